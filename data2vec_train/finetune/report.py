"""The report of a fine-tuning run: scores, curves, and a few predictions."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from data2vec_train.finetune.base import HeadTask, PredictionMeter
from data2vec_train.finetune.data import FinetuneData
from data2vec_train.finetune.module import evaluate
from data2vec_train.report.page import (
    Section,
    charts,
    facts_section,
    image_tag,
    png_of,
    read_metrics,
    table,
    tiled,
    write_report,
)
from data2vec_train.training.run_directory import command_line
from data2vec_train.weights.base import PretrainedModel

SHOWN = 12  # number of records with their predictions
MAX_CLASSES = 25  # largest table of confusions
# Colours of pixel classes; neighbouring numbers get different colours.
COLOURS = np.array([[int(255 * ((n * f) % 1)) for f in (0.618, 0.382, 0.786)] for n in range(1, 257)], np.uint8)


def write_finetune_report(
    cfg: DictConfig, run_dir: Path, model: PretrainedModel, task: HeadTask, data: FinetuneData, summary: dict
) -> Path:
    """Write `report.html` into the run directory and return its path."""
    metrics = read_metrics(run_dir / "metrics.csv")
    sections = [_scores_section(task, summary)]
    names = {"Loss": {"training": "train/loss", "test": "test/loss"}}
    names |= {
        name.removeprefix("test/"): {"": name} for name in metrics if name.startswith("test/") and "loss" not in name
    }
    names |= {"Learning rate": {"": "train/lr"}, "Gradient norm": {"": "train/grad_norm"}}
    explanation = "Scores are measured on the test records, which are not used in training."
    sections.append(Section("Training curves", explanation, charts(metrics, names)))
    if data.test_set is not None:
        _, meter = evaluate(model, task, data.test_batches())
        if isinstance(meter, PredictionMeter):
            sections += _predictions_sections(task, meter)
        elif task.model_class.endswith("SemanticSegmentation"):
            sections.append(_maps_section(model, task, data))
    sections.append(facts_section(summary, command=command_line("data2vec_train.finetune")))
    return write_report(
        run_dir / "report.html",
        title=f"Fine-tuning: {summary['head']} on {Path(str(cfg.init_from)).name}",
        sections=sections,
        config_yaml=OmegaConf.to_yaml(cfg, resolve=True),
    )


def _scores_section(task: HeadTask, summary: dict) -> Section:
    best, last = summary["best"], summary["last"]
    if best is None:
        return Section("Scores", "There were no test records: data.held_out_fraction=0 and no data.test_source.", "")
    rows = [
        [f"<th>{escape(name)}</th>", f"<td>{best[name]:.4g}</td>", f"<td>{last[name]:.4g}</td>"]
        for name in last
        if name in best
    ]
    start = "random weights" if summary["random_weights"] else "pretrained weights"
    direction = "lowest" if task.lower_is_better else "highest"
    return Section(
        "Scores",
        f"On {summary['test_records']} test records, after training on {summary['train_records']} from {start}. The "
        f"weights in model/ are those with the {direction} {task.metric}, at step {best['step']}. They were chosen on "
        "the same records, so the best score is slightly optimistic. Scores are fractions of 1, except losses and "
        "perplexity.",
        table(["", "best", "last"], rows),
    )


def _predictions_sections(task: HeadTask, meter: PredictionMeter) -> list[Section]:
    rows = list(zip(meter.keys, meter.references, meter.predictions, strict=True))
    sections = []
    if rows and isinstance(rows[0][2], dict) and "index" in rows[0][2] and len(task.class_names) <= MAX_CLASSES:
        sections.append(_confusions(task.class_names, [(row[1], row[2]["index"]) for row in rows]))
    if not rows or isinstance(rows[0][2], np.ndarray):  # vectors are not readable
        return sections
    shown = [rows[place] for place in np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).astype(int)]
    cells = [
        [
            f"<td class='label'>{escape(str(key))}</td>",
            f"<td>{_as_html(task, wanted)}</td>",
            f"<td>{_as_html(task, found)}</td>",
        ]
        for key, wanted, found in shown
    ]
    heads = ["record", "reference", "prediction"]
    sections.append(Section("Some predictions", "A few test records, spread evenly.", table(heads, cells)))
    return sections


def _as_html(task: HeadTask, value: Any) -> str:
    """A prediction or a reference as a few words of HTML."""
    if isinstance(value, dict) and "label" in value:
        return f"{escape(str(value['label']))} ({value['probability']:.0%})"
    if isinstance(value, dict) and "segments" in value:
        value = " ".join(f"{part['label']} {part['start']:.2f}-{part['end']:.2f}" for part in value["segments"])
    elif isinstance(value, dict) and "labels" in value:
        value = ", ".join(value["labels"]) or "none"
    elif isinstance(value, int) and task.needs_classes:
        value = task.class_names[value]
    elif isinstance(value, list) and value and isinstance(value[0], float):  # 0 or 1 for each class
        value = ", ".join(name for name, on in zip(task.class_names, value, strict=True) if on) or "none"
    elif isinstance(value, tuple) and len(value) == 2:  # a text and its reference answers
        value = " / ".join(value[1] or [""])
    elif isinstance(value, np.ndarray):
        names = ["-" if place < 0 else task.class_names[place] for place in value[:: max(1, len(value) // 30)]]
        value = " ".join(names)
    elif isinstance(value, (list, tuple)):
        value = " ".join(map(str, value))
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return escape(text[:300]) or "<i>nothing</i>"


def _confusions(names: Sequence[str], pairs: Sequence[tuple[int, int]]) -> Section:
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    for wanted, found in pairs:
        counts[wanted, found] += 1
    share = counts / counts.sum(axis=1, keepdims=True).clip(1)
    rows = [
        [f"<th>{escape(name)}</th>"]
        + [
            f'<td style="padding:5px 9px; text-align:right; background: color-mix(in srgb, '
            f'{"#1a9850" if row == column else "#d1242f"} {70 * share[row, column]:.0f}%, transparent)">'
            f"{counts[row, column] or ''}</td>"
            for column in range(len(names))
        ]
        for row, name in enumerate(names)
    ]
    return Section(
        "Confusions",
        "Number of test records by true class (rows) and predicted class (columns); the diagonal is correct.",
        table(["", *(escape(name) for name in names)], rows),
    )


def _maps_section(model: PretrainedModel, task: HeadTask, data: FinetuneData) -> Section:
    rows = []
    for batch in data.test_batches():
        found = task.predict(model, batch.to(model.device))
        with_map = [place for place, wanted in enumerate(batch.references) if wanted is not None]
        for place in with_map[: 6 - len(rows)]:
            picture = task.inputs.transform.display(batch.inputs["pixel_values"][place])
            maps = [batch.references[place], found[place]]
            pictures = [np.uint8(picture * 255)] + [COLOURS[np.asarray(classes, np.int64)] for classes in maps]
            cells = [image_tag(png_of(tiled(image / 255.0, side=140)), alt="map") for image in pictures]
            rows.append([f"<td>{cell}</td>" for cell in cells])
        if len(rows) >= 6:
            break
    return Section(
        "Some maps",
        "Image, reference and prediction; one colour for each class. The image is shown as the model receives it.",
        table(["image", "reference", "prediction"], rows, css="pictures"),
    )
