"""Features of many files: written in parts, which survive a killed run, then merged into one parquet file.

`OUT.parts/identity.json` records the data, weights and settings of the parts. `OUT.parts/part-000012-SHA256.parquet`
holds the records from number 12 * rows_per_part on; its name contains the hash of its content, which is checked before
the part is used.
"""

import contextlib
import hashlib
import json
import logging
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from data2vec_train.config.build import build
from data2vec_train.config.inputs import inherit, look_at_images
from data2vec_train.data.dataset import EvaluationDataset, Sample
from data2vec_train.data.files import version_of
from data2vec_train.data.loading import Loader, available_workers
from data2vec_train.data.sources.files import Source, StreamingSource
from data2vec_train.encoders.waveform import multiply_convolutions
from data2vec_train.errors import BadSample, ConfigError, DataError
from data2vec_train.features.embedding import Embedder, layer_numbers
from data2vec_train.system.clock import seconds_since
from data2vec_train.system.outputs import (
    output_path,
    refuse_existing,
    remove,
    replace_file,
    sole_writer,
    sweep,
    writing,
)
from data2vec_train.training.assemble import quiet_libraries
from data2vec_train.training.run_directory import leaves
from data2vec_train.weights.convert import load_pretrained

log = logging.getLogger(__name__)

_PART = re.compile(r"part-(\d{6})-([0-9a-f]{64})\.parquet")


def embed(cfg: DictConfig) -> int:
    """Write `cfg.out`, with one row for each usable record, and return the number of rows.

    Parts of `cfg.rows_per_part` records are kept in `OUT.parts/` until all are complete. A part depends only on its
    records, so an interrupted and restarted run writes the same file. Columns: `key`, and `layer_N` with the features.
    Unusable records are listed in `OUT.rejected.jsonl`.

    Raises:
        ConfigError: the file exists, another process is writing it, or `OUT.parts/` holds parts of another command.
        DataError: no record is usable.
    """
    quiet_libraries()
    out = output_path(cfg.out)
    with sole_writer(out):
        refuse_existing(out)
        return _embed(cfg, out)


