"""Rules of the command line, which no type can say: names, choices of groups, the trainer, files and this machine.

What settings have to be for the code to work stands in `constraints`, which constructors use too. Each rule here is
silent when a setting it needs is absent or of another type. Nothing heavy is imported: names that other modules hold
are read from their source.
"""

import codecs
import difflib
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data2vec_train.config.check.schema import class_attribute, did_you_mean, find, keys_of, mismatch, show, signature
from data2vec_train.encoders import backends
from data2vec_train.paths import text_of_recipe
from data2vec_train.system import constraints, launch

Rule = Callable[[DictConfig], Iterable[str]]  # sentences that begin with the setting at fault and a colon

MODALITIES = ("audio", "sound", "text", "vision")
_TRAINER = "lightning.pytorch.Trainer"

RULES: list[Rule] = []
MACHINE_RULES: list[Rule] = []  # looked at when a command is about to run, not when it is only read


def rule(*paths: str, of_machine: bool = False) -> Callable[[Callable], Callable]:
    """Registers a rule.

    With paths, it is called with the settings there, if they are of the types of its parameters, and its sentence is
    about the first of them. Without, it is called with the whole config, and gives one sentence that names the
    setting, or several.
    """

    def register(function: Callable) -> Callable:
        ask = functools.partial(_ask, function, paths) if paths else functools.partial(_ask_all, function)
        (MACHINE_RULES if of_machine else RULES).append(ask)
        return function

    return register


def _ask(function: Callable[..., str | None], paths: tuple[str, ...], cfg: DictConfig) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    values = [_get(cfg, path, parameter.annotation) for path, parameter in zip(paths, parameters, strict=True)]
    said = None if None in values else function(*values)
    return [f"{paths[0]}: {said}"] if said else []


def _ask_all(function: Callable[[DictConfig], str | Iterable[str] | None], cfg: DictConfig) -> list[str]:
    said = function(cfg)
    return [said] if isinstance(said, str) else list(said or ())


def _get(cfg: DictConfig, path: str, kind: object = int, default: object = None) -> object:
    """A setting that has this type, and is not true or false unless asked for."""
    try:
        value = OmegaConf.select(cfg, path)
    except OmegaConfBaseException:
        return default
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    is_bool = isinstance(value, bool) and kind is not bool
    return value if value is not None and isinstance(value, kind) and not is_bool else default


def _name(cfg: DictConfig, path: str) -> str:
    """The class that a node names, without its module."""
    return str(_get(cfg, f"{path}._target_", str)).rpartition(".")[2]


def plans_only(cfg: DictConfig) -> bool:
    """Whether the command plans a run for other hardware: neither its data nor its devices need be here."""
    return "hardware" in cfg


def _choices(cfg: DictConfig) -> dict:
    """Group -> what was chosen; empty where hydra's own part is missing."""
    return _get(cfg, "hydra.runtime.choices", dict, {})


def _recipes(cfg: DictConfig) -> dict[str, str]:
    """The recipes that were chosen, and their text."""
    chosen = _choices(cfg).get("recipes")
    return {str(name): text_of_recipe(str(name)) for name in (chosen if isinstance(chosen, list) else [chosen])}


# ---------------------------------------------------------------------------------------------------------------------
# Constraints on settings of several places

# Name in the constraint -> where the setting stands; what stands in one place is found by itself.
TOGETHER = (
    {
        "top_k_layers": "objective.targets.top_k_layers",
        "depth": "size.depth",
        "prenet_depth": "modality.encoder.prenet_depth",
    },
    {"image_px": "modality.image_px", "patch_px": "modality.encoder.patch_px"},
    {"mask_token": "modality.encoder.mask_token", "mask_mode": "objective.mask_mode"},
)


@rule()
def _settings_of_an_encoder_that_is_not_built(cfg: DictConfig) -> list[str]:
    chosen = _choices(cfg).get("encoder")
    if chosen in (None, "builtin"):
        return []
    typed = _get(cfg, "hydra.overrides.task", list, [])
    # encoder.mask_token refers to that of the modality, which the objective decides.
    return [
        f"{line}: encoder={chosen} is another encoder, which does not read modality.encoder; see encoder in "
        f"configs/encoder/{chosen}.yaml"
        for line in typed
        if line.lstrip("+").startswith("modality.encoder.") and "mask_token" not in line
    ]


@rule()
def _parts_suit_the_mask_mode(cfg: DictConfig) -> str | None:
    labels = {"mask_mode": "objective.mask_mode", "masker": "modality.masker", "decoder": "objective.decoder"}
    mode = _get(cfg, "objective.mask_mode", str)
    for part, fact, module in (("masker", "constant_count", "masking"), ("decoder", "restores_dropped", "decoders")):
        name = _name(cfg, labels[part])
        known = class_attribute(find(str(_get(cfg, f"{labels[part]}._target_", str))), fact)
        if known is None:  # a class that has the name of one of ours is taken to be like it
            known = class_attribute(find(f"data2vec_train.objective.{module}.{name}"), fact)
        settings = {part: name, fact: known, "mask_mode": mode}
        if broken := _sentences(settings, labels):
            return broken[0]
    return None


