"""Classes that configs name, and where they were in earlier versions: old runs, checkpoints and recipes still work."""

from typing import Any

# Module below `data2vec_train`, then and now.
_MODULES = {
    "data.sources": "data.sources.files",
    "data.sources_hf": "data.sources.hf",
    "data.vision": "data.image",
    "data2vec": "objective.data2vec",
    "decoders": "objective.decoders",
    "encoders.audio": "encoders.waveform",
    "finetuning.module": "finetune.module",
    "finetuning.speech": "finetune.speech",
    "finetuning.text": "finetune.text",
    "finetuning.transcribe": "finetune.transcribe",
    "finetuning.vision": "finetune.vision",
    "hf.preprocessing": "weights.preprocessing",
    "layers.attention": "encoders.attention",
    "layers.backends": "encoders.backends",
    "layers.misc": "encoders.layers",
    "layers.positions": "encoders.positions",
    "masking": "objective.masking",
    "monitor": "training.callbacks.monitor",
    "optim": "training.optim",
    "parallel": "training.distributed",
    "pictures.audio": "report.pictures.audio",
    "pictures.text": "report.pictures.text",
    "pictures.vision": "report.pictures.vision",
    "probes.callback": "training.callbacks.probe",
    "probes.raw": "features.raw",
    "saving": "training.callbacks.checkpointing",
    "targets": "objective.targets",
    "teacher": "objective.teacher",
}


def current(target: str) -> str:
    """The dotted path of a class today, for what an earlier version may have called it."""
    module, _, name = target.removeprefix("data2vec_train.").rpartition(".")
    is_ours = target.startswith("data2vec_train.") and module in _MODULES
    return f"data2vec_train.{_MODULES[module]}.{name}" if is_ours else target


def with_current_names(tree: Any) -> Any:
    """A config of dicts and lists in which every `_target_` has the name of today."""
    if isinstance(tree, dict):
        return {
            key: current(value) if key == "_target_" and isinstance(value, str) else with_current_names(value)
            for key, value in tree.items()
        }
    return [with_current_names(value) for value in tree] if isinstance(tree, list) else tree
