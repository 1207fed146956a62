"""Probing by layer: a table and a chart of each layer's accuracy, for trained and untrained weights."""

import copy
import json
import logging
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from data2vec_train.batch import Batch
from data2vec_train.config.build import build
from data2vec_train.config.inputs import inherit, look_at_images
from data2vec_train.data.collate import Collator
from data2vec_train.data.datamodule import DataModule
from data2vec_train.data.dataset import EvaluationDataset
from data2vec_train.data.seeding import generator
from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.encoders.waveform import multiply_convolutions
from data2vec_train.errors import ConfigError, DataError
from data2vec_train.features.embedding import layer_numbers
from data2vec_train.features.measures import knn_accuracy, linear_accuracy, standard_error
from data2vec_train.probe.layers import attentive_probes, layer_features, simple_probes
from data2vec_train.report.page import Section, image_tag, table, write_report
from data2vec_train.system.clock import seconds_since
from data2vec_train.system.outputs import lock_directory, replace_file
from data2vec_train.training.assemble import quiet_libraries
from data2vec_train.training.callbacks.probe import raw_input
from data2vec_train.training.records import build_sources
from data2vec_train.training.run_directory import command_line
from data2vec_train.weights.base import PretrainedModel
from data2vec_train.weights.convert import load_pretrained, untrained

log = logging.getLogger(__name__)

NAMES = {"knn": "k-NN", "linear": "linear", "attentive": "attentive"}