def _sentences(settings: Mapping[str, object], labels: Mapping[str, str]) -> list[str]:
    return [constraints.named(sentence, labels) for sentence in constraints.unrelated(settings)]


# ---------------------------------------------------------------------------------------------------------------------
# Single settings

_PRECISIONS = ("auto", "32-true", "32-tf32", "bf16-mixed", "16-mixed", "fp8-mixed")  # see `training.precision`
_NAMES: dict[str, Callable[[], Iterable[str]]] = {
    "weights": lambda: ("student", "teacher"),
    "format": lambda: ("hf", "timm", "safetensors", "onnx", "torch_export"),
    "pooling": lambda: ("mean", "mean_std", "none"),
    "dtype": lambda: ("float32", "float16"),
    "modality.pages": lambda: ("first", "channels"),
    "compile": lambda: ("true", "false", "auto", "graphs"),
    "probes": lambda: keys_of("data2vec_train.probe.run", "NAMES"),
    "precision.trainer": lambda: _PRECISIONS,
    "strategy.accelerator": lambda: ("auto", "cpu", "gpu", "cuda", "mps"),
    "callbacks.monitor.progress": lambda: constraints.PROGRESS,
    "modality.encoder.activation": lambda: keys_of("data2vec_train.encoders.layers", "ACTIVATIONS"),
    "attention.backend": lambda: (*backends.NAMES, "auto"),
    "what": lambda: ("all", *keys_of("data2vec_train.benchmark.run", "MEASURES")),
    "against": lambda: ("all", *keys_of("data2vec_train.benchmark.peers", "PEERS")),
    "modalities": lambda: ("all", "audio", "text", "vision"),
    "step.objectives": lambda: ("data2vec", "data2vec2"),
    "encoder.modes": lambda: ("inference", "training"),
    "step.beside": lambda: ("fp32", "eager"),
    "backends.names": lambda: backends.NAMES,
    "backends.bias": lambda: ("none", "relative", "linear"),
}


def expected(path: str) -> str | None:
    """What a single setting has to be; None when nothing is said about it."""
    if path in _NAMES:
        return f"one of {', '.join(_NAMES[path]())}"
    allowed = constraints.range_of(path)
    return allowed.expected if allowed else None


def has_names(path: str) -> bool:
    """Whether a setting is one of a few names, whatever its default is."""
    return path in _NAMES


@rule()
def _names_are_known(cfg: DictConfig) -> Iterator[str]:
    for path, names in _NAMES.items():
        value, known = _get(cfg, path, str | int | float | list), list(names())
        given = value if isinstance(value, list) else [value]
        wrong = [name for name in given if name is not None and str(name) not in known]
        if wrong:
            near = did_you_mean(str(wrong[0]), known).rstrip(".")
            yield f"{path}: expected one of {', '.join(known)}, got {show(wrong[0])}{near}"


@rule()
def _there_is_something_to_measure(cfg: DictConfig) -> Iterator[str]:
    for path in ("what", "modalities", "step.objectives", "encoder.modes", "encoder.batch_sizes", "loader.workers"):
        if _get(cfg, path, list) == []:
            yield f"{path}: nothing is left to measure; name at least one"


@rule("backends.shapes")
def _attention_has_four_sizes(shapes: list) -> str | None:
    for shape in shapes:
        sizes = shape if isinstance(shape, list) else [shape]
        if len(sizes) != 4 or any(type(size) is not int or size < 1 for size in sizes):
            return f"expected [[rows,heads,length,width of a head],...], got {show(shape)}"
    return None


@rule("seed_table.inference_px", "seed_table.patch_px")
def _measured_images_have_patches(side: int, patch: int) -> str | None:
    if side <= 0 or patch <= 0 or side % patch == 0:
        return None
    return f"{side} pixels cannot be cut into patches of {patch} (seed_table.patch_px)"


@rule("seed_table.training_px", "seed_table.patch_px")
def _training_images_have_patches(sides: list, patch: int) -> str | None:
    if any(type(side) is not int for side in sides) or (len(sides) == 2 and min(sides) >= patch):
        return None
    return f"expected [height,width], neither below seed_table.patch_px, got {show(sides)}"