def _embed(cfg: DictConfig, out: Path) -> int:
    started = time.perf_counter()
    model = load_pretrained(cfg.checkpoint, weights=cfg.weights)
    model = inherit(cfg, model, f"checkpoint={cfg.checkpoint}")
    source, rows = _records(cfg)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    multiply_convolutions(model)
    encoder = model.get_encoder().to(device).eval()
    layers = tuple(layer_numbers(cfg.layers if isinstance(cfg.layers, (str, int)) else list(cfg.layers), encoder.depth))
    embedder = Embedder(encoder, layers, cfg.pooling, pad_value=cfg.modality.pad_value, budget=_budget(cfg))

    parts = out.with_name(out.name + ".parts")
    size = cfg.rows_per_part
    count = -(-len(rows) // size)
    _begin(parts, _identity(cfg, source, layers, encoder.state_dict()))
    done = _whole_parts(parts)
    missing = [number for number in range(count) if number not in done]
    log.info("%d records, %d of %d parts exist already", len(rows), count - len(missing), count)
    loader = _loader(cfg, source, rows, missing, size)
    reported = time.perf_counter()
    for place, (number, packed) in enumerate(zip(missing, loader, strict=True)):
        done[number] = _write_part(parts, number, _unpacked(packed), embedder, cfg.dtype)
        if seconds_since(reported) > 10:
            reported = time.perf_counter()
            rate = (place + 1) * size / max(seconds_since(started), 1.0)
            log.info("part %d of %d, %.0f records a second", place + 1, len(missing), rate)
    written, rejected = _merge([done[number] for number in range(count)], out, [*source.rejected, *source.left_out])
    shutil.rmtree(parts)
    if rejected:
        log.info("%d records are unusable; see %s", rejected, out.with_name(out.name + ".rejected.jsonl"))
    log.info("%d rows: %s (%.0f s)", written, out, seconds_since(started))
    return written


def _records(cfg: DictConfig) -> tuple[Source, np.ndarray]:
    source = build(cfg.data.source)
    if isinstance(source, StreamingSource):
        raise ConfigError("data=stream has no fixed order, so embed cannot resume it; choose data=hf")
    look_at_images(cfg, source)
    prepare = build(cfg.modality.prepare)
    source = source if prepare is None else prepare(source)
    return source, np.arange(len(source))


def _budget(cfg: DictConfig) -> int:
    """The size of a batch, in units of the inputs' last axis."""
    if cfg.modality.batching is None:
        return 10**9
    return int(cfg.modality.batching.budget)


def _identity(
    cfg: DictConfig, source: Source, layers: tuple[int, ...], state: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Everything that the features depend on: data, weights, settings, versions."""
    weights = hashlib.sha256()
    for name, tensor in state.items():
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    settings = {
        "source": OmegaConf.to_container(cfg.data.source, resolve=True),
        "modality": OmegaConf.to_container(cfg.modality, resolve=True),
        "layers": layers,
        **{name: cfg[name] for name in ("pooling", "dtype", "rows_per_part")},
    }
    identity = {
        "records": len(source),
        "data": _content(source),
        "weights": weights.hexdigest(),
        "torch": torch.__version__,
        "settings": settings,
    }
    return json.loads(json.dumps(identity, default=str))


def _content(source: Source) -> str:
    """A hash of all records: their keys, with the size and time of files and the content of all other values."""
    digest = hashlib.sha256()
    for row in range(len(source)):
        try:
            sample = source[row]
        except BadSample as error:
            digest.update(f"{row}: {error}\n".encode("utf-8", "replace"))
            continue
        value = version_of(sample.value) if isinstance(sample.value, Path) else sample.value
        value = str(value) if isinstance(value, BadSample) else value
        digest.update(f"{sample.key}|".encode("utf-8", "replace"))
        digest.update(value.encode("utf-8", "replace") if isinstance(value, str) else np.asarray(value).tobytes())
    return digest.hexdigest()


def _begin(parts: Path, identity: dict[str, Any]) -> None:
    """Create the folder of the parts, or check that the parts in it belong to this command.

    Raises:
        ConfigError: the existing parts were made with other data, weights or settings.
    """
    note = parts / "identity.json"
    if not parts.is_dir() or not any(parts.glob("part-*")):
        remove(parts)
        parts.mkdir()
        replace_file(note, json.dumps(identity, indent=1).encode())
        return
    try:
        before = json.loads(note.read_bytes())
        differing = [name for name in identity if before[name] != identity[name]]
    except (OSError, ValueError, TypeError, KeyError):
        log.warning("%s is damaged, so the origin of its parts is unknown: they are computed again", note)
        remove(parts)
        _begin(parts, identity)
        return
    if differing:
        now, was = dict(leaves(identity)), dict(leaves(before))
        names = sorted(name for name in now | was if now.get(name) != was.get(name))[:5]
        shown = ", ".join(f"{name.removeprefix('settings.')}={now.get(name)} (was {was.get(name)})" for name in names)
        raise ConfigError(
            f"{parts} holds parts made with other {' and '.join(differing)}: {shown}. Remove it to start again, or "
            "choose another out"
        )
    sweep(parts)


def _whole_parts(parts: Path) -> dict[int, Path]:
    """The complete parts by number; damaged ones are removed."""
    found = {}
    for path in sorted(parts.glob("part-*")):
        if path.is_file() and _is_whole(path, path.read_bytes()):
            found[int(_PART.fullmatch(path.name)[1])] = path
        else:
            log.warning("%s is damaged (its hash does not match); the part is computed again", path)
            remove(path)
    return found


def _loader(cfg: DictConfig, source: Source, rows: np.ndarray, missing: list[int], size: int) -> Loader:
    """The samples of each missing part, in order, packed by `_packed`."""
    transform = build(cfg.modality.transform)
    dataset = EvaluationDataset(
        source=source, indices=rows, decode=build(cfg.modality.decode), transform=transform.evaluate
    )
    workers = available_workers() if cfg.data.num_workers == "auto" else cfg.data.num_workers
    return Loader(
        dataset,
        collate=_packed,
        num_workers=workers,
        prefetch_factor=1,
        batch_sampler=[list(range(number * size, min((number + 1) * size, len(rows)))) for number in missing],
    )


def _packed(samples: list[Sample]) -> tuple[list[Sample], list[torch.Size | None], torch.Tensor]:
    """The samples without their inputs, the shapes of the inputs, and all inputs concatenated into one flat tensor.

    One tensor instead of many: each tensor that a loader process sends uses an open file.
    """
    inputs = [sample.inputs for sample in samples]
    flat = [tensor.reshape(-1) for tensor in inputs if tensor is not None]
    shapes = [None if tensor is None else tensor.shape for tensor in inputs]
    return [replace(sample, inputs=None) for sample in samples], shapes, torch.cat(flat) if flat else torch.empty(0)


def _unpacked(packed: tuple[list[Sample], list[torch.Size | None], torch.Tensor]) -> list[Sample]:
    samples, shapes, flat = packed
    inputs = iter(flat.split([shape.numel() for shape in shapes if shape is not None]))
    return [
        sample if shape is None else replace(sample, inputs=next(inputs).view(shape))
        for sample, shape in zip(samples, shapes, strict=True)
    ]


def _write_part(parts: Path, number: int, samples: list[Sample], embedder: Embedder, dtype: str) -> Path:
    import pyarrow
    from pyarrow import parquet

    good = [sample for sample in samples if sample.inputs is not None]
    features = embedder([sample.inputs for sample in good])
    kind = pyarrow.float16() if dtype == "float16" else pyarrow.float32()
    columns: dict[str, Any] = {"key": pyarrow.array([sample.key for sample in good], pyarrow.string())}
    for place, layer in enumerate(embedder.layers):
        columns[f"layer_{layer}"] = _lists([record[place].astype(dtype) for record in features], kind, embedder.pooling)
    rejected = [list(pair) for sample in samples for pair in sample.rejected]
    table = pyarrow.table(columns).replace_schema_metadata({"rejected": json.dumps(rejected)})
    stream = pyarrow.BufferOutputStream()
    parquet.write_table(table, stream)
    content = stream.getvalue().to_pybytes()
    path = parts / f"part-{number:06d}-{hashlib.sha256(content).hexdigest()}.parquet"
    replace_file(path, content)
    return path


def _lists(arrays: list[np.ndarray], kind: Any, pooling: str) -> Any:
    """One list of numbers for each record, or a list of lists with pooling="none", as an arrow array."""
    import pyarrow

    if sum(array.size for array in arrays) >= 2**31:  # list offsets are int32
        raise ConfigError("a part has more than 2^31 numbers in a layer; lower rows_per_part")
    if pooling != "none":
        flat = np.concatenate(arrays) if arrays else np.empty(0, kind.to_pandas_dtype())
        width = len(arrays[0]) if arrays else 0
        offsets = np.arange(len(arrays) + 1, dtype=np.int32) * width
        return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(flat, kind))
    rows = np.concatenate(arrays) if arrays else np.empty((0, 0), kind.to_pandas_dtype())
    inner_offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    inner = pyarrow.ListArray.from_arrays(pyarrow.array(inner_offsets), pyarrow.array(rows.ravel(), kind))
    offsets = np.cumsum([0, *map(len, arrays)]).astype(np.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), inner)


def _merge(parts: list[Path], out: Path, rejected: list[tuple[str, str]]) -> tuple[int, int]:
    """Write all parts into one file, one row group each; return the number of rows and of rejected records.

    Raises:
        DataError: there are no rows, or a part is damaged.
    """
    import pyarrow
    from pyarrow import parquet

    listing = out.with_name(out.name + ".rejected.jsonl")
    rows = 0
    writer = None
    with writing(out) as unfinished:
        try:
            for path in parts:
                table = parquet.read_table(pyarrow.BufferReader(_read_part(path)))
                rejected += json.loads(table.schema.metadata[b"rejected"])
                table = table.replace_schema_metadata(None)
                if len(table):
                    writer = writer or parquet.ParquetWriter(unfinished, table.schema)
                    writer.write_table(table)
                    rows += len(table)
            if writer is not None:
                writer.close()
        except OSError:
            if writer is not None:
                with contextlib.suppress(OSError):  # closing retries the write that failed
                    writer.close()
            raise
        listing.unlink(missing_ok=True)  # left by an earlier file of the same name
        if rejected:
            lines = [json.dumps({"key": key, "reason": why}) + "\n" for key, why in rejected]
            replace_file(listing, "".join(lines).encode())
        if not rows:
            key, why = rejected[0]
            shutil.rmtree(parts[0].parent)
            raise DataError(f"none of {len(rejected)} records is usable; the first is {key}: {why}")
    return rows, len(rejected)


def _read_part(path: Path) -> bytes:
    content = path.read_bytes() if path.is_file() else b""
    if not _is_whole(path, content):
        raise DataError(f"{path} has changed on disk; run the same command again to compute this part again")
    return content


def _is_whole(path: Path, content: bytes) -> bool:
    name = _PART.fullmatch(path.name)
    return name is not None and hashlib.sha256(content).hexdigest() == name[2]
