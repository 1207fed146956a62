"""Where the configuration files lie, and what their text may refer to."""

import os
from pathlib import Path

from data2vec_train.errors import ConfigError

_HERE = Path(__file__).resolve().parent
SAMPLES = _HERE / "samples"


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
