"""Reading a pickled checkpoint without running code from it.

A pickle names functions to call. Only those that build tensors and plain containers are called here. Classes of other
programs (fairseq, omegaconf, argparse, ...) become `Stranger`, which stores its arguments and does nothing. All other
functions of Python's library and of torch are refused: no checkpoint of a model needs them.
"""

import _compat_pickle
import collections
import io
import pickle
import re
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data2vec_train.errors import ConfigError

_HARMLESS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("collections", "Counter"): collections.Counter,
    **{
        ("builtins", kind.__name__): kind
        for kind in (int, float, bool, str, bytes, complex, dict, list, tuple, set, frozenset, slice, bytearray, object)
    },
}
_TORCH = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_parameter_with_state"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.storage", "UntypedStorage"),
    ("torch.storage", "TypedStorage"),
}
# Modules of Python's library whose classes only describe things and become `Stranger`; `__main__` is the program that
# wrote the file.
_DESCRIPTIONS = {
    "__main__",
    "argparse",
    "enum",
    "pathlib",
    "pathlib._local",
    "typing",
    "dataclasses",
    "datetime",
    "decimal",
}


class Stranger(dict):
    """An object of another program: its arguments and its state, without its behaviour."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__()
        self.arguments = arguments
        self.named = named

    def __setstate__(self, state: Any) -> None:
        slots = {}
        if isinstance(state, tuple) and len(state) == 2:
            state, slots = state
        for part in (state, slots):
            if isinstance(part, dict):
                self.update(part)
            elif part is not None:
                self.arguments = (*self.arguments, part)

    def append(self, item: Any) -> None:
        """Add an item, as a list does."""
        self.arguments = (*self.arguments, item)

    def extend(self, several: Any) -> None:
        """Add items, as a list does."""
        self.arguments = (*self.arguments, *several)

    def __hash__(self) -> int:
        return id(self)


def _latin(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise Refused(f"it asks for the encoding {encoding}, which no pickle needs")
    return text.encode("latin1")


_BROKEN = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError)


class Refused(pickle.UnpicklingError):
    """A pickle asks for something that no checkpoint needs."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Files may use Python 2's names of its library.
        if (module, name) in _compat_pickle.NAME_MAPPING:
            module, name = _compat_pickle.NAME_MAPPING[module, name]
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        if (module, name) in _HARMLESS:
            return _HARMLESS[module, name]
        top = module.split(".")[0]
        if (module, name) in _TORCH or (module == "torch" and re.fullmatch(r"\w+Storage", name)):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        # numpy's classes become strangers too: a forged state of a dtype can declare bytes to be pointers.
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 writes bytes
            return _latin
        if top in ("torch", "builtins") or (top in sys.stdlib_module_names and module not in _DESCRIPTIONS):
            raise Refused(f"it asks for {module}.{name}, which no checkpoint needs")
        return type(name, (Stranger,), {"__module__": module})


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


def _loads(data: bytes, **options: Any) -> Any:
    return _Unpickler(io.BytesIO(data), **options).load()


# torch.load takes a module that behaves like pickle.
_SAFE_PICKLE = types.ModuleType("data2vec_train_safe_pickle")
_SAFE_PICKLE.Unpickler = _Unpickler
_SAFE_PICKLE.load = _load
_SAFE_PICKLE.loads = _loads
_SAFE_PICKLE.UnpicklingError = pickle.UnpicklingError


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint written by torch.save, tensors on the CPU; nothing in it is executed.

    Raises:
        ConfigError: there is no such file, it is broken, it holds no mapping, or it asks to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file")
    if reason := _other_kind(path):
        raise ConfigError(f"{path} was refused, and nothing in it was run: {reason}")
    try:
        content = torch.load(path, map_location="cpu", pickle_module=_SAFE_PICKLE, weights_only=False)
    except Refused as error:
        raise ConfigError(f"{path} was refused, and nothing in it was run: {error}") from error
    # Which error a broken pickle raises depends on where it is broken.
    except _BROKEN as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path} is not an intact checkpoint of torch.save ({first})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, expected a mapping, as in checkpoints")
    return content


def _other_kind(path: Path) -> str | None:
    """Why torch.load would not pass the file to our unpickler: it is a program or a tar; None if it would."""
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile:
            return None  # `read_checkpoint` reports it
        # A TorchScript archive runs its own `__setstate__`, which can write files.
        is_script = any(name.endswith("constants.pkl") or "/code/" in name for name in names)
        return "it is a TorchScript program; save its state_dict with torch.save" if is_script else None
    with path.open("rb") as file:
        file.seek(257)
        is_tar = file.read(5) == b"ustar"
    return "it is a tar, from a torch before 0.1.10; save it again with a newer one" if is_tar else None


def plain(value: Any) -> Any:
    """A setting of a checkpoint as plain containers: omegaconf nodes, namespaces and enums are unpacked."""
    if isinstance(value, Tensor) or value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Stranger):
        for inside in ("_content", "_val"):
            if inside in value:
                return plain(value[inside])
        if value:
            return {str(name): plain(item) for name, item in value.items()}
        return plain(value.arguments[0]) if len(value.arguments) == 1 else [plain(item) for item in value.arguments]
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return str(value)
