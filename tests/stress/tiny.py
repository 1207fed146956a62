"""Tiny runs of the real program in forked processes: everything is imported once, a start costs a second."""

import csv
import faulthandler
import importlib
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image

from data2vec_train import checkpoints

STEPS = 15
SIZE = ["size.dim=16", "size.depth=2", "size.num_heads=2", "size.ffn_dim=32", "objective.decoder.channels=16"]
SIZE += ["objective.targets.top_k_layers=2", "objective.masks_per_sample=2", "report=false", "optimizer.lr=1e-3"]
SIZE += ["precision=fp32"]  # whatever the machine: runs are compared
OFTEN = [f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1", "callbacks.probe.every_n_steps=1000"]
OFTEN += ["callbacks.probe.rank_samples=8", "data.held_out_fraction=0.1", "callbacks.monitor.grace_steps=1000"]
WORDS = "It was a day like any other, and nobody in the house knew what was to come of it. "


def make_data(folder: Path) -> dict[str, list[str]]:
    """Small data sets, an epoch of which is five batches; arguments of the program for each modality."""
    rng = np.random.default_rng(0)
    images, sounds, texts = folder / "images", folder / "sounds", folder / "texts"
    for directory in (images, sounds, texts):
        directory.mkdir(parents=True, exist_ok=True)
    for number in range(22):
        Image.fromarray(rng.integers(0, 256, (24, 24), dtype=np.uint8)).save(images / f"{number:02d}.png")
        soundfile.write(sounds / f"{number:02d}.wav", rng.normal(scale=0.1, size=4000 + 40 * number), 16_000)
        (texts / f"{number:02d}.txt").write_text(f"{number} " + WORDS * 3)
    own = {
        "vision": [f"data.path={images}", "modality.image_px=16", "modality.patch_px=4", "modality.channels=1",
                   "modality.mean=[0.5]", "modality.std=[0.25]", "data.batch_size_per_device=4"],
        "audio": [f"data.path={sounds}", "size.conv_dim=8", "modality.max_seconds=0.3", "modality.batch_seconds=1.2"],
        "text": [f"data.path={texts}", "modality.block_tokens=32", "data.batch_size_per_device=4",
                 ],
    }  # fmt: skip
    return {
        name: [f"modality={name}", "data=folder", f"cache_dir={folder}/cache", *SIZE, *OFTEN, *mine]
        for name, mine in own.items()
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Processes:
    """One start of the program: a process, or two that share the work."""

    def __init__(
        self, arguments: list[str], run: Path | None, *, count: int, log: Path, command: str = "__main__",
        prepare: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.run = run
        self.log = log
        self.command = command
        self.prepare = prepare  # called in each process, before the program
        port = free_port() if count > 1 else 0
        arguments = arguments if run is None else [*arguments, f"hydra.run.dir={run}"]  # None: a sweep
        self.ids = [self._start(arguments, rank, count, port) for rank in range(count)]
        self.statuses: dict[int, int] = {}

    def _start(self, arguments: list[str], rank: int, count: int, port: int) -> int:
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        try:
            os.setsid()
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = (
                os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2)
            )  # pytest has its own
            faulthandler.enable()
            torch.set_num_threads(1)
            if count > 1:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": 0, "NODE_RANK": 0}
                os.environ |= {name: str(value) for name, value in place.items()} | {"TORCHELASTIC_RUN_ID": "stress"}
                arguments = [*arguments, "strategy=ddp", "strategy.accelerator=cpu", f"strategy.devices={count}"]
            sys.argv = ["data2vec_train", *arguments]
            from lightning.pytorch.utilities import rank_zero_only

            rank_zero_only.rank = rank  # read from the environment when it was imported, before the fork
            from data2vec_train.config.compose import main

            verb = "" if self.command == "__main__" else f".{self.command}"
            entry = importlib.import_module(f"data2vec_train{verb}.__main__")
            options = {"config_name": self.command} if self.command != "__main__" else {"config_name": "train"}
            weights = {"finetune": "init_from", "probe": "checkpoint", "embed": "checkpoint", "predict": "checkpoint"}
            self.prepare()
            status = 0
            try:
                main(entry._pretrain if self.command == "__main__" else entry._run, **options,
                     weights=weights.get(self.command))  # fmt: skip
            except SystemExit as ending:
                status = ending.code or 0
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def running(self) -> list[int]:
        for child in self.ids:
            if child not in self.statuses:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    self.statuses[child] = os.waitstatus_to_exitcode(status)
        return [child for child in self.ids if child not in self.statuses]

    def wait(self, seconds: float) -> bool:
        """Whether all have left in time; those that have not write their stacks into the log and are killed."""
        end = time.monotonic() + seconds
        while self.running() and time.monotonic() < end:
            time.sleep(0.005)
        late = self.running()
        for process in late:
            os.killpg(process, signal.SIGABRT)  # faulthandler: stacks of all threads, of loader processes too
        if late:
            time.sleep(2)
        self.kill()
        return not late

    def kill(self, which: int | None = None) -> None:
        """SIGKILL to all, workers too, or to one."""
        for number, child in enumerate(self.ids):
            if child not in self.statuses and which in (None, number):
                try:
                    os.killpg(child, signal.SIGKILL)
                except ProcessLookupError:
                    os.kill(child, signal.SIGKILL)
        while which is None and self.running():
            time.sleep(0.005)

    def signal(self, number: int, which: list[int]) -> None:
        for index in which:
            if self.ids[index] in self.running():
                os.kill(self.ids[index], number)


def reference(arguments: list[str], run: Path, *, count: int = 1) -> Path:
    """A run that nobody disturbs."""
    processes = Processes(arguments, fresh(run), count=count, log=run.with_name(f"{run.name}.log"))
    ended = processes.wait(300)
    if not ended or any(processes.statuses.values()):
        sys.exit(run.with_name(f"{run.name}.log").read_text())
    return run


def step_of(run: Path) -> int:
    """The last step in metrics.csv; -1 before the first row."""
    file = run / "metrics.csv"
    if not file.exists():
        return -1
    lines = file.read_bytes().split(b"\n")[:-1]
    return int(lines[-1].split(b",")[0]) if len(lines) > 1 else -1


def flat(tree: object, path: str = ""):
    """(path, leaf) of nested containers, without what says when something happened."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key not in ("loops", "callbacks", "config"):
                yield from flat(value, f"{path}.{key}")
    elif isinstance(tree, (list, tuple)):
        for key, value in enumerate(tree):
            yield from flat(value, f"{path}.{key}")
    else:
        yield path, tree


def final_state(run: Path) -> dict[str, object]:
    """Student, teacher, decoder, optimizer and counters of the newest checkpoint."""
    return dict(flat(checkpoints.read(checkpoints.resolve(run))))


def logged(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, without times."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: row[name] for name in row if "second" not in name and "wait" not in name} for row in rows]


def differences(run: Path, reference: Path) -> list[str]:
    """Names of tensors and rows that are not the same to the last bit."""
    ours, theirs = final_state(run), final_state(reference)
    found = [name for name in ours.keys() ^ theirs.keys()]
    for name in ours.keys() & theirs.keys():
        value, other = ours[name], theirs[name]
        if not (torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other):
            found.append(name)
    rows, others = logged(run), logged(reference)
    found += [f"row {number}" for number, (row, other) in enumerate(zip(rows, others, strict=False)) if row != other]
    return found + (["number of rows"] if len(rows) != len(others) else [])


def fresh(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def import_everything() -> None:
    """What every child would import; nothing is computed, since threads do not survive a fork."""
    import data2vec_train.config.compose
    import data2vec_train.pretrain.run
    import data2vec_train.report.pretraining  # noqa: F401
