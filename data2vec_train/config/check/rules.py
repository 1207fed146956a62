"""Rules for single settings and between settings, which no type can say: sizes, shares, what divides what.

Each rule takes a composed config and gives a sentence, or None; it is silent when a setting it needs is absent or of
another type. Nothing heavy is imported: names that other modules hold are read from their source.
"""

import codecs
import difflib
import functools
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data2vec_train.config.check.schema import did_you_mean, find, keys_of, mismatch, show, signature
from data2vec_train.encoders import backends
from data2vec_train.paths import text_of_recipe
from data2vec_train.system import launch

Rule = Callable[[DictConfig], str | None]

MODALITIES = ("audio", "sound", "text", "vision")
_FREE_GROUPS = ("preset", "sample", "pieces", "supervised")  # whose choices are named after a modality
_TRAINER = "lightning.pytorch.Trainer"


def _get(cfg: DictConfig, path: str, kind: type | tuple[type, ...] = int) -> object:
    """A setting that has this type, else None; whole numbers unless told otherwise."""
    try:
        value = OmegaConf.select(cfg, path)
    except OmegaConfBaseException:
        return None
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return value if isinstance(value, kind) and not isinstance(value, bool) else None


def _name(cfg: DictConfig, path: str) -> str:
    """The class that a node names, without its module."""
    return str(_get(cfg, f"{path}._target_", str)).rpartition(".")[2]


def _written(cfg: DictConfig, name: str) -> tuple[bool, object]:
    """Whether a setting of the top level is there and can be read, and its value."""
    if name not in list(cfg) or OmegaConf.is_missing(cfg, name):
        return False, None
    try:
        value = cfg[name]
    except OmegaConfBaseException:
        return False, None
    return True, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def plans_only(cfg: DictConfig) -> bool:
    """Whether the command plans a run for other hardware: neither its data nor its devices need be here."""
    return "hardware" in cfg


def _choices(cfg: DictConfig) -> dict[str, str]:
    """Group -> what was chosen; empty where hydra's own part is missing."""
    return _get(cfg, "hydra.runtime.choices", dict) or {}


# ---------------------------------------------------------------------------------------------------------------------
# Single settings


def _range(expected: str, is_right: Callable[[float], bool], paths: str) -> list[Rule]:
    """A rule for each path, for a number or for every number of a list."""
    return [functools.partial(_in_range, path, expected=expected, is_right=is_right) for path in paths.split()]


def _in_range(path: str, cfg: DictConfig, *, expected: str, is_right: Callable[[float], bool]) -> str | None:
    value = _get(cfg, path, (int, float, list, str))
    numbers = value if isinstance(value, list) else [] if value in (None, "auto") else [value]
    is_wrong = any(isinstance(one, str) or (isinstance(one, (int, float)) and not is_right(one)) for one in numbers)
    return f"{path}: expected {expected}, got {show(value)}" if is_wrong else None


def _whole(value: float) -> bool:
    return math.isfinite(value) and value == int(value)


_DROPPED = ("dropout", "attention_dropout", "activation_dropout", "input_dropout", "layer_drop", "drop_path")
_RANGES = [
    *_range(
        "a whole number of at least 1",
        lambda value: _whole(value) and value >= 1,
        """
        trainer.max_steps trainer.log_every_n_steps trainer.accumulate_grad_batches
        data.batch_size_per_device data.max_probe_samples data.shuffle_buffer data.train_samples
        objective.masks_per_sample size.depth size.dim size.ffn_dim size.conv_dim
        modality.patch_px modality.channels modality.visible_block_patches modality.batch_size_per_device
        modality.block_tokens modality.min_tokens modality.sample_rate_hz modality.mel_bins modality.patch
        modality.encoder.conv_kernel modality.encoder.conv_stride modality.encoder.position_kernel
        modality.encoder.position_groups
        callbacks.probe.every_n_steps callbacks.probe.neighbours callbacks.probe.rank_samples
        callbacks.evaluation.every_n_steps callbacks.checkpoint.every_n_steps
        callbacks.monitor.data_wait_rows data.prefetch_factor
        neighbours attentive.epochs attentive.num_heads rows_per_part num_heads
        head.vector_dim head.tdnn_dim head.max_answer_tokens head.masks.time_span head.max_tokens
        rounds threads peak.side peak.repeats step.batch_size step.image_px step.text_tokens encoder.batch_sizes
        encoder.image_px encoder.patch_px encoder.text_tokens loader.batches loader.samples ema.image_px ema.patch_px
        strategy.num_nodes
        startup.packages seed_table.patch_px seed_table.training_px seed_table.training_batch seed_table.inference_px
        seed_table.inference_batches
        hardware.devices
        """,
    ),
    *_range(
        "a whole number of at least 0",
        lambda value: _whole(value) and value >= 0,
        """
        scheduler.warmup_steps scheduler.hold_steps objective.tau_anneal_steps data.tolerated_bad_samples
        data.num_workers modality.encoder.position_depth callbacks.monitor.grace_steps
        modality.augment.shift_px freeze.encoder_steps head.continue_tokens head.stride warmups loader.workers
        """,
    ),
    *_range(
        "a number above 0",
        lambda value: value > 0 and value < math.inf,
        """
        optimizer.lr optimizer.eps modality.encoder.norm_eps modality.std modality.max_seconds modality.batch_seconds
        modality.max_value modality.window_ms modality.frames_per_second
        attentive.lr head.max_seconds modality.decode.max_pixels tolerance step.loss_tolerance step.audio_seconds
        stop_seconds encoder.audio_seconds window_seconds stride_seconds startup.timeout_s peak.stated_tflops
        hardware.memory_gib hardware.bandwidth_gb_s hardware.tflops.bf16 hardware.tflops.fp16 hardware.tflops.tf32
        hardware.tflops.fp32
        """,
    ),
    *_range(
        "a number above 0",
        lambda value: value > 0,
        "modality.segment_seconds layer_decay.rate scheduler.final_factor",
    ),
    *_range(
        "a number of at least 0",
        lambda value: 0 <= value < math.inf,
        """
        optimizer.weight_decay trainer.gradient_clip_val modality.min_seconds objective.loss_beta attentive.weight_decay
        l2 callbacks.probe.l2 head.mixup head.cutmix head.init_scale modality.encoder.embed_gradient scheduler.min_lr
        scheduler.end_lr scheduler.start_lr min_seconds callbacks.monitor.min_target_std reserve.fragmentation
        callbacks.monitor.min_prediction_std callbacks.monitor.min_feature_ratio callbacks.monitor.min_rank_ratio
        reserve.workspace_gib reserve.context_gib
        """,
    ),
    *_range(
        "a number from 0 to 1",
        lambda value: 0 <= value <= 1,
        """
        objective.tau_start objective.tau_end data.max_bad_fraction data.held_out_fraction layer_decay.rate
        modality.augment.horizontal_flip modality.augment.erase head.horizontal_flip head.mix_probability
        head.masks.channel_span callbacks.monitor.max_data_wait
        """,
    ),
    *_range(
        "a number from 0 to below 1",
        lambda value: 0 <= value < 1,
        """
        optimizer.betas modality.batching.max_waste head.label_smoothing head.masks.time_fraction
        head.masks.channel_fraction
        """
        + " ".join(f"{group}.{name}" for group in ("modality.encoder", "rates") for name in _DROPPED)
        + " rates.head_dropout",
    ),
    *_range("a number above 0, at most 1", lambda value: 0 < value <= 1, "utilisation"),
    *_range(
        "a number between 0 and 1",
        lambda value: 0 < value < 1,
        "modality.masker.hidden_fraction modality.corruption.hidden_fraction head.hidden_fraction",
    ),
]