@rule()
def _seed_is_a_whole_number(cfg: DictConfig) -> str | None:
    seed = _written(cfg, "seed", 0)
    if type(seed) is int and 0 <= seed < 2**32:  # what numpy takes
        return None
    if type(seed) is int:
        return f"seed: expected a whole number from 0 to {2**32 - 1}, got {seed}"
    return f"seed: expected a whole number, got {show(seed)}; for several runs write -m seed=0,1"


@rule()
def _cache_is_a_path(cfg: DictConfig) -> str | None:
    folder = _written(cfg, "cache_dir", "")
    return None if isinstance(folder, str) else f"cache_dir: expected a path, got {show(folder)}"


def _written(cfg: DictConfig, name: str, otherwise: object) -> object:
    """A setting of the top level as it is, null too; `otherwise` when it is absent or cannot be read."""
    if name not in list(cfg) or OmegaConf.is_missing(cfg, name):
        return otherwise
    try:
        value = cfg[name]
    except OmegaConfBaseException:
        return otherwise
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


@rule("modality.encodings")
def _encodings_exist(names: list) -> str | None:
    for name in names:
        try:
            codecs.lookup(str(name))
        except LookupError:
            return f"there is no encoding called {show(name)}; utf-8, cp1252 and shift_jis are some"
    return None


@rule("data.num_workers")
def _workers_are_countable(workers: str | float) -> str | None:
    return None if workers == "auto" else f"expected a whole number or auto, got {show(workers)}"


@rule("layers")
def _layers_are_numbers(layers: str | float | list) -> str | None:
    numbers = isinstance(layers, list) and layers and all(type(layer) is int for layer in layers)
    if numbers or layers in ("last", "all"):
        return None
    return f"expected last, all, or numbers such as [0,6,12], got {show(layers)}"


@rule("head.remove")
def _removal_is_a_pattern(pattern: str) -> str | None:
    return _pattern_fault(pattern)


@rule("data.group_pattern")
def _groups_are_one_pattern(pattern: str) -> str | None:
    if (fault := _pattern_fault(pattern)) or re.compile(pattern).groups <= 1:
        return fault
    return (
        f"{show(pattern)} has {re.compile(pattern).groups} groups, expected one, or none for the whole match; "
        "write (?:...) for the others"
    )


