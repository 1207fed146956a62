"""Verbs as Python calls: every kind of data object, the same numbers as the command, one-line errors, no traces."""

import csv
import inspect
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pandas
import pytest
import torch
from PIL import Image

import data2vec_train
from data2vec_train import ConfigError, DataError, Run, embed, export, finetune, predict, pretrain, probe
from data2vec_train.data.sources.objects import as_source
from data2vec_train.errors import BadSample

TINY = {
    "precision": "fp32",
    "strategy.accelerator": "cpu",
    "data.num_workers": 0,
    "size.dim": 32,
    "size.depth": 2,
    "size.num_heads": 2,
    "size.ffn_dim": 64,
    "report": False,
}
STEPS = {"max_steps": 2}
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 32, 32), dtype=np.uint8)
LABELS = [index % 3 for index in range(24)]
WAVES = RNG.normal(0, 0.1, (12, 16000)).astype(np.float32)
TEXTS = [f"line {index}: the ship sails to the harbour on day {index}" * 5 for index in range(40)]


def losses(run: Run) -> list[str]:
    with (run.path / "metrics.csv").open(newline="") as file:
        return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]


class Pairs(torch.utils.data.Dataset):
    """A data set of torch, as torchvision's are."""

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, index: int):
        return Image.fromarray(PIXELS[index]), LABELS[index]


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        for pixels in PIXELS:
            yield Image.fromarray(pixels)


def hugging_face(stream: bool = False):
    import datasets

    data = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(pixels) for pixels in PIXELS], "label": LABELS},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}),
    )
    return data.to_iterable_dataset(num_shards=1) if stream else data


def polars_frame():
    return pytest.importorskip("polars").DataFrame({"image": [p.tolist() for p in PIXELS], "label": LABELS})


