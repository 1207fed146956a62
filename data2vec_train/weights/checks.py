"""Checks of config files before anything is built: types, ranges, and sizes against the file's tensors."""

import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from data2vec_train.encoders.layers import ACTIVATIONS
from data2vec_train.errors import ConfigError

MOST_LAYERS = 1024  # most layers of one kind, and most entries of a list; no published model has 100
MOST_LABELS = 2**18
LARGEST = 2**31 - 1
# A config may describe a head that the file lacks, but not a model of another order of size than the file.
GROWTH, SLACK = 4, 2**22

_LAYERS = {"depth", "num_hidden_layers", "position_depth", "num_conv_pos_embeddings", "num_adapter_layers"} | {
    "auxiliary_num_convs"
}
_FROM_0 = {"prenet_depth", "position_depth", "num_conv_pos_embeddings", "num_adapter_layers", "auxiliary_num_convs"} | {
    *("num_token_types", "type_vocab_size", "pad_id", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("chunk_size_feed_forward", "mask_time_min_masks", "mask_feature_min_masks", "out_indices", "resample"),
}
_ANY_SIGN = {"semantic_loss_ignore_index", "padding_value", "image_mean", "mean", "high_hz"}
_ABOVE_0 = {"image_std", "rescale_factor", "std", "window_ms", "frames_per_second"}
_BELOW_1 = {"drop_path", "drop_path_rate", "layer_drop", "layerdrop"}
_SHARES = {
    *("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout", "dropout"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "input_dropout"),
    *("mask_time_prob", "mask_feature_prob"),
}
_EPSILONS = {"norm_eps", "layer_norm_eps"}
_ACTIVATIONS = {"activation", "conv_activation", "hidden_act", "feat_extract_activation"}


def check_values(values: Mapping[str, Any], hints: Mapping[str, Any], where: str) -> None:
    """Check settings against their declared types and the ranges that belong to their names.

    Args:
        values: by name.
        hints: {name: type}; only these are checked.
        where: for the message.

    Raises:
        ConfigError: a value that no model can have.
    """
    for name, value in values.items():
        fault = _fault(name, value, hints[name]) if name in hints else None
        if fault is not None:
            raise ConfigError(f"{where}: {name}={_shown(value)}, expected {fault}")


def build_encoder(kind: type[nn.Module], arguments: Mapping[str, Any]) -> Any:
    """The encoder with these arguments, which may come from a file.

    Raises:
        ConfigError: arguments are missing or unknown, or the encoder cannot be built with them.
    """
    hints = {name: hint for name, hint in get_type_hints(kind.__init__).items() if name != "return"}
    parameters = inspect.signature(kind.__init__).parameters
    with_default = {name for name in hints if parameters[name].default is not inspect.Parameter.empty}
    missing = sorted(set(hints) - with_default - set(arguments))
    unknown = sorted(set(arguments) - set(hints), key=str)
    if missing or unknown:
        raise ConfigError(
            f"the description of a {kind.__name__} does not fit it; missing: {', '.join(missing) or 'nothing'}, "
            f"unknown: {', '.join(map(str, unknown)) or 'nothing'}"
        )
    check_values(arguments, hints, kind.__name__)
    try:
        return kind(**arguments)
    except ConfigError:
        raise
    except (ValueError, RuntimeError) as error:  # sizes that do not fit together: the constructor names them
        raise ConfigError(f"{kind.__name__}: {error}") from error


def check_size(make: Callable[[], nn.Module], tensors: Mapping[str, Tensor], where: str) -> None:
    """Compare the size of a model with that of its tensors, before memory is allocated for it.

    Args:
        make: builds the model.
        tensors: of the file.
        where: for the message.

    Raises:
        ConfigError: the model is far larger than the file.
    """
    with torch.device("meta"), _Unfilled():
        model = make()
    wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    held = sum(tensor.numel() for tensor in tensors.values())
    if wanted > GROWTH * held + SLACK:
        raise ConfigError(
            f"{where} describes a model of {wanted:,} numbers, but the weights beside it hold {held:,}: one of the "
            "two belongs to another model"
        )


class _Unfilled(TorchFunctionMode):
    """Skips operations that fill tensors with random numbers, which meta tensors do not need.

    For such an operation torch would load its compiler, which takes seconds, to infer the shape of the result.
    """

    def __torch_function__(self, func: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "erfinv_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _fault(name: str, value: Any, hint: Any) -> str | None:
    """What was expected instead; None if the value is valid."""
    if not _fits(value, hint):
        return _described(hint)
    if name in _ACTIVATIONS and value not in ACTIVATIONS:
        return f"one of {', '.join(ACTIVATIONS)}"
    many = isinstance(value, (list, tuple))
    if many and len(value) > MOST_LAYERS:
        return f"at most {MOST_LAYERS} entries"
    for entry in value if many else [value]:
        if isinstance(entry, bool) or not isinstance(entry, (int, float)):
            continue
        lowest, highest, text = _range(name, isinstance(entry, int) and hint is not float)
        if not lowest <= entry <= highest:
            return text
    return None


def _range(name: str, whole: bool) -> tuple[float, float, str]:
    """Lowest and highest value, and a description of the range."""
    if name in _EPSILONS:
        return math.nextafter(0, 1), 1, "a number above 0, at most 1"
    if name in _BELOW_1:
        return 0, math.nextafter(1, 0), "a probability from 0 to below 1"
    if name in _SHARES:
        return 0, 1, "a probability from 0 to 1"
    if name in _ABOVE_0:
        return math.nextafter(0, 1), 1e30, "a number above 0"
    if name in _ANY_SIGN:
        return -LARGEST, LARGEST, "a number"
    if not whole:
        return 0, 1e30, "a number of at least 0"
    lowest = 0 if name in _FROM_0 else 1
    highest = MOST_LAYERS if name in _LAYERS else MOST_LABELS if name == "num_labels" else LARGEST
    return lowest, highest, f"a whole number from {lowest} to {highest}"


def _fits(value: Any, hint: Any) -> bool:
    origin, inside = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in inside)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in inside)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        return is_list and (len(value) > 0 or inside[0] is str) and all(_fits(entry, inside[0]) for entry in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _described(hint: Any) -> str:
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(option) for option in inside)
    if origin is Literal:
        return f"one of {', '.join(map(str, inside))}"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list ({_described(inside[0])})"
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}
    return words.get(hint, "null" if hint is types.NoneType else "a mapping" if origin is dict else str(hint))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
