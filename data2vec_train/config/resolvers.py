"""What the text of a config may refer to besides its own settings."""

import os
import re

from omegaconf import OmegaConf

from data2vec_train.errors import ConfigError
from data2vec_train.paths import SAMPLES
from data2vec_train.system import launch


def register_resolvers() -> None:
    """Makes eight functions available in configs.

    `${share:0.1,${trainer.max_steps}}`: that share of a whole number, at least 1 unless it is 0.
    `${product:60,16000}`: the product, rounded to a whole number.
    `${sample:FILE}`: path of a data set inside the package.
    `${vocabulary:PATH,TRAIN_VOCAB_SIZE,NAME}`: a fact about a tokenizer, see `tokenizer_facts`.
    `${wrapped:LIBRARY,NAME,FACT}`: a fact about another library's model, see `facts` in `wrapped`.
    `${launch:}`: a name that the processes of a run have in common, see `launch.name`.
    `${first_process:VALUE,OTHER}`: VALUE in the first process of a run, OTHER in the others.
    `${oc.env:NAME,DEFAULT}`: an environment variable, as always, but no password.
    """
    OmegaConf.register_new_resolver("oc.env", _environment, replace=True)
    OmegaConf.register_new_resolver("share", _share, replace=True)
    OmegaConf.register_new_resolver("product", lambda a, b: round(a * b), replace=True)
    OmegaConf.register_new_resolver("sample", lambda file: str(SAMPLES / file), replace=True)
    OmegaConf.register_new_resolver("vocabulary", _vocabulary, replace=True)
    OmegaConf.register_new_resolver("wrapped", _wrapped, replace=True)
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


def _wrapped(library: str, name: str, fact: str) -> object:
    from data2vec_train.wrapped import hf, timm

    return {"timm": timm.facts, "hf": hf.facts}[library](name)[fact]


# Here as well: a member of a sweep on a cluster is unpickled, and its config resolved, before anything of ours runs.
register_resolvers()
