"""`python -m tests.distributed.runs FOLDER CASE ...`: the runs that the tests beside this file compare.

One program that imports everything and then forks: starting Python for each process takes longer than the runs.
"""

import argparse
import csv
import json
import os
import sys
import time
from pathlib import Path

import torch

from data2vec_train import checkpoints
from tests.stress import tiny

STEPS = 50


class Group(tiny.Processes):
    """Processes as `torchrun` would start them, with the strategy that the arguments say."""

    def _start(self, arguments: list[str], rank: int, count: int, port: int) -> int:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        place = {name: str(value) for name, value in place.items()} if count > 1 else {}
        os.environ |= place
        try:
            return super()._start(arguments, rank, 1, port)
        finally:
            for name in place:
                del os.environ[name]


def start(arguments: list[str], run: Path, how: str) -> Group:
    """`how` is 1, or the strategy and number of processes as in ddp2."""
    count = int(how[-1])
    sharing = [f"strategy={how[:-1]}", "strategy.accelerator=cpu", f"strategy.devices={count}"] if count > 1 else []
    sharing.append(f"trainer.accumulate_grad_batches={2 // count}")
    return Group([*arguments, *sharing], run, count=count, log=run.with_name(f"{run.name}.log"))


def finish(processes: Group) -> None:
    if not processes.wait(300) or any(processes.statuses.values()):
        sys.exit(f"{processes.statuses}\n{processes.log.read_text()}")


def compare(run: Path, reference: Path) -> dict[str, float]:
    """Largest relative difference between losses, largest difference between weights."""
    losses, others = ([float(row["train/loss"]) for row in rows(one)] for one in (run, reference))
    assert len(losses) == len(others) == STEPS, (len(losses), len(others))
    ours, theirs = tiny.final_state(run), tiny.final_state(reference)
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    difference = {"loss": max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True))}
    for part in ("student", "teacher", "decoder"):
        names = [name for name in ours if f".objective.{part}." in name]
        difference[part] = max(float((ours[name] - theirs[name]).abs().max()) for name in names)
    moments = [name for name in ours if name.endswith((".exp_avg", ".step"))]
    difference["moments"] = max(float((ours[name] - theirs[name]).abs().max()) for name in moments)
    return difference


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["train/loss"]]  # the first row is before training


def main() -> None:
    """A case is MODALITY/VERSION/HOW or, killed in between, MODALITY/VERSION/HOW/HOW."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="+")
    options = parser.parse_args()
    tiny.import_everything()
    commands = tiny.make_data(options.folder / "data")
    found = {}
    for case in options.cases:
        modality, version, *ways = case.split("/")
        arguments = [*commands[modality], f"objective={'data2vec' if version == '1' else 'data2vec2'}"]
        arguments += [f"trainer.max_steps={STEPS}", "data.num_workers=0", "callbacks.checkpoint.every_n_steps=10"]
        arguments += ["modality.encoder.dropout=0.1", "modality.encoder.attention_dropout=0.1"]
        if version == "1":
            arguments.append("objective.views=1")
        if (modality, version) == ("audio", "1"):
            arguments += ["modality.encoder.layer_drop=0.3"]
        reference = options.folder / f"{modality}-{version}"
        if not reference.exists():
            finish(start(arguments, tiny.fresh(reference), "1"))
        run = tiny.fresh(options.folder / case.replace("/", "-"))
        for way in ways[:-1]:
            processes = start(arguments, run, way)
            while processes.running() and tiny.step_of(run) < STEPS // 2 + 3:
                time.sleep(0.002)
            processes.kill()
            assert checkpoints.newest(run / "checkpoints") is not None, processes.log.read_text()
            assert not (run / "summary.json").exists(), "it was too late to kill it"
        started = time.monotonic()
        finish(start(arguments, run, ways[-1]))
        found[case] = compare(run, reference) | {"seconds": time.monotonic() - started}
        print(json.dumps({case: found[case]}), file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
