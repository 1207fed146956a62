"""Reading files of tensors, and copying tensors into a model strictly."""

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
    """What was missing or in excess when tensors were copied into a model; names are those of the file."""

    fresh: list[str] = field(default_factory=list)  # not in the file: the model keeps its initial values
    left_out: list[str] = field(default_factory=list)  # in the file, but not in this model

    def __str__(self) -> str:
        parts = []
        if self.fresh:
            parts.append(f"newly initialised, since the file lacks them: {_listed(self.fresh)}")
        if self.left_out:
            parts.append(f"left out, since this model does not have them: {_listed(self.left_out)}")
        return "; ".join(parts) or "everything fits"


def weights_file(folder: str | Path) -> Path:
    """model.safetensors, pytorch_model.bin, or the index of the shards of either.

    Raises:
        ConfigError: there is none.
    """
    folder = Path(folder)
    for name in (SAFETENSORS_NAME, PICKLE_NAME):
        found = next(
            (candidate for candidate in (folder / name, folder / f"{name}{_INDEX}") if candidate.is_file()), None
        )
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
    """The tensors of several files, each from the file that the index names for it.

    Raises:
        ConfigError: the index is broken, or names files or tensors that are not there.
    """
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of or not all(isinstance(name, str) for name in shard_of.values()):
        raise ConfigError(f"{index}: expected weight_map, an object of names of tensors and of the files beside it")
    shards = sorted(set(shard_of.values()))
    outside = [shard for shard in shards if Path(shard).name != shard or "\\" in shard]
    if outside:
        raise ConfigError(f"{index} names {outside[0]!r}, which is not a file beside it")
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        raise ConfigError(f"{index} names files that do not exist: {', '.join(absent[:5])}")
    found: dict[str, Tensor] = {}
    for shard in shards:
        tensors = read(index.parent / shard)
        named = [name for name, file_name in shard_of.items() if file_name == shard]
        lacking = [name for name in named if name not in tensors]
        if lacking:
            raise ConfigError(f"{index.parent / shard} has no tensor {lacking[0]}, but {index.name} says that it has")
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
        raise ConfigError(f"{path} is not an intact safetensors file ({error})") from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin or .pt file, read without running code from it.

    Raises:
        ConfigError: the file is broken, or holds anything but a flat mapping of tensors.
    """
    import pickle

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path} cannot be read: it is broken, or holds more than tensors ({first})") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(f"{path} holds a {type(content).__name__}, expected a flat mapping of names to tensors")
    return content


def check_tensors(tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], where: str) -> None:
    """Refuse weights that no training produces: integers, complex numbers, NaN and infinities.

    Args:
        tensors: of a file, by name.
        dtypes: of the tensors to copy into; if one is not a floating-point type, the file's tensor may not be either.
        where: the file, for the message.

    Raises:
        ConfigError: with the first such tensor.
    """
    for name, tensor in tensors.items():
        wanted = dtypes[name]
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ConfigError(f"{where}: {name} is not a plain tensor (it is sparse, quantized or without content)")
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
                "the training diverged, or the file is damaged; take an earlier checkpoint or another copy"
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
        model: receives the tensors; it is not changed if an error is raised.
        names: {their name: ours} of all that the model has.
        tensors: by their names.
        where: the file, for messages.
        fresh: prefixes of their names that may be missing; those tensors keep their initial values.
        left_out: prefixes of their names that may be in excess.
        reshape_fresh: tensors in `fresh` may also have another shape; they then keep their initial values too.

    Raises:
        WeightMismatch: tensors are missing, in excess or of another shape; the message lists all of them.
        ConfigError: a tensor is not of a floating-point type but the model's is, or holds numbers that are not finite.
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
    """All names; those that differ only in their first number are written once, with all numbers."""
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
