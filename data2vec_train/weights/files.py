"""JSON files beside weights, and stacking samples into tensors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data2vec_train.errors import ConfigError
from data2vec_train.system.outputs import replace_file


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: there is no such file, or it holds no JSON object.
    """
    if not path.is_file():
        raise ConfigError(f"{path.parent} has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    # Bytes that are not text or not JSON, a number with thousands of digits, or thousands of nested braces.
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error})") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as JSON; missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")


def stacked(values: list[np.ndarray], kind: str | None) -> Any:
    """Samples as one tensor ("pt"), one array ("np"), or unchanged (None).

    Raises:
        ValueError: another kind, or samples that differ in shape.
    """
    if kind is None:
        return values
    if kind not in ("pt", "np"):
        raise ValueError(f"return_tensors is 'pt', 'np' or None, got {kind!r}")
    shapes = {value.shape for value in values}
    if len(shapes) > 1:
        raise ValueError(f"samples of different shapes cannot be stacked: {sorted(shapes)[:3]}; set padding=True")
    return torch.from_numpy(np.stack(values)) if kind == "pt" else np.stack(values)
