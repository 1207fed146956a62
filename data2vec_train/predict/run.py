"""Predictions of a fine-tuned model for files: transcripts, classes, answers, maps."""

import itertools
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from data2vec_train.config.build import build
from data2vec_train.config.inputs import inherit
from data2vec_train.data.audio import AudioWindows
from data2vec_train.data.loading import available_workers
from data2vec_train.encoders.waveform import multiply_convolutions
from data2vec_train.errors import ConfigError, DataError
from data2vec_train.finetune.base import Examples
from data2vec_train.finetune.data import ExampleTestDataset, test_loader
from data2vec_train.finetune.inputs import inputs_of
from data2vec_train.finetune.run import FACTS_NAME, build_source, prepared, task_of
from data2vec_train.finetune.speech import SpeechTask
from data2vec_train.paths import config_directory
from data2vec_train.system.clock import seconds_since
from data2vec_train.system.outputs import output_path, refuse_existing, sole_writer, writing
from data2vec_train.training.assemble import quiet_libraries
from data2vec_train.weights.base import PretrainedModel
from data2vec_train.weights.convert import load_pretrained
from data2vec_train.weights.files import read_json

log = logging.getLogger(__name__)

LISTING = "predictions.jsonl"  # in a folder of maps
SHOWN = 10  # number of predictions that are printed
WINDOW = 512  # number of records that are batched by length together, then written in their order


def predict(cfg: DictConfig) -> int:
    """Write `cfg.out` and return the number of records with a prediction.

    One line of JSON for each record, {"key": ..., "prediction": ...}; unusable records have "error" instead of
    "prediction". Transcripts also have "words", with times in seconds. Recordings longer than `window_seconds` are
    read in overlapping windows; the middle parts of the windows are joined into one prediction. Class maps are written
    as .png files into the folder `cfg.out`, and their names into `predictions.jsonl` there.

    Raises:
        ConfigError: the weights have no head, or `out` exists.
        DataError: no record is usable.
    """
    quiet_libraries()
    out = output_path(cfg.out)
    with sole_writer(out):
        refuse_existing(out)
        return _predict(cfg, out)


def _predict(cfg: DictConfig, out: Path) -> int:
    started = time.perf_counter()
    model = load_pretrained(cfg.checkpoint)
    if model.base_model is model:
        raise ConfigError(
            f"checkpoint={cfg.checkpoint} is a {type(model).__name__}, an encoder without a head: fine-tune it first "
            "(python -m data2vec_train.finetune), or compute features (python -m data2vec_train.embed)"
        )
    model = inherit(cfg, model, f"checkpoint={cfg.checkpoint}")
    task = task_of(model, inputs_of(cfg, model), _head_settings(cfg, model))
    source = prepared(cfg, task, build_source(cfg, task, labelled=False), labelled=False)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    multiply_convolutions(model)
    model = model.to(device).eval()
    dataset = ExampleTestDataset(task=task, source=source, indices=np.arange(len(source)))
    workers = available_workers() if cfg.data.num_workers == "auto" else cfg.data.num_workers
    maps = task.model_class.endswith("SemanticSegmentation")
    joined = Joined(task, source) if isinstance(source, AudioWindows) else None
    good, bad = 0, len(source.rejected) + len(source.left_out)
    lines: dict[int, dict[str, Any]] = {}  # row -> line, for the current window
    reported = time.perf_counter()
    with writing(out) as unfinished, _listing(unfinished, maps).open("w", encoding="utf-8") as file, torch.no_grad():
        _write(file, [{"key": key, "error": why} for key, why in (*source.rejected, *source.left_out)])
        loader = test_loader(dataset, task, build(cfg.modality.batching), workers, window=WINDOW)
        for rows, batch in zip(loader.batch_sampler, loader, strict=True):
            if lines and rows[0] // WINDOW != next(iter(lines)) // WINDOW:
                _write(file, [lines.pop(row) for row in sorted(lines)])
            if joined is not None:
                for row, line in joined.add(model, rows, batch, device):
                    lines[row] = line
                    good, bad = good + ("prediction" in line), bad + ("error" in line)
                continue
            found = task.predict(model, batch.to(device)) if len(batch) else []
            for row, key, answer in zip(batch.places, batch.keys, found, strict=True):
                lines[row] = {
                    "key": key,
                    "prediction": _map_file(unfinished, key, answer, cfg) if maps else _plain(answer),
                }
            broken = [row for row in rows if row not in batch.places]
            for row, (key, why) in zip(broken, batch.rejected, strict=True):
                lines[row] = {"key": key, "error": why}
            good, bad = good + len(batch), bad + len(broken)
            if seconds_since(reported) > 10:
                reported = time.perf_counter()
                log.info("%d of %d records", good + bad, len(source))
        _write(file, [lines[row] for row in sorted(lines)])
    path = out / LISTING if maps else out
    if not good:
        raise DataError(f"none of {bad} records is usable; see {path}")
    _show(path)
    failed = f", {bad} records unusable" if bad else ""
    log.info("%d predictions%s: %s (%.0f s)", good, failed, path, seconds_since(started))
    return good


def _listing(out: Path, maps: bool) -> Path:
    """The path of the file with one line for each record; makes the folder of maps."""
    if not maps:
        return out
    out.mkdir()
    return out / LISTING


