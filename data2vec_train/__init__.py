"""Self-supervised pretraining of image, speech and text encoders with data2vec 1.0 and 2.0."""

import importlib
import os
import sys
import time
from typing import TYPE_CHECKING

if sys.argv[0] == "-m" and not sys.flags.safe_path:
    # `python -m data2vec_train` puts the working directory first in `sys.path`. A data folder may contain a file with
    # the name of a library: neither this process nor its children may import it.
    sys.path.pop(0)
    if os.path.dirname(__path__[0]) == os.getcwd():  # a checkout that is not installed is searched last
        sys.path.append(os.getcwd())
    else:
        os.environ["PYTHONSAFEPATH"] = "1"

STARTED = time.perf_counter()  # approximate start of the process; see `training.callbacks.timing`
__version__ = "0.1.0"

# Imported on first use, so that `import data2vec_train` does not load torch.
_HOMES = {
    "Run": "data2vec_train.api",
    "parts": "data2vec_train.api",
    "Batch": "data2vec_train.batch",
    "ConfigError": "data2vec_train.errors",
    "DataError": "data2vec_train.errors",
    "Data2Vec": "data2vec_train.objective.data2vec",
    "Data2VecModule": "data2vec_train.training.module",
    "DataModule": "data2vec_train.data.datamodule",
    "EMATeacher": "data2vec_train.objective.teacher",
    "EncoderOutput": "data2vec_train.encoders.base",
    "ModalityEncoder": "data2vec_train.encoders.base",
    "TargetBuilder": "data2vec_train.objective.targets",
    "build": "data2vec_train.config.build",
    "load_pretrained": "data2vec_train.weights.convert",
    "save_pretrained": "data2vec_train.weights.convert",
    # The classes and configs of Hugging Face's Data2Vec page
    "Data2VecAudioConfig": "data2vec_train.weights.configs",
    "Data2VecAudioForAudioFrameClassification": "data2vec_train.weights.audio",
    "Data2VecAudioForCTC": "data2vec_train.weights.audio",
    "Data2VecAudioForSequenceClassification": "data2vec_train.weights.audio",
    "Data2VecAudioForXVector": "data2vec_train.weights.audio",
    "Data2VecAudioModel": "data2vec_train.weights.audio",
    "Data2VecTextConfig": "data2vec_train.weights.configs",
    "Data2VecTextForCausalLM": "data2vec_train.weights.text",
    "Data2VecTextForMaskedLM": "data2vec_train.weights.text",
    "Data2VecTextForMultipleChoice": "data2vec_train.weights.text",
    "Data2VecTextForQuestionAnswering": "data2vec_train.weights.text",
    "Data2VecTextForSequenceClassification": "data2vec_train.weights.text",
    "Data2VecTextForTokenClassification": "data2vec_train.weights.text",
    "Data2VecTextModel": "data2vec_train.weights.text",
    "Data2VecVisionConfig": "data2vec_train.weights.configs",
    "Data2VecVisionForImageClassification": "data2vec_train.weights.vision",
    "Data2VecVisionForSemanticSegmentation": "data2vec_train.weights.vision",
    "Data2VecVisionModel": "data2vec_train.weights.vision",
}

# Folders that can be called, see `data2vec_train.system.verbs`.
_VERBS = ("pretrain", "finetune", "probe", "embed", "predict", "export")

__all__ = [*_VERBS, *_HOMES]

if TYPE_CHECKING:
    from data2vec_train.api import embed as embed
    from data2vec_train.api import export as export
    from data2vec_train.api import finetune as finetune
    from data2vec_train.api import predict as predict
    from data2vec_train.api import pretrain as pretrain
    from data2vec_train.api import probe as probe


def __getattr__(name: str) -> object:
    if name in _VERBS:
        return importlib.import_module(f"data2vec_train.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
