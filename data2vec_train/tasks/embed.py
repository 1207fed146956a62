"""Features of many files, in parts that a killed run does not lose, then in one parquet file."""

import hashlib
import json
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from data2vec_train.config import build
from data2vec_train.data.datamodule import available_workers, ignore_interrupts
from data2vec_train.data.dataset import EvaluationDataset, Sample
from data2vec_train.data.sources import Source, StreamingSource
from data2vec_train.embedding import Embedder, layer_numbers
from data2vec_train.encoders.audio import multiply_convolutions
from data2vec_train.errors import ConfigError, DataError
from data2vec_train.hf.convert import load_pretrained
from data2vec_train.tasks.inputs import inherit
from data2vec_train.tasks.pretrain import quiet_libraries

log = logging.getLogger(__name__)


def embed(cfg: DictConfig) -> int:
    """Write `cfg.out`, a row for each record that could be used, and return the number of rows.

    Parts of `cfg.rows_per_part` records lie in `OUT.parts/` until all are there. A part is a function of its records
    alone: whatever interrupts the work, the file is the same in the end. Columns: `key`, and `layer_N` with the
    features. Records that could not be used are listed in `OUT.rejected.jsonl`.

    Raises:
        ConfigError: the file is there already, or parts of another command are.
        DataError: no record can be used.
    """
    quiet_libraries()
    out = Path(cfg.out).expanduser()
    if out.exists():
        raise ConfigError(f"out={out} exists already; choose another name, or remove it")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"out={out}: there is no folder {out.absolute().parent}")
    started = time.monotonic()
    model = load_pretrained(cfg.checkpoint, weights=cfg.weights)
    inherit(cfg, model, f"checkpoint={cfg.checkpoint}")
    source, rows = _records(cfg)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    multiply_convolutions(model)
    encoder = model.get_encoder().to(device).eval()
    layers = tuple(layer_numbers(cfg.layers if isinstance(cfg.layers, (str, int)) else list(cfg.layers), encoder.depth))
    embedder = Embedder(encoder, layers, cfg.pooling, pad_value=cfg.modality.pad_value, budget=_budget(cfg))

    parts = out.with_name(out.name + ".parts")
    size = cfg.rows_per_part
    count = -(-len(rows) // size)
    done = _begin(parts, _identity(cfg, source, layers, encoder.state_dict()), out)
    missing = [number for number in range(count) if number not in done]
    log.info("%d records, %d of %d parts are there already", len(rows), count - len(missing), count)
    loader = _loader(cfg, source, rows, missing, size)
    reported = time.monotonic()
    for place, (number, packed) in enumerate(zip(missing, loader, strict=True)):
        _write_part(parts, number, _unpacked(packed), embedder, cfg.dtype)
        if time.monotonic() - reported > 10:
            reported = time.monotonic()
            rate = (place + 1) * size / (reported - started)
            log.info("part %d of %d, %.0f records a second", place + 1, len(missing), rate)
    written, rejected = _merge(parts, count, out, [*source.rejected, *source.left_out])
    if rejected:
        log.info("%d records cannot be used; see %s", rejected, out.with_name(out.name + ".rejected.jsonl"))
    log.info("%d rows: %s (%.0f s)", written, out, time.monotonic() - started)
    return written


def _records(cfg: DictConfig) -> tuple[Source, np.ndarray]:
    source = build(cfg.data.source)
    if isinstance(source, StreamingSource):
        raise ConfigError("data=stream has no order to resume in; choose data=hf")
    prepare = build(cfg.modality.prepare)
    source = source if prepare is None else prepare(source)
    return source, np.arange(len(source))


def _budget(cfg: DictConfig) -> int:
    """Of a batch, in units of the inputs' last axis."""
    if cfg.modality.batching is None:
        return 10**9
    return int(cfg.modality.batching.budget)


def _identity(cfg: DictConfig, source: Source, layers: tuple[int, ...], state: dict[str, torch.Tensor]) -> str:
    """A hash of all that the features depend on, but for the content of the records."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    facts = {
        "source": OmegaConf.to_container(cfg.data.source, resolve=True),
        "modality": OmegaConf.to_container(cfg.modality, resolve=True),
        "layers": layers,
        "how": [cfg.pooling, cfg.dtype, cfg.rows_per_part],
        "records": [len(source), source[0].key, source[len(source) - 1].key],
    }
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _begin(parts: Path, identity: str, out: Path) -> set[int]:
    """Numbers of the parts that are there.

    Raises:
        ConfigError: they are those of another command.
    """
    parts.mkdir(exist_ok=True)
    note = parts / "identity"
    if note.is_file() and note.read_text() != identity:
        raise ConfigError(
            f"{parts} holds parts made with other weights, data or settings; remove it, or choose another out"
        )
    _replace(note, identity.encode())
    return {int(path.stem.removeprefix("part-")) for path in parts.glob("part-*.parquet")}


def _replace(path: Path, content: bytes) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def _loader(cfg: DictConfig, source: Source, rows: np.ndarray, missing: list[int], size: int) -> DataLoader:
    """The samples of each missing part, in order, as `_packed` makes them."""
    transform = build(cfg.modality.transform)
    dataset = EvaluationDataset(
        source=source, indices=rows, decode=build(cfg.modality.decode), transform=transform.evaluate
    )
    workers = available_workers() if cfg.data.num_workers == "auto" else cfg.data.num_workers
    return DataLoader(
        dataset,
        batch_sampler=[list(range(number * size, min((number + 1) * size, len(rows)))) for number in missing],
        collate_fn=_packed,
        num_workers=workers,
        prefetch_factor=1 if workers else None,
        worker_init_fn=ignore_interrupts,
    )


def _packed(samples: list[Sample]) -> tuple[list[Sample], list[torch.Size | None], torch.Tensor]:
    """Samples without inputs, the shapes of these, and all end to end: each tensor that is sent takes an open file."""
    inputs = [sample.inputs for sample in samples]
    flat = [one.reshape(-1) for one in inputs if one is not None]
    shapes = [None if one is None else one.shape for one in inputs]
    return [replace(one, inputs=None) for one in samples], shapes, torch.cat(flat) if flat else torch.empty(0)


def _unpacked(packed: tuple[list[Sample], list[torch.Size | None], torch.Tensor]) -> list[Sample]:
    samples, shapes, flat = packed
    inputs = iter(flat.split([shape.numel() for shape in shapes if shape is not None]))
    return [
        sample if shape is None else replace(sample, inputs=next(inputs).view(shape))
        for sample, shape in zip(samples, shapes, strict=True)
    ]


def _write_part(parts: Path, number: int, samples: list[Sample], embedder: Embedder, dtype: str) -> None:
    import pyarrow
    from pyarrow import parquet

    good = [sample for sample in samples if sample.inputs is not None]
    features = embedder([sample.inputs for sample in good])
    kind = pyarrow.float16() if dtype == "float16" else pyarrow.float32()
    columns: dict[str, Any] = {"key": pyarrow.array([sample.key for sample in good], pyarrow.string())}
    for place, layer in enumerate(embedder.layers):
        columns[f"layer_{layer}"] = _lists([one[place].astype(dtype) for one in features], kind, embedder.pooling)
    rejected = [list(pair) for sample in samples for pair in sample.rejected]
    table = pyarrow.table(columns).replace_schema_metadata({"rejected": json.dumps(rejected)})
    path = parts / f"part-{number:06d}.parquet"
    unfinished = path.with_name(path.name + ".unfinished")
    parquet.write_table(table, unfinished)
    unfinished.replace(path)


def _lists(arrays: list[np.ndarray], kind: Any, pooling: str) -> Any:
    """Rows of numbers, or with "none" of rows of numbers, as an arrow array."""
    import pyarrow

    if sum(one.size for one in arrays) >= 2**31:  # what offsets can count
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


def _merge(parts: Path, count: int, out: Path, rejected: list[tuple[str, str]]) -> tuple[int, int]:
    """The parts in one file, a row group each; how many rows there are and how many records were rejected in all.

    Raises:
        DataError: there are no rows.
    """
    from pyarrow import parquet

    unfinished = out.with_name(out.name + ".unfinished")
    rows = 0
    writer = None
    try:
        for number in range(count):
            table = parquet.read_table(parts / f"part-{number:06d}.parquet")
            rejected += json.loads(table.schema.metadata[b"rejected"])
            table = table.replace_schema_metadata(None)
            if len(table):
                writer = writer or parquet.ParquetWriter(unfinished, table.schema)
                writer.write_table(table)
                rows += len(table)
    finally:
        if writer is not None:
            writer.close()
    listing = out.with_name(out.name + ".rejected.jsonl")
    listing.unlink(missing_ok=True)  # of an earlier file with this name
    if rejected:
        lines = [json.dumps({"key": key, "reason": why}) + "\n" for key, why in rejected]
        _replace(listing, "".join(lines).encode())
    if not rows:
        key, why = rejected[0]
        shutil.rmtree(parts)
        raise DataError(f"none of {len(rejected)} records can be used; the first is {key}: {why}")
    unfinished.replace(out)
    shutil.rmtree(parts)
    return rows, len(rejected)
