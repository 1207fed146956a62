"""Old names of classes and settings in configs, and their current names.

Old runs and checkpoints still work: their saved configs and commands are translated to the current names. On a command
line or in a user's own file an old setting is an error, which names the new one.
"""

import copy
import re
from typing import Any

# Old and current setting.
SETTINGS = {
    "objective.views": "objective.masks_per_sample",
    "objective.targets.tap": "objective.targets.target_layer",
}

# Old and current module below `data2vec_train`.
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


# Old and current class, with its current module.
_CLASSES = {
    "encoders.waveform.AudioEncoder": "encoders.waveform.WaveformEncoder",
}


def current(target: str) -> str:
    """The current dotted path of a class; `target` may be the path in an earlier version."""
    if not target.startswith("data2vec_train."):
        return target
    module, _, name = target.removeprefix("data2vec_train.").rpartition(".")
    path = f"{_MODULES.get(module, module)}.{name}".lstrip(".")
    return f"data2vec_train.{_CLASSES.get(path, path)}"


def with_current_names(tree: Any) -> Any:
    """A config of dicts and lists with the current name in every `_target_`."""
    if isinstance(tree, dict):
        return {
            key: current(value) if key == "_target_" and isinstance(value, str) else with_current_names(value)
            for key, value in tree.items()
        }
    return [with_current_names(value) for value in tree] if isinstance(tree, list) else tree


def with_current_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The whole config of a run with the current name of every `_target_` and setting."""
    config = copy.deepcopy(with_current_names(config))
    for old, new in SETTINGS.items():
        above, name = _node_of(config, old)
        below, new_name = _node_of(config, new)
        if above is not None and below is not None and name in above:
            below.setdefault(new_name, above.pop(name))
    return config


def _node_of(config: dict[str, Any], path: str) -> tuple[dict[str, Any] | None, str]:
    """The mapping that contains a setting, or None; and the setting's own name."""
    *parents, name = path.split(".")
    node: Any = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    return (node if isinstance(node, dict) else None), name


def with_current_setting(override: str) -> str:
    """An override of a saved command with the current name of its setting."""
    plus, key, rest = re.fullmatch(r"([+~]*)([^=]*)(.*)", override, re.DOTALL).groups()
    for old, new in SETTINGS.items():
        rest = rest.replace(f"${{{old}}}", f"${{{new}}}")
    return f"{plus}{SETTINGS.get(key, key)}{rest}"
