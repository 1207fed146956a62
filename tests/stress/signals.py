"""`python -m tests.stress.signals --signals 50`: signals to some of two processes, one of which lags behind.

All have to be gone in 30 seconds with the documented exit status, saved at the edge of a step, and the run that goes on
has to end in the same bits as one that nobody disturbed.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from data2vec_train import checkpoints
from tests.stress import tiny

STATUS = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--signals", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    tiny.import_everything()
    arguments = [*tiny.make_data(options.folder / "data")["vision"], "callbacks.checkpoint.every_n_steps=1000"]
    arguments += ["data.num_workers=1"]
    reference = tiny.reference(arguments, options.folder / "whole", count=2)
    rng = random.Random(options.seed)
    wrong: list[str] = []
    slowest, sent = 0.0, 0
    while sent < options.signals:
        run, log = tiny.fresh(options.folder / "run"), options.folder / f"{sent:03d}.log"
        step = rng.randrange(1, tiny.STEPS - 3)
        processes = tiny.Processes(arguments, run, count=2, log=log)
        while processes.running() and tiny.step_of(run) < step:
            time.sleep(0.0005)
        number = rng.choice(list(STATUS))
        targets = rng.choice([[0], [1], [0, 1]])
        straggler = processes.ids[rng.randrange(2)]
        os.kill(straggler, signal.SIGSTOP)
        started = time.monotonic()
        for target in targets:
            processes.signal(number, [target])
            time.sleep(rng.uniform(0, 0.1))
        time.sleep(rng.uniform(0, 1))
        os.kill(straggler, signal.SIGCONT)
        sent += 1
        gone = processes.wait(30)
        slowest = max(slowest, time.monotonic() - started)
        found = checkpoints.newest(run / "checkpoints")
        what = f"{log}: {number.name} to {targets} at step {step}"
        if not gone or set(processes.statuses.values()) != {STATUS[number]} or found is None:
            wrong.append(f"{what}: in time {gone}, statuses {processes.statuses}, saved {found}")
            continue
        processes = tiny.Processes(arguments, run, count=2, log=log)
        if not processes.wait(300) or any(processes.statuses.values()):
            wrong.append(f"{what}: did not go on: {processes.statuses}")
        elif different := tiny.differences(run, reference):
            wrong.append(f"{what}: {len(different)} differ, such as {different[:3]}")
        print(f"{sent} signals, slowest end {slowest:.1f} s, {len(wrong)} wrong", flush=True)
    print(json.dumps({"signals": sent, "slowest_end_seconds": round(slowest, 1), "wrong": wrong}, indent=2))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