def probe(cfg: DictConfig) -> float:
    """Probe every layer and return the linear accuracy of the chosen layer.

    Writes into Hydra's run directory: `probe.json`, `probe.csv`, and `probe.html` with the charts.

    Raises:
        DataError: the records have no classes.
    """
    quiet_libraries()
    started = time.perf_counter()
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    lock_directory(run_dir)
    model = load_pretrained(cfg.checkpoint, weights=cfg.weights)
    model = inherit(cfg, model, f"checkpoint={cfg.checkpoint}")
    replace_file(run_dir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True).encode())
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    multiply_convolutions(model)
    encoder = model.get_encoder().to(device)
    layers = layer_numbers(cfg.layers if isinstance(cfg.layers, (str, int)) else list(cfg.layers), encoder.depth)
    data = _labelled_data(cfg, encoder, run_dir)
    measures = [name for name in cfg.probes if name in NAMES]
    if len(measures) != len(cfg.probes) or not measures:
        raise ConfigError(f"probes={list(cfg.probes)}: expected some of {', '.join(NAMES)}")

    raw = [
        raw_input(build(cfg.modality.probe.raw), data.evaluation_batches(dataset))
        for dataset in (data.fit_set, data.test_set)
    ]
    pairs = (raw[0].features, raw[0].labels, raw[1].features, raw[1].labels)
    results: dict[str, Any] = {
        "raw": {
            "knn": knn_accuracy(*pairs, neighbours=cfg.neighbours),
            "linear": linear_accuracy(*pairs, l2=cfg.l2),
        }
    }
    chosen: dict[str, dict[str, dict[str, Any]]] = {}
    for which, candidate in (("untrained", _untrained(model, cfg.seed).to(device)), ("trained", encoder)):
        hits = _measure(cfg, candidate, data, layers, measures)
        results[which] = {name: [float(row.mean()) for row in rows] for name, rows in hits.items()}
        chosen[which] = {name: choose_layer(rows, layers, cfg.seed) for name, rows in hits.items()}
    sentences = [
        comparison(NAMES[name], *(chosen[which][name] for which in ("untrained", "trained"))) for name in measures
    ]
    for sentence in sentences:
        log.info("%s", sentence)
    facts = {
        "checkpoint": str(cfg.checkpoint),
        "layers": layers,
        "raw_name": cfg.modality.probe.raw_name,
        "classes": len(data.class_names),
        "fit_records": len(data.fit_set),
        "test_records": len(data.test_set),
        "pooling": cfg.modality.probe.pooling,
        "seed": cfg.seed,
        "chosen": chosen,
        "seconds": round(seconds_since(started), 1),
    }
    replace_file(run_dir / "probe.json", json.dumps(facts | results, indent=2).encode() + b"\n")
    lines = _table(results, layers, measures)
    replace_file(run_dir / "probe.csv", "".join(",".join(line) + "\n" for line in lines).encode())
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        log.info("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    log.info("report: %s", _write_page(cfg, run_dir, facts, results, layers, measures, lines, sentences))
    return chosen["trained"]["linear" if "linear" in measures else measures[0]]["accuracy"]


def _labelled_data(cfg: DictConfig, encoder: ModalityEncoder, run_dir: Path) -> DataModule:
    data, prepare = cfg.data, build(cfg.modality.prepare)
    sources = build_sources(data)
    source, test_source = sources["source"], sources.get("test_source")
    look_at_images(cfg, source)
    if prepare is not None:
        source = prepare(source)
        test_source = None if test_source is None else prepare(test_source)
    plain = {
        "masker": None,
        "masks_per_sample": 1,
        "grid": encoder.grid,
        "token_count": encoder.token_count,
        "seed": cfg.seed,
    }
    module = DataModule(
        source=source,
        test_source=test_source,
        held_out_fraction=data.held_out_fraction,
        max_probe_samples=data.max_probe_samples,
        decode=build(cfg.modality.decode),
        transform=build(cfg.modality.transform),
        batching=build(cfg.modality.batching),
        collator=Collator(**plain, pad_value=cfg.modality.pad_value),
        batch_size_per_device=data.batch_size_per_device,
        num_workers=data.num_workers,
        prefetch_factor=data.prefetch_factor,
        max_bad_fraction=data.max_bad_fraction,
        tolerated_bad_samples=data.tolerated_bad_samples,
        quarantine_path=run_dir / "quarantine.jsonl",
        seed=cfg.seed,
    )
    if module.test_set is None:
        raise DataError(
            "the records have no classes to predict: put files into a folder for each class, or name the column "
            f"with data.label_column ({module.probe_note})"
        )
    return module


def _untrained(model: PretrainedModel, seed: int) -> ModalityEncoder:
    """The same architecture with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return untrained(model)


def _measure(
    cfg: DictConfig, encoder: ModalityEncoder, data: DataModule, layers: list[int], measures: list[str]
) -> dict[str, list[np.ndarray]]:
    """Measure -> which test records are classified correctly, (m,) bool for each layer."""
    found: dict[str, list[np.ndarray]] = {}
    if {"knn", "linear"} & set(measures):
        fit, test = (
            layer_features(encoder, data.evaluation_batches(dataset), layers, cfg.modality.probe.pooling)
            for dataset in (data.fit_set, data.test_set)
        )
        found |= simple_probes(fit, test, neighbours=cfg.neighbours, l2=cfg.l2)
    if "attentive" in measures:
        found["attentive"] = attentive_probes(
            encoder,
            lambda epoch: _shuffled(data, data.fit_set, cfg.seed, epoch),
            lambda _: data.evaluation_batches(data.test_set),
            layers,
            num_classes=len(data.class_names),
            num_heads=cfg.attentive.num_heads,
            epochs=cfg.attentive.epochs,
            batch_size=cfg.attentive.batch_size,
            lr=cfg.attentive.lr,
            weight_decay=cfg.attentive.weight_decay,
            seed=cfg.seed,
        )
    return {name: found[name] for name in measures}


def _shuffled(data: DataModule, dataset: EvaluationDataset, seed: int, epoch: int) -> Iterator[Batch]:
    """The batches of an epoch in a new order; where all records are equally long, the records are shuffled too."""
    order = generator(seed, "order", epoch, len(dataset))
    if data.batching is None or dataset.lengths is None:
        rows = order.permutation(len(dataset))
        shuffled = copy.copy(dataset)
        shuffled.indices = dataset.indices[rows]
        yield from data.evaluation_batches(shuffled)
    else:
        yield from data.evaluation_batches(dataset, shuffle=order)


def choose_layer(hits: list[np.ndarray], layers: list[int], seed: int) -> dict[str, Any]:
    """The most accurate layer, and its accuracy on records that were not used to choose it, if there are enough.

    Args:
        hits: which test records are classified correctly, (m,) bool for each layer.
        layers: the numbers of the layers.
        seed: seed of the split into halves: one half chooses the layer, the other measures its accuracy.
    """
    rows = np.random.default_rng((seed, len(hits[0]))).permutation(len(hits[0]))
    is_apart = len(rows) >= 2 * _ENOUGH and len(layers) > 1
    choosing, testing = (rows[: len(rows) // 2], rows[len(rows) // 2 :]) if is_apart else (rows, rows)
    place = int(np.argmax([row[choosing].mean() for row in hits]))
    accuracy = float(hits[place][testing].mean())
    return {
        "layer": layers[place],
        "accuracy": accuracy,
        "standard_error": standard_error(accuracy, len(testing)),
        "records": len(testing),
        "chosen_on_the_same_records": len(layers) > 1 and not is_apart,
    }


def comparison(name: str, untrained: dict[str, Any], trained: dict[str, Any]) -> str:
    """A sentence that compares both results, with a note if the difference is not significant."""
    errors = [result["standard_error"] for result in (untrained, trained)]
    texts = [
        f"{result['accuracy']:.1%} +- {result['standard_error']:.1%} (layer {result['layer']})"
        for result in (untrained, trained)
    ]
    text = f"{name}: {texts[0]} untrained -> {texts[1]} trained, on {trained['records']} test records"
    notes = []
    if abs(trained["accuracy"] - untrained["accuracy"]) < 2 * float(np.hypot(*errors)) or trained["records"] < _FEW:
        notes.append("with so few records, the difference may be due to chance")
    if trained["chosen_on_the_same_records"]:
        notes.append("the layers were chosen on these same records, so both values are too high")
    return "; ".join([text, *notes])


_FEW = 30  # with fewer records, no difference counts as significant
_ENOUGH = 100  # records needed to choose the layer, and as many again to test it


def _table(results: dict[str, Any], layers: list[int], measures: list[str]) -> list[list[str]]:
    heads = ["layer", *(f"{NAMES[name]} {which}" for name in measures for which in ("untrained", "trained"))]
    rows = [
        [
            str(layer),
            *(f"{100 * results[which][name][place]:.1f}" for name in measures for which in ("untrained", "trained")),
        ]
        for place, layer in enumerate(layers)
    ]
    raw = ["raw input"]
    for name in measures:
        raw += ["", f"{100 * results['raw'][name]:.1f}" if name in results["raw"] else ""]
    return [heads, *rows, raw]


def _write_page(
    cfg: DictConfig,
    run_dir: Path,
    facts: dict[str, Any],
    results: dict[str, Any],
    layers: list[int],
    measures: list[str],
    lines: list[list[str]],
    sentences: list[str],
) -> Path:
    pictures = "".join(
        f"<figure><figcaption>{NAMES[name]}</figcaption>"
        f"{image_tag(_picture(results, layers, name), alt=f'{NAMES[name]} accuracy by layer')}</figure>"
        for name in measures
    )
    rows = [[f"<th>{escape(line[0])}</th>", *(f"<td>{cell}</td>" for cell in line[1:])] for line in lines[1:]]
    explanation = (
        "Accuracy in percent of classifiers on frozen features of each layer; layer 0 is the input of the first block. "
        "Trained should be higher than untrained (the same encoder with random weights). For k-NN and the linear "
        f"classifier, token features are pooled ({facts['pooling']}); the attentive classifier pools them itself. "
        f"{facts['fit_records']} records to fit on, {facts['test_records']} to test on, {facts['classes']} classes. "
        f"Raw input: {facts['raw_name']}."
    )
    summary = "".join(f"<p>{escape(sentence)}.</p>" for sentence in sentences)
    html = summary + f'<div class="charts">{pictures}</div>' + table([escape(cell) for cell in lines[0]], rows)
    command = f"<pre>{escape(command_line('data2vec_train.probe'))}</pre>"
    return write_report(
        run_dir / "probe.html",
        title=f"Accuracy by layer: {Path(str(cfg.checkpoint)).name}",
        sections=[
            Section("By layer", explanation, html),
            Section("The run", f"{facts['seconds']} seconds. The command repeats it.", command),
        ],
        config_yaml=OmegaConf.to_yaml(cfg, resolve=True),
    )


def _picture(results: dict[str, Any], layers: list[int], name: str) -> bytes:
    """A chart of accuracy over layers, trained and untrained, with the raw input as a dotted line."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(4.5, 2.6), dpi=130, facecolor="none", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="none")
    for which, colour in (("trained", "#3355cc"), ("untrained", "#d9730d")):
        axes.plot(layers, results[which][name], color=colour, marker="o", markersize=3.5, linewidth=1.8, label=which)
    if name in results["raw"]:
        axes.axhline(results["raw"][name], color="#3a3f47", linewidth=1.4, dashes=(1, 1.2), label="raw input")
    axes.set_xlabel("layer", fontsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.tick_params(labelsize=8.5, length=0)
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.spines[["left", "top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=3, fontsize=8.5, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
