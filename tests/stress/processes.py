"""`python -m tests.stress.processes vision data2vec2`: two processes against one that accumulates.

Losses of 50 steps, and the student and teacher they end in; then runs that change the number of processes on the way.
"""

import argparse
import csv
import json
import os
import sys
from pathlib import Path

import torch

from tests.stress import tiny

STEPS, CHANGE = 50, 20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("modality")
    parser.add_argument("objective")
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    tiny.import_everything()
    arguments = tiny.make_data(options.folder / "data")[options.modality]
    if options.objective == "data2vec":
        arguments = [one for one in arguments if not one.startswith(("objective.views", "objective.decoder"))]
    arguments = [one for one in arguments if not one.startswith("trainer.max_steps")]
    arguments += [f"objective={options.objective}", f"trainer.max_steps={STEPS}", "data.num_workers=0"]
    arguments += ["modality.encoder.dropout=0.1", f"callbacks.checkpoint.every_n_steps={CHANGE}"]
    one, two = [*arguments, "trainer.accumulate_grad_batches=2"], arguments
    whole = tiny.reference(one, options.folder / "one")
    found = {"two": compare(tiny.reference(two, options.folder / "two", count=2), whole)}
    for name, first, then in (("two to one", (two, 2), (one, 1)), ("one to two", (one, 1), (two, 2))):
        run = tiny.fresh(options.folder / name.replace(" ", "_"))
        processes = tiny.Processes(first[0], run, count=first[1], log=options.folder / f"{run.name}.log")
        while processes.running() and tiny.step_of(run) < CHANGE + 2:
            pass
        processes.kill()
        processes = tiny.Processes(then[0], run, count=then[1], log=options.folder / f"{run.name}.log")
        if not processes.wait(300) or any(processes.statuses.values()):
            sys.exit((options.folder / f"{run.name}.log").read_text())
        found[name] = compare(run, whole)
    print(json.dumps(found, indent=2))
    # The student is printed, not judged: Adam makes a whole step of a gradient that is only rounding noise.
    sys.exit(any(part[name] > 1e-6 for part in found.values() for name in ("loss", "teacher")))


def compare(run: Path, whole: Path) -> dict[str, float]:
    """Largest difference of the losses, relative, and of the weights, absolute."""
    ours, theirs = losses(run), losses(whole)
    assert len(ours) == len(theirs) == STEPS
    relative = max(abs(one - other) / abs(other) for one, other in zip(ours, theirs, strict=True))
    ours, theirs = tiny.final_state(run), tiny.final_state(whole)
    parts = {"teacher": "objective.teacher.", "student": "objective.student."}
    found = {"loss": relative}
    for part, prefix in parts.items():
        names = [name for name in theirs if name.startswith(f".state_dict.{prefix}")]
        found[part] = max(float((ours[name] - theirs[name]).abs().max()) for name in names)
    return found


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