def _pattern_fault(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"{show(pattern)} is no regular expression ({error})"
    return None


@rule()
def _groups_are_told_once(cfg: DictConfig) -> str | None:
    column, pattern = (_get(cfg, f"data.group_{name}", str) for name in ("column", "pattern"))
    if column and pattern:
        return f"data.group_column: {column}, and data.group_pattern is set too; give one of them"
    if (column or pattern) and _name(cfg, "data.source") == "HFStreamingSource":
        return f"data.group_{'column' if column else 'pattern'}: of a stream nothing is held out; read with data=hf"
    return None


@rule("modality.name")
def _modality_has_a_plain_name(name: object) -> str | None:
    """The run directory is named after it."""
    if isinstance(name, str) and re.fullmatch(r"\w[\w-]*", name):
        return None
    return f"expected letters, digits and dashes, got {show(name)}"


# ---------------------------------------------------------------------------------------------------------------------
# Data, objective and schedule


@rule("modality.visible_block_patches", "modality.patch_px", "modality.image_px", "objective")
def _a_visible_block_fits_the_image(block: int, patch: int, image: int | list, _objective: dict) -> str | None:
    sides = image if isinstance(image, list) else [image, image]
    if patch < 1 or len(sides) != 2 or not all(isinstance(side, int) and side >= patch for side in sides):
        return None
    rows, columns = (side // patch for side in sides)
    if block < max(rows, columns):
        return None
    return (
        f"a square of {block} patches covers the whole image, which has {rows} x {columns}; choose at most "
        f"{max(1, min(rows, columns) - 1)}"
    )


@rule()
def _a_batch_has_a_size(cfg: DictConfig) -> str | None:
    """Null is for modalities whose batches have a budget instead."""
    if _get(cfg, "data.source", dict) is None or "batching" not in (cfg.get("modality") or {}):
        return None
    size = OmegaConf.select(cfg, "data.batch_size_per_device", default=0)
    if size is not None or _get(cfg, "modality.batching", dict) is not None:
        return None
    return "data.batch_size_per_device: expected a whole number of at least 1, got null"


@rule()
def _corruption_and_mask_mode_agree(cfg: DictConfig) -> str | None:
    mode, corruption = _get(cfg, "objective.mask_mode", str), _get(cfg, "modality.corruption._target_", str)
    if mode == "corrupt" and corruption is None:
        return (
            "objective.mask_mode: corrupt needs modality.corruption, which says what hidden tokens become; choose "
            "objective=data2vec with modality=text, or another mask mode"
        )
    if mode in ("replace", "drop") and corruption is not None:
        return f"modality.corruption: objective.mask_mode={mode} hides tokens in the encoder; set it to null"
    if mode == "replace" and _get(cfg, "modality.name", str) == "text" and _get(cfg, "modality.encoder", dict):
        return (
            "objective.mask_mode: replace is for images and speech, the text encoder has no mask token; choose corrupt "
            "with objective=data2vec, or drop with objective=data2vec2"
        )
    return None


@rule("scheduler.warmup_steps", "trainer.max_steps")
def _warm_up_ends_in_time(warmup: int | float, steps: int) -> str | None:
    if steps < 1 or warmup <= steps:
        return None
    return f"{warmup} is more than trainer.max_steps={steps}; lower it or train longer"


@rule("scheduler.hold_steps", "scheduler.warmup_steps", "trainer.max_steps")
def _hold_ends_in_time(hold: int, warmup: int | float, steps: int) -> str | None:
    if steps < 1 or warmup > steps or warmup + hold <= steps:
        return None
    return f"{hold}, with scheduler.warmup_steps={warmup} more than trainer.max_steps={steps}; lower it or train longer"


# ---------------------------------------------------------------------------------------------------------------------
# Groups and commands


@rule()
def choices_suit_the_modality(cfg: DictConfig) -> str | None:
    """A choice that belongs to another modality than the one that was chosen."""
    choices = _choices(cfg)
    modality = choices.get("modality")
    if modality not in MODALITIES:
        return None
    for group in ("preset", "sample", "pieces", "supervised"):  # whose choices are named after a modality
        words = re.split(r"[_/]", str(choices.get(group)))
        other = next((word for word in words if word in MODALITIES and word != modality), None)
        if other is not None:
            return f"{group}={choices[group]}: is for modality={other}, and this is modality={modality}"
    for recipe, text in _recipes(cfg).items():
        other = re.search(r"override /modality: *(\w+)", text)
        if other and other[1] != modality:
            return f"recipes={recipe}: is for modality={other[1]}, and this is modality={modality}; leave modality out"
    name = _get(cfg, "modality.name", str)
    return None if name in (modality, None) else f"modality.name: expected {modality}, which was chosen, got {name}"


@rule()
def _head_suits_the_modality(cfg: DictConfig) -> str | None:
    target, modality = str(_get(cfg, "head._target_", str)), _get(cfg, "modality.name", str)
    *_, module, head = ["", *target.split(".")]
    wanted = {"speech": "audio", "text": "text", "vision": "vision"}.get(module)
    if wanted is None or modality in (None, wanted):
        return None
    if modality not in MODALITIES and head == "UtteranceClassification":  # serves the modalities of plugins
        return None
    return f"head: {head} is for modality={wanted}, and this is modality={modality}"


@rule()
def _data_suits_the_command(cfg: DictConfig) -> str | None:
    data = _get(cfg, "data", dict, {})
    if "objective" in cfg or "source" not in data:
        return None
    if not isinstance(data["source"], dict):
        return "data: the embedded samples are for pretraining; choose data=folder or data=hf, and data.path"
    if _name(cfg, "data.source") == "HFStreamingSource":
        return (
            "data: a stream is only for pretraining, everything else looks at the data more than once; choose data=hf"
        )
    return None


# Primary config -> group -> choices that other commands have and this one refuses, by the rules above and below.
_ONLY_PRETRAINING = {"data": ("sample", "stream", "objects")}
_NO_HEAD = {"modality": ("sound",)}
REFUSED_CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {"callbacks": ("finetune",), "data": ("objects",)},
    "plan": {"callbacks": ("finetune",), "data": ("objects",)},
    "finetune": {"callbacks": ("default",), **_ONLY_PRETRAINING, **_NO_HEAD},
    "probe": _ONLY_PRETRAINING,
    "embed": _ONLY_PRETRAINING,
    "predict": {**_ONLY_PRETRAINING, **_NO_HEAD},
}


@rule()
def _callbacks_suit_the_command(cfg: DictConfig) -> str | None:
    callbacks = _get(cfg, "callbacks", dict)
    if not callbacks or ("evaluation" in callbacks) == ("head" in cfg):
        return None
    return f"callbacks: these are for another command; choose callbacks={'finetune' if 'head' in cfg else 'default'}"


# Of Lightning's trainer: what a run reads; what may be said because it is so anyway; and of the rest, why not.
_READ = ("max_steps", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "log_every_n_steps")
_READ += ("overfit_batches", "deterministic", "benchmark", "detect_anomaly", "enable_model_summary")
_READ += ("accelerator", "devices", "num_nodes", "strategy", "precision", "logger", "callbacks")  # without groups
_CONSTANT = {"enable_progress_bar": False, "use_distributed_sampler": False}
_CONSTANT |= {"num_sanity_val_steps": 0, "limit_val_batches": 0, "limit_test_batches": 0, "limit_predict_batches": 0}
_CONSTANT |= dict.fromkeys(("max_time", "fast_dev_run", "limit_train_batches", "max_epochs", "min_epochs"), False)
# What else Lightning knows to end a run, or an epoch, is not what our checkpoints and loaders rest on.
_WHY_NOT = {
    "max_time": "the run would count as finished; stop it with SIGTERM, which saves it, and give the command again",
    "fast_dev_run": "a run of a step would count as finished; choose debug=smoke",
    "limit_train_batches": "the same batches would come again and again; set trainer.max_steps",
    "max_epochs": "samples come without end, and no epoch is over; set trainer.max_steps",
    "min_epochs": "samples come without end, and no epoch is over; set trainer.max_steps",
    "profiler": "has no effect in these runs; choose debug=profile",
    "enable_progress_bar": "has no effect in these runs; choose callbacks.monitor.progress=bar",
    "default_root_dir": "has no effect in these runs; write hydra.run.dir=DIR",
    "enable_checkpointing": "has no effect in these runs; see callbacks.checkpoint",
    "min_steps": "has no effect in these runs; set trainer.max_steps",
}


@rule()
def _trainer_settings_are_read(cfg: DictConfig) -> Iterator[str]:
    """The groups strategy, precision, logger and callbacks win over what the trainer says, and the rest is unread."""
    elsewhere = {name: name for name in ("precision", "logger", "callbacks") if name in cfg}
    elsewhere |= {name: f"strategy.{name}" for name in _get(cfg, "strategy", dict, {})}
    takes = signature(find(_TRAINER)).parameters
    for name, value in _get(cfg, "trainer", dict, {}).items():
        if name in elsewhere:
            yield f"trainer.{name}: is set by {elsewhere[name]}; change that instead"
        elif name in takes and name not in _READ and value is not None and _CONSTANT.get(name) != value:
            yield f"trainer.{name}: {_WHY_NOT.get(name, 'has no effect in these runs; leave it out')}"


@rule()
def _loggers_can_be_made(cfg: DictConfig) -> Iterator[str]:
    for name, node in _get(cfg, "logger", dict, {}).items():
        if not isinstance(node, dict) or "_target_" not in node or node.get("_partial_") is not True:
            wanted = "the settings of a logger, with _target_ and _partial_: true"
            yield f"logger.{name}: expected {wanted}, got {show(node)}"


@rule(of_machine=True)
def _logger_is_installed(cfg: DictConfig) -> Iterator[str]:
    for name, node in _get(cfg, "logger", dict, {}).items():
        target = str(node.get("_target_") if isinstance(node, dict) else "").lower().replace("_", "")
        package = next((package for package in ("wandb", "tensorboard") if f"{package}logger" in target), None)
        if package and (absent := constraints.missing(package, package)):
            yield f"logger={name}: {absent}"


# ---------------------------------------------------------------------------------------------------------------------
# Devices


@rule()
def _devices_are_countable(cfg: DictConfig) -> Iterator[str]:
    for group in ("strategy", "trainer"):
        devices = _get(cfg, f"{group}.devices", object)
        count = type(devices) is int and (devices > 0 or devices == -1)
        listed = (
            isinstance(devices, list) and devices and all(type(number) is int and number >= 0 for number in devices)
        )
        written = isinstance(devices, str) and re.fullmatch(r"auto|\d+(,\d+)*", devices)
        if devices is not None and not (count or listed or written):
            yield f"{group}.devices: expected a count, a list such as [0,1], or auto, got {show(devices)}"


@rule("strategy.strategy")
def _strategy_exists(name: str) -> str | None:
    """Lightning's own strategies lack what these models need: checkpoints, weights that rest, shared teachers."""
    group = next((group for group in ("ddp", "fsdp") if name.startswith(group)), None)
    if group is not None:
        return f"{name} would be Lightning's own; write strategy={group}"
    return f"there is no strategy {show(name)}; auto, ddp (strategy=ddp) and fsdp (strategy=fsdp) are" * (
        name != "auto"
    )


@rule()
def _strategy_is_what_the_trainer_takes(cfg: DictConfig) -> str | None:
    takes = signature(find(_TRAINER)).parameters
    for name, value in _get(cfg, "strategy", dict, {}).items():
        if name not in takes:
            return f"strategy.{name}: Trainer has no setting called '{name}'{did_you_mean(name, takes)}"
        wanted = mismatch(value, takes[name])
        if wanted and name != "devices":
            return f"strategy.{name}: expected {wanted}, got {show(value)}"
    return None


def may_have_a_gpu() -> bool:
    """False when this machine surely has none that torch could use: asking torch would take seconds."""
    if sys.platform != "linux":
        return True
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(Path("/dev", name).exists() for name in ("nvidiactl", "nvidia0", "kfd", "dxg", "nvhost-gpu"))


@rule("device")
def _device_exists(device: str | int) -> str | None:
    if re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", str(device)):
        return None
    hint = "; did you mean cuda?" if str(device).startswith(("gpu", "cud")) else ""
    return f"expected auto, cpu, cuda, cuda:1 or mps, got {show(str(device))}{hint}"


def _is_on_cpu(cfg: DictConfig) -> bool:
    accelerator = _get(cfg, "strategy.accelerator", str)
    return accelerator == "cpu" or (accelerator == "auto" and not may_have_a_gpu())


@rule(of_machine=True)
def _gpu_is_there(cfg: DictConfig) -> str | None:
    for path in ("device", "strategy.accelerator"):
        value = _get(cfg, path, str, "")
        if value.startswith(("cuda", "gpu")) and not may_have_a_gpu():
            return f"{path}: {value}, and this machine has no GPU; choose auto or cpu"
        if value == "mps" and sys.platform != "darwin":
            return f"{path}: mps is of Apple's computers; choose auto or cpu"
    if _get(cfg, "compile", str) == "graphs" and _is_on_cpu(cfg):
        return "compile: graphs needs a GPU, and this run is on the CPU; choose compile=false or compile=true"
    return None


@rule(of_machine=True)
def _precision_can(cfg: DictConfig) -> Iterator[str]:
    precision = _get(cfg, "precision.trainer", str)
    if precision == "fp8-mixed" and "objective" not in cfg:
        yield "precision.trainer: fp8-mixed is for pretraining; choose precision=auto or precision=bf16"
    settings = {"precision": precision, "device": "cpu" if _is_on_cpu(cfg) else "cuda"}
    yield from _sentences(settings, {"precision": "precision.trainer"})


@rule(of_machine=True)
def _attention_can(cfg: DictConfig) -> str | None:
    backend = _get(cfg, "attention.backend", str)
    encoder = _get(cfg, "modality.encoder", dict)
    if backend not in backends.NAMES or encoder is None:
        return None
    accelerator = _get(cfg, "strategy.accelerator", str)
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and may_have_a_gpu())
    precision = str(_get(cfg, "precision.trainer", str))
    low = "float16" if precision.startswith("16") else "bfloat16"
    dim, heads = _get(cfg, "modality.encoder.dim"), _get(cfg, "modality.encoder.num_heads")
    biases = [_get(cfg, f"modality.encoder.{name}", str) for name in ("relative_bias", "alibi")]
    rate = _get(cfg, "modality.encoder.attention_dropout", int | float)
    case = backends.Case(
        device="cuda" if on_gpu else "cpu",
        dtype="float32" if precision.startswith("32") or not on_gpu else low,
        head_dim=dim // heads if dim and heads else None,
        bias=any(bias not in (None, "none") for bias in biases),
        padding=_get(cfg, "modality.batching", object) is not None,
        per_query=False,
        dropout=bool(rate),
    )
    reason = backends.refusal(backend, case)
    if reason is None:
        return None
    return f"attention={backend}: {reason}; choose one of {', '.join(backends.able(case))}, auto"


