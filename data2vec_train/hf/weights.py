"""Files of tensors, and putting tensors into a model without losing any."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from data2vec_train.errors import ConfigError, WeightMismatch
from data2vec_train.hf.names import to_ours

SAFETENSORS_NAME = "model.safetensors"


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


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """All tensors in a folder: model.safetensors, its shards, or pytorch_model.bin; on the CPU.

    Raises:
        ConfigError: there are none, or a file is broken or holds more than tensors.
    """
    folder = Path(folder)
    for name, read in ((SAFETENSORS_NAME, read_safetensors), ("pytorch_model.bin", read_pickle)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return read(folder / name)
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            absent = [shard for shard in shards if not (folder / shard).is_file()]
            if absent:
                raise ConfigError(f"{index} speaks of files that are not there: {', '.join(absent)}")
            return {key: tensor for shard in shards for key, tensor in read(folder / shard).items()}
    raise ConfigError(f"{folder} has no weights: expected {SAFETENSORS_NAME} or pytorch_model.bin")


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
