"""Runs that are stopped anywhere go on as if nothing had happened; numbers that are not finite change nothing."""

import csv
import json
import os
import random
import signal
from pathlib import Path

import lightning as L
import pytest
import torch

from data2vec_train import checkpoints
from data2vec_train.errors import CollapseError, ConfigError, Interrupted, SaveError
from data2vec_train.system.compat import own_processes
from data2vec_train.training.callbacks.checkpointing import Checkpointing, FiniteSteps, Interruption
from data2vec_train.training.callbacks.monitor import CSVLog, Monitor
from tests.stress.tiny import flat
from tests.test_module import Noise, data_of, module_of, objective, trainer_of

STEPS = 8


class Small(Noise):
    """20 samples: with batches of 4 an epoch ends every 5 of them."""

    def __init__(self) -> None:
        super().__init__(20)


class Killed(BaseException):
    pass


class Stop(L.Callback):
    """Does something when a step has ended, before or after it was saved."""

    def __init__(self, step: int, action) -> None:
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            self.action()


def kill() -> None:
    raise Killed


NO_WATCH = {"max_data_wait": 1.0, "data_wait_rows": 5}


class Run:
    """What the pretraining task makes of a run directory, with a tiny model."""

    def __init__(self, folder: Path, version: int = 2, *, every: int = 3, workers: int = 0, accumulate: int = 1,
                 keep_last: int = 2, asynchronous: bool = False, max_in_a_row: int = 3, steps: int = STEPS,
                 callbacks: tuple = (), last: tuple = (), changed: bool = False) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.module = module_of(objective(version, dropout=0.1, noise_std=0.01))
        self.data = data_of(version, folder, batch=4, num_workers=workers, source=Small(), changed_steps=changed)
        self.checkpointing = Checkpointing(
            every_n_steps=every, keep_last=keep_last, asynchronous=asynchronous, directory=folder / "checkpoints",
            config={"seed": 0},
        )  # fmt: skip
        self.finite = FiniteSteps(
            max_in_a_row=max_in_a_row, path=folder / "nonfinite.jsonl", checkpointing=self.checkpointing
        )
        self.interruption = Interruption(checkpointing=self.checkpointing)
        limits = {"min_target_std": None, "min_prediction_std": None, "grace_steps": 0} | NO_WATCH
        self.trainer = trainer_of(
            folder, steps=steps, accumulate_grad_batches=accumulate, gradient_clip_val=1.0,
            callbacks=[*callbacks, Monitor(**limits, progress="none"), self.checkpointing, self.finite,
                       self.interruption, *last],
            logger=[CSVLog(path=folder / "metrics.csv")], plugins=[self.checkpointing.io],
        )  # fmt: skip
        own_processes(self.trainer)

    def fit(self) -> "Run":
        checkpoint = checkpoints.newest(self.folder / "checkpoints")
        CSVLog(path=self.folder / "metrics.csv").cut(0 if checkpoint is None else checkpoints.step_of(checkpoint))
        with self.interruption.listening():
            self.trainer.fit(self.module, datamodule=self.data, ckpt_path=checkpoint)
        return self

    def state(self) -> dict[str, torch.Tensor]:
        return dict(flat(checkpoints.read(checkpoints.resolve(self.folder))))

    def rows(self) -> list[dict]:
        with (self.folder / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        return [{name: row[name] for name in row if "second" not in name and "wait" not in name} for row in rows]


def assert_same(run: Run, whole: Run) -> None:
    """Student, teacher, decoder, optimizer and every logged number, bit for bit."""
    ours, theirs = run.state(), whole.state()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        same = torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
        assert same, name
    assert run.rows() == whole.rows()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("accumulate", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_a_run_killed_after_any_step_ends_in_the_same_bits(version, accumulate, workers, tmp_path):
    options = {"version": version, "accumulate": accumulate, "every": 1 if workers else 3}
    whole = Run(tmp_path / "whole", **options).fit()
    for step in range(1, STEPS) if not workers else (5,):
        for place in ("callbacks", "last"):  # before and after that step is saved
            folder = tmp_path / f"{step}-{place}"
            with pytest.raises(Killed):
                Run(folder, **options, workers=workers, **{place: (Stop(step, kill),)}).fit()
            assert_same(Run(folder, **options, workers=1 if workers else 0).fit(), whole)


def test_a_run_killed_many_times_ends_in_the_same_bits(tmp_path):
    whole = Run(tmp_path / "whole").fit()
    for step in (2, 4, 4, 5, 7):
        with pytest.raises(Killed):
            Run(tmp_path / "run", callbacks=(Stop(step, kill),)).fit()
    assert_same(Run(tmp_path / "run").fit(), whole)


def test_checkpoints_written_in_the_background_are_those_of_their_step(tmp_path):
    whole = Run(tmp_path / "whole", every=2, keep_last=9).fit()
    other = Run(tmp_path / "run", every=2, keep_last=9, asynchronous=True).fit()
    for step in (2, 4, 6, 8):
        folders = [run.folder / "checkpoints" / checkpoints.name_of(step) for run in (whole, other)]
        first, two = (dict(flat(checkpoints.read(checkpoints.check(folder)))) for folder in folders)
        assert all(torch.equal(first[name], two[name]) for name in first if isinstance(first[name], torch.Tensor))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_ends_the_step_saves_and_leaves(number, tmp_path, request):
    whole = Run(tmp_path / "whole").fit()
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    inherited = signal.signal(number, before)  # processes in the background ignore some
    request.addfinalizer(lambda: signal.signal(number, inherited))
    with pytest.raises(Interrupted, match="stopped and saved after step 4") as caught:
        Run(tmp_path / "run", callbacks=(Stop(4, lambda: os.kill(os.getpid(), number)),)).fit()
    assert caught.value.signal_number == number
    assert signal.getsignal(number) is before
    assert checkpoints.pointed(tmp_path / "run" / "checkpoints" / "last").name == "step-00000004"
    assert_same(Run(tmp_path / "run").fit(), whole)


def test_a_signal_after_the_last_step_leaves_what_is_saved(tmp_path):
    class AtTheEnd(L.Callback):
        def on_train_end(self, *_):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="after step 8"):
        Run(tmp_path / "run", last=(AtTheEnd(),)).fit()


def test_a_disk_that_is_full_stops_the_run_with_what_to_do(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    run = Run(tmp_path / "run", callbacks=(Stop(5, lambda: monkeypatch.setattr(checkpoints, "write", full)),))
    with pytest.raises(SaveError, match=r"No space left on device\. Earlier checkpoints .* give the same command"):
        run.fit()
    monkeypatch.undo()
    assert_same(Run(tmp_path / "run").fit(), Run(tmp_path / "whole").fit())


def test_another_number_of_batches_per_step_is_refused(tmp_path):
    with pytest.raises(Killed):
        Run(tmp_path / "run", accumulate=2, last=(Stop(4, kill),)).fit()
    with pytest.raises(ConfigError, match=r"took 2 batches, and now would take 1 .* set trainer.accumulate_grad"):
        Run(tmp_path / "run", accumulate=1).fit()
    Run(tmp_path / "run", accumulate=1, changed=True).fit()


# ------------------------------------------------------------------------------------------------------------- numbers


class Spoil(L.Callback):
    """Makes the loss or a gradient of some steps not finite."""

    def __init__(self, steps: dict[int, str]) -> None:
        self.steps = steps
        self.before: dict | None = None
        self.kept = 0

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.before = self._state(trainer, pl_module)

    def _state(self, trainer, pl_module):
        states = {"weights": pl_module.state_dict(), "optimizer": trainer.optimizers[0].state_dict()["state"]}
        return {name: value.clone() for name, value in flat(states) if isinstance(value, torch.Tensor)}

    def on_after_backward(self, trainer, pl_module):
        kind = self.steps.get(trainer.global_step + 1)
        if kind in ("nan", "inf"):
            parameter = next(p for p in pl_module.parameters() if p.grad is not None)
            parameter.grad.view(-1)[0] = float(kind)
        elif kind == "loss":
            pl_module._micro_batches.loss = pl_module._micro_batches.loss * float("nan")

    def on_train_batch_end(self, trainer, pl_module, *_):
        same = all(torch.equal(value, self.before[name]) for name, value in self._state(trainer, pl_module).items())
        assert same == (trainer.global_step in self.steps), trainer.global_step
        self.kept += same


def test_a_hundred_steps_that_are_not_finite_change_nothing(tmp_path):
    rng = random.Random(0)
    spoiled = {step: rng.choice(["nan", "inf", "loss"]) for step in rng.sample(range(2, 200), 100)}
    spoil = Spoil(spoiled)
    run = Run(tmp_path / "run", every=1000, steps=200, max_in_a_row=1000, callbacks=(spoil,)).fit()
    assert spoil.kept == 100 == run.finite.skipped
    listed = [json.loads(line) for line in (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()]
    assert [row["step"] for row in listed] == sorted(spoiled)
    assert all(len(row["samples"]) == 4 for row in listed)


def test_too_many_in_a_row_stop_the_run_saved_and_with_the_samples(tmp_path):
    spoil = Spoil({2: "nan", 4: "nan", 5: "inf", 6: "loss"})
    run = Run(tmp_path / "run", callbacks=(spoil,))
    with pytest.raises(CollapseError, match=r"3 times in a row, up to step 6; .* samples of the last were \d+"):
        run.fit()
    assert checkpoints.pointed(tmp_path / "run" / "checkpoints" / "last").name == "step-00000006"


def test_the_teacher_stands_still_when_only_the_device_knows():
    """What a GPU does: the flag is a tensor that the host does not read."""
    model = objective(2)
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.add_(1.0)

    class OnDevice(torch.Tensor):
        device = property(lambda self: torch.device("meta"))

    before = {name: value.clone() for name, value in model.teacher.state_dict().items()}
    model.step_teacher(1, skip_step=torch.tensor(True).as_subclass(OnDevice))
    assert all(torch.equal(value, before[name]) for name, value in model.teacher.state_dict().items())
    expected = objective(2)
    expected.student.load_state_dict(model.student.state_dict())
    expected.step_teacher(1)
    model.step_teacher(1, skip_step=torch.tensor(False).as_subclass(OnDevice))
    for weight, other in zip(model.teacher.parameters(), expected.teacher.parameters(), strict=True):
        torch.testing.assert_close(weight, other, atol=1e-6, rtol=0)


def test_rows_behind_the_checkpoint_are_cut(tmp_path):
    log = CSVLog(path=tmp_path / "metrics.csv")
    for step in (1, 5, 10, 12):
        log.log_metrics({"train/loss": float(step)}, step=step)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("1")  # killed while writing step 15
    again = CSVLog(path=tmp_path / "metrics.csv")
    again.cut(10)
    again.log_metrics({"train/loss": 11.0}, step=11)
    rows = (tmp_path / "metrics.csv").read_text().split()
    assert rows == ["step,train/loss", "1,1.0", "5,5.0", "10,10.0", "11,11.0"]