def _one_of(path: str, cfg: DictConfig, *, names: Callable[[], Iterable[str]]) -> str | None:
    value = _get(cfg, path, (str, int, float, list))
    known = list(names())
    given = value if isinstance(value, list) else [value]
    wrong = [one for one in given if one is not None and str(one) not in known]
    if not wrong:
        return None
    near = difflib.get_close_matches(str(wrong[0]), known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{path}: expected one of {', '.join(known)}, got {show(wrong[0])}{hint}"


_PRECISIONS = ("auto", "32-true", "32-tf32", "bf16-mixed", "16-mixed", "fp8-mixed")  # see `runtime`
_NAMES: dict[str, Callable[[], Iterable[str]]] = {
    "weights": lambda: ("student", "teacher"),
    "format": lambda: ("hf", "safetensors", "onnx", "torch_export"),
    "pooling": lambda: ("mean", "mean_std", "none"),
    "dtype": lambda: ("float32", "float16"),
    "modality.pages": lambda: ("first", "channels"),
    "compile": lambda: ("true", "false", "auto", "graphs"),
    "probes": lambda: keys_of("data2vec_train.probe.run", "NAMES"),
    "precision.trainer": lambda: _PRECISIONS,
    "strategy.accelerator": lambda: ("auto", "cpu", "gpu", "cuda", "mps"),
    "callbacks.monitor.progress": lambda: ("auto", "bar", "lines", "none"),
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


def _there_is_something_to_measure(cfg: DictConfig) -> str | None:
    for path in ("what", "modalities", "step.objectives", "encoder.modes", "encoder.batch_sizes", "loader.workers"):
        if _get(cfg, path, list) == []:
            return f"{path}: nothing is left to measure; name at least one"
    return None


def _attention_has_four_sizes(cfg: DictConfig) -> str | None:
    for shape in _get(cfg, "backends.shapes", list) or []:
        sizes = shape if isinstance(shape, list) else [shape]
        if len(sizes) != 4 or any(type(one) is not int or one < 1 for one in sizes):
            return f"backends.shapes: expected [[rows,heads,length,width of a head],...], got {show(shape)}"
    return None


def _measured_images_have_patches(cfg: DictConfig) -> str | None:
    for group, sides in (("encoder", "image_px"), ("ema", "image_px"), ("seed_table", "inference_px")):
        side, patch = _get(cfg, f"{group}.{sides}"), _get(cfg, f"{group}.patch_px")
        if side and patch and side > 0 and patch > 0 and side % patch:
            return f"{group}.{sides}: {side} pixels cannot be cut into patches of {patch} ({group}.patch_px)"
    pixels, patch = _get(cfg, "seed_table.training_px", list), _get(cfg, "seed_table.patch_px")
    numbers = pixels is None or all(type(one) is int for one in pixels)
    if pixels is None or not numbers or (len(pixels) == 2 and min(pixels) >= (patch or 1)):
        return None
    return f"seed_table.training_px: expected [height,width], neither below seed_table.patch_px, got {show(pixels)}"


def expected(path: str) -> str | None:
    """What the rules for single settings say that a value is; None when they say nothing."""
    if path in _NAMES:
        return f"one of {', '.join(_NAMES[path]())}"
    return next((rule.keywords["expected"] for rule in reversed(_RANGES) if rule.args[0] == path), None)


def has_names(path: str) -> bool:
    """Whether a setting is one of a few names, whatever its default is."""
    return path in _NAMES


def _seed_is_a_whole_number(cfg: DictConfig) -> str | None:
    is_there, seed = _written(cfg, "seed")
    if not is_there or (type(seed) is int and 0 <= seed < 2**32):  # what numpy takes
        return None
    if type(seed) is int:
        return f"seed: expected a whole number from 0 to {2**32 - 1}, got {seed}"
    return f"seed: expected a whole number, got {show(seed)}; for several runs write -m seed=0,1"


def _encodings_exist(cfg: DictConfig) -> str | None:
    for name in _get(cfg, "modality.encodings", list) or []:
        try:
            codecs.lookup(str(name))
        except LookupError:
            return f"modality.encodings: there is no encoding called {show(name)}; utf-8, cp1252 and shift_jis are some"
    return None


def _workers_are_countable(cfg: DictConfig) -> str | None:
    workers = _get(cfg, "data.num_workers", (str, float))
    if workers in (None, "auto"):
        return None
    return f"data.num_workers: expected a whole number or auto, got {show(workers)}"


def _layers_are_numbers(cfg: DictConfig) -> str | None:
    layers = _get(cfg, "layers", (str, float, list))
    numbers = isinstance(layers, list) and layers and all(type(one) is int for one in layers)
    if layers is None or numbers or layers in ("last", "all"):
        return None
    return f"layers: expected last, all, or numbers such as [0,6,12], got {show(layers)}"


def _cache_is_a_path(cfg: DictConfig) -> str | None:
    is_there, folder = _written(cfg, "cache_dir")
    return f"cache_dir: expected a path, got {show(folder)}" if is_there and not isinstance(folder, str) else None


def _removal_is_a_pattern(cfg: DictConfig) -> str | None:
    pattern = _get(cfg, "head.remove", str)
    try:
        re.compile(pattern or "")
    except re.error as error:
        return f"head.remove: {show(pattern)} is no regular expression ({error})"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Sizes that have to fit each other


def _groups_are_told_once(cfg: DictConfig) -> str | None:
    column, pattern = _get(cfg, "data.group_column", str), _get(cfg, "data.group_pattern", str)
    if column and pattern:
        return f"data.group_column: {column}, and data.group_pattern is set too; give one of them"
    if (column or pattern) and _name(cfg, "data.source") == "HFStreamingSource":
        return f"data.group_{'column' if column else 'pattern'}: of a stream nothing is held out; read with data=hf"
    try:
        groups = re.compile(pattern or "").groups
    except (re.error, OverflowError, RecursionError) as error:
        return f"data.group_pattern: {show(pattern)} is no regular expression ({error})"
    if groups > 1:
        return (
            f"data.group_pattern: {show(pattern)} has {groups} groups, expected one, or none for the whole match; "
            "write (?:...) for the others"
        )
    return None


def _heads_divide_the_width(cfg: DictConfig) -> str | None:
    dim, heads = _get(cfg, "size.dim"), _get(cfg, "size.num_heads")
    if dim is None or heads is None or dim < 1 or (heads > 0 and dim % heads == 0):
        return None
    below = [count for count in range(1, min(heads, dim)) if dim % count == 0][-1:]
    above = [count for count in range(max(heads, 1), dim + 1) if dim % count == 0][:1]
    near = " or ".join(map(str, below + above))
    return (
        f"size.num_heads: size.dim={dim} cannot be split into {heads} heads; choose {near} heads, or another size.dim"
    )


def _patches_tile_the_image(cfg: DictConfig) -> str | None:
    patch = _get(cfg, "modality.encoder.patch_px")
    image = _get(cfg, "modality.image_px", (int, list))
    sides = image if isinstance(image, list) else [image]
    if not patch or patch < 1 or not all(isinstance(side, int) for side in sides):
        return None
    if isinstance(image, list) and len(image) != 2:
        return f"modality.image_px: expected one side, or [height, width], got {show(image)}"
    wrong = next((side for side in sides if side < patch or side % patch), None)
    if wrong is None:
        return None
    near = sorted({max(patch, wrong // patch * patch), max(patch, (wrong // patch + 1) * patch)})
    return (
        f"modality.image_px: {wrong} pixels cannot be cut into patches of {patch} (modality.encoder.patch_px); "
        f"the nearest sizes that work are {' and '.join(map(str, near))}"
    )


def _patches_tile_the_spectrogram(cfg: DictConfig) -> str | None:
    bins, patch = _get(cfg, "modality.mel_bins"), _get(cfg, "modality.patch")
    if bins is None or patch is None or bins < 1 or patch < 1:
        return None
    if bins % patch:
        near = sorted({max(patch, bins // patch * patch), (bins // patch + 1) * patch})
        return (
            f"modality.mel_bins: {bins} bins cannot be cut into patches of {patch} (modality.patch); the nearest "
            f"numbers that work are {' and '.join(map(str, near))}"
        )
    frames = _get(cfg, "modality.batching.max_length")
    if frames is not None and frames < patch:
        return f"modality.max_seconds: {frames} frames are fewer than a patch has (modality.patch={patch}); raise it"
    return None


def _a_visible_block_fits_the_image(cfg: DictConfig) -> str | None:
    if OmegaConf.select(cfg, "objective") is None:  # only pretraining hides patches
        return None
    block, patch = _get(cfg, "modality.visible_block_patches"), _get(cfg, "modality.patch_px")
    image = _get(cfg, "modality.image_px", (int, list))
    sides = image if isinstance(image, list) else [image, image]
    if not block or not patch or patch < 1 or len(sides) != 2:
        return None
    if not all(isinstance(side, int) and side >= patch for side in sides):
        return None
    rows, columns = (side // patch for side in sides)
    if block < max(rows, columns):
        return None
    return (
        f"modality.visible_block_patches: a square of {block} patches covers the whole image, which has "
        f"{rows} x {columns}; choose at most {max(1, min(rows, columns) - 1)}"
    )


def _blocks_hold_documents(cfg: DictConfig) -> str | None:
    shortest, block = _get(cfg, "modality.min_tokens"), _get(cfg, "modality.block_tokens")
    if shortest is None or block is None or block < 1 or shortest <= block:
        return None
    return f"modality.min_tokens: {shortest} is more than modality.block_tokens={block}; nothing would be left"


def _betas_are_two(cfg: DictConfig) -> str | None:
    betas = _get(cfg, "optimizer.betas", list)
    return (
        f"optimizer.betas: expected two numbers, got {show(betas)}" if betas is not None and len(betas) != 2 else None
    )


def _crops_are_shares(cfg: DictConfig) -> str | None:
    for path in ("modality.augment.crop_scale", "head.crop_scale"):
        scale = _get(cfg, path, list)
        if scale is not None and (len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1):
            return f"{path}: expected the smallest and the largest share of an image, as [0.2,1.0], got {show(scale)}"
    return None


def _convolutions_have_all_their_numbers(cfg: DictConfig) -> str | None:
    kernels, strides = (_get(cfg, f"modality.encoder.conv_{name}", list) for name in ("kernel", "stride"))
    if kernels is None or strides is None:
        return None
    if not len(kernels) == len(strides) > 0:
        return (
            f"modality.encoder.conv_kernel: {len(kernels)} layers, and modality.encoder.conv_stride has "
            f"{len(strides)}; give one number of each for every layer"
        )
    widths = _get(cfg, "modality.encoder.conv_dim", list)
    if widths is None or len(widths) == len(kernels):
        return None
    return (
        f"modality.encoder.conv_dim: {len(widths)} widths for the {len(kernels)} layers of "
        "modality.encoder.conv_kernel; give one for each, or one number for all"
    )


def _position_groups_divide_the_width(cfg: DictConfig) -> str | None:
    dim, groups = _get(cfg, "size.dim"), _get(cfg, "modality.encoder.position_groups")
    if dim is None or groups is None or groups < 1 or dim < 1 or dim % groups == 0:
        return None
    near = max(count for count in range(1, min(groups, dim) + 1) if dim % count == 0)
    return (
        f"modality.encoder.position_groups: {groups} groups cannot share the width {dim} (size.dim); choose {near}, or "
        "another size.dim"
    )


def _seconds_are_in_order(cfg: DictConfig) -> str | None:
    shortest, longest, batch = (_get(cfg, f"modality.{name}_seconds", (int, float)) for name in ("min", "max", "batch"))
    if longest is None or longest <= 0:
        return None
    if shortest is not None and shortest > longest:
        return (
            f"modality.min_seconds: {shortest} is more than modality.max_seconds={longest}; no recording would be left"
        )
    if batch is not None and 0 < batch < longest:
        return (
            f"modality.batch_seconds: {batch} s of sound in a batch is less than one recording may have "
            f"(modality.max_seconds={longest}); raise it, or lower modality.max_seconds"
        )
    return None


def _prenet_leaves_layers(cfg: DictConfig) -> str | None:
    prenet, depth = _get(cfg, "modality.encoder.prenet_depth"), _get(cfg, "size.depth")
    if prenet is None or depth is None or depth < 1 or 0 <= prenet < depth:
        return None
    return f"modality.encoder.prenet_depth: expected a number from 0 to below size.depth={depth}, got {prenet}"


def _enough_layers_for_the_targets(cfg: DictConfig) -> str | None:
    top, depth = _get(cfg, "objective.targets.top_k_layers"), _get(cfg, "size.depth")
    layers = (depth or 0) - (_get(cfg, "modality.encoder.prenet_depth") or 0)
    if top is None or depth is None or layers < 1 or 1 <= top <= layers:
        return None
    return f"objective.targets.top_k_layers: expected a number from 1 to {layers}, the layers there are, got {top}"


def _normalisation_fits_the_channels(cfg: DictConfig) -> str | None:
    channels = _get(cfg, "modality.channels")
    mean, std = _get(cfg, "modality.mean", list), _get(cfg, "modality.std", list)
    if channels is None or mean is None or std is None or all(len(one) in (1, channels) for one in (mean, std)):
        return None
    return (
        f"modality.channels: {channels}, but modality.mean has {len(mean)} and modality.std {len(std)} values; give 1 "
        f"or {channels} of each, for example modality.mean=[0.449] modality.std=[0.226]"
    )


def _a_batch_has_a_size(cfg: DictConfig) -> str | None:
    """Null is for modalities whose batches have a budget instead."""
    if "data" not in cfg or _get(cfg, "data.source", dict) is None or "batching" not in (cfg.get("modality") or {}):
        return None
    size = OmegaConf.select(cfg, "data.batch_size_per_device", default=0)
    if size is not None or _get(cfg, "modality.batching", dict) is not None:
        return None
    return "data.batch_size_per_device: expected a whole number of at least 1, got null"


# ---------------------------------------------------------------------------------------------------------------------
# The objective


def _dropping_needs_a_constant_count(cfg: DictConfig) -> str | None:
    if _get(cfg, "objective.mask_mode", str) != "drop":
        return None
    masker = _name(cfg, "modality.masker")
    instead = {"BlockMasker": "InverseBlockMasker", "SpanMasker": "Block1dMasker"}.get(masker)
    if instead is not None:
        return (
            f"modality.masker: {masker} hides a different number of tokens in each sample, and "
            f"objective.mask_mode=drop needs the same number; choose data2vec_train.objective.masking.{instead}, or "
            "objective.mask_mode=replace"
        )
    decoder = _name(cfg, "objective.decoder")
    if decoder in ("LinearDecoder", "MLPDecoder"):
        return (
            f"objective.decoder: {decoder} sees one token at a time and cannot fill in those that "
            "objective.mask_mode=drop leaves out; choose a convolutional decoder, or objective.mask_mode=replace"
        )
    return None


def _corruption_and_mask_mode_agree(cfg: DictConfig) -> str | None:
    mode, corruption = _get(cfg, "objective.mask_mode", str), _get(cfg, "modality.corruption._target_", str)
    if mode == "corrupt" and corruption is None:
        return (
            "objective.mask_mode: corrupt needs modality.corruption, which says what hidden tokens become; choose "
            "objective=data2vec with modality=text, or another mask mode"
        )
    if mode in ("replace", "drop") and corruption is not None:
        return f"modality.corruption: objective.mask_mode={mode} hides tokens in the encoder; set it to null"
    return None


def _replacing_needs_a_mask_token(cfg: DictConfig) -> str | None:
    encoder = _get(cfg, "modality.encoder", dict)
    if _get(cfg, "objective.mask_mode", str) != "replace" or encoder is None:
        return None
    if _get(cfg, "modality.name", str) == "text":
        if _get(cfg, "modality.corruption", dict) is not None:
            return None  # said by the rule above
        return (
            "objective.mask_mode: replace is for images and speech, the text encoder has no mask token; choose corrupt "
            "with objective=data2vec, or drop with objective=data2vec2"
        )
    if encoder.get("mask_token") is not False:
        return None
    return (
        "modality.encoder.mask_token: false, and objective.mask_mode=replace puts this token in place of hidden ones; "
        "write modality.encoder.mask_token=true, or choose another mask mode"
    )


def _tau_rises(cfg: DictConfig) -> str | None:
    start, end = _get(cfg, "objective.tau_start", (int, float)), _get(cfg, "objective.tau_end", (int, float))
    if start is None or end is None or not 0 <= end < start <= 1:
        return None
    return f"objective.tau_start: {start} is above objective.tau_end={end}; the teacher slows down, so start lower"


def _warm_up_ends_in_time(cfg: DictConfig) -> str | None:
    warmup, steps = _get(cfg, "scheduler.warmup_steps", (int, float)), _get(cfg, "trainer.max_steps")
    hold = _get(cfg, "scheduler.hold_steps") or 0
    if warmup is None or steps is None or steps < 1 or warmup + max(hold, 0) <= steps:
        return None
    if warmup > steps:
        return f"scheduler.warmup_steps: {warmup} is more than trainer.max_steps={steps}; lower it or train longer"
    return (
        f"scheduler.hold_steps: {hold}, with scheduler.warmup_steps={warmup} more than trainer.max_steps={steps}; "
        "lower it or train longer"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Groups, commands and machines


def choices_suit_the_modality(cfg: DictConfig) -> str | None:
    """A choice that belongs to another modality than the one that was chosen."""
    choices = _choices(cfg)
    modality = choices.get("modality")
    if modality not in MODALITIES:
        return None
    for group in _FREE_GROUPS:
        words = re.split(r"[_/]", str(choices.get(group)))
        other = next((word for word in words if word in MODALITIES and word != modality), None)
        if other is not None:
            return f"{group}={choices[group]}: is for modality={other}, and this is modality={modality}"
    recipes = choices.get("recipes")
    for recipe in recipes if isinstance(recipes, list) else [recipes]:
        other = re.search(r"override /modality: *(\w+)", text_of_recipe(str(recipe)))
        if other and other[1] != modality:
            return f"recipes={recipe}: is for modality={other[1]}, and this is modality={modality}; leave modality out"
    name = _get(cfg, "modality.name", str)
    return None if name in (modality, None) else f"modality.name: expected {modality}, which was chosen, got {name}"


def _head_suits_the_modality(cfg: DictConfig) -> str | None:
    target, modality = _get(cfg, "head._target_", str), _get(cfg, "modality.name", str)
    module = str(target).rpartition(".")[0].rpartition(".")[2]
    wanted = {"speech": "audio", "text": "text", "vision": "vision"}.get(module)
    if target is None or wanted is None or modality in (None, wanted):
        return None
    return f"head: {target.rpartition('.')[2]} is for modality={wanted}, and this is modality={modality}"


def _data_suits_the_command(cfg: DictConfig) -> str | None:
    if "objective" in cfg or "source" not in (_get(cfg, "data", dict) or {}):
        return None
    source = _name(cfg, "data.source")
    if _get(cfg, "data.source", dict) is None:
        return "data: the embedded samples are for pretraining; choose data=folder or data=hf, and data.path"
    if source == "HFStreamingSource":
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


def _callbacks_suit_the_command(cfg: DictConfig) -> str | None:
    callbacks = _get(cfg, "callbacks", dict)
    if not callbacks or ("evaluation" in callbacks) == ("head" in cfg):
        return None
    return f"callbacks: these are for another command; choose callbacks={'finetune' if 'head' in cfg else 'default'}"


def _trainer_is_told_once(cfg: DictConfig) -> str | None:
    """What the groups strategy, precision, logger and callbacks say would win silently."""
    elsewhere = {"precision": "precision", "logger": "logger", "callbacks": "callbacks"}
    elsewhere |= {name: f"strategy.{name}" for name in _get(cfg, "strategy", dict) or {}}
    for name, group in elsewhere.items():
        if name in (_get(cfg, "trainer", dict) or {}) and group.partition(".")[0] in cfg:
            return f"trainer.{name}: is set by {group}; change that instead"
    return None


# Of Lightning's trainer: what a run reads, and what others set or have no use for here.
_READ = ("max_steps", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "log_every_n_steps")
_READ += ("overfit_batches", "deterministic", "benchmark", "detect_anomaly", "enable_model_summary")
_READ += ("accelerator", "devices", "num_nodes", "strategy", "precision", "logger", "callbacks")  # told once
_CONSTANT = {"enable_progress_bar": False, "use_distributed_sampler": False}
_CONSTANT |= {"num_sanity_val_steps": 0, "limit_val_batches": 0, "limit_test_batches": 0, "limit_predict_batches": 0}
_INSTEAD = {
    "profiler": "choose debug=profile",
    "enable_progress_bar": "choose callbacks.monitor.progress=bar",
    "default_root_dir": "write hydra.run.dir=DIR",
    "enable_checkpointing": "see callbacks.checkpoint",
    "min_steps": "set trainer.max_steps",
}


def _trainer_settings_are_read(cfg: DictConfig) -> str | None:
    """Others are overwritten by the program, or concern a validation loop that there is none of."""
    settings = _get(cfg, "trainer", dict) or {}
    if settings.get("gradient_clip_algorithm") not in (None, "norm"):
        return f"trainer.gradient_clip_algorithm: expected norm, got {show(settings['gradient_clip_algorithm'])}"
    takes = signature(find(_TRAINER)).parameters
    for name, value in settings.items():
        is_default = name in _CONSTANT and value == _CONSTANT[name]
        if name not in takes or name in _READ or name in _OTHER_ENDS or is_default or value is None:
            continue
        return f"trainer.{name}: has no effect in these runs; {_INSTEAD.get(name, 'leave it out')}"
    return None


def _loggers_can_be_made(cfg: DictConfig) -> str | None:
    for name, node in (_get(cfg, "logger", dict) or {}).items():
        if not isinstance(node, dict) or "_target_" not in node or node.get("_partial_") is not True:
            return (
                f"logger.{name}: expected the settings of a logger, with _target_ and _partial_: true, got {show(node)}"
            )
    return None


def _modality_has_a_plain_name(cfg: DictConfig) -> str | None:
    """The run directory is named after it."""
    name = _get(cfg, "modality.name", object)
    if name is None or (isinstance(name, str) and re.fullmatch(r"\w[\w-]*", name)):
        return None
    return f"modality.name: expected letters, digits and dashes, got {show(name)}"


_OTHER_ENDS = {
    "max_time": "the run would count as finished; stop it with SIGTERM, which saves it, and give the command again",
    "fast_dev_run": "a run of a step would count as finished; choose debug=smoke",
    "limit_train_batches": "the same batches would come again and again; set trainer.max_steps",
    "max_epochs": "samples come without end, and no epoch is over; set trainer.max_steps",
    "min_epochs": "samples come without end, and no epoch is over; set trainer.max_steps",
}


def _steps_end_a_run(cfg: DictConfig) -> str | None:
    """What else Lightning knows to end a run, or an epoch, is not what our checkpoints and loaders rest on."""
    asked = [name for name in _OTHER_ENDS if (_get(cfg, "trainer", dict) or {}).get(name) not in (None, False)]
    return f"trainer.{asked[0]}: {_OTHER_ENDS[asked[0]]}" if asked else None


def _devices_are_countable(cfg: DictConfig) -> str | None:
    for group in ("strategy", "trainer"):
        devices = _get(cfg, f"{group}.devices", object)
        count = type(devices) is int and (devices > 0 or devices == -1)
        listed = isinstance(devices, list) and devices and all(type(one) is int and one >= 0 for one in devices)
        written = isinstance(devices, str) and re.fullmatch(r"auto|\d+(,\d+)*", devices)
        if devices is None or count or listed or written:
            continue
        return f"{group}.devices: expected a count, a list such as [0,1], or auto, got {show(devices)}"
    return None


def _strategy_exists(cfg: DictConfig) -> str | None:
    """Lightning's own strategies lack what these models need: checkpoints, weights that rest, shared teachers."""
    name = _get(cfg, "strategy.strategy", str)
    if name in (None, "auto"):
        return None
    group = next((group for group in ("ddp", "fsdp") if name.startswith(group)), None)
    if group is not None:
        return f"strategy.strategy: {name} would be Lightning's own; write strategy={group}"
    return (
        f"strategy.strategy: there is no strategy {show(name)}; auto, ddp (strategy=ddp) and fsdp (strategy=fsdp) are"
    )


def _strategy_is_what_the_trainer_takes(cfg: DictConfig) -> str | None:
    takes = signature(find(_TRAINER)).parameters
    for name, value in (_get(cfg, "strategy", dict) or {}).items():
        if name not in takes:
            return f"strategy.{name}: Trainer has no setting called '{name}'{did_you_mean(name, takes)}"
        expected = mismatch(value, takes[name])
        if expected and name != "devices":
            return f"strategy.{name}: expected {expected}, got {show(value)}"
    return None


def may_have_a_gpu() -> bool:
    """False when this machine surely has none that torch could use: asking torch would take seconds."""
    if sys.platform != "linux":
        return True
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(Path("/dev", name).exists() for name in ("nvidiactl", "nvidia0", "kfd", "dxg", "nvhost-gpu"))


def _device_exists(cfg: DictConfig) -> str | None:
    device = str(_get(cfg, "device", (str, int)))
    if device == "None" or re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", device):
        return None
    hint = "; did you mean cuda?" if device.startswith(("gpu", "cud")) else ""
    return f"device: expected auto, cpu, cuda, cuda:1 or mps, got {show(device)}{hint}"


def _gpu_is_there(cfg: DictConfig) -> str | None:
    accelerator = _get(cfg, "strategy.accelerator", str)
    device = str(_get(cfg, "device", str))
    if may_have_a_gpu():
        pass
    elif device.startswith("cuda"):
        return f"device: {device}, and this machine has no GPU; choose auto or cpu"
    elif accelerator in ("gpu", "cuda"):
        return f"strategy.accelerator: {accelerator}, and this machine has no GPU; choose auto or cpu"
    for setting, value in (("device", device), ("strategy.accelerator", accelerator)):
        if value == "mps" and sys.platform != "darwin":
            return f"{setting}: mps is of Apple's computers; choose auto or cpu"
    precision = _get(cfg, "precision.trainer", str)
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not may_have_a_gpu())
    if precision in ("16-mixed", "16-true", "32-tf32", "fp8-mixed") and on_cpu:
        return (
            f"precision.trainer: {precision} needs a GPU, and this run is on the CPU; choose precision=auto or "
            "precision=fp32, or precision=bf16, which is very slow on CPUs without bfloat16 instructions"
        )
    if _get(cfg, "compile", str) == "graphs" and on_cpu:
        return "compile: graphs needs a GPU, and this run is on the CPU; choose compile=false or compile=true"
    return None


def _float8_is_possible(cfg: DictConfig) -> str | None:
    if _get(cfg, "precision.trainer", str) != "fp8-mixed":
        return None
    if "objective" not in cfg:
        return "precision.trainer: fp8-mixed is for pretraining; choose precision=auto or precision=bf16"
    if "hardware" not in cfg and importlib.util.find_spec("torchao") is None:  # a plan computes nothing
        return (
            "precision.trainer: fp8-mixed needs the package torchao: pip install 'data2vec-train[fp8]'; or choose "
            "precision=bf16"
        )
    return None


def _attention_can(cfg: DictConfig) -> str | None:
    backend = _get(cfg, "attention.backend", str)
    encoder = _get(cfg, "modality.encoder", dict)
    if backend not in backends.NAMES or encoder is None:
        return None
    accelerator = _get(cfg, "strategy.accelerator", str)
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and may_have_a_gpu())
    if "hardware" in cfg:  # that a plan is for
        on_gpu = bool(_get(cfg, "hardware.gpu", bool))
    precision = str(_get(cfg, "precision.trainer", str))
    low = "float16" if precision.startswith("16") else "bfloat16"
    dim, heads = _get(cfg, "modality.encoder.dim", int), _get(cfg, "modality.encoder.num_heads", int)
    biases = [_get(cfg, f"modality.encoder.{name}", str) for name in ("relative_bias", "alibi")]
    rate = _get(cfg, "modality.encoder.attention_dropout", (int, float))
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
    is_open = _get(cfg, "strategy.devices", (int, str)) in ("auto", "-1", -1)
    return (planned if plans_only(cfg) and is_open else _device_count(cfg) or 1) * nodes


_BATCH = ("trainer.accumulate_grad_batches", "data.batch_size_per_device", "modality.batch_seconds")
_BATCH += ("modality.batch_size_per_device",)


def _published_batch_is_of_one_device(cfg: DictConfig) -> str | None:
    """A recipe makes its batch on one device; on many it would be as many times larger, with the same learning rate."""
    recipes = _choices(cfg).get("recipes")
    texts = [text_of_recipe(str(name)) for name in (recipes if isinstance(recipes, list) else [recipes])]
    has_batch = any(re.search(r"accumulate_grad_batches:|batch_size_per_device:|batch_seconds:", one) for one in texts)
    is_for_many = any(re.search(r"(?m)^\s+devices:", one) for one in texts)
    devices = _all_devices(cfg) if has_batch and not is_for_many else 1
    said = {line.partition("=")[0].lstrip("+") for line in _get(cfg, "hydra.overrides.task", list) or []}
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


# ---------------------------------------------------------------------------------------------------------------------
# Files


def weights_can_be_read(cfg: DictConfig) -> str | None:
    """What is wrong with the place of the weights, or None."""
    for name in ("checkpoint", "init_from"):
        found = OmegaConf.select(cfg, name, throw_on_missing=False)
        if isinstance(found, str) and "://" in found:
            return f"{name}: {found} is an address; weights are only read from this machine: download them first"
        if isinstance(found, str) and not Path(found).expanduser().exists():
            return f"{name}: there is no file or folder {found}"
    return None


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


RULES: list[Rule] = [
    _seed_is_a_whole_number,
    *(functools.partial(_one_of, path, names=names) for path, names in _NAMES.items()),
    *_RANGES,
    _heads_divide_the_width,
    _patches_tile_the_image,
    _patches_tile_the_spectrogram,
    _normalisation_fits_the_channels,
    _crops_are_shares,
    _a_visible_block_fits_the_image,
    _blocks_hold_documents,
    _betas_are_two,
    _convolutions_have_all_their_numbers,
    _position_groups_divide_the_width,
    _seconds_are_in_order,
    _prenet_leaves_layers,
    _enough_layers_for_the_targets,
    _a_batch_has_a_size,
    _dropping_needs_a_constant_count,
    _corruption_and_mask_mode_agree,
    _replacing_needs_a_mask_token,
    _tau_rises,
    _warm_up_ends_in_time,
    _encodings_exist,
    _workers_are_countable,
    _layers_are_numbers,
    _cache_is_a_path,
    choices_suit_the_modality,
    _head_suits_the_modality,
    _data_suits_the_command,
    _callbacks_suit_the_command,
    _removal_is_a_pattern,
    _groups_are_told_once,
    _trainer_is_told_once,
    _steps_end_a_run,
    _trainer_settings_are_read,
    _loggers_can_be_made,
    _modality_has_a_plain_name,
    _published_batch_is_of_one_device,
    _devices_are_countable,
    _strategy_exists,
    _strategy_is_what_the_trainer_takes,
    _device_exists,
    _there_is_something_to_measure,
    _attention_has_four_sizes,
    _measured_images_have_patches,
    weights_can_be_read,
    _out_is_free,
]


# ---------------------------------------------------------------------------------------------------------------------
# This machine: looked at when a command is about to run, not when it is only read


def _data_is_there(cfg: DictConfig) -> str | None:
    source = _name(cfg, "data.source")
    for setting in ("data", "data.test_source"):
        value = _get(cfg, f"{setting}.path", (str, list))
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


def _objects_are_handed_over(cfg: DictConfig) -> str | None:
    # A Python call has loaded this module; only loading tells, as it takes seconds.
    if _name(cfg, "data.source") != "handed_over" or "data2vec_train.data.sources.objects" in sys.modules:
        return None
    return "data: objects are for Python calls (data2vec_train.pretrain(data=[...])); choose data=folder or data=hf"


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


def _workers_fit(cfg: DictConfig) -> str | None:
    workers, cores = _get(cfg, "data.num_workers"), os.cpu_count() or 1
    if workers is None or workers <= 32 * cores:
        return None
    return f"data.num_workers: {workers} processes on {cores} cores; choose auto, or about as many as cores"


def _logger_is_installed(cfg: DictConfig) -> str | None:
    for name, node in (_get(cfg, "logger", dict) or {}).items():
        target = str(node.get("_target_") if isinstance(node, dict) else "").lower()
        package = next((one for one in ("wandb", "tensorboard") if f"{one}logger" in target.replace("_", "")), None)
        if package and importlib.util.find_spec(package) is None:
            return f"logger={name}: needs the package {package}: pip install 'data2vec-train[{package}]'"
    return None


def _near_path(path: Path) -> str:
    if not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.R_OK):
        return ""
    with os.scandir(path.absolute().parent) as entries:
        names = [entry.name for _, entry in zip(range(2000), entries, strict=False)]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _can_be_written(name: str, cfg: DictConfig) -> str | None:
    value = _get(cfg, name, str)
    if value is None:
        return None
    path = Path(value).expanduser().absolute()
    there = next(one for one in (path, *path.parents) if one.exists())
    if not there.is_dir():
        return f"{name}: {there} is a file, expected a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{name}: {value} cannot be written, {there} does not belong to you; choose another folder"
    return None


def _out_has_a_folder(cfg: DictConfig) -> str | None:
    out = _get(cfg, "out", str)
    parent = Path(out).expanduser().absolute().parent if out and out != "???" else None
    if parent is None or "format" in cfg or parent.is_dir():
        return None
    return f"out: there is no folder {parent}"


def _device_count(cfg: DictConfig) -> int | None:
    """Devices on each node; None when it cannot be told without asking torch, or nothing is said."""
    devices = _get(cfg, "strategy.devices", (int, str, list))
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([one for one in devices.split(",") if one])
    if devices not in (None, "auto", "-1", -1):
        return int(devices) if str(devices).isdigit() else None
    if devices is None or _get(cfg, "strategy.accelerator", str) == "cpu" or not may_have_a_gpu():
        return None if devices is None else 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return len(visible.split(",")) if visible else len(list(Path("/dev").glob("nvidia[0-9]*"))) or None


def _many_devices_have_a_strategy(cfg: DictConfig) -> str | None:
    nodes, count = _get(cfg, "strategy.num_nodes") or 1, _device_count(cfg)
    if _get(cfg, "strategy.strategy", str) != "auto" or count is None or count * nodes == 1:
        return None
    return f"strategy.devices: {count * nodes} devices need strategy=ddp or strategy=fsdp; or set strategy.devices=1"


def _sweep_can_start_its_processes(cfg: DictConfig) -> str | None:
    is_sweep = str(_get(cfg, "hydra.mode", object)).endswith("MULTIRUN")
    if not is_sweep or _name(cfg, "hydra.launcher") == "SlurmLauncher":
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


def _processes_match_the_devices(cfg: DictConfig) -> str | None:
    if str(_get(cfg, "hydra.mode", object)).endswith("MULTIRUN"):
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


def _nodes_share_a_directory(cfg: DictConfig) -> str | None:
    where = OmegaConf.to_container(cfg.hydra.run, resolve=False).get("dir") if "hydra" in cfg else None
    if launch.has_a_common_name() or "${launch:" not in str(where):
        return None
    return (
        "hydra.run.dir: torchrun runs on several nodes, and each would choose its own; write hydra.run.dir=DIR, the "
        "same for all nodes and on a disk that all of them see"
    )


WRITING_RULES: list[Rule] = [functools.partial(_can_be_written, name) for name in ("hydra.run.dir", "hydra.sweep.dir")]

MACHINE_RULES: list[Rule] = [
    _sweep_can_start_its_processes,
    _processes_match_the_devices,
    _nodes_share_a_directory,
    _many_devices_have_a_strategy,
    _gpu_is_there,
    _attention_can,
    _float8_is_possible,
    _logger_is_installed,
    _workers_fit,
    _manifest_is_of_recordings,
    _objects_are_handed_over,
    _data_is_there,
    _out_has_a_folder,
    functools.partial(_can_be_written, "cache_dir"),
    *WRITING_RULES,
]
