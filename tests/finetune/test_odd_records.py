"""Records that are odd or say nothing, and numbers that have to agree with each other."""

import io
import json
import logging
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from data2vec_train.errors import CollapseError
from data2vec_train.features import measures
from data2vec_train.finetune.base import Examples
from data2vec_train.finetune.metrics import regression_scores
from data2vec_train.finetune.module import _rank, evaluate
from data2vec_train.finetune.speech import CTC, UtteranceClassification
from data2vec_train.finetune.text import SequenceClassification
from data2vec_train.heads.speech import XVectorHead
from data2vec_train.predict import run as prediction_task


@pytest.fixture
def tested_on(write, tmp_path):
    """Rows -> the setting that makes them the test records."""
    return lambda rows: f"data.test_source={{path:{write(rows, tmp_path / 'test.parquet')}}}"


def summary_of(run_dir) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def said_by(report: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", report))


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def test_numbers_to_learn_may_be_whole_and_may_be_written_as_text(command, rows):
    changed = [row | {"label": str(5 * number)} for number, row in enumerate(rows("sequence"))]
    status, run_dir = command("sequence", "head.problem=regression", "head.metric=pearson", steps=1, rows=changed)
    assert status == 0
    assert "sequence.parquet:15 75 " in said_by((run_dir / "report.html").read_text())
    changed = [row | {"label": 5 * number} for number, row in enumerate(rows("sequence"))]
    again = ["head.problem=regression", "head.metric=pearson", f"hydra.run.dir={run_dir}2"]
    assert command("sequence", *again, steps=1, rows=changed)[0] == 0


def test_several_classes_are_shown_by_their_names(command, rows):
    changed = [row | {"label": ["low", "high"][: 1 + number % 2]} for number, row in enumerate(rows("sequence"))]
    status, run_dir = command("sequence", "head.problem=multi_label", "head.metric=f1", steps=1, rows=changed)
    assert status == 0
    assert "sequence.parquet:15 high, low " in said_by((run_dir / "report.html").read_text())


@pytest.mark.parametrize(
    ("problem", "metric", "known", "labels", "said"),
    [
        ("multi_label", "f1", ["a"], ["other"], "test records have the class other"),
        ("regression", "pearson", 0.5, "nothing", "label is 'nothing'; expected a number"),
    ],
)
def test_labels_of_the_test_that_mean_nothing(command, rows, tested_on, capsys, problem, metric, known, labels, said):
    changed = [row | {"label": known} for row in rows("sequence")]
    other = tested_on([row | {"label": labels} for row in changed])
    given = [f"head.problem={problem}", f"head.metric={metric}", other]
    assert command("sequence", *given, steps=1, rows=changed)[0] == 2
    assert said in capsys.readouterr().err


def test_choices_by_letter(command, rows, capsys):
    changed = [row | {"label": "ABC"[number % 3]} for number, row in enumerate(rows("multiple_choice"))]
    assert command("multiple_choice", steps=1, rows=changed)[0] == 2
    assert re.search(r"choice [ABC] of 3; expected 0 to 2", capsys.readouterr().err)


def test_answers_may_be_a_list_of_answers(command, rows, tmp_path, capsys):
    def as_list(row: dict) -> dict:
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        return row | {"answers": [{"text": text, "answer_start": start} for text, start in pairs]}

    assert command("qa", "report=false", steps=1, rows=list(map(as_list, rows("qa"))))[0] == 0
    wrong = [row | {"answers": "alpha"} for row in rows("qa")]
    assert command("qa", "report=false", f"hydra.run.dir={tmp_path}/other", steps=1, rows=wrong)[0] == 2
    assert "expected {text: [...], answer_start: [...]}" in capsys.readouterr().err


LABELS = {"ctc": "text", "frame": "segments", "token": "tags", "qa": "answers", "multiple_choice": "label"}


@pytest.mark.parametrize("head", [*LABELS, "segmentation"])
def test_a_test_that_says_nothing(command, rows, tested_on, capsys, head):
    other = tested_on([row | {LABELS.get(head, "map"): None} for row in rows(head)])
    assert command(head, other, steps=1)[0] == 2
    assert "no test record has a label" in capsys.readouterr().err


@pytest.mark.parametrize("head", [*LABELS, "segmentation"])
def test_records_that_say_nothing_are_not_scored(command, rows, tested_on, tmp_path, head):
    few = [row | ({LABELS.get(head, "map"): None} if number < 8 else {}) for number, row in enumerate(rows(head))]
    status, run_dir = command(head, tested_on(few), steps=1)
    assert status == 0
    half = tmp_path / "half"
    assert command(head, tested_on(few[8:]), f"hydra.run.dir={half}", "report=false", steps=1)[0] == 0
    found, expected = summary_of(run_dir)["best"], summary_of(half)["best"]
    expected.pop("loss")  # of whole batches
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_training_records_that_say_nothing_are_left_out(command, rows, capsys):
    changed = [row | ({"segments": None} if number < 4 else {}) for number, row in enumerate(rows("frame"))]
    status, run_dir = command("frame", "report=false", steps=1, rows=changed)
    assert status == 0
    assert summary_of(run_dir)["train_records"] == 12
    assert "4 of 16 records are left out" in capsys.readouterr().out


def test_recordings_that_are_too_long_are_mentioned(command, rows, capsys):
    given = ["modality.max_seconds=0.7", "report=false"]
    status, run_dir = command("ctc", *given, steps=1)
    assert status == 0
    left = 16 - summary_of(run_dir)["train_records"]
    assert left > 0
    assert f"{left} records are left out, such as ctc.parquet" in "".join(capsys.readouterr())


def test_one_speaker_has_no_equal_error_rate(command, rows, tested_on, capsys):
    other = tested_on([row | {"kind": "one"} for row in rows("speaker")])
    assert command("speaker", other, steps=1)[0] == 2
    assert "an equal error rate needs" in capsys.readouterr().err


def test_held_out_speakers_have_to_make_pairs(command, rows, capsys):
    every = [row | {"kind": f"speaker {number // 2}"} for number, row in enumerate(rows("speaker"))]
    assert command("speaker", "data.test_source=null", steps=1, rows=every)[0] == 2
    error = capsys.readouterr().err
    assert re.search(r"held-out records: \d recordings of \d speakers; an equal error rate needs", error)
    assert "raise data.held_out_fraction" in error


@pytest.mark.parametrize(("fraction", "held_out"), [(0.1, 4), (0.5, 8), (0, 0)])
def test_few_groups_leave_one_to_test_on(command, rows, fraction, held_out):
    every = [row | {"place": f"place {number % 4}"} for number, row in enumerate(rows("frame"))]
    given = ["data.test_source=null", f"data.held_out_fraction={fraction}", "data.group_column=place", "report=false"]
    status, run_dir = command("frame", *given, steps=1, rows=every)
    assert status == 0
    assert summary_of(run_dir)["test_records"] == held_out


def test_mixtures_with_whole_numbers(command):
    given = ["head.mixup=1", "head.cutmix=1", "report=false"]
    assert command("image", *given, steps=4)[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def test_a_score_that_is_not_a_number_is_never_the_best():
    task = object.__new__(UtteranceClassification)
    nothing, something = {"accuracy": float("nan"), "loss": 1.0}, {"accuracy": 0.1, "loss": 9.0}
    assert _rank(task, something) > _rank(task, nothing)
    assert not _rank(task, nothing) > _rank(task, something)


def test_among_equal_scores_the_lower_loss_is_better():
    task = object.__new__(CTC)
    early, late = {"wer": 1.0, "loss": 20.0}, {"wer": 1.0, "loss": 10.0}
    assert _rank(task, late) > _rank(task, early)
    assert _rank(task, {"wer": 0.9, "loss": 30.0}) > _rank(task, late)


def test_outputs_that_are_not_finite_end_the_run():
    class Task:
        def meter(self):
            return None

        def loss(self, model, batch):
            return None, {"embeddings": torch.tensor([1.0, float("nan")])}

    model = torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")
    with pytest.raises(CollapseError, match="not finite"):
        evaluate(model, Task(), [Examples({})])


def test_correlations_of_predictions_that_hardly_vary():
    rng = np.random.default_rng(0)
    wanted = rng.standard_normal(50)
    found = 1e-7 * (wanted + rng.standard_normal(50)) + 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = regression_scores(found.tolist(), wanted.tolist())
        constant = regression_scores([1.0] * 50, wanted.tolist())
    assert scores["pearson"] == pytest.approx(np.corrcoef(found, wanted)[0, 1], abs=1e-6)
    assert np.isnan(constant["pearson"])


def test_speaker_vectors_of_one_output_frame_have_a_gradient():
    torch.manual_seed(0)
    shape = {"tdnn_dim": [8, 8], "tdnn_kernel": [3, 1], "tdnn_dilation": [1, 1], "embedding_dim": 4, "num_labels": 2}
    head = XVectorHead(dim=6, **shape)
    features = torch.randn(2, 5, 6, requires_grad=True)
    for frames in (torch.tensor([5, 3]), None):  # the second has one output frame
        vectors, _ = head(features if frames is not None else features[:, :3], frames)
        features.grad = None
        vectors.square().sum().backward()
        assert torch.isfinite(vectors).all()
        assert torch.isfinite(features.grad).all()
        assert all(
            torch.isfinite(parameter.grad).all() for parameter in head.parameters() if parameter.grad is not None
        )


def test_a_linear_probe_that_does_not_converge_says_so_in_a_sentence(monkeypatch, caplog):
    rng = np.random.default_rng(0)
    features, classes = rng.standard_normal((60, 20)).astype(np.float32), rng.integers(0, 3, 60)
    monkeypatch.setattr(measures, "MAX_ITERATIONS", 2)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        measures.linear_accuracy(features, classes, features, classes, l2=0.01)
    assert "stopped after 2 iterations" in caplog.text


def test_text_files_are_read_in_the_encodings_of_the_config(command, tmp_path, monkeypatch):
    folder = tmp_path / "texts"
    for number in range(16):
        file = folder / ["low", "high"][number % 2] / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(f"alpha é {number}".encode("cp1252" if number % 3 else "utf-8-sig"))
    read = []
    ids_of = SequenceClassification.ids_of
    monkeypatch.setattr(
        SequenceClassification, "ids_of", lambda task, text, pair: read.append(text) or ids_of(task, text, pair)
    )
    given = ["data=folder", f"data.path={folder}", "data.label_column=null", "data.test_source=null", "report=false"]
    status, run_dir = command("sequence", *given, "data.tolerated_bad_samples=0", steps=2)
    assert status == 0
    assert not (run_dir / "quarantine.jsonl").exists()
    assert {text.rpartition(" ")[0] for text in read} == {"alpha é"}


# ---------------------------------------------------------------------------------------------------------------------
# Predictions


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_predictions_come_in_the_order_of_the_records(command, program_of, rows, write, tmp_path, monkeypatch):
    status, run_dir = command("ctc", "report=false", steps=1)
    assert status == 0
    changed = rows("ctc")
    changed[5]["audio"]["bytes"] = changed[5]["audio"]["bytes"][:60]
    path = write(changed, tmp_path / "some.parquet")
    given = [f"checkpoint={run_dir}", "data=hf", f"data.path={path}", "data.num_workers=0"]
    assert program_of("predict", *given, f"out={tmp_path}/whole.jsonl") == 0
    monkeypatch.setattr(prediction_task, "WINDOW", 3)
    assert program_of("predict", *given, f"out={tmp_path}/parts.jsonl") == 0
    found = lines_of(tmp_path / "whole.jsonl")
    keys = [line["key"] for line in found if "prediction" in line]
    assert keys == [f"some.parquet:{number}" for number in range(16) if number != 5]
    assert [line["key"] for line in found if "error" in line] == ["some.parquet:5"]
    assert found == lines_of(tmp_path / "parts.jsonl")


def test_predictions_take_no_more_sound_at_once_than_a_batch_may_hold(command, program_of, tmp_path, monkeypatch):
    status, run_dir = command("ctc", "report=false", steps=1)
    assert status == 0
    seen = []
    predict = CTC.predict
    monkeypatch.setattr(
        CTC,
        "predict",
        lambda task, model, batch: seen.append(batch.inputs["input_values"]) or predict(task, model, batch),
    )
    given = [f"checkpoint={run_dir}", "data=hf", f"data.path={tmp_path}/ctc.parquet", "data.num_workers=0"]
    given += ["modality.max_seconds=1", "modality.batch_seconds=1", f"out={tmp_path}/said.jsonl"]
    assert program_of("predict", *given) == 0
    assert sum(map(len, seen)) == 16
    assert max(sounds.numel() for sounds in seen) <= 2 * 8000, "as in the tests during training, twice a batch"


def test_every_image_has_a_map_of_its_own(command, program_of, rows, tmp_path):
    status, run_dir = command("segmentation", "report=false", steps=1)
    assert status == 0
    given = [f"checkpoint={run_dir}", "data.num_workers=0"]
    assert (
        program_of("predict", *given, "data=hf", f"data.path={tmp_path}/segmentation.parquet", f"out={tmp_path}/a") == 0
    )
    assert len({line["prediction"] for line in lines_of(tmp_path / "a" / "predictions.jsonl")}) == 16
    folder = tmp_path / "images" / "some"
    folder.mkdir(parents=True)
    pixels = Image.open(io.BytesIO(rows("segmentation")[0]["image"]["bytes"]))
    for name in ("x.png", "x.bmp", "v1.5.png"):
        pixels.save(folder / name)
    assert program_of("predict", *given, "data=folder", f"data.path={folder.parent}", f"out={tmp_path}/b") == 0
    found = {line["key"]: line["prediction"] for line in lines_of(tmp_path / "b" / "predictions.jsonl")}
    assert found == {"some/v1.5.png": "some/v1.5.png", "some/x.bmp": "some/x.png", "some/x.png": "some/x.png.png"}


def test_the_image_size_of_a_recipe_stays_and_is_that_of_predictions(command, program_of, tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "larger.yaml").write_text("# @package _global_\nmodality:\n  image_px: 64\n")
    monkeypatch.setenv("DATA2VEC_RECIPES", str(tmp_path))
    status, run_dir = command("segmentation", "+recipes=larger", "report=false", steps=1)
    assert status == 0
    sizes = []
    made = prediction_task.inputs_of

    def noted(*given):
        sizes.append(made(*given))
        return sizes[-1]

    monkeypatch.setattr(prediction_task, "inputs_of", noted)
    given = [f"checkpoint={run_dir}", "data=hf", f"data.path={tmp_path}/segmentation.parquet", f"out={tmp_path}/maps"]
    assert program_of("predict", *given, "data.num_workers=0") == 0
    assert sizes[0].transform.size == (64, 64)


# ---------------------------------------------------------------------------------------------------------------------
# Features


def test_parts_of_another_folder_are_not_taken_over(program_of, weights, tmp_path, monkeypatch, capsys):
    from data2vec_train.embed import run as embedding_task

    rng = np.random.default_rng(0)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number in range(4):
            pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    given = [f"checkpoint={weights('vision')}", "data=folder", f"out={tmp_path}/out.parquet", "rows_per_part=2"]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(embedding_task, "_merge", stop)
    assert program_of("embed", *given, f"data.path={tmp_path}/a", "data.num_workers=0") == 130
    assert program_of("embed", *given, f"data.path={tmp_path}/b", "data.num_workers=0") == 2
    assert "holds parts made with other data and settings" in capsys.readouterr().err
