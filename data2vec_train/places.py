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
    """Makes four functions available in configs.

    `${share:0.1,${trainer.max_steps}}`: that share of a whole number, at least 1 unless it is 0.
    `${product:60,16000}`: the product, rounded to a whole number.
    `${sample:FILE}`: path of a data set inside the package.
    `${vocabulary:PATH,TRAIN_VOCAB_SIZE,NAME}`: a fact about a tokenizer, see `tokenizer_facts`.
    """
    OmegaConf.register_new_resolver("share", _share, replace=True)
    OmegaConf.register_new_resolver("product", lambda a, b: round(a * b), replace=True)
    OmegaConf.register_new_resolver("sample", lambda file: str(_HERE / "samples" / file), replace=True)
    OmegaConf.register_new_resolver("vocabulary", _vocabulary, replace=True)


def _share(fraction: float, total: int) -> int:
    return max(1, round(fraction * total)) if fraction > 0 else 0


def _vocabulary(path: str | None, train_vocab_size: int | None, name: str) -> int:
    from data2vec_train.data.tokenizer import tokenizer_facts

    try:
        return tokenizer_facts(path, train_vocab_size)[name]
    except ConfigError as error:
        raise ConfigError(f"modality.tokenizer: {error}") from error