def _all_devices(cfg: DictConfig) -> int:
    """Of a run, on all nodes; 1 where that cannot be told."""
    started, nodes = launch.started_processes(), _get(cfg, "strategy.num_nodes") or 1
    if started is not None and not plans_only(cfg):
        return started[1]
    planned = _get(cfg, "hardware.devices") or 1
    is_open = _get(cfg, "strategy.devices", int | str) in ("auto", "-1", -1)
    return (planned if plans_only(cfg) and is_open else _device_count(cfg) or 1) * nodes


_BATCH = ("trainer.accumulate_grad_batches", "data.batch_size_per_device", "modality.batch_seconds")
_BATCH += ("modality.batch_size_per_device",)


@rule()
def _published_batch_is_of_one_device(cfg: DictConfig) -> str | None:
    """A recipe makes its batch on one device; on many it would be as many times larger, with the same learning rate."""
    recipes = _choices(cfg).get("recipes")
    text = "\n".join(_recipes(cfg).values())
    has_batch = re.search(r"accumulate_grad_batches:|batch_size_per_device:|batch_seconds:", text)
    is_for_many = re.search(r"(?m)^\s+devices:", text)
    devices = _all_devices(cfg) if has_batch and not is_for_many else 1
    said = {line.partition("=")[0].lstrip("+") for line in _get(cfg, "hydra.overrides.task", list, [])}
    if devices == 1 or said & set(_BATCH):
        return None
    micro, size = _get(cfg, "trainer.accumulate_grad_batches") or 1, _get(cfg, "data.batch_size_per_device")
    if micro % devices == 0:
        instead = f"trainer.accumulate_grad_batches={micro // devices} keeps it"
    elif size is not None and size * micro % devices == 0:
        instead = f"trainer.accumulate_grad_batches=1 data.batch_size_per_device={size * micro // devices} keeps it"
    else:
        instead = "say trainer.accumulate_grad_batches and data.batch_size_per_device yourself"
    return (
        f"trainer.accumulate_grad_batches: recipes={recipes} makes its batch on one device, in {micro} "
        f"micro-batch{'es' * (micro != 1)}, and on {devices} devices it would be {devices} times as large; {instead}"
    )


