import csv
import itertools
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data2vec_train.data.datamodule import TimedLoader
from data2vec_train.errors import CollapseError, ConfigError
from data2vec_train.training.callbacks.monitor import CSVLog, Monitor, describe, loader_advice, wandb_logger
from data2vec_train.training.callbacks.probe import ProbeCallback
from data2vec_train.training.step_result import StepResult


def rows(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------------------ CSV log


def test_one_row_per_call_is_on_disk_at_once(tmp_path):
    log = CSVLog(path=tmp_path / "metrics.csv")
    log.log_metrics({"train/loss": 1.5, "a": 2.0}, step=1)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,train/loss,a", "1,1.5,2.0"]
    log.log_metrics({"a": 4.0, "train/loss": 3.0}, step=2)
    assert rows(tmp_path / "metrics.csv")[1] == {"step": "2", "train/loss": "3.0", "a": "4.0"}


def test_new_metrics_get_columns_at_the_end_and_old_rows_keep_them_empty(tmp_path):
    log = CSVLog(path=tmp_path / "metrics.csv")
    log.log_metrics({"knn": 0.5}, step=0)
    log.log_metrics({"train/loss": 1.0}, step=1)
    log.log_metrics({"train/loss": 2.0, "rank": 3.0}, step=2)
    path = tmp_path / "metrics.csv"
    assert path.read_text().splitlines()[0] == "step,train/loss,knn,rank"
    empty = {"train/loss": "", "knn": "", "rank": ""}
    assert rows(path) == [
        {**empty, "step": "0", "knn": "0.5"},
        {**empty, "step": "1", "train/loss": "1.0"},
        {**empty, "step": "2", "train/loss": "2.0", "rank": "3.0"},
    ]


@pytest.mark.parametrize("second", [{"knn": 0.7}, {"train/loss": 0.7}])
def test_a_second_run_into_the_same_folder_appends_under_the_right_columns(tmp_path, second):
    path = tmp_path / "metrics.csv"
    CSVLog(path=path).log_metrics({"rank": 9.0, "knn": 0.5}, step=1)
    CSVLog(path=path).log_metrics(second, step=2)
    first, two = rows(path)
    assert (first["step"], first["knn"], first["rank"]) == ("1", "0.5", "9.0")
    assert {name: value for name, value in two.items() if value} == {"step": "2", **dict.fromkeys(second, "0.7")}
    assert len(path.read_text().splitlines()[-1].split(",")) == len(path.read_text().splitlines()[0].split(","))


# ------------------------------------------------------------------------------------------------------------ monitor


class Rows:
    """A logger that keeps what it gets."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict]] = []

    def log_metrics(self, row, step):
        self.rows.append((step, dict(row)))


class Run:
    """The parts of a Trainer, a LightningModule and a batch that the monitor looks at."""

    def __init__(self, monitor: Monitor, *, num_samples: int | None = 64) -> None:
        self.monitor, self.log = monitor, Rows()
        data = SimpleNamespace(num_samples=num_samples, loader=SimpleNamespace(waited_seconds=0.0))
        data.num_workers, data.on_device = 1, None
        self.trainer = SimpleNamespace(
            global_step=0,
            max_steps=100,
            world_size=1,
            num_devices=1,
            is_global_zero=True,
            callbacks=[],
            loggers=[self.log],
            datamodule=data,
        )
        self.module = SimpleNamespace(step_result=None)
        monitor.on_train_start(self.trainer, self.module)

    def batch(self, step: int, *, completes: bool = True, **metrics: float) -> None:
        """One batch; without metrics it completes a step that is not logged."""
        self.trainer.global_step = step
        named = {"train/" + name: torch.tensor(value) for name, value in metrics.items()}
        never = torch.tensor(False)
        result = StepResult(step=step, metrics=named, skip_step=never, non_finite=never, loss_scale=None, samples=())
        self.module.step_result = result if completes else None
        self.monitor.on_train_batch_end(self.trainer, self.module, None, list(range(16)), 0)

    def step(self, step: int, *, target_std: float = 1.0, prediction_std: float = 1.0) -> None:
        self.batch(step, loss=2.0, tau=0.9, lr=0.1, target_std=target_std, prediction_std=prediction_std)


def monitor(**changes) -> Monitor:
    options = {"min_target_std": 0.1, "min_prediction_std": 0.01, "grace_steps": 50, "progress": "none"}
    return Monitor(**options | {"max_data_wait": 0.2, "data_wait_rows": 2} | changes)


@pytest.mark.parametrize(
    ("low", "message"),
    [
        ({"target_std": 0.0321}, r"step 50: train/target_std is 0\.0321, below the threshold of 0\.1"),
        ({"prediction_std": 0.00456}, r"step 50: train/prediction_std is 0\.00456, below the threshold of 0\.01"),
    ],
)
def test_a_collapse_is_an_error_with_value_and_threshold_after_the_grace_period_only(low, message):
    run = Run(monitor())
    run.step(49, **low)
    with pytest.raises(CollapseError, match=message):
        run.step(50, **low)
    assert [step for step, _ in run.log.rows] == [49, 50]  # the row that shows it is logged


@pytest.mark.parametrize("name", ["target_std", "prediction_std"])
def test_nan_is_an_alarm_too(name):
    run = Run(monitor())
    with pytest.raises(CollapseError):
        run.step(60, **{name: float("nan")})


def measured_run(monitor: Monitor, *, untrained: float, trained: float) -> Run:
    """A run whose probe has measured RankMe at whatever step it is."""
    run = Run(monitor)
    probe = ProbeCallback(every_n_steps=1, neighbours=1, l2=1.0, rank_samples=1, **PLAIN_PROBE)
    probe.ranks, probe.metrics = {"untrained": untrained, "trained": trained}, {"probe/rankme": trained}
    run.trainer.callbacks.append(probe)
    run.probe = probe
    return run


PLAIN_PROBE = {"pooling": "mean", "raw": None, "raw_name": "raw", "note": None}
BEFORE_NORMS = {"min_feature_ratio": 0.01, "min_rank_ratio": 0.02}


def features(run: Run, step: int, feature_std: float) -> None:
    run.batch(step, loss=2.0, tau=0.9, lr=0.1, target_std=0.95, prediction_std=0.3, feature_std=feature_std)


def test_features_that_no_longer_differ_are_a_collapse_though_normalised_targets_vary():
    run = Run(monitor(**BEFORE_NORMS))
    features(run, 1, 0.5)
    features(run, 49, 1e-6)  # still in the grace period
    with pytest.raises(
        CollapseError, match=r"step 50: train/feature_std is 1e-06, below the threshold of 0\.005 .*lower optimizer\.lr"
    ):
        features(run, 50, 1e-6)


def test_the_last_step_of_a_run_shorter_than_the_grace_period_is_judged():
    run = Run(monitor(grace_steps=500, **BEFORE_NORMS))
    features(run, 1, 0.5)
    features(run, 99, 1e-6)
    with pytest.raises(CollapseError, match="collapse at step 100: train/feature_std"):
        features(run, 100, 1e-6)


@pytest.mark.parametrize("low", [{"target_std": 0.009}, {"prediction_std": 0.001}])
def test_both_deviations_are_judged_at_the_end_of_a_short_run(low):
    run = Run(monitor(grace_steps=500))
    run.step(1, target_std=0.32, prediction_std=0.0475)
    with pytest.raises(CollapseError, match="collapse at step 100"):
        run.step(100, **{"target_std": 0.32, "prediction_std": 0.05} | low)


@pytest.mark.parametrize("prediction_std", [0.004, 0.0081])
def test_small_predictions_of_a_short_healthy_run_are_no_collapse(prediction_std):
    run = Run(monitor(grace_steps=500))
    run.step(1, prediction_std=0.0081)  # a new decoder says little, and less before it says more
    run.step(100, prediction_std=prediction_std)


@pytest.mark.parametrize("first", [0.5, 0.0067, 1e-4])
def test_features_that_differ_little_from_the_start_are_judged_by_that(first):
    run = Run(monitor(**BEFORE_NORMS))
    for step in (1, 50, 100):
        features(run, step, first if step == 1 else first / 20)


def test_features_of_data_that_are_all_alike_are_no_collapse():
    run = Run(monitor(**BEFORE_NORMS))
    for step in (1, 50, 100):
        features(run, step, 0.0)


def test_a_batch_of_one_sample_says_nothing_about_other_samples():
    run = Run(monitor(**BEFORE_NORMS))
    features(run, 1, float("nan"))
    features(run, 100, float("nan"))
    assert all("train/feature_std" not in row for _, row in run.log.rows)


@pytest.mark.parametrize(
    ("untrained", "trained", "fails"), [(3.0, 1.0, True), (70.5, 1.2, True), (1.249, 1.067, False), (1.0001, 1.0, True)]
)
def test_rankme_is_judged_against_the_untrained_encoder(untrained, trained, fails):
    run = measured_run(monitor(**BEFORE_NORMS), untrained=untrained, trained=trained)
    run.probe.measured_at = 100
    if fails:
        with pytest.raises(CollapseError, match=r"step 100: probe/rankme is 1\.\d+, below the threshold of"):
            run.step(100)
    else:
        run.step(100)


def test_rankme_is_judged_between_two_logged_steps_too():
    run = measured_run(monitor(**BEFORE_NORMS), untrained=3.0, trained=1.0)
    run.probe.measured_at = 75
    with pytest.raises(CollapseError, match="probe/rankme"):
        run.batch(75)


def test_null_switches_the_judgement_before_the_norms_off():
    run = measured_run(monitor(min_feature_ratio=None, min_rank_ratio=None), untrained=3.0, trained=1.0)
    run.probe.measured_at = 100
    features(run, 1, 0.5)
    features(run, 100, 0.0)


def test_healthy_values_pass():
    run = Run(monitor())
    for step in (49, 50, 100):
        run.step(step, target_std=0.11, prediction_std=0.011)
    assert len(run.log.rows) == 3


def test_thresholds_of_0_switch_the_alarm_off():
    run = Run(monitor(min_target_std=0.0, min_prediction_std=0.0))
    run.step(60, target_std=0.0, prediction_std=0.0)


def test_only_complete_logged_steps_make_a_row():
    run = Run(monitor())
    run.batch(0, completes=False)  # first half of an accumulation
    run.batch(1, loss=2.0, target_std=1.0, prediction_std=1.0, tau=0.9, lr=0.1)
    run.batch(1, completes=False)  # first half of the next
    run.batch(2)  # a step that is not logged
    ((step, row),) = run.log.rows
    assert step == 1
    assert row["train/loss"] == 2.0
    assert row["train/lr"] == pytest.approx(0.1)
    assert all(isinstance(value, float) for value in row.values())


def test_throughput_and_waiting_are_since_the_last_row(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("data2vec_train.training.callbacks.monitor.time.perf_counter", lambda: now[0])
    run = Run(monitor())
    now[0] += 2.0
    run.trainer.datamodule.loader.waited_seconds = 0.5
    run.step(1)  # 16 samples in 2 s, a quarter of it waiting
    run.batch(2)
    now[0] += 4.0
    run.trainer.datamodule.loader.waited_seconds = 3.5
    run.step(3)  # 32 samples in 4 s
    (_, first), (_, two) = run.log.rows
    assert (first["train/samples_per_second"], first["train/data_wait"], first["train/epoch"]) == (8.0, 0.25, 0.25)
    assert (two["train/samples_per_second"], two["train/data_wait"], two["train/epoch"]) == (8.0, 0.75, 0.75)


class Slow(torch.utils.data.Dataset):
    """Records that take a while to read, by the clock that is given."""

    def __init__(self, seconds: float, clock: list[float]) -> None:
        self.seconds = seconds
        self.clock = clock

    def __getitem__(self, index: int) -> int:
        self.clock[0] += self.seconds
        return index

    def __len__(self) -> int:
        return 1000


@pytest.mark.parametrize(("seconds", "said"), [(0.005, 1), (0.0, 0)])
def test_a_loader_that_is_the_brake_is_said_once_with_what_to_change(seconds, said, caplog, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("data2vec_train.training.callbacks.monitor.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("data2vec_train.training.callbacks.monitor.cores_at_hand", lambda: 4)
    run = Run(monitor())
    run.trainer.datamodule.loader = TimedLoader(torch.utils.data.DataLoader(Slow(seconds, now), batch_size=2))
    with caplog.at_level(logging.WARNING, logger="data2vec_train.training.callbacks.monitor"):
        for step, _ in enumerate(itertools.islice(run.trainer.datamodule.loader, 8), start=1):
            now[0] += 0.01  # the step itself
            run.step(step)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == said
    for line in lines:
        assert 20 < int(line.split()[0]) < 100
        assert line.endswith("the loader has 1 process, and there are 4 cores; set data.num_workers=2")


def test_waiting_for_the_first_logged_step_is_no_brake(caplog, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("data2vec_train.training.callbacks.monitor.time.perf_counter", lambda: now[0])
    run = Run(monitor())
    for step in range(1, 8):
        now[0] += 100.0 if step == 1 else 1.0
        run.trainer.datamodule.loader.waited_seconds += 99.0 if step == 1 else 0.19
        run.step(step)
    assert not caplog.records


@pytest.mark.parametrize(
    ("workers", "cores", "on_device", "advice"),
    [
        (0, 8, None, "set data.num_workers=1"),
        (3, 8, False, "set data.num_workers=6"),
        (7, 8, False, "set data.num_workers=8"),
        (8, 8, False, "data.on_device=true"),
        (8, 8, True, "in shards (data=hf, data=stream), augment less"),
        (8, 8, None, "augment less"),
    ],
)
def test_the_advice_fits_what_there_is(workers, cores, on_device, advice):
    text = loader_advice(workers=workers, cores=cores, on_device=on_device)
    assert text.endswith(advice) or (on_device is False and advice in text)
    assert ("num_workers" in text) == (workers < cores)


def test_a_stream_has_no_epochs():
    run = Run(monitor(), num_samples=None)
    run.step(1)
    assert "train/epoch" not in run.log.rows[0][1]


def test_first_and_last_rows_are_kept_for_the_summary():
    run = Run(monitor())
    for step, std in ((1, 0.5), (2, 0.75), (3, 0.25)):
        run.step(step, target_std=std)
    assert run.monitor.first["train/target_std"] == 0.5
    assert run.monitor.last["train/target_std"] == 0.25
    assert run.monitor.samples == 48


def test_progress_as_lines_tells_step_loss_and_remaining_time(caplog):
    run = Run(monitor(progress="lines"))
    with caplog.at_level(logging.INFO, logger="data2vec_train.training.callbacks.monitor"):
        run.step(10)
    assert "step 10/100" in caplog.text
    assert "loss 2.000" in caplog.text
    assert "ETA" in caplog.text


def test_an_unknown_kind_of_progress_is_refused():
    with pytest.raises(ValueError, match="got 'dots'"):
        monitor(progress="dots")


def test_rows_in_words():
    row = {"train/loss": 1.23456, "probe/knn": np.float64(0.987), "train/lr": 0.1, "train/data_wait": 0.25}
    assert describe(row) == "loss 1.235  data wait 25%  kNN 98.7%"
    assert describe({"train/loss": 1.0, "test/f1": 0.5, "test/loss": 2.0}) == "loss 1.000  f1 0.5  test loss 2"


def test_wandb_without_the_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("data2vec_train.system.constraints.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"data2vec-train\[wandb\]"):
        wandb_logger(project="p", save_dir="d", step=0)
