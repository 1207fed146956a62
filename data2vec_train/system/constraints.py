"""Every constraint on settings, stated once: constructors raise it, the check of the command line reports it.

`RANGES` says what a setting of some name is, wherever it stands. A function under `@relation` says what settings that
stand together have to fulfil: its parameters are their names, and `<name>` in its sentence stands for the setting,
which the command line knows by a longer name. The first one named is at fault.
"""

import functools
import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin

from data2vec_train.errors import ConfigError

Relation = Callable[..., str | None]
LIST_OF_ANYTHING = list | tuple  # of a relation; `list` is one of numbers


def show(value: object) -> str:
    """A value as YAML has it."""
    if isinstance(value, dict):
        return "a mapping of settings"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)


# ---------------------------------------------------------------------------------------------------------------------
# One setting


class Range(NamedTuple):
    """What a number has to be, or every number of a list."""

    expected: str
    is_right: Callable[[float], bool]


def _whole(value: float) -> bool:
    return math.isfinite(value) and value == int(value)


# A name with dots is the setting of that path and no other.
_TABLE = (
    (
        Range("a whole number of at least 1", lambda value: _whole(value) and value >= 1),
        """
        accumulate_grad_batches batch_size batch_size_per_device batch_sizes loader.batches block_tokens
        channels conv_dim
        conv_kernel conv_stride data_wait_rows depth dim epochs every_n_steps ffn_dim hardware.devices image_px
        inference_batches inference_px log_every_n_steps masks_per_sample max_answer_tokens max_probe_samples max_steps
        max_tokens mel_bins min_tokens neighbours num_heads num_nodes startup.packages patch patch_px position_groups
        position_kernel prefetch_factor rank_samples peak.repeats rounds rows_per_part sample_rate_hz
        loader.samples shuffle_buffer
        peak.side span_tokens tdnn_dim text_tokens threads time_span top_k_layers train_samples training_batch
        training_px
        vector_dim visible_block_patches
        """,
    ),
    (
        Range("a whole number of at least 0", lambda value: _whole(value) and value >= 0),
        """
        continue_tokens encoder_steps grace_steps hold_steps min_spans num_workers position_depth shift_px head.stride
        tau_anneal_steps tolerated_bad_samples warmup_steps warmups loader.workers
        """,
    ),
    (
        Range("a number above 0", lambda value: 0 < value < math.inf),
        """
        audio_seconds bandwidth_gb_s batch_seconds hardware.tflops.bf16 eps hardware.tflops.fp16
        hardware.tflops.fp32 frames_per_second loss_tolerance lr max_pixels
        max_seconds max_value memory_gib nominal_fraction norm_eps stated_tflops std
        stop_seconds stride_seconds hardware.tflops.tf32 startup.timeout_s tolerance window_ms window_seconds
        """,
    ),
    (Range("a number above 0", lambda value: value > 0), "final_factor segment_seconds"),
    (
        Range("a number of at least 0", lambda value: 0 <= value < math.inf),
        """
        context_gib cutmix embed_gradient end_lr fragmentation gradient_clip_val init_scale l2 loss_beta
        min_feature_ratio min_lr min_prediction_std min_rank_ratio min_seconds min_target_std mixup
        start_lr weight_decay workspace_gib
        """,
    ),
    (
        Range("a number from 0 to 1", lambda value: 0 <= value <= 1),
        "erase horizontal_flip max_bad_fraction max_data_wait mix_probability tau_end tau_start",
    ),
    (
        Range("a number from 0 to below 1", lambda value: 0 <= value < 1),
        """
        activation_dropout attention_dropout betas channel_fraction channel_span drop_path dropout head_dropout
        held_out_fraction input_dropout label_smoothing layer_drop time_fraction
        """,
    ),
    (Range("a number above 0, at most 1", lambda value: 0 < value <= 1), "layer_decay.rate utilisation"),
    (Range("a number between 0 and 1", lambda value: 0 < value < 1), "hidden_fraction max_waste"),
)
RANGES = {name: allowed for allowed, names in _TABLE for name in names.split()}