def _device_count(cfg: DictConfig) -> int | None:
    """Devices on each node; None when it cannot be told without asking torch, or nothing is said."""
    devices = _get(cfg, "strategy.devices", int | str | list)
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([number for number in devices.split(",") if number])
    if devices not in (None, "auto", "-1", -1):
        return int(devices) if str(devices).isdigit() else None
    if devices is None or _get(cfg, "strategy.accelerator", str) == "cpu" or not may_have_a_gpu():
        return None if devices is None else 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return len(visible.split(",")) if visible else len(list(Path("/dev").glob("nvidia[0-9]*"))) or None


def _is_sweep(cfg: DictConfig) -> bool:
    return str(_get(cfg, "hydra.mode", object)).endswith("MULTIRUN")


@rule(of_machine=True)
def _many_devices_have_a_strategy(cfg: DictConfig) -> str | None:
    nodes, count = _get(cfg, "strategy.num_nodes") or 1, _device_count(cfg)
    if _get(cfg, "strategy.strategy", str) != "auto" or count is None or count * nodes == 1:
        return None
    return f"strategy.devices: {count * nodes} devices need strategy=ddp or strategy=fsdp; or set strategy.devices=1"


@rule(of_machine=True)
def _sweep_can_start_its_processes(cfg: DictConfig) -> str | None:
    if not _is_sweep(cfg) or _name(cfg, "hydra.launcher") == "SlurmLauncher":
        return None
    nodes, started = _get(cfg, "strategy.num_nodes") or 1, launch.started_processes()
    if launch.by_torchrun() or (started is not None and started[1] > 1):
        program = "torchrun" if launch.by_torchrun() else "srun"
        return (
            f"-m: under {program} every process would run the whole sweep; start {program} once for each member, "
            "without -m, or let hydra/launcher=slurm start them all"
        )
    count = (_device_count(cfg) or 1) * nodes
    if count == 1:
        return None
    return (
        f"strategy.devices: {count} devices need {count} processes, and each of them would run the whole sweep; write "
        f"hydra/launcher=slurm on a cluster, or start torchrun --nproc-per-node {count} once for each member, without "
        "-m. A sweep on one device works as it is: strategy.devices=1"
    )


