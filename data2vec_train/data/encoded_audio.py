"""A column of encoded recordings; import it only where `datasets` is installed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets


@dataclass
class EncodedAudio(datasets.Audio):
    """`datasets.Audio` that stores encoded recordings unchanged; `datasets.Audio` itself needs torchcodec for this."""

    decode: bool = False

    def encode_example(self, value: Any) -> dict[str, bytes | str | None]:
        """A file, its content, or a mapping with either, as {"bytes", "path"}.

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
            return {name: value.get(name) for name in ("bytes", "path")}
        if isinstance(value, bytes):
            return {"bytes": value, "path": None}
        if isinstance(value, str):
            return {"bytes": None, "path": value}
        raise ValueError(f"a recording is a file or its content, got {type(value).__name__}")