def range_of(path: str) -> Range | None:
    """What the setting of that name or dotted path has to be; None when any value will do."""
    return RANGES.get(path) or RANGES.get(path.rpartition(".")[2])


def out_of_range(path: str, value: object) -> str | None:
    """What was expected, when a number, or one of a list, is out of its range; text is, but for `auto`."""
    allowed = range_of(path)
    numbers = value if isinstance(value, list | tuple) else [value]
    if allowed is None or value == "auto":
        return None
    wrong = [number for number in numbers if isinstance(number, str) or not _is_number_of(allowed, number)]
    return allowed.expected if wrong else None


def _is_number_of(allowed: Range, number: object) -> bool:
    """Whether it is in the range; what is no number is judged by its type elsewhere."""
    return isinstance(number, bool) or not isinstance(number, int | float) or allowed.is_right(number)


# ---------------------------------------------------------------------------------------------------------------------
# Settings that stand together


RELATIONS: dict[Relation, Mapping[str, inspect.Parameter]] = {}


def relation(function: Relation) -> Relation:
    """Registers what settings have to fulfil that are named like the parameters and have their types."""
    RELATIONS[function] = inspect.signature(function).parameters
    return function


@relation
def _heads_divide_the_width(num_heads: int, dim: int) -> str | None:
    if dim % num_heads == 0:
        return None
    counts = [count for count in range(1, dim + 1) if dim % count == 0]
    near = [count for count in counts if count < num_heads][-1:] + [count for count in counts if count > num_heads][:1]
    return (
        f"<num_heads>: <dim>={dim} cannot be split into {num_heads} heads; choose {_or(near)} heads, or another <dim>"
    )


@relation
def _position_groups_divide_the_width(position_groups: int, dim: int) -> str | None:
    if dim % position_groups == 0:
        return None
    near = max(count for count in range(1, min(position_groups, dim) + 1) if dim % count == 0)
    return (
        f"<position_groups>: {position_groups} groups cannot share the width {dim} (<dim>); choose {near}, or another "
        "<dim>"
    )


@relation
def _an_image_has_two_sides(image_px: list) -> str | None:
    return None if len(image_px) == 2 else f"<image_px>: expected one side, or [height, width], got {show(image_px)}"