IMAGES = {
    "list of PIL": lambda: [Image.fromarray(pixels) for pixels in PIXELS],
    "array": lambda: PIXELS,
    "list of arrays": lambda: list(PIXELS),
    "tensor": lambda: torch.from_numpy(PIXELS)[:, None],
    "floats from 0 to 1": lambda: torch.from_numpy(PIXELS)[:, None] / 255,
    "pairs with labels": lambda: [(Image.fromarray(p), label) for p, label in zip(PIXELS, LABELS, strict=True)],
    "torch Dataset": Pairs,
    "torch IterableDataset": Endless,
    "HF Dataset": hugging_face,
    "HF IterableDataset": lambda: hugging_face(stream=True),
    "pandas": lambda: pandas.DataFrame({"image": list(PIXELS), "label": LABELS}),
    "polars": polars_frame,
    "dict of columns": lambda: {"image": list(PIXELS), "label": LABELS},
    "list of dicts": lambda: [{"image": p, "label": n} for p, n in zip(PIXELS, LABELS, strict=True)],
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images_of_every_kind_give_the_same_pixels(kind: str) -> None:
    source = as_source(IMAGES[kind](), kind="image")
    records = list(source.first()) if "Iterable" in kind else [source[index] for index in range(len(source))]
    from data2vec_train.data.image import decode_image

    found = [np.asarray(decode_image(record.value, channels=1, max_pixels=10**6)).reshape(32, 32) for record in records]
    assert len(found) == len(PIXELS)
    assert all((image == pixels).all() for image, pixels in zip(found, PIXELS, strict=True))


@pytest.mark.parametrize("kind", ["pairs with labels", "torch Dataset", "HF Dataset", "pandas", "list of dicts"])
def test_labels_come_along(kind: str) -> None:
    source = as_source(IMAGES[kind](), kind="image")
    assert source.labels().tolist() == LABELS
    assert len(source.class_names) == 3


def test_labels_that_are_given_go_first_and_false_means_none() -> None:
    images = IMAGES["pairs with labels"]()
    given = as_source(images, kind="image", labels=["x", "y"] * 12)
    assert given.class_names == ["x", "y"]
    assert as_source(images, kind="image", labels=False).labels() is None


def test_an_image_beyond_the_range_of_the_first_ones_is_broken_and_not_white() -> None:
    images = [pixels / 255.0 for pixels in PIXELS] + [PIXELS[0] * 1.0]
    value = as_source(images, kind="image")[len(PIXELS)].value
    assert isinstance(value, BadSample)
    assert "those of the first images lie in [0, 1]" in str(value)


SOUNDS = {
    "array": lambda: WAVES,
    "pairs with a rate": lambda: [(wave, 16000) for wave in WAVES],
    "tensors with channels": lambda: [(torch.from_numpy(wave)[None], 16000) for wave in WAVES],
    "dicts as datasets decodes them": lambda: [{"array": wave, "sampling_rate": 16000} for wave in WAVES],
    "torchaudio's items": lambda: [(torch.from_numpy(wave)[None], 16000, "yes") for wave in WAVES],
}


@pytest.mark.parametrize("kind", SOUNDS)
def test_recordings_of_every_kind_give_the_same_waveform(kind: str) -> None:
    from data2vec_train.data.audio import decode_audio

    source = as_source(SOUNDS[kind](), kind="audio")
    rules = {"sample_rate_hz": 16000, "channels": 1, "min_seconds": 0.1, "min_level": 1e-4, "max_level": 10.0}
    for index, wave in enumerate(WAVES):
        np.testing.assert_array_equal(decode_audio(source[index].value, **rules), wave)
    assert source.class_names == (["yes"] if kind == "torchaudio's items" else None)


def test_recordings_at_another_rate_are_resampled() -> None:
    from data2vec_train.data.audio import decode_audio

    source = as_source([(WAVES[0], 8000)], kind="audio")
    rules = {"sample_rate_hz": 16000, "channels": 1, "min_seconds": 0.1, "min_level": 1e-4, "max_level": 10.0}
    assert len(decode_audio(source[0].value, **rules)) == 32000


# Of each modality one run for each kind of road: in memory, with columns, a stream.
RUNS = [
    ("vision", "list of PIL", lambda: IMAGES["list of PIL"]()),
    ("vision", "HF IterableDataset", lambda: hugging_face(stream=True)),
    ("vision", "torch IterableDataset", Endless),
    ("vision", "HF Dataset", hugging_face),
    ("audio", "pairs with a rate", SOUNDS["pairs with a rate"]),
    ("text", "texts", lambda: TEXTS),
    ("text", "pandas", lambda: pandas.DataFrame({"text": TEXTS})),
]


@pytest.mark.parametrize(("modality", "kind", "data"), RUNS, ids=[f"{case[0]}: {case[1]}" for case in RUNS])
def test_pretrain_takes_it(modality: str, kind: str, data, tmp_path: Path) -> None:
    more = {"modality.tokenizer.train_vocab_size": 300} if modality == "text" else {}
    run = pretrain(modality=modality, data=data(), out=tmp_path / "run", **TINY, **STEPS, **more)
    assert run.summary["steps"] == 2
    assert len(run.metrics) > 0
    assert np.isfinite(run.summary["loss_last"])
    assert not run.encoder().training


def test_a_call_has_the_losses_of_the_command_and_a_second_call_those_of_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(folder / f"{index}.png")
    settings = {**TINY, **STEPS, "modality": "vision", "data": folder}
    first = pretrain(out=tmp_path / "first", **settings)
    torch.manual_seed(123)
    torch.set_default_dtype(torch.float32)
    second = pretrain(out=tmp_path / "second", **settings)
    typed = [
        "modality=vision",
        "data=folder",
        f"data.path={folder}",
        "trainer.max_steps=2",
        f"hydra.run.dir={tmp_path / 'command'}",
    ]
    typed += [f"{name}={str(value).lower()}" for name, value in TINY.items()]
    subprocess.run([sys.executable, "-m", "data2vec_train", *typed], check=True, capture_output=True, cwd=tmp_path)
    assert losses(first) == losses(second) == losses(Run(tmp_path / "command"))


def test_the_process_is_left_as_it_was(tmp_path: Path) -> None:
    import logging

    from hydra.core.hydra_config import HydraConfig

    torch.manual_seed(5)
    before = torch.get_rng_state(), logging.getLogger("data2vec_train").handlers[:], torch.get_num_threads()
    pretrain(modality="vision", data=PIXELS, out=tmp_path / "run", **TINY, **STEPS)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert logging.getLogger("data2vec_train").handlers == before[1]
    assert torch.get_num_threads() == before[2]
    assert not HydraConfig.initialized()


def test_an_unfinished_run_goes_on_and_other_objects_are_refused(tmp_path: Path) -> None:
    settings = {**TINY, "modality": "vision", "callbacks.checkpoint.every_n_steps": 2}

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("the machine is gone")

    whole = pretrain(data=PIXELS, out=tmp_path / "whole", max_steps=4, **settings)
    with pytest.raises(RuntimeError, match="gone"):
        pretrain(data=PIXELS, out=tmp_path / "run", max_steps=4, callbacks=[Stop()], **settings)
    with pytest.raises(ConfigError, match="has changed since"):
        pretrain(data=PIXELS[::-1].copy(), out=tmp_path / "run", max_steps=4, **settings)
    run = pretrain(data=PIXELS, out=tmp_path / "run", max_steps=4, **settings)
    assert losses(run) == losses(whole)


def test_callbacks_and_loggers_of_lightning_act(tmp_path: Path) -> None:
    seen = []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            seen.append(trainer.global_step)

    from lightning.pytorch.loggers import CSVLogger

    own = CSVLogger(tmp_path / "own")
    pretrain(modality="vision", data=PIXELS, out=tmp_path / "run", callbacks=Count(), logger=own, **TINY, **STEPS)
    assert seen == [1, 2]
    assert list((tmp_path / "own").rglob("metrics.csv"))


def test_a_trainer_of_ones_own_trains_the_parts(tmp_path: Path) -> None:
    module, data = data2vec_train.parts(modality="vision", data=PIXELS, out=tmp_path / "run", **TINY, **STEPS)
    before = {name: weight.clone() for name, weight in module.objective.student.named_parameters()}
    trainer = L.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    trainer.fit(module, datamodule=data)
    moved = [name for name, weight in module.objective.student.named_parameters() if (weight != before[name]).any()]
    assert len(moved) > len(before) / 2


def test_the_other_verbs(tmp_path: Path) -> None:
    images = [Image.fromarray(pixels) for pixels in PIXELS]
    run = pretrain(modality="vision", data=images, labels=LABELS, out=tmp_path / "run", **TINY, **STEPS)
    features = embed(run, images, **{"data.num_workers": 0})
    assert list(features["key"]) == [f"data[{index}]" for index in range(24)]
    assert np.stack(features["layer_2"]).shape == (24, 32)
    measured = probe(run, data=images, labels=LABELS, probes=["knn"], out=tmp_path / "probe", device="cpu")
    assert measured.summary["classes"] == 3
    few = {name: value for name, value in TINY.items() if not name.startswith("size")}
    tuned = finetune(
        run, head="image", data=images, labels=LABELS, test_data=images[:6], test_labels=LABELS[:6],
        out=tmp_path / "tuned", max_steps=2, **few,
    )  # fmt: skip
    said = predict(tuned, images[:3], **{"data.num_workers": 0})
    assert [row["key"] for row in said] == ["data[0]", "data[1]", "data[2]"]
    assert all("prediction" in row for row in said)
    folder = export(run, tmp_path / "exported")
    assert (folder / "model.safetensors").is_file()


def test_transcripts_come_from_a_column(tmp_path: Path) -> None:
    run = pretrain(modality="audio", data=SOUNDS["array"](), out=tmp_path / "run", **TINY, **STEPS)
    frame = pandas.DataFrame({"audio": [(wave, 16000) for wave in WAVES], "sentence": ["ab ba", "b a"] * 6})
    few = {name: value for name, value in TINY.items() if not name.startswith("size")}
    tuned = finetune(run, head="ctc", data=frame, out=tmp_path / "tuned", max_steps=1, **few)
    assert tuned.summary["steps"] == 1


REFUSED = {
    "a misspelt setting": ({"data": PIXELS, "max_stps": 2}, "max_steps"),
    "a wrong value": ({"data": PIXELS, "modality.image_px": 33}, "image_px"),
    "a generator": ({"data": (pixels for pixels in PIXELS)}, "generator"),
    "a number": ({"data": 5}, "expected a list"),
    "nothing in it": ({"data": []}, "empty"),
    "no such folder": ({"data": "no/such/folder"}, "no file or folder"),
    "labels that are too few": ({"data": PIXELS, "labels": [1, 2]}, "24 records and 2 labels"),
    "labels of a folder": ({"data": ".", "labels": [1]}, "labels go with objects"),
    "objects and a folder": ({"data": PIXELS, "test_data": "."}, "both alike"),
    "a trainer": ({"data": PIXELS, "trainer": object()}, "Trainer of your own"),
    "hydra's settings": ({"data": PIXELS, "hydra.run.dir": "x"}, "out="),
    "a value of another kind": ({"data": PIXELS, "seed": object()}, "seed"),
    "images below 0": ({"data": PIXELS / 128.0 - 1.0}, "below 0"),
    "columns that could be anything": ({"data": {"a": list(PIXELS), "b": list(PIXELS)}}, "data.column"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_one_line(case: str, tmp_path: Path) -> None:
    settings, expected = REFUSED[case]
    with pytest.raises((ConfigError, DataError)) as caught:
        pretrain(modality="vision", out=tmp_path / "run", **TINY, **settings)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_objects_are_not_for_commands(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data2vec_train", "modality=vision", "data=objects"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "Python call" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_verb_is_a_folder_and_a_call() -> None:
    import data2vec_train.pretrain.run  # noqa: F401

    assert callable(data2vec_train.pretrain)
    assert "data" in inspect.signature(data2vec_train.pretrain).parameters
    code = "import sys, data2vec_train; data2vec_train.pretrain; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_directories_are_new_ones_unless_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = {pretrain(modality="vision", data=PIXELS, **TINY, max_steps=1).path for _ in range(2)}
    assert len(runs) == 2
    assert all(path.is_relative_to(tmp_path / "runs" / "vision") for path in runs)
