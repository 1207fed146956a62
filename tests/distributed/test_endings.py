"""Runs whose processes, shared memory or open files are taken away, and runs that are told to stop: how they end."""

import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.distributed import endings
from tests.stress import tiny

ROOT = os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], check=False).returncode == 0


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, list[str]]:
    torch.set_num_threads(1)
    tiny.import_everything()
    return tiny.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def start(data, tmp_path):
    """Start the program in a forked process; whatever is left of it at the end is killed."""
    started = []

    def _start(*arguments: str, modality: str = "vision", count: int = 1, **options) -> tiny.Processes:
        run = tmp_path / f"run{len(started)}"
        log = tmp_path / f"{len(started)}.log"
        own = [*data[modality], *arguments]
        started.append(tiny.Processes(own, tiny.fresh(run), count=count, log=log, **options))
        return started[-1]

    yield _start
    for processes in started:
        processes.kill()


# ------------------------------------------------------------------------------------------ what loader processes need


@pytest.mark.skipif(not ROOT, reason="needs a name space of its own for /dev/shm")
@pytest.mark.parametrize("size", ["4k", pytest.param("64k", marks=pytest.mark.slow)])
def test_too_little_shared_memory_ends_a_run_with_what_to_change(size, start):
    prepare = endings.small_shared_memory(size)
    found = endings.outcome(start(*endings.WORKERS, "data.batch_size_per_device=16", prepare=prepare), 60)
    assert found["statuses"] == [2], found
    assert "--shm-size" in found["log"]
    assert "data.num_workers=0" in found["log"]
    assert "Traceback" not in found["log"]


@pytest.mark.parametrize("count", [40, pytest.param(80, marks=pytest.mark.slow)])
def test_too_few_open_files_end_a_run_with_what_to_change(count, start):
    found = endings.outcome(start(*endings.WORKERS, prepare=endings.open_files(count)), 60)
    assert found["statuses"] == [2], found
    assert "ulimit -n" in found["log"]
    assert "data.num_workers" in found["log"]
    assert "Traceback" not in found["log"]


# -------------------------------------------------------------------------------------------------------------- signals

STATUS = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGHUP: 75, signal.SIGINT: 130}


def stop_children(processes: tiny.Processes) -> list[int]:
    found = endings.children(processes.ids[0])
    for child in found:
        os.kill(child, signal.SIGSTOP)
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_run_whose_loader_processes_do_not_answer_leaves_in_the_stated_time(number, start):
    processes = start(*endings.WORKERS, *endings.LONG)
    endings.in_steps(processes, 8)
    loaders = stop_children(processes)
    assert len(loaders) == 2
    processes.signal(number, [0])
    found = endings.outcome(processes, 25, loaders)
    assert found["statuses"] == [STATUS[number]], found
    assert found["saved"] >= 5
    assert found["left"] == 0
    assert "for 3 s (stop_seconds)" in found["log"]
    assert "a batch from a loader process" in found["log"]


def test_a_second_ctrl_c_leaves_at_once_whatever_the_first_waits_for(start):
    processes = start(*endings.WORKERS, *endings.LONG, "stop_seconds=600")
    endings.in_steps(processes)
    loaders = stop_children(processes)
    processes.signal(signal.SIGINT, [0])
    time.sleep(0.5)
    processes.signal(signal.SIGINT, [0])
    found = endings.outcome(processes, 5, loaders)
    assert found["statuses"] == [130], found
    assert found["left"] == 0


@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stopped_process_holds_the_others_for_the_stated_time_only(stopped, start):
    processes = start("data.num_workers=0", *endings.LONG, count=2)
    endings.in_steps(processes, 8)
    os.kill(processes.ids[stopped], signal.SIGSTOP)
    time.sleep(0.5)
    processes.signal(signal.SIGTERM, [1 - stopped])
    end = time.monotonic() + 20
    while len(processes.running()) == 2 and time.monotonic() < end:
        time.sleep(0.05)
    assert processes.statuses == {processes.ids[1 - stopped]: 75}, processes.log.read_text()
    os.kill(processes.ids[stopped], signal.SIGCONT)
    found = endings.outcome(processes, 25)
    assert found["statuses"] == [75, 75] or found["statuses"][stopped] == 76, found
    assert "Traceback" not in found["log"]


# ---------------------------------------------------------------------------------------------------- killed processes


@pytest.mark.parametrize(("victim", "kind"), [(1, "ddp"), pytest.param(0, "ddp", marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_others_with_a_line(victim, kind, start):
    processes = start("data.num_workers=0", *endings.LONG, count=2)
    endings.in_steps(processes, 8)
    processes.kill(victim)
    found = endings.outcome(processes, 25)
    expected = [76, 76]
    expected[victim] = -9
    assert found["statuses"] == expected, found
    assert f"process {victim} was killed (out of memory?)" in found["log"]
    assert "Traceback" not in found["log"]


def test_a_killed_loader_process_ends_the_run_with_a_line(start):
    processes = start(*endings.WORKERS, *endings.LONG)
    endings.in_steps(processes)
    loaders = endings.children(processes.ids[0])
    os.kill(loaders[0], signal.SIGKILL)
    found = endings.outcome(processes, 25, loaders)
    assert found["statuses"] == [76], found
    assert "a loader process was killed (out of memory?)" in found["log"]
    assert "Traceback" not in found["log"]
    assert found["left"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.05, 0.2, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_a_command_starts_ends_it_with_the_same_status(number, delay, data, tmp_path):
    command = [sys.executable, "-m", "data2vec_train", *data["vision"], f"hydra.run.dir={tmp_path / 'run'}"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, *endings.LONG], stdout=log, stderr=log, cwd=endings.CHECKOUT)
    time.sleep(delay + 0.1)  # for Python itself
    process.send_signal(number)
    assert process.wait(30) == 75, (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()


# ------------------------------------------------------------------------------------- loader processes not forked


def test_what_loader_processes_get_knows_nothing_of_the_run(tmp_path):
    """Pickled for a spawned process: the DataModule and the trainer behind it cannot be, and must not be."""
    from tests.test_module import data_of

    module = data_of(2, tmp_path, batch=4, num_workers=0)
    subset = module.training_subset(8)
    loader = module.train_dataloader().loader
    for part in (subset, loader.dataset, loader.collate_fn):
        assert b"DataModule" not in pickle.dumps(part)


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["vision", "audio", "text"])
def test_loader_processes_that_are_spawned_give_the_same_bits(modality, start):
    runs = []
    for method in ("fork", "spawn", "forkserver"):
        arguments = ["trainer.max_steps=3", "data.num_workers=1"]
        runs.append(start(*arguments, modality=modality, prepare=endings.started_by(method)))
        found = endings.outcome(runs[-1], 250)
        assert found["statuses"] == [0], found
    assert not tiny.differences(runs[1].run, runs[0].run)
    assert not tiny.differences(runs[2].run, runs[0].run)
