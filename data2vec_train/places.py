"""Where the configuration files lie, and what their text may refer to."""

import os
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data2vec_train import launch
from data2vec_train.errors import ConfigError, disk_fault

COMMAND = ".command.yaml"  # of a run directory: the overrides that the run has
HEAL = "put back a copy of it, or give the run's own command with resume=changed, which writes it again"
MAX_YAML_BYTES = 500_000  # of what a run directory holds; ours have some ten thousand

_HERE = Path(__file__).resolve().parent


def config_directory() -> Path:
    """The directory with `train.yaml`: inside the package in a wheel, beside it in a checkout."""
    return _inside_or_beside("configs")


def recipes_parent() -> Path:
    """The directory that contains `recipes/`, so that `recipes/vision/x` is found below it."""
    return _inside_or_beside("recipes").parent


def _inside_or_beside(name: str) -> Path:
    for parent in (_HERE, _HERE.parent):
        if (parent / name).is_dir():
            return parent / name
    raise ConfigError(f"there is no directory {name} in {_HERE} or {_HERE.parent}; install data2vec_train again")


def read_yaml(file: Path) -> Any:
    """The plain content of a YAML file of a run directory, interpolations as they stand.

    Raises:
        ConfigError: it is damaged.
    """
    size = file.stat().st_size
    if size > MAX_YAML_BYTES:
        raise ConfigError(f"{file} is damaged: it has {size} bytes; {HEAL}")
    try:
        # References can stand for any number of values, and no run writes them.
        events = yaml.parse(file.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
        if any(isinstance(event, yaml.AliasEvent) for event in events):
            raise ConfigError(f"{file} is damaged: it has references; {HEAL}")
        return OmegaConf.to_container(OmegaConf.load(file))
    except ConfigError:
        raise
    except (ValueError, OSError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        if disk_fault(error):
            raise
        raise ConfigError(f"{file} is damaged ({type(error).__name__}); {HEAL}") from error


def expose_recipes() -> None:
    """Sets DATA2VEC_RECIPES, which `hydra.searchpath` of the primary config reads, unless the user has set it."""
    if not os.environ.get("DATA2VEC_RECIPES"):
        os.environ["DATA2VEC_RECIPES"] = str(recipes_parent())


def text_of_recipe(name: str) -> str:
    """What is written in `recipes/NAME.yaml`; nothing when there is no such recipe."""
    file = Path(os.environ.get("DATA2VEC_RECIPES") or recipes_parent(), "recipes", f"{name}.yaml")
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def stay_off_the_network() -> None:
    """Turns off what libraries send or fetch unasked; what the user sets in the environment stays.

    `datasets` counts the loading of local files on its makers' server, and hub requests carry usage data.
    """
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")


def register_resolvers() -> None:
    """Makes seven functions available in configs.

    `${share:0.1,${trainer.max_steps}}`: that share of a whole number, at least 1 unless it is 0.
    `${product:60,16000}`: the product, rounded to a whole number.
    `${sample:FILE}`: path of a data set inside the package.
    `${vocabulary:PATH,TRAIN_VOCAB_SIZE,NAME}`: a fact about a tokenizer, see `tokenizer_facts`.
    `${launch:}`: a name that the processes of a run have in common, see `launch.name`.
    `${first_process:VALUE,OTHER}`: VALUE in the first process of a run, OTHER in the others.
    `${oc.env:NAME,DEFAULT}`: an environment variable, as always, but no password.
    """
    OmegaConf.register_new_resolver("oc.env", _environment, replace=True)
    OmegaConf.register_new_resolver("share", _share, replace=True)
    OmegaConf.register_new_resolver("product", lambda a, b: round(a * b), replace=True)
    OmegaConf.register_new_resolver("sample", lambda file: str(_HERE / "samples" / file), replace=True)
    OmegaConf.register_new_resolver("vocabulary", _vocabulary, replace=True)
    OmegaConf.register_new_resolver("launch", launch.name, replace=True)
    OmegaConf.register_new_resolver("first_process", lambda a, b: a if launch.rank() == 0 else b, replace=True)


_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|PRIVATE|API_?KEY|ACCESS_?KEY|COOKIE|(^|_)KEY(_|$)", re.IGNORECASE)
_NOTHING = object()


def _environment(name: str, default: object = _NOTHING) -> object:
    if _SECRET.search(str(name)):
        # Settings are written into config.yaml and into every checkpoint, which people share.
        raise ConfigError(f"a config may not read the environment variable {name}: runs keep their settings for all")
    if name in os.environ:
        return os.environ[name]
    if default is _NOTHING:
        raise ConfigError(f"the environment variable {name} is not set; set it, or write ${{oc.env:{name},DEFAULT}}")
    return default if default is None else str(default)


def _share(fraction: float, total: int) -> int:
    return max(1, round(fraction * total)) if fraction > 0 else 0


def _vocabulary(path: str | None, train_vocab_size: int | None, name: str) -> int:
    from data2vec_train.data.tokenizer import tokenizer_facts

    try:
        return tokenizer_facts(path, train_vocab_size)[name]
    except ConfigError as error:
        raise ConfigError(f"modality.tokenizer: {error}") from error


# Here as well: a member of a sweep on a cluster is unpickled, and its config resolved, before anything of ours runs.
register_resolvers()
