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
from data2vec_train.training.module import Data2VecModule
from tests.stress import tiny

STEPS = 50
WHOLE_LOGS = [1, 7, 14, 21, 28, 35, 42, 49, 50]  # logged steps of the cases with "whole"
SPOILED = (10, 31, 32)  # steps with a gradient that is not finite in one of two processes


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
    """`how` is 1, the strategy and number of processes as in ddp2, or "whole": one process, one batch per step."""
    count = 1 if how == "whole" else int(how[-1])
    sharing = [f"strategy={how[:-1]}", "strategy.accelerator=cpu", f"strategy.devices={count}"] if count > 1 else []
    if how != "whole":
        sharing.append(f"trainer.accumulate_grad_batches={2 // count}")
    return Group([*arguments, *sharing], run, count=count, log=run.with_name(f"{run.name}.log"))


def finish(processes: Group) -> None:
    if not processes.wait(300) or any(processes.statuses.values()):
        sys.exit(f"{processes.statuses}\n{processes.log.read_text()}")


def compare(run: Path, reference: Path) -> dict[str, float]:
    """Largest relative difference between losses, largest difference between weights."""
    logged, wanted = rows(run), rows(reference)
    steps = WHOLE_LOGS if "whole" in reference.name else list(range(1, STEPS + 1))
    assert [int(row["step"]) for row in logged] == [int(row["step"]) for row in wanted] == steps
    losses, others = ([float(row["train/loss"]) for row in table] for table in (logged, wanted))
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


def spoil(module: Data2VecModule) -> None:
    """After the backward pass of the last batch of a step: what stands for `on_after_backward`."""
    world_size = module.trainer.world_size
    last = world_size * len(module._micro_batches.counts) == 2 and module.global_rank == world_size - 1
    if last and module.trainer.global_step + 1 in SPOILED:
        gradient = next(p.grad for p in module.parameters() if p.grad is not None and p.grad.shape[0] > 1)
        gradient = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        gradient.view(-1)[0] = float("nan")


def main() -> None:
    """A case is MODALITY/VERSION/HOW or, killed in between, MODALITY/VERSION/HOW/HOW[/HOW].

    VERSION is 1 or 2, 2-nan with steps that are not finite, 2-report with a report at the end, 2-bf16,
    1-whole compared with one batch per step in place of two, without dropout.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="+")
    options = parser.parse_args()
    tiny.import_everything()
    commands = tiny.make_data(options.folder / "data")
    found, unspoiled = {}, Data2VecModule.on_after_backward
    for case in options.cases:
        modality, kind, *ways = case.split("/")
        version, _, special = kind.partition("-")
        arguments = [*commands[modality], f"objective={'data2vec' if version == '1' else 'data2vec2'}"]
        if version == "1":  # neither masks per sample nor convolutions
            arguments = [
                word for word in arguments if not word.startswith(("objective.masks_per_sample", "objective.decoder"))
            ]
        arguments += [f"trainer.max_steps={STEPS}", "data.num_workers=0", "callbacks.checkpoint.every_n_steps=10"]
        arguments += ["modality.encoder.dropout=0.1", "modality.encoder.attention_dropout=0.1"]
        if (modality, version) == ("audio", "1"):
            arguments += ["modality.encoder.layer_drop=0.3"]
        if (modality, version) == ("text", "2"):
            # Four samples would hide a power of two of tokens, and weights that are exact hide what is done with them.
            arguments = [word for word in arguments if not word.startswith("data.batch_size")]
            arguments += ["data.batch_size_per_device=3", "trainer.gradient_clip_val=0.3"]
        arguments += {"report": ["report=true"], "bf16": ["precision.trainer=bf16-mixed"]}.get(special, [])
        whole = special == "whole"
        if whole:  # what drops out would differ; with large blocks masks hide unequal numbers
            arguments += ["modality.encoder.dropout=0", "modality.encoder.attention_dropout=0"]
            arguments += ["modality.masker.min_block_fraction=0.3", "trainer.log_every_n_steps=7"]
        Data2VecModule.on_after_backward = spoil if special == "nan" else unspoiled
        reference = options.folder / f"{modality}-{kind}"
        if not reference.exists():
            doubled = ["data.batch_size_per_device=8"] if whole else []
            finish(start([*arguments, *doubled], tiny.fresh(reference), "whole" if whole else "1"))
        run = tiny.fresh(options.folder / case.replace("/", "-"))
        for number, way in enumerate(ways[:-1], start=1):
            processes = start(arguments, run, way)
            while processes.running() and tiny.step_of(run) < STEPS * number // len(ways) + 3:
                time.sleep(0.002)
            assert len(processes.running()) == int(way[-1]), processes.log.read_text()
            processes.kill()
            assert checkpoints.newest(run / "checkpoints") is not None, processes.log.read_text()
            assert not (run / "summary.json").exists(), "it was too late to kill it"
        started = time.monotonic()
        finish(start(arguments, run, ways[-1]))
        found[case] = compare(run, reference) | {"seconds": time.monotonic() - started}
        listed = run / "nonfinite.jsonl"
        steps = [json.loads(line)["step"] for line in listed.read_text().splitlines()] if listed.exists() else []
        found[case]["passed_over"] = len(set(steps))  # one line of all processes with its samples
        found[case]["report"] = (run / "report.html").exists()
        sys.stderr.write(json.dumps({case: found[case]}) + "\n")
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
