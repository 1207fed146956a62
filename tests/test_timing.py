"""Where a run's time goes, and what starting costs."""

import contextlib
import csv
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data2vec_train.training.callbacks import timing
from data2vec_train.training.callbacks.timing import (
    BACKWARD,
    ENCODE,
    PARTS,
    PROBES,
    REST,
    STUDENT,
    TEACHER,
    WAIT,
    Timing,
)

CHECKOUT = Path(__file__).parents[1]
TINY = (
    "size.dim=32",
    "size.depth=2",
    "size.num_heads=2",
    "size.ffn_dim=64",
    "data.batch_size_per_device=16",
    "data.max_probe_samples=200",
    "callbacks.probe.rank_samples=200",
    "objective.masks_per_sample=2",
)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, which a test moves on."""
    now = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.time, "process_time", lambda: now[0] / 2)
    return now


def test_a_part_within_a_part_stops_the_outer_one(clock):
    timer = Timing()
    timer.switch(REST)
    with timer.part(STUDENT):
        clock[0] += 4
        with timer.part(TEACHER):
            clock[0] += 3
        clock[0] += 1
    clock[0] += 2
    with contextlib.suppress(KeyError), timer.part(WAIT):
        clock[0] += 8
        raise KeyError
    clock[0] += 1
    rows = {row["part"]: row for row in timer.rows()}
    assert {part: rows[part]["wall_s"] for part in (STUDENT, TEACHER, WAIT, REST)} == {
        STUDENT: 5, TEACHER: 3, WAIT: 8, REST: 3
    }  # fmt: skip
    assert rows[TEACHER]["cpu_s"] == 1.5


def test_a_forward_pass_is_training_or_a_probe_by_where_it_is(clock):
    timer = Timing()
    timer.switch(REST)
    for outer in (PROBES, REST):
        with timer.part(outer), timer.part(STUDENT):
            clock[0] += 1
            with timer.part(ENCODE):  # a pass of the encoder alone
                clock[0] += 1
    with timer.part(PROBES), timer.part(ENCODE):
        clock[0] += 4
    assert (timer.seconds[STUDENT][0], timer.seconds[ENCODE][0]) == (2, 6)


@pytest.mark.slow
def test_a_profiled_run_is_the_run_and_its_table_has_all_the_time(run_program, tmp_path):
    columns = {}
    for name, more in (("plain", []), ("profiled", ["debug=profile"])):
        begun = time.perf_counter()
        result = run_program("trainer.max_steps=4", "trainer.log_every_n_steps=1", "report=false", *TINY, *more,
                             f"hydra.run.dir={tmp_path / name}", new=True)  # fmt: skip
        whole = time.perf_counter() - begun
        assert result.returncode == 0, result.stderr
        with (tmp_path / name / "metrics.csv").open() as file:
            columns[name] = [
                (row["train/loss"], row["probe/knn"], row["train/grad_norm"]) for row in csv.DictReader(file)
            ]
    assert columns["plain"] == columns["profiled"]
    assert not (tmp_path / "plain" / "profile.csv").exists()
    with (tmp_path / "profiled" / "profile.csv").open() as file:
        rows = {row["part"]: float(row["wall_s"]) for row in csv.DictReader(file)}
    assert list(rows)[: len(PARTS)] == list(PARTS)
    assert all(rows[part] > 0 for part in (STUDENT, TEACHER, BACKWARD, timing.OPTIMIZER, timing.EMA, WAIT, ENCODE))
    assert sum(rows[part] for part in PARTS) == pytest.approx(rows["all"], abs=0.02)
    assert 0.5 * whole < rows["all"] < whole
    outside = rows["outside forward, backward, optimizer, EMA"]
    assert outside == pytest.approx(rows["all"] - sum(rows[part] for part in timing.TRAINING), abs=0.02)


# -------------------------------------------------------------------------------------------------------------- start


def loaded(code: str) -> set[str]:
    """Packages that a program loads."""
    code = f"import sys\n{code}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    return set(run.stdout.splitlines()[-1].split())


def test_help_loads_nothing_heavy():
    code = "import runpy\nsys.argv = ['data2vec_train', '--help']\n"
    code += "try:\n    runpy.run_module('data2vec_train', run_name='__main__')\nexcept SystemExit:\n    pass"
    assert not {"torch", "numpy", "lightning", "transformers", "datasets", "matplotlib"} & loaded(code)


def test_pretraining_loads_what_only_some_runs_need_when_they_need_it():
    # lightning loads torchmetrics, and that transformers, matplotlib, scipy and torchvision where they are installed.
    by_lightning = loaded("import lightning")
    ours = loaded("import data2vec_train.pretrain.run") - by_lightning
    assert not {"datasets", "transformers", "matplotlib", "wandb", "tensorboard", "sklearn", "tokenizers"} & ours
    assert not {"datasets", "wandb", "tensorboard"} & by_lightning