@relation
def _patches_tile_the_image(image_px: int | list, patch_px: int) -> str | None:
    sides = image_px if isinstance(image_px, list) else [image_px]
    wrong = next((side for side in sides if side < patch_px or side % patch_px), None)
    if wrong is None:
        return None
    near = sorted({max(patch_px, wrong // patch_px * patch_px), max(patch_px, (wrong // patch_px + 1) * patch_px)})
    return (
        f"<image_px>: {wrong} pixels cannot be cut into patches of {patch_px} (<patch_px>); the nearest sizes that "
        f"work are {' and '.join(map(str, near))}"
    )


@relation
def _patches_tile_the_spectrogram(mel_bins: int, patch: int) -> str | None:
    if mel_bins % patch == 0:
        return None
    near = sorted({max(patch, mel_bins // patch * patch), (mel_bins // patch + 1) * patch})
    return (
        f"<mel_bins>: {mel_bins} bins cannot be cut into patches of {patch} (<patch>); the nearest numbers that work "
        f"are {' and '.join(map(str, near))}"
    )


@relation
def _a_spectrogram_has_a_patch(max_frames: int, patch: int) -> str | None:
    if max_frames >= patch:
        return None
    return f"<max_frames>: {max_frames} frames are fewer than a patch has (<patch>={patch}); raise it"


@relation
def _prenet_leaves_layers(prenet_depth: int, depth: int) -> str | None:
    if 0 <= prenet_depth < depth:
        return None
    return f"<prenet_depth>: expected a number from 0 to below <depth>={depth}, got {prenet_depth}"


@relation
def _enough_layers_for_the_targets(top_k_layers: int, depth: int, prenet_depth: int = 0) -> str | None:
    if top_k_layers <= depth - prenet_depth or not 0 <= prenet_depth < depth:
        return None
    return (
        f"<top_k_layers>: expected a number from 1 to {depth - prenet_depth}, the layers that can serve as targets "
        f"(<depth> less <prenet_depth>), got {top_k_layers}"
    )


@relation
def _convolutions_have_strides(conv_kernel: list, conv_stride: list) -> str | None:
    if len(conv_kernel) == len(conv_stride) > 0:
        return None
    return (
        f"<conv_kernel>: {len(conv_kernel)} layers, and <conv_stride> has {len(conv_stride)}; give one number of each "
        "for every layer"
    )


@relation
def _convolutions_have_widths(conv_dim: list, conv_kernel: list) -> str | None:
    if len(conv_dim) == len(conv_kernel):
        return None
    return (
        f"<conv_dim>: {len(conv_dim)} widths for the {len(conv_kernel)} layers of <conv_kernel>; give one for each, or "
        "one number for all"
    )


@relation
def _time_delay_layers_have_all_their_numbers(tdnn_dim: list, tdnn_kernel: list, tdnn_dilation: list) -> str | None:
    counts = [len(numbers) for numbers in (tdnn_dim, tdnn_kernel, tdnn_dilation)]
    if counts[0] == counts[1] == counts[2] > 0:
        return None
    return f"<tdnn_dim>: {counts[0]} layers, <tdnn_kernel> has {counts[1]}, and <tdnn_dilation> has {counts[2]}"


@relation
def _normalisation_fits_the_channels(channels: int, mean: list, std: list) -> str | None:
    if all(len(numbers) in (1, channels) for numbers in (mean, std)):
        return None
    return (
        f"<channels>: {channels}, but <mean> has {len(mean)} values and <std> {len(std)}; give 1 or {channels} of "
        "each, for example <mean>=[0.449] <std>=[0.226]"
    )


@relation
def _crops_are_shares(crop_scale: list) -> str | None:
    if len(crop_scale) == 2 and 0 < crop_scale[0] <= crop_scale[1] <= 1:
        return None
    return f"<crop_scale>: expected the smallest and the largest share of an image, as [0.2,1.0], got {crop_scale}"


@relation
def _crops_have_a_shape(crop_ratio: list | None, crop_scale: list) -> str | None:
    if crop_ratio and len(crop_ratio) == 2 and 0 < crop_ratio[0] <= crop_ratio[1]:
        return None
    return f"<crop_ratio>: expected the smallest and the largest width/height, as [0.75,1.33], got {show(crop_ratio)}"


@relation
def _a_shift_leaves_the_image(shift_px: int, image_px: int | list) -> str | None:
    side = min(image_px) if isinstance(image_px, list) else image_px
    return None if shift_px < side else f"<shift_px>: expected 0 to {side - 1} for images of {image_px}, got {shift_px}"


@relation
def _colours_are_of_colour_images(color_jitter: list, channels: int) -> str | None:
    if len(color_jitter) != 3 or min(color_jitter) < 0:
        return f"<color_jitter>: expected [brightness, contrast, saturation], none negative, got {color_jitter}"
    if max(color_jitter) == 0 or channels in (1, 3):
        return None
    return f"<color_jitter>: needs 1 or 3 channels, not {channels}; set <color_jitter>=null"


@relation
def _random_changes_are_of_colour_images(rand_augment: list, channels: int) -> str | None:
    if len(rand_augment) == 2 and 0 <= rand_augment[1] <= 30 and channels in (1, 3):
        return None
    return f"<rand_augment>: expected [changes, 0 to 30] and 1 or 3 channels, got {rand_augment} and {channels}"


@relation
def _recordings_have_a_length(min_seconds: float, max_seconds: float) -> str | None:
    if min_seconds <= max_seconds:
        return None
    return f"<min_seconds>: {min_seconds} is more than <max_seconds>={max_seconds}; no recording would be left"


@relation
def _parts_of_recordings_have_a_length(min_seconds: float, segment_seconds: float) -> str | None:
    if min_seconds <= segment_seconds:
        return None
    return f"<min_seconds>: {min_seconds} is more than <segment_seconds>={segment_seconds}; no recording would be left"


@relation
def _a_batch_holds_the_longest_sample(budget: int, max_length: int) -> str | None:
    if budget >= max_length:
        return None
    return (
        f"<budget>: a batch of {budget} (samples of sound, or tokens) cannot hold the longest sample, of {max_length}; "
        "raise it, or lower <max_length>"
    )


@relation
def _documents_fit_blocks(min_tokens: int, block_tokens: int) -> str | None:
    if min_tokens <= block_tokens:
        return None
    return f"<min_tokens>: {min_tokens} is more than <block_tokens>={block_tokens}; nothing would be left"


@relation
def _corruption_leaves_mask_tokens(random_fraction: float, keep_fraction: float) -> str | None:
    if random_fraction >= 0 and keep_fraction >= 0 and random_fraction + keep_fraction < 1:
        return None
    return (
        f"<random_fraction>: expected shares that leave something to the mask token, got {random_fraction} and "
        f"<keep_fraction>={keep_fraction}"
    )


@relation
def _dropping_needs_a_constant_count(masker: str, constant_count: bool, mask_mode: str) -> str | None:
    if constant_count or mask_mode != "drop":
        return None
    instead = {"BlockMasker": "InverseBlockMasker", "SpanMasker": "Block1dMasker"}.get(masker)
    choose = f"data2vec_train.objective.masking.{instead}" if instead else "another masker"
    return (
        f"<masker>: {masker} hides a different number of tokens in each sample, and <mask_mode>=drop needs the same "
        f"number; choose {choose}, or <mask_mode>=replace"
    )


@relation
def _dropping_needs_a_decoder_with_context(decoder: str, restores_dropped: bool, mask_mode: str) -> str | None:
    if restores_dropped or mask_mode != "drop":
        return None
    return (
        f"<decoder>: {decoder} sees one token at a time and cannot fill in those that <mask_mode>=drop leaves out; "
        "choose a convolutional decoder, or <mask_mode>=replace"
    )


@relation
def _replacing_needs_a_mask_token(mask_token: bool, mask_mode: str) -> str | None:
    if mask_token or mask_mode != "replace":
        return None
    return (
        "<mask_token>: false, and <mask_mode>=replace puts this token in place of hidden ones; "
        "write <mask_token>=true, or choose another mask mode"
    )


@relation
def _tau_rises(tau_start: float, tau_end: float) -> str | None:
    if tau_start <= tau_end:
        return None
    return f"<tau_start>: {tau_start} is above <tau_end>={tau_end}; the teacher slows down, so start lower"


@relation
def _betas_are_two(betas: list) -> str | None:
    return None if len(betas) == 2 else f"<betas>: expected two numbers, got {show(betas)}"


@relation
def _gradients_are_clipped_by_norm(gradient_clip_algorithm: str) -> str | None:
    if gradient_clip_algorithm == "norm":
        return None
    return f"<gradient_clip_algorithm>: expected norm, got {show(gradient_clip_algorithm)}"


# Below `callbacks`; others are added by the user.
OWN_CALLBACKS = ("probe", "monitor", "checkpoint", "timing", "finite", "evaluation")
PROGRESS = ("auto", "bar", "lines", "none")


@relation
def _progress_is_shown_somehow(progress: str) -> str | None:
    if progress in PROGRESS:
        return None
    return f"<progress>: expected one of {', '.join(PROGRESS)}, got {show(progress)}"


@relation
def _one_text_or_two(text_columns: LIST_OF_ANYTHING) -> str | None:
    if 1 <= len(text_columns) <= 2:
        return None
    return f"<text_columns>: expected one column or two, got {text_columns}"


METRICS = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "multi_label": ("f1", "accuracy"),
}


@relation
def _metric_is_of_the_problem(metric: str, problem: str) -> str | None:
    known = METRICS.get(problem, (metric,))
    return (
        None if metric in known else f"<metric>: with <problem>={problem} it is one of {', '.join(known)}, got {metric}"
    )


@relation
def _precision_is_of_the_device(precision: str, device: str) -> str | None:
    if device == "cuda" or precision not in ("16-mixed", "16-true", "32-tf32", "fp8-mixed"):
        return None
    slow = ", or precision=bf16, which is very slow on CPUs without bfloat16 instructions" * (device == "cpu")
    where = device.upper() if device == "cpu" else device
    return (
        f"<precision>: {precision} needs a GPU, and this run is on the {where}; choose precision=auto or "
        f"precision=fp32{slow}"
    )


@relation
def _precision_has_its_package(precision: str) -> str | None:
    absent = missing("torchao", "fp8") if precision == "fp8-mixed" else None
    return f"<precision>: fp8-mixed {absent}; or choose precision=bf16" if absent else None


def missing(package: str, extra: str) -> str | None:
    """What to install for a package that is not there; None when it is."""
    if importlib.util.find_spec(package) is not None:
        return None
    return f"needs the package {package}: pip install 'data2vec-train[{extra}]'"


def _or(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


# ---------------------------------------------------------------------------------------------------------------------
# Both users of the above


def out_of_ranges(settings: Mapping[str, object]) -> Iterator[str]:
    """A sentence, with `<name>` for settings, for each setting that is out of its range."""
    for name, value in settings.items():
        if expected := out_of_range(name, value):
            yield f"<{name}>: expected {expected}, got {show(list(value) if isinstance(value, tuple) else value)}"


def unrelated(settings: Mapping[str, object]) -> Iterator[str]:
    """Likewise for each relation that settings of one place break.

    A relation is left out when one of its settings is absent, of another type or out of its range.
    """
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in settings.items()
        if not out_of_range(name, value)
    }
    for function, parameters in RELATIONS.items():
        given = {name: values[name] for name in parameters if name in values}
        needed = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
        if needed <= set(given) and all(_is_of(value, parameters[name].annotation) for name, value in given.items()):
            sentence = function(**given)
            if sentence:
                yield sentence


def _is_of(value: object, annotation: Any) -> bool:
    if isinstance(value, bool) or annotation is bool:
        return isinstance(value, bool) and annotation is bool
    if isinstance(value, list) and annotation is not LIST_OF_ANYTHING:
        numbers = all(isinstance(item, int | float) and not isinstance(item, bool) for item in value)
        return numbers and isinstance(value, annotation)
    return isinstance(value, int | float if annotation is float else annotation)


def named(sentence: str, labels: Mapping[str, str]) -> str:
    """A sentence with the names that settings have for its reader."""
    return re.sub(r"<(\w+)>", lambda found: labels.get(found[1], found[1]), sentence)


def require(**settings: object) -> None:
    """Raises ConfigError for the first constraint that these settings break."""
    for sentence in (*out_of_ranges(settings), *unrelated(settings)):
        raise ConfigError(named(sentence, {}))


def checked(constructor: Callable[..., None]) -> Callable[..., None]:
    """A constructor that first requires what RANGES, RELATIONS and its `Literal` annotations say of its arguments."""
    signature = inspect.signature(constructor)
    literals = {name: _literals(parameter.annotation) for name, parameter in signature.parameters.items()}

    @functools.wraps(constructor)
    def check_and_construct(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        for name, value in given.arguments.items():
            values = value if isinstance(value, list | tuple) else [value]
            wrong = [item for item in values if literals[name] and item is not None and item not in literals[name]]
            if wrong:
                raise ConfigError(f"{name}: expected one of {', '.join(map(str, literals[name]))}, got {wrong[0]!r}")
        require(**given.arguments)
        constructor(*args, **kwargs)

    return check_and_construct


def _literals(annotation: Any) -> tuple[object, ...]:
    """The values that an annotation, or that of the items of a list, enumerates; none when it also takes others."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    inner = [part for part in get_args(annotation) if part not in (type(None), ...)]
    return _literals(inner[0]) if len(inner) == 1 else ()
