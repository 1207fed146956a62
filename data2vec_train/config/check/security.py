"""What a config may do: a file of settings can come from anybody, and must not be able to do more than set things.

Only the command line says where something is written and what Hydra itself does. A file of configs, a recipe and the
command that a run directory keeps set the rest, and call only the classes that are listed here; `hydra.searchpath`
imports nothing that the user has not named. Nothing is imported here to find out.
"""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from data2vec_train.config.check.schema import did_you_mean, file_of, find, public_names, show
from data2vec_train.system.plugins import plugin_packages

# What `_target_` may name: modules without anything that writes, loads or downloads, and of other modules single names.
OURS = (
    *("encoders", "wrapped", "heads", "finetune.speech", "finetune.text", "finetune.vision", "finetune.transcribe"),
    *(f"objective.{name}" for name in ("data2vec", "decoders", "masking", "targets", "teacher")),
    *("features.raw", "finetune.module.Evaluation", "report.pictures", "pretrain.sweep.SweepTable"),
    *(f"data.audio.{name}" for name in ("AudioTransform", "decode_audio", "prepare_audio")),
    *(f"data.image.{name}" for name in ("ImageTransform", "decode_image")),
    *(f"data.text.{name}" for name in ("TokenTransform", "decode_text", "decode_tokens", "prepare_text")),
    "data.sampler.LengthBatching",
    *(f"data.sources.files.{name}" for name in ("ArraySource", "FolderSource", "ManifestSource")),
    *(f"data.sources.hf.{name}" for name in ("HFSource", "HFStreamingSource")),
    "data.sources.objects.handed_over",
    *(f"data.spectrogram.{name}" for name in ("SpectrogramTransform", "prepare_spectrograms")),
    *(f"weights.preprocessing.{name}" for name in ("AudioFeatureExtractor", "ImageProcessor")),
    "weights.sound.SpectrogramExtractor",
    "training.optim",
    *(f"training.distributed.{name}" for name in ("ReplicatedStrategy", "ShardedStrategy")),
    *(f"training.callbacks.checkpointing.{name}" for name in ("Checkpointing", "FiniteSteps")),
    *(f"training.callbacks.monitor.{name}" for name in ("Monitor", "tensorboard_logger", "wandb_logger")),
    "training.callbacks.probe.ProbeCallback",
)
LIBRARIES = (
    *("lightning.Trainer", "lightning.pytorch.Trainer", "lightning.pytorch.trainer.Trainer"),
    *("torch.optim", "torchvision.transforms"),
    # Callbacks that write nothing; ModelCheckpoint and its like take a folder.
    *(f"lightning.pytorch.callbacks.{name}" for name in ("EarlyStopping", "LearningRateMonitor", "DeviceStatsMonitor")),
    "lightning.pytorch.callbacks.Timer",
)
_DEFINED_IN = ("lightning.", "torch.optim.", "torchvision.transforms.")

# Arguments that the program gives, most of them places in the run directory.
SUPPLIED = {
    "data2vec_train.training.callbacks.checkpointing.Checkpointing": ("directory", "config"),
    "data2vec_train.training.callbacks.checkpointing.FiniteSteps": ("path", "checkpointing"),
    "data2vec_train.training.callbacks.monitor.tensorboard_logger": ("save_dir", "step"),
    "data2vec_train.training.callbacks.monitor.wandb_logger": ("save_dir", "step"),
}

ONLY_TYPED = "only the command line may say this, and a file of configs does; add it to the command, if you mean it"
_DEFAULT_PLACES = (None, "???", "${cache_dir}", "${data.cache_dir}")
_DEFAULT_PLACES += ("${oc.env:DATA2VEC_CACHE,'~/.cache/data2vec_train'}",)

