"""The program as its users meet it: whole runs from the command line, on tiny data."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data2vec_train import checkpoints

CHECKOUT = Path(__file__).parents[1]

TINY = (
    "size.dim=32",
    "size.depth=2",
    "size.num_heads=2",
    "size.ffn_dim=64",
    "data.num_workers=0",
    "data.batch_size_per_device=16",
    "data.max_probe_samples=200",
    "callbacks.probe.rank_samples=200",
    "objective.masks_per_sample=2",
)


def _images(folder, count=24, size=(40, 30)):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    modes = ["RGB", "L", "RGBA", "CMYK", "P"]
    for index in range(count):
        mode = modes[index % len(modes)]
        pixels = rng.integers(0, 256, (size[1] + index, size[0], 3), dtype=np.uint8)
        image = Image.fromarray(pixels).convert(mode)
        image.save(folder / f"{index:02d}{'.jpg' if mode in ('RGB', 'L', 'CMYK') else '.png'}")


def test_a_run_leaves_everything_it_promises(run_program, tmp_path):
    run_dir = tmp_path / "run"
    result = run_program("modality=vision", "trainer.max_steps=6", "trainer.log_every_n_steps=3", *TINY,
                         f"hydra.run.dir={run_dir}", new=True)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"report: {run_dir / 'report.html'}" in result.stdout

    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["modality"], summary["objective"], summary["seed"], summary["steps"]) == (
        "vision",
        "data2vec2",
        0,
        6,
    )
    for name in ("seconds", "samples_per_second", "loss_first", "loss_last", "target_std", "prediction_std", "rankme"):
        assert summary[name] > 0, name
    for probe in ("knn", "linear"):
        assert all(0 <= summary["probe"][probe][row] <= 1 for row in ("untrained", "raw_input", "trained"))
    assert summary["probe"]["test_samples"] == summary["probe"]["fit_samples"] == 200

    with (run_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:2] == ["step", "train/loss"]
    assert [row["step"] for row in rows if row["train/loss"]] == ["1", "3", "6"]
    assert float(rows[-1]["train/loss"]) == pytest.approx(summary["loss_last"])

    checkpoint = checkpoints.read(checkpoints.resolve(run_dir))
    assert checkpoint["global_step"] == 6
    assert checkpoint["config"]["trainer"]["max_steps"] == 6
    assert any(name.startswith("objective.teacher.") for name in checkpoint["state_dict"])
    assert checkpoints.resolve(run_dir / "checkpoints" / "best") is not None

    report = (run_dir / "report.html").read_text()
    assert "python -m data2vec_train modality=vision" in report
    assert not re.search(r'(src|href)="https?:', report)
    assert "seed: 0" in (run_dir / "config.yaml").read_text()

    command = ["modality=vision", "trainer.max_steps=6", "trainer.log_every_n_steps=3", *TINY]
    again = run_program(*command, "resume=never", f"hydra.run.dir={run_dir}")
    assert again.returncode == 2
    assert "already holds a run" in again.stderr
    again = run_program(*command, f"hydra.run.dir={run_dir}")
    assert again.returncode == 0, again.stderr
    assert "is finished already" in again.stdout
    other = run_program(*command, "seed=5", f"hydra.run.dir={run_dir}")
    assert other.returncode == 2
    assert "holds a run with other settings: seed=5 (was 0)" in other.stderr
    other = run_program(*command, "resume=changed", "size.ffn_dim=96", f"hydra.run.dir={run_dir}")
    assert other.returncode == 2
    assert "is (96,), was (64,)" in other.stderr
    assert "Traceback" not in other.stderr
    other = run_program(*command, "resume=changed", "optimizer.decay_all=true", f"hydra.run.dir={run_dir}")
    assert other.returncode == 2
    assert "other weights" in other.stderr
    again = run_program(f"resume={run_dir}")  # as the run is, whatever was refused since
    assert again.returncode == 0, again.stderr
    assert "is finished already" in again.stdout


def test_the_same_seed_gives_the_same_run_whatever_the_workers(run_program, tmp_path):
    states = []
    for name, workers in (("a", 0), ("b", 2)):
        run_dir = tmp_path / name
        result = run_program("trainer.max_steps=3", "report=false", *TINY, f"data.num_workers={workers}",
                             f"hydra.run.dir={run_dir}")  # fmt: skip
        assert result.returncode == 0, result.stderr
        states.append(checkpoints.read(checkpoints.resolve(run_dir))["state_dict"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_folder_of_mixed_images_without_labels_trains_and_lists_broken_files(run_program, tmp_path):
    images, run_dir = tmp_path / "images", tmp_path / "run"
    _images(images / "deep" / "er")
    whole = (images / "deep" / "er" / "00.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "text.png").write_text("not an image")
    (images / "notes.txt").write_text("ignored")
    arguments = ("data=folder", f"data.path={images}", "modality.image_px=32", "modality.patch_px=8", *TINY,
                 "trainer.max_steps=8", f"hydra.run.dir={run_dir}")  # fmt: skip
    result = run_program(*arguments, "data.max_bad_fraction=0.2")
    assert result.returncode == 0, result.stderr
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["probe"] is None
    assert summary["rankme"] >= 1
    assert summary["broken_samples"] == 2
    assert f"left out: 2 broken samples, see {run_dir / 'quarantine.jsonl'}" in result.stdout
    listed = [json.loads(line) for line in (run_dir / "quarantine.jsonl").read_text().splitlines()]
    assert {entry["key"]: entry["reason"].split(":")[0] for entry in listed} == {
        "cut.jpg": "truncated",
        "text.png": "not an image",
    }

    strict = ("data.tolerated_bad_samples=0", f"hydra.run.dir={tmp_path / 'strict'}")
    result = run_program(*arguments[:-1], *strict)
    assert result.returncode == 2
    assert "data.max_bad_fraction" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, ["does not exist", "data.path"]),
        (lambda path: path.mkdir(), ["no files"]),
        (lambda path: path.write_text("x"), ["a file"]),
    ],
    ids=["missing", "empty", "file"],
)
def test_a_folder_that_cannot_be_used_is_one_line(make, words, run_program, tmp_path):
    make(tmp_path / "images")
    result = run_program("data=folder", f"data.path={tmp_path / 'images'}", *TINY, f"hydra.run.dir={tmp_path / 'run'}")
    assert result.returncode == 2
    lines = [line for line in result.stderr.strip().splitlines() if not line.startswith("1 error in the command")]
    assert len(lines) == 1, result.stderr
    assert "images" in lines[0]


def test_class_folders_feed_the_probes(run_program, tmp_path):
    for label in ("cat", "dog"):
        _images(tmp_path / "images" / label, count=20)
        (tmp_path / "images" / label / "broken.png").write_bytes(b"")
    result = run_program("data=folder", f"data.path={tmp_path / 'images'}", "modality.image_px=32",
                         "modality.patch_px=8", *TINY, "trainer.max_steps=2", "report=false",
                         f"hydra.run.dir={tmp_path / 'run'}")  # fmt: skip
    assert result.returncode == 0, result.stderr
    probe = json.loads((tmp_path / "run" / "summary.json").read_text())["probe"]
    assert probe["classes"] == 2
    assert probe["test_samples"] + probe["fit_samples"] == 40  # without the broken ones


def test_a_sweep_leaves_a_directory_for_each_member_and_a_table(run_program, tmp_path):
    result = run_program("-m", "modality=vision", "objective=data2vec,data2vec2", "seed=1", "trainer.max_steps=2",
                         *TINY[:-1], "report=false", f"hydra.sweep.dir={tmp_path / 'sweep'}")  # fmt: skip
    assert result.returncode == 0, result.stderr
    summaries = [json.loads(path.read_text()) for path in (tmp_path / "sweep").glob("*/summary.json")]
    assert {(summary["objective"], summary["seed"]) for summary in summaries} == {("data2vec", 1), ("data2vec2", 1)}
    assert (tmp_path / "sweep" / "sweep.csv").exists()
    assert result.stdout.count("data2vec2") >= 1


def test_probes_between_logged_steps_are_written_down(run_program, tmp_path):
    result = run_program("trainer.max_steps=5", "trainer.log_every_n_steps=1000", "callbacks.probe.every_n_steps=2",
                         "trainer.accumulate_grad_batches=2", "report=false", *TINY,
                         f"hydra.run.dir={tmp_path / 'run'}")  # fmt: skip
    assert result.returncode == 0, result.stderr
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [(row["step"], bool(row["probe/knn"]), bool(row["train/loss"])) for row in csv.DictReader(file)]
    assert rows == [("0", True, False), ("1", False, True), ("2", True, False), ("4", True, False), ("5", True, True)]


def test_divergence_is_one_line_and_leaves_a_report(run_program, tmp_path):
    result = run_program("trainer.max_steps=12", "optimizer.lr=1e12", "trainer.gradient_clip_val=null", *TINY,
                         "callbacks.probe.every_n_steps=4", f"hydra.run.dir={tmp_path / 'run'}")  # fmt: skip
    assert result.returncode == 3
    assert "diverged" in result.stderr
    assert "Traceback" not in result.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "collapsed"
    assert (tmp_path / "run" / "report.html").exists()


def test_an_interrupted_run_keeps_its_weights(tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "data2vec_train", "trainer.max_steps=100000", *TINY, f"hydra.run.dir={run_dir}"]
    options = {"cwd": CHECKOUT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Processes that a shell starts in the background ignore Ctrl-C, and hand this on.
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, **options) as process:
        while "step 20/" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert checkpoints.read(checkpoints.resolve(run_dir))["global_step"] >= 20


@pytest.mark.parametrize("number", [pytest.param(signal.SIGHUP, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_run_spares_those_that_load(number, tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "data2vec_train", "trainer.max_steps=100000", *TINY, "data.num_workers=1",
               "data.batch_size_per_device=1024", "trainer.log_every_n_steps=1",
               f"hydra.run.dir={run_dir}"]  # fmt: skip
    options = {"cwd": CHECKOUT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Under nohup, SIGHUP is ignored, and what is started there goes on.
    heard = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)}
    with subprocess.Popen(command, **options, **heard) as process:
        try:
            while "step 2/" not in process.stdout.readline():
                assert process.poll() is None
            time.sleep(0.1)  # in the middle of a step
            os.killpg(process.pid, number)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    assert checkpoints.read(checkpoints.resolve(run_dir))["global_step"] >= 2


def test_a_collapse_stops_the_run_with_value_and_threshold(run_program, tmp_path):
    result = run_program("trainer.max_steps=6", "report=false", *TINY, "callbacks.monitor.min_target_std=100",
                         "callbacks.monitor.grace_steps=2", "trainer.log_every_n_steps=1",
                         f"hydra.run.dir={tmp_path / 'run'}")  # fmt: skip
    assert result.returncode == 3
    assert re.search(r"collapse at step 2: train/target_std is [\d.]+, below the threshold of 100", result.stderr)
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_learns(seed, run_program, tmp_path):
    """The claim of the README: within five minutes on two cores, for each of three seeds."""
    result = run_program("modality=vision", f"seed={seed}", f"hydra.run.dir={tmp_path / 'run'}", timeout=900)
    assert result.returncode == 0, result.stderr
    probe = json.loads((tmp_path / "run" / "summary.json").read_text())["probe"]
    assert probe["knn"]["trained"] >= probe["knn"]["untrained"] + 0.15
    assert probe["linear"]["trained"] >= 0.80


def _grouped_images(folder, numbers):
    for number in numbers:
        path = folder / f"film{number // 4}_frame{number % 4}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


def _state(run_dir):
    return checkpoints.read(checkpoints.newest(run_dir / "checkpoints") / "state.ckpt")["DataModule"]


def test_a_run_goes_on_with_its_own_data_and_a_finished_one_needs_no_checkpoints(run_program, tmp_path):
    data, run_dir = tmp_path / "data", tmp_path / "run"
    _grouped_images(data, range(40))
    command = ["modality=vision", "data=folder", f"data.path={data}", *TINY, "trainer.max_steps=1", "report=false",
               r"data.group_pattern='^(film\d+)_'", f"hydra.run.dir={run_dir}"]  # fmt: skip
    first = run_program(*command)
    assert first.returncode == 0, first.stderr
    assert "40 records in 10 groups" in first.stdout
    split = _state(run_dir)["split"]
    (run_dir / "summary.json").unlink()  # as if it had been killed
    _grouped_images(data, range(40, 44))
    before = {path: path.read_bytes() for path in run_dir.glob("*.csv")}
    refused = run_program(*command)
    assert refused.returncode == 2
    assert re.fullmatch(r"error: data.source has changed .*: 40 records then, 44 now: 4 new .*\n", refused.stderr)
    assert {path: path.read_bytes() for path in run_dir.glob("*.csv")} == before
    changed = run_program(*command, "resume=changed", "trainer.max_steps=2")
    assert changed.returncode == 0, changed.stderr
    assert _state(run_dir)["split"] == split
    shutil.rmtree(run_dir / "checkpoints")
    names = ("metrics.csv", "summary.json", "config.yaml")
    before = {run_dir / name: (run_dir / name).read_bytes() for name in names}
    again = run_program(*command, "trainer.max_steps=2")
    assert (again.returncode, "is finished already" in again.stdout) == (0, True), again.stderr
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_a_run_directory_that_is_removed_while_the_run_is_in_it_stays_removed(tmp_path):
    run_dir = tmp_path / "run"
    arguments = ["modality=vision", *TINY, "trainer.max_steps=100000", "callbacks.checkpoint.every_n_steps=5",
                 "report=false", f"hydra.run.dir={run_dir}"]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "data2vec_train", *arguments], stderr=subprocess.PIPE, text=True)
    try:
        while not (run_dir / "checkpoints/last").is_file():
            assert process.poll() is None
            time.sleep(0.1)
        for _ in range(50):
            shutil.rmtree(run_dir, ignore_errors=True)
        error = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 2, error
    assert "was removed, or replaced by another directory" in error
    assert not (run_dir / "checkpoints").exists()
    assert not (run_dir / "metrics.csv").exists()
