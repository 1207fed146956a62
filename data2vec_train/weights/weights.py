"""Files of tensors, and putting tensors into a model without losing any."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from data2vec_train.errors import ConfigError, WeightMismatch
from data2vec_train.weights.files import read_json
from data2vec_train.weights.names import to_ours

SAFETENSORS_NAME, PICKLE_NAME = "model.safetensors", "pytorch_model.bin"
_INDEX = ".index.json"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass
class LoadReport:
    """What happened when tensors were put into a model; names are those of the file."""

    fresh: list[str] = field(default_factory=list)  # not in the file: the model keeps its initial values
    left_out: list[str] = field(default_factory=list)  # in the file, and of no use to this model

    def __str__(self) -> str:
        parts = []
        if self.fresh:
            parts.append(f"newly initialised, since the file lacks them: {_listed(self.fresh)}")
        if self.left_out:
            parts.append(f"left out, since this model has no place for them: {_listed(self.left_out)}")
        return "; ".join(parts) or "everything fits"


def weights_file(folder: str | Path) -> Path:
    """model.safetensors, pytorch_model.bin, or the index of either's parts.

    Raises:
        ConfigError: there is none.
    """
    folder = Path(folder)
    for name in (SAFETENSORS_NAME, PICKLE_NAME):
        found = next((one for one in (folder / name, folder / f"{name}{_INDEX}") if one.is_file()), None)
        if found is not None:
            return found
    raise ConfigError(f"{folder} has no weights: expected {SAFETENSORS_NAME} or {PICKLE_NAME}")


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """All tensors in a folder: model.safetensors, its shards, or pytorch_model.bin; on the CPU.

    Raises:
        ConfigError: there are none, or a file is broken or holds more than tensors.
    """
    path = weights_file(folder)
    read = read_safetensors if path.name.startswith(SAFETENSORS_NAME) else read_pickle
    return _read_shards(path, read) if path.name.endswith(_INDEX) else read(path)


def _read_shards(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of several files, each from the one that the index names for it.

    Raises:
        ConfigError: the index is broken, or names files or tensors that are not there.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(one, str) for one in places.values()):
        raise ConfigError(f"{index}: expected weight_map, an object of names of tensors and of the files beside it")
    shards = sorted(set(places.values()))
    outside = [shard for shard in shards if Path(shard).name != shard or "\\" in shard]
    if outside:
        raise ConfigError(f"{index} names {outside[0]!r}, which is no file beside it")
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        raise ConfigError(f"{index} speaks of files that are not there: {', '.join(absent[:5])}")
    found: dict[str, Tensor] = {}
    for shard in shards:
        tensors = read(index.parent / shard)
        named = [name for name, place in places.items() if place == shard]
        lacking = [name for name in named if name not in tensors]
        if lacking:
            raise ConfigError(f"{index.parent / shard} has no tensor {lacking[0]}, which {index.name} says it holds")
        found |= {name: tensors[name] for name in named}
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file.

    Raises:
        ConfigError: the file is broken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a whole safetensors file ({error})") from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin or .pt file, read without running what it may hold.

    Raises:
        ConfigError: the file is broken, or holds anything but a flat mapping of tensors.
    """
    import pickle

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path} was not read: broken, or more than tensors ({first})") from error
    if not isinstance(content, dict) or not all(isinstance(one, Tensor) for one in content.values()):
        raise ConfigError(f"{path} holds a {type(content).__name__}, expected a flat mapping of names to tensors")
    return content


