"""Self-supervised pretraining of image, speech and text encoders with data2vec 1.0 and 2.0."""

import importlib

__version__ = "0.1.0"

# Looked up on first use, so that `import data2vec_train` does not load torch.
_HOMES = {
    "Batch": "data2vec_train.encoders.base",
    "Data2Vec": "data2vec_train.data2vec",
    "Data2VecModule": "data2vec_train.module",
    "EMATeacher": "data2vec_train.teacher",
    "EncoderOutput": "data2vec_train.encoders.base",
    "ModalityEncoder": "data2vec_train.encoders.base",
    "TargetBuilder": "data2vec_train.targets",
    "build": "data2vec_train.config",
}

__all__ = [  # noqa: F822 - found by __getattr__
    "Batch",
    "Data2Vec",
    "Data2VecModule",
    "EMATeacher",
    "EncoderOutput",
    "ModalityEncoder",
    "TargetBuilder",
    "build",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