@rule(of_machine=True)
def _processes_match_the_devices(cfg: DictConfig) -> str | None:
    if _is_sweep(cfg):
        return None  # its members are started elsewhere
    nodes, count, started = _get(cfg, "strategy.num_nodes") or 1, _device_count(cfg), launch.started_processes()
    if count is None:
        return None
    if started is None:
        if nodes == 1:
            return None
        return (
            f"strategy.num_nodes: {nodes}, and no process is started on another node from here; start torchrun on each "
            "node, or write srun before the command"
        )
    local, total = started
    if (count, count * nodes) == (local, total):
        return None
    program, there = "torchrun" if launch.by_torchrun() else "srun", total // local
    return (
        f"strategy.devices: {program} started {local} processes on each of {there} nodes, and the command says "
        f"{count} devices on each of {nodes}; write strategy.devices={local} strategy.num_nodes={there}"
        f"{' strategy=ddp' if _get(cfg, 'strategy.strategy', str) == 'auto' and total > 1 else ''}"
    )


@rule(of_machine=True)
def _nodes_share_a_directory(cfg: DictConfig) -> str | None:
    where = OmegaConf.to_container(cfg.hydra.run, resolve=False).get("dir") if "hydra" in cfg else None
    if launch.has_a_common_name() or "${launch:" not in str(where):
        return None
    return (
        "hydra.run.dir: torchrun runs on several nodes, and each would choose its own; write hydra.run.dir=DIR, the "
        "same for all nodes and on a disk that all of them see"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files


@rule()
def weights_can_be_read(cfg: DictConfig) -> str | None:
    """What is wrong with the place of the weights, or None."""
    for name in ("checkpoint", "init_from"):
        found = OmegaConf.select(cfg, name, throw_on_missing=False)
        if isinstance(found, str) and "://" in found:
            return f"{name}: {found} is an address; weights are only read from this machine: download them first"
        if isinstance(found, str) and not Path(found).expanduser().exists():
            return f"{name}: there is no file or folder {found}"
    return None


@rule()
def _out_is_free(cfg: DictConfig) -> str | None:
    out = OmegaConf.select(cfg, "out", throw_on_missing=False)
    if out is None or out == "???":
        return None
    if not isinstance(out, str):
        return f"out: expected a path, got {show(out)}"
    path = Path(out).expanduser()
    if "format" in cfg:  # a folder to make
        is_free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
        return None if is_free else f"out: {out} is not an empty folder; choose another, or remove it"
    if path.exists():
        return f"out: {out} exists already; choose another name, or remove it"
    wanted = ".parquet" if "pooling" in cfg else ".jsonl"
    if path.suffix == wanted or ("pooling" not in cfg and not path.suffix):
        return None
    return f"out: expected a file that ends in {wanted}, got {out}; write out={path.with_suffix(wanted)}"


@rule(of_machine=True)
def _data_is_there(cfg: DictConfig) -> str | None:
    source = _name(cfg, "data.source")
    for setting in ("data", "data.test_source"):
        value = _get(cfg, f"{setting}.path", str | list)
        paths = value if isinstance(value, list) else [value]
        for path in paths if value is not None else []:
            fault = _path_fault(source, str(path))
            if fault:
                return f"{setting}.path: {fault}"
        if value == []:
            return f"{setting}.path: expected a folder, or a list of folders, got an empty list"
    metadata = _get(cfg, "data.metadata", str)
    if metadata not in (None, "auto") and not Path(metadata).expanduser().is_file():
        return f"data.metadata: there is no file {metadata}{_near_path(Path(metadata).expanduser())}"
    return None


@rule(of_machine=True)
def _objects_are_handed_over(cfg: DictConfig) -> str | None:
    # A Python call has loaded this module; only loading tells, as it takes seconds.
    if _name(cfg, "data.source") != "handed_over" or "data2vec_train.data.sources.objects" in sys.modules:
        return None
    return "data: objects are for Python calls (data2vec_train.pretrain(data=[...])); choose data=folder or data=hf"


@rule(of_machine=True)
def _manifest_is_of_recordings(cfg: DictConfig) -> str | None:
    modality = _get(cfg, "modality.name", str)
    if _name(cfg, "data.source") != "ManifestSource" or modality not in ("text", "vision"):
        return None
    return f"data: a manifest lists recordings, and this is modality={modality}; choose data=folder or data=hf"


def _path_fault(source: str, text: str) -> str | None:
    path = Path(text).expanduser()
    if source in ("FolderSource", "ManifestSource"):
        what = "folder" if source == "FolderSource" else "file"
        if "://" in text:
            return f"{text} is an address, expected a {what} on this machine; download it first, or choose data=hf"
        if not path.exists():
            return f"there is no {what} {text}{_near_path(path)}"
        if source == "FolderSource" and path.is_file():
            return f"{text} is a file, expected a folder; a data set in one file needs data=hf"
        if source == "ManifestSource" and path.is_dir():
            return f"{text} is a folder, expected a manifest (.tsv); for a folder choose data=folder"
    if source in ("HFSource", "HFStreamingSource"):
        if "://" in text:
            return f"{text} is an address; for files on the web write data.path=parquet data.data_files='{text}'"
        is_local = text.startswith(("/", "./", "../", "~"))
        if is_local and not path.exists() and not re.search(r"[*?\[]", text):
            return f"there is no file or folder {text}{_near_path(path)}"
    return None


def _near_path(path: Path) -> str:
    if not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.R_OK):
        return ""
    with os.scandir(path.absolute().parent) as entries:
        names = [entry.name for _, entry in zip(range(2000), entries, strict=False)]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


@rule("data.num_workers", of_machine=True)
def _workers_fit(workers: int) -> str | None:
    cores = os.cpu_count() or 1
    if workers <= 32 * cores:
        return None
    return f"{workers} processes on {cores} cores; choose auto, or about as many as cores"


@rule(of_machine=True)
def _out_has_a_folder(cfg: DictConfig) -> str | None:
    out = _get(cfg, "out", str)
    parent = Path(out).expanduser().absolute().parent if out and out != "???" else None
    if parent is None or "format" in cfg or parent.is_dir():
        return None
    return f"out: there is no folder {parent}"


def _unwritable(folder: str) -> str | None:
    path = Path(folder).expanduser().absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir():
        return f"{there} is a file, expected a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{folder} cannot be written, {there} does not belong to you; choose another folder"
    return None


WRITING_RULES: list[Rule] = [
    functools.partial(_ask, _unwritable, (name,)) for name in ("hydra.run.dir", "hydra.sweep.dir")
]
MACHINE_RULES += [functools.partial(_ask, _unwritable, ("cache_dir",)), *WRITING_RULES]
