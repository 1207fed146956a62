"""Where the configuration files lie, and what their text may refer to."""

import os
from pathlib import Path

from omegaconf import OmegaConf

from data2vec_train.errors import ConfigError

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


def expose_recipes() -> None:
    """Sets DATA2VEC_RECIPES, which `hydra.searchpath` of the primary config reads, unless the user has set it."""
    if not os.environ.get("DATA2VEC_RECIPES"):
        os.environ["DATA2VEC_RECIPES"] = str(recipes_parent())


def register_resolvers() -> None:
    """Makes `${share:0.1,${trainer.max_steps}}` available: that share of a whole number, at least 1 unless it is 0."""
    OmegaConf.register_new_resolver("share", _share, replace=True)


def _share(fraction: float, total: int) -> int:
    return max(1, round(fraction * total)) if fraction > 0 else 0
