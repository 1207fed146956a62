"""`python -m tests.stress.sweeps --kills 10`: a sweep that is killed anywhere and issued again does the rest only."""

import argparse
import json
import random
import sys
import time
from pathlib import Path

from tests.stress import tiny


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    tiny.import_everything()
    arguments = [*tiny.make_data(options.folder / "data")["vision"], "callbacks.checkpoint.every_n_steps=2"]
    arguments += ["data.num_workers=0"]
    cache = [word for word in arguments if word.startswith("cache_dir=")]  # a saved command may not say where to write
    seeds = range(4)
    whole = [
        tiny.reference([*arguments, f"seed={seed}"], options.folder / "whole" / str(seed), count=1) for seed in seeds
    ]
    rng = random.Random(options.seed)
    wrong: list[str] = []
    for number in range(options.kills):
        sweep = tiny.fresh(options.folder / f"sweep{number}")
        log = options.folder / f"sweep{number}.log"
        swept = ["-m", *arguments, f"seed={','.join(map(str, seeds))}", f"hydra.sweep.dir={sweep}"]
        processes = tiny.Processes(swept, None, count=1, log=log)
        member, step = sweep / str(rng.choice(seeds)), rng.randrange(tiny.STEPS)
        while processes.running() and tiny.step_of(member) < step:
            time.sleep(0.0005)
        processes.kill()
        finished = {
            member: (member / "summary.json").stat().st_mtime_ns for member in sweep.glob("*") if _finished(member)
        }
        again = swept if rng.random() < 0.5 else [f"resume={sweep}", *cache]
        processes = tiny.Processes(again, None, count=1, log=log)
        if not processes.wait(300) or any(processes.statuses.values()):
            wrong.append(f"{log}: did not go on: {processes.statuses}")
            continue
        for seed in seeds:
            if found := tiny.differences(sweep / str(seed), whole[seed]):
                wrong.append(f"{sweep / str(seed)}: {len(found)} differ, such as {found[:3]}")
        if any((member / "summary.json").stat().st_mtime_ns != written for member, written in finished.items()):
            wrong.append(f"{sweep}: a finished member was done again")
        print(f"{number + 1} kills, {len(finished)} of 4 members were finished, {len(wrong)} wrong", flush=True)
    print(json.dumps({"kills": options.kills, "wrong": wrong}, indent=2))
    sys.exit(bool(wrong))


def _finished(run: Path) -> bool:
    return (run / "summary.json").is_file()


if __name__ == "__main__":
    main()