def check_tensors(tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], where: str) -> None:
    """Refuse weights that no training leaves: whole numbers, complex ones, NaN and infinities.

    Args:
        tensors: of a file, by name.
        dtypes: of what they are to be copied into; where that is no floating-point type, neither may the tensor be.
        where: the file, for the message.

    Raises:
        ConfigError: with the first such tensor.
    """
    for name, tensor in tensors.items():
        wanted = dtypes[name]
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ConfigError(f"{where}: {name} is no plain tensor of numbers (sparse, quantized or empty of content)")
        if not wanted.is_floating_point:
            if tensor.is_floating_point() or tensor.is_complex():
                raise ConfigError(f"{where}: {name} is of type {_type(tensor)}, expected {_type(wanted)}")
            continue
        if tensor.dtype not in FLOATS:
            raise ConfigError(
                f"{where}: {name} is of type {_type(tensor)}, expected floating-point numbers of 16, 32 or 64 bits"
            )
        finite = torch.isfinite(tensor.to(wanted))
        if not finite.all():
            count = int((~finite).sum())
            raise ConfigError(
                f"{where}: {name} holds {count:,} of {tensor.numel():,} numbers that are not finite (NaN or infinite): "
                "the weights are of a training that diverged, or damaged; take an earlier checkpoint or another copy"
            )


def _type(of: Tensor | torch.dtype) -> str:
    return str(of.dtype if isinstance(of, Tensor) else of).removeprefix("torch.")


def put_into(
    model: nn.Module,
    names: dict[str, str],
    tensors: Mapping[str, Tensor],
    *,
    where: str,
    fresh: tuple[str, ...] = (),
    left_out: tuple[str, ...] = (),
    reshape_fresh: bool = False,
) -> LoadReport:
    """Copy tensors into a model, strictly.

    Args:
        model: what receives them, whole tensors or none.
        names: {their name: ours} of all that the model has.
        tensors: by their names.
        where: the file, for messages.
        fresh: beginnings of their names that may be missing; those tensors keep their initial values.
        left_out: beginnings of their names that may be in excess.
        reshape_fresh: tensors in `fresh` may also have another shape; they then keep their initial values too.

    Raises:
        WeightMismatch: anything is missing, in excess or of another shape; all of it is listed, and the model is as it
            was.
        ConfigError: a tensor is not of floating-point numbers where the model's is, or holds some that are not finite.
    """
    own = model.state_dict()
    shapes = {}
    for theirs, ours in names.items():
        name, _, part = ours.partition("#")
        shape = own[name].shape
        shapes[theirs] = (shape[0] // 3, *shape[1:]) if part else tuple(shape)
    missing = [name for name in names if name not in tensors]
    excess = [name for name in tensors if name not in names]
    misshapen = [name for name, shape in shapes.items() if name in tensors and tuple(tensors[name].shape) != shape]
    allowed = [name for name in misshapen if reshape_fresh and name.startswith(fresh)] if fresh else []
    report = LoadReport(
        fresh=[name for name in missing if fresh and name.startswith(fresh)] + allowed,
        left_out=[name for name in excess if left_out and name.startswith(left_out)],
    )
    faults = []
    if wrong := [name for name in missing if name not in report.fresh]:
        faults.append(f"missing: {_listed(wrong)}")
    if wrong := [name for name in excess if name not in report.left_out]:
        faults.append(f"unexpected: {_listed(wrong)}")
    if wrong := [name for name in misshapen if name not in allowed]:
        faults.append(
            "of another shape: "
            + _listed([f"{name} {list(tensors[name].shape)}, expected {list(shapes[name])}" for name in wrong])
        )
    if faults:
        raise WeightMismatch(f"{where} does not fit {type(model).__name__}; " + "; ".join(faults))
    taken = {name: tensors[name] for name in names if name in tensors and name not in allowed}
    check_tensors(taken, {name: own[names[name].partition("#")[0]].dtype for name in taken}, where)
    # Two names may stand for one tensor (tied embeddings): the state dict takes both.
    model.load_state_dict(to_ours(names, taken), strict=False)
    return report


def _listed(names: list[str]) -> str:
    """All names; those that differ in their first number only are written once, with all numbers."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        before, number, after = re.fullmatch(r"(\D*)(\d*)(.*)", name, re.DOTALL).groups()
        numbers = groups.setdefault((before, after), [])
        if number:
            numbers.append(int(number))
    return ", ".join(before + _numbers(numbers) + after for (before, after), numbers in groups.items())


def _numbers(numbers: list[int]) -> str:
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    consecutive = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{{{numbers[0]}-{numbers[-1]}}}" if consecutive else "{" + ",".join(map(str, numbers)) + "}"