_LEVELS = ("NOTSET", "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
# Hydra's part that is filled in when a command starts, is only printed, or is looked at by `search_path_faults`.
_FREE_OF_HYDRA = ("runtime", "overrides", "searchpath", "help", "hydra_help", "verbose")
_FREE_OF_JOB = ("id", "num", "config_name", "override_dirname")
# Of a launcher a file may say how much a job gets: these are numbers, or plain names of the cluster.
_RESOURCES = ("nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "mem_gb", "timeout_min", "array_parallelism")
_RESOURCES += ("partition", "qos", "account", "constraint", "gres")
_PLAIN = r"[A-Za-z0-9][A-Za-z0-9_.:,-]*"


def target_fault(target: object) -> str | None:
    """Why a config may not, or cannot, call `target`; None when it may."""
    if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", target, re.ASCII):
        return f"expected the dotted path of a class, got {show(target)}"
    module, _, name = target.rpartition(".")
    top = target.split(".")[0]
    if not _is_allowed(target) or any(part.startswith("_") for part in target.split(".")):
        listed = ", ".join(["data2vec_train", *LIBRARIES, *sorted(plugin_packages)])
        return (
            f"'{target}' may not be called from a config; allowed are public classes in {listed} "
            "and in the modules that DATA2VEC_PLUGINS names"
        )
    if file_of(module) is None:
        return f"there is no module {module}."
    found = find(target)
    if found is None:
        return f"there is no '{name}' in {module}{did_you_mean(name, public_names(module))}"
    # An import can lead anywhere (`torchvision.io.os.system`), so the definition has to be in an allowed place as well.
    ours = top in {"data2vec_train", *plugin_packages}
    kinds = ("ClassDef", "FunctionDef") if ours else ("ClassDef",)
    home = f"{found.module}.{getattr(found.node, 'name', '')}"
    is_home = _is_allowed(home) if ours else f"{found.module}.".startswith(_DEFINED_IN)
    if type(found.node).__name__ not in kinds or not is_home:
        return f"'{target}' is not a {' or '.join(kinds)} of {top}"
    return None


def _is_allowed(dotted: str) -> bool:
    places = (*(f"data2vec_train.{name}" for name in OURS), *LIBRARIES, *plugin_packages)
    return any(f"{dotted}.".startswith(f"{place}.") for place in places)


def search_path_faults(entries: object) -> list[str]:
    """What is wrong with `hydra.searchpath`: folders are only read, packages are imported."""
    faults = []
    for entry in entries if isinstance(entries, list) else []:
        scheme, _, rest = str(entry).rpartition("://")
        top = re.split(r"[./]", rest)[0]
        if scheme == "pkg" and top not in ("hydra", "hydra_plugins", "data2vec_train", *plugin_packages):
            faults.append(
                f"hydra.searchpath: {entry} would be imported; give its folder as file://DIR, or name it in "
                "DATA2VEC_PLUGINS"
            )
        elif scheme not in ("", "file", "pkg"):
            faults.append(f"hydra.searchpath: expected file://DIR or pkg://PACKAGE, got {entry}")
    return faults


def hydra_faults(part: dict, own: Sequence[dict]) -> dict[str, str]:
    """Dotted path -> sentence for what hydra's own part of a config holds and may not.

    Args:
        part: references not filled in.
        own: what the program's own configs and the command line make of it, any of which is right.
    """
    faults: dict[str, str] = {}
    for group, now in part.items():
        if group in _FREE_OF_HYDRA:
            continue
        differing = _differing(now, [tree[group] for tree in own if group in tree], f"hydra.{group}")
        foreign = [path for path, value in differing if not _is_harmless(path, value)]
        if foreign and group in ("job_logging", "hydra_logging"):
            faults[foreign[0]] = f"{foreign[0]}: of logging only levels can be set, each one of {', '.join(_LEVELS)}"
        elif foreign:
            faults[foreign[0]] = f"{foreign[0]}: {ONLY_TYPED}"
    return faults


def _differing(now: object, own: list[object], path: str) -> Iterator[tuple[str, object]]:
    """(dotted path, value) of what is in `now` and in none of `own`; what is missing does no harm."""
    if isinstance(now, dict) and (trees := [tree for tree in own if isinstance(tree, dict)]):
        for key, value in now.items():
            yield from _differing(value, [tree[key] for tree in trees if key in tree], f"{path}.{key}")
    elif not any(type(known) is type(now) and known == now for known in own):
        yield path, now


def _is_harmless(path: str, value: object) -> bool:
    group, last = path.split(".")[1], path.rpartition(".")[2]
    if group in ("job_logging", "hydra_logging"):
        below = dict(nodes_of(value, path)) if ".loggers" in path else {}
        levels = {key: level for key, level in below.items() if not isinstance(level, dict)} or {path: value}
        return all(key.endswith(".level") and level in _LEVELS for key, level in levels.items())
    if group == "job":
        return last in _FREE_OF_JOB
    return group == "launcher" and is_resource(last, value)


def is_resource(name: str, value: object) -> bool:
    """Whether it only says how much a job of a launcher gets, or where on the cluster."""
    is_plain = type(value) is int or (isinstance(value, str) and re.fullmatch(_PLAIN, value) is not None)
    return name in _RESOURCES and is_plain


def place_faults(tree: dict, typed: Collection[str]) -> dict[str, str]:
    """Dotted path -> sentence for places to write that a file of configs names; references not filled in.

    Args:
        tree: the config without hydra's own part.
        typed: settings that the command line names.
    """
    return {
        path: f"{path}: {ONLY_TYPED}"
        for path, value in nodes_of(tree)
        if (path == "out" or path.rpartition(".")[2] == "cache_dir")
        and value not in _DEFAULT_PLACES
        and not any(path == name or path.startswith(f"{name}.") for name in typed)
    }


def saved_faults(overrides: list[object], typed: Collection[str], file: Path) -> list[str]:
    """What is wrong with the command that a run directory keeps: it can come from anybody, as a file of configs can.

    Args:
        overrides: what the file holds.
        typed: settings that the command line names itself, which count then.
        file: for the message.
    """
    faults = []
    for line in overrides:
        key, sign, value = str(line).partition("=")
        name = key.strip("+~ ")
        if not isinstance(line, str) or not (sign or key.startswith("~")):
            faults.append(f"{file}: expected settings such as seed=0, got {show(line)}")
        elif name not in typed and not _may_be_saved(name, value):
            faults.append(f"{name}: {file} says {value}, and only the command line may; add {line} if you mean it")
    return faults


def _may_be_saved(name: str, value: str) -> bool:
    if name.startswith("hydra.launcher."):
        return is_resource(name.rpartition(".")[2], int(value) if value.isdecimal() else value)
    return re.match(r"hydra(\.|$)", name) is None and name not in ("resume", "out") and not name.endswith("cache_dir")


def links_out(directory: Path) -> Path | None:
    """The first link below a directory that leads out of it: what is written there would be written elsewhere."""
    home = directory.resolve()
    paths = (Path(folder, name) for folder, below, files in os.walk(home) for name in (*below, *files))
    return next((path for path in paths if path.is_symlink() and not path.resolve().is_relative_to(home)), None)


def called_hydra_faults(part: dict) -> dict[str, str]:
    """What hydra's own part of a config may not call or change, the command line included; references filled in."""
    faults: dict[str, str] = {}
    for path, value in nodes_of(part, "hydra"):
        if path.endswith("._target_") and not _is_plugin_of_hydra(value, path):
            faults |= {path: f"{path}: {fault}"} if (fault := target_fault(value)) else {}
    for name in (part.get("job") or {}).get("env_set") or {}:
        path = f"hydra.job.env_set.{name}"
        faults[path] = f"{path}: a config does not change the environment; write {name}=VALUE before the command"
    return faults


def _is_plugin_of_hydra(target: object, path: str) -> bool:
    """Hydra itself accepts only its registered plugins as launcher and sweeper; its callbacks only write."""
    places = (
        (r"hydra\.(launcher|sweeper)\._target_", r"(hydra\._internal\.core_plugins|hydra_plugins)\.[\w.]+"),
        (r"hydra\.callbacks\.\w+\._target_", r"hydra\.experimental\.callbacks\.\w+"),
        (r"hydra\.sweeper\.sampler\._target_", r"optuna\.samplers\.\w+"),
    )
    return any(re.fullmatch(where, path) and re.fullmatch(what, str(target)) for where, what in places)


def nodes_of(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    """(dotted path, value) of everything in a tree of dicts and lists."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        here = f"{path}.{key}" if path else str(key)
        yield here, value
        yield from nodes_of(value, here)
