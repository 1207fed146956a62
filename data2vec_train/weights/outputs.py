"""The outputs of the Hugging Face classes."""

from collections.abc import Hashable
from typing import Any


class ModelOutput(dict):
    """Named results in a fixed order: `out.logits`, `out["logits"]`, `out[0]`, `out.to_tuple()`.

    A field that is None exists as an attribute, but neither as a key nor in the tuple.
    """

    def __init__(self, **fields: Any) -> None:
        super().__init__({name: value for name, value in fields.items() if value is not None})
        self._absent = frozenset(name for name, value in fields.items() if value is None)

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return super().__getitem__(name)
        if name in self.__dict__.get("_absent", ()):
            return None
        raise AttributeError(f"this output has no field {name!r}; it has {', '.join([*self, *sorted(self._absent)])}")

    def __getitem__(self, key: Hashable) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple:
        """The fields that are not None, in order."""
        return tuple(self.values())