class Joined:
    """Joins the windows of each recording into one prediction; keeps only the frames' outputs, not the windows.

    Args:
        task: the task of a head that reads frames.
        source: the windows.
    """

    def __init__(self, task: SpeechTask, source: AudioWindows) -> None:
        self.task = task
        self.source = source
        hop = math.prod(task.inputs.token_count.strides)
        self.edge = source.stride_samples // hop
        self.step = source.step_samples // hop
        # Recording -> window -> (outputs of its frames or the reason why it is unusable, whether it is not silent).
        self.parts: dict[int, dict[int, tuple[Tensor | str, bool]]] = {}

    def add(
        self, model: PretrainedModel, rows: Sequence[int], batch: Examples, device: str
    ) -> list[tuple[int, dict[str, Any]]]:
        """The last window and the output line of every recording that this batch completes.

        Args:
            model: the model, on the device.
            rows: all windows of the batch.
            batch: the windows among them that could be read.
            device: the device of the model.
        """
        frames = self.task.predict(model, batch.to(device)) if len(batch) else []
        sounds = [bool(wave.any()) for wave in batch.inputs.get("input_values", ())]
        found: dict[int, tuple[Tensor | str, bool]] = {
            row: pair for row, *pair in zip(batch.places, frames, sounds, strict=True)
        }
        broken = [row for row in rows if row not in batch.places]
        found |= {row: (why, True) for row, (_, why) in zip(broken, batch.rejected, strict=True)}
        lines = []
        for row in rows:
            recording = int(self.source.recordings[row])
            parts = self.parts.setdefault(recording, {})
            parts[row] = found[row]
            if len(parts) == self.source.parts[recording]:
                lines.append((max(parts), self._line(recording, self.parts.pop(recording))))
        return lines

    def _line(self, recording: int, parts: dict[int, tuple[Tensor | str, bool]]) -> dict[str, Any]:
        first, last = min(parts), max(parts)
        key = self.source[first].key
        why = next((value for _, (value, _) in sorted(parts.items()) if isinstance(value, str)), None)
        if why is None and not any(sound for _, sound in parts.values()):
            why = "silence: all samples are equal"
        if why is not None:
            return {"key": key, "error": why}
        middles = [
            value[self.edge if row > first else 0 : None if row == last else self.edge + self.step]
            for row, (value, _) in sorted(parts.items())
        ]
        answer = self.task.read(torch.cat(middles), int(self.source.samples[recording]))
        if "text" in answer:
            return {"key": key, "prediction": answer["text"], "words": answer["words"]}
        return {"key": key, "prediction": _plain(answer)}


def _write(file: TextIO, lines: list[dict[str, Any]]) -> None:
    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _show(path: Path) -> None:
    """Log the first predictions."""
    with path.open(encoding="utf-8") as file:
        found = (line for line in map(json.loads, file) if "prediction" in line)
        for line in itertools.islice(found, SHOWN):
            log.info("%s: %s", line["key"], _in_words(line["prediction"]))


def _in_words(prediction: Any) -> str:
    if isinstance(prediction, dict) and "probability" in prediction:
        return f"{prediction['label']} ({prediction['probability']:.0%})"
    if isinstance(prediction, list) and prediction and isinstance(prediction[0], float):
        return f"a vector of {len(prediction)} numbers"
    if isinstance(prediction, dict):
        prediction = next(iter(prediction.values()))
    return str(prediction)[:200] or "(nothing)"


def _head_settings(cfg: DictConfig, model: PretrainedModel) -> dict[str, Any]:
    """The settings of the fine-tuning, or the defaults of the head; then changed by those of the command."""
    facts = None if model.source is None else model.source / FACTS_NAME
    if facts is not None and facts.is_file():
        settings = read_json(facts)["head"]
        if settings.get("maps") is not None:  # the maps of the training images do not belong to the new images
            settings |= {"maps": None, "map_column": "map"}
    else:
        settings = _default_settings(cfg, model)
    wrong = sorted(set(cfg.head) - set(settings))
    if wrong:
        known = ", ".join(name for name in settings if name[0] != "_")
        raise ConfigError(f"head.{wrong[0]}: this head has no such setting; expected one of {known}")
    return settings | OmegaConf.to_container(cfg.head, resolve=True)


def _default_settings(cfg: DictConfig, model: PretrainedModel) -> dict[str, Any]:
    from data2vec_train.config.check.schema import find

    for path in sorted((config_directory() / "head").glob("*.yaml")):
        node = OmegaConf.load(path)
        if "_target_" not in node:
            continue
        definition = find(node._target_)
        names = [
            getattr(statement.value, "value", None)
            for statement in definition.node.body
            if hasattr(statement, "targets")
        ]
        if type(model).__name__ in names:
            if OmegaConf.is_missing(node, "classes"):
                node.classes, node.map_column = model.config.num_labels, "map"
            whole = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
            whole.head = node
            return OmegaConf.to_container(whole.head, resolve=True)
    raise ConfigError(f"{type(model).__name__} has no predictions")


def _plain(answer: Any) -> Any:
    """A prediction as values that JSON can hold."""
    if isinstance(answer, np.ndarray):
        return [round(float(value), 6) for value in answer]
    if isinstance(answer, dict):
        kept = {name: value for name, value in answer.items() if name in ("label", "probability", "labels", "segments")}
        return kept | ({"probability": round(kept["probability"], 6)} if "probability" in kept else {})
    return answer


def _map_file(folder: Path, key: str, classes: np.ndarray, cfg: DictConfig) -> str:
    """Write a class map as .png below `folder`; return its relative path, named after the image."""
    from PIL import Image

    name = Path(*[part for part in Path(key.replace(":", "_")).parts if part not in ("/", "..")])
    whole = name.with_name(name.name + ".png")
    name = name.with_suffix(".png") if name.suffix.lower() in cfg.modality.extensions else whole
    name = whole if (folder / name).exists() else name  # a.jpg beside a.png
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(classes).save(folder / name)
    return str(name)
