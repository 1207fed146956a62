"""`python -m tests.stress.kills --kills 200`: runs are killed at random moments, and have to end in the same bits.

Every run is compared with one that nobody disturbed: each logged loss and each tensor of student, teacher, decoder and
optimizer, to the last bit. The number of loader processes changes at every start.
"""

import argparse
import itertools
import json
import random
import sys
import time
from pathlib import Path

from tests.stress import tiny

EPOCH = 5  # batches


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kills-per-run", type=int, default=3)
    parser.add_argument(
        "--edge-share", type=float, default=0.3, help="of the kills, right after a step on an epoch edge"
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--modalities", nargs="+", default=["vision", "audio", "text"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    tiny.import_everything()
    commands = tiny.make_data(options.folder / "data")
    rng = random.Random(options.seed)
    cases = list(itertools.product(options.modalities, [1, 2], options.processes))
    references: dict[tuple, Path] = {}
    kills = edges = runs = 0
    wrong: list[str] = []
    started = time.monotonic()
    for case in itertools.cycle(cases):
        if kills >= options.kills:
            break
        modality, accumulate, count = case
        arguments = [*commands[modality], f"trainer.accumulate_grad_batches={accumulate}"]
        arguments += ["callbacks.checkpoint.every_n_steps=2"]
        if case not in references:
            whole = options.folder / "whole" / "-".join(map(str, case))
            references[case] = tiny.reference([*arguments, "data.num_workers=0"], whole, count=count)
        run = tiny.fresh(options.folder / "killed" / f"{runs:04d}")
        for _ in range(options.kills_per_run):
            edge = rng.random() < options.edge_share
            done = max(tiny.step_of(run), 0)
            later = [step for step in range(done + 1, tiny.STEPS) if not edge or step * accumulate * count % EPOCH == 0]
            if not later:
                break
            step, delay = rng.choice(later), 0.0 if edge else rng.uniform(0, 0.1)
            processes = start(arguments, run, count, workers=rng.choice([0, 1, 2]))
            while processes.running() and tiny.step_of(run) < step:
                time.sleep(0.0005)
            time.sleep(delay)
            if len(processes.running()) < count:
                wrong.append(f"{run}: ended by itself: {processes.statuses}")
                break
            if count > 1 and rng.random() < 0.5:  # one process dies; the other must not hang
                processes.kill(rng.randrange(count))
                if not processes.wait(60):
                    wrong.append(f"{run}: a process hung when the other was killed")
            else:
                processes.kill()
            kills += 1
            edges += edge
        processes = start(arguments, run, count, workers=rng.choice([0, 1, 2]))
        if not processes.wait(300) or any(processes.statuses.values()):
            wrong.append(f"{run}: did not end: {processes.statuses}")
        elif found := tiny.differences(run, references[case]):
            wrong.append(f"{run} {case}: {len(found)} differ, such as {found[:3]}")
        runs += 1
        print(f"{kills} kills ({edges} on epoch edges), {runs} runs, {len(wrong)} wrong", flush=True)
    result = {"kills": kills, "on_epoch_edges": edges, "runs": runs, "wrong": wrong}
    result["seconds"] = round(time.monotonic() - started)
    print(json.dumps(result, indent=2))
    sys.exit(bool(wrong))


def start(arguments: list[str], run: Path, count: int, *, workers: int) -> tiny.Processes:
    log = run.with_name(f"{run.name}.log")
    return tiny.Processes([*arguments, f"data.num_workers={workers}"], run, count=count, log=log)


if __name__ == "__main__":
    main()
