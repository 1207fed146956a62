"""`python -m tests.compare_losses OLD NEW`: whether a change of the code changes what is computed.

OLD and NEW are commits, or folders with a checkout. Each trains the six pairs of modality and objective on the embedded
samples, with the same seed, in float32, on one thread and without loader processes. Every logged number except those
about time is compared bit for bit: one line for each pair, with the first step that differs. The exit status is 1 when
a pair differs.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.pairs import PAIRS

ROOT = Path(__file__).resolve().parents[1]
TIMES = {"train/samples_per_second", "train/data_wait"}
RENAMED = {"heldout/explained": "heldout/r2"}  # columns that have another name since some commit
# Nothing is held out: the order of training then depends on the seed alone, and the probes take no time.
SHORT = ["seed=0", "precision=fp32", "report=false", "data.num_workers=0", "data.held_out_fraction=0"]
SHORT += ["trainer.log_every_n_steps=1", "callbacks.probe.rank_samples=8", "callbacks.monitor.progress=none"]

Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a commit, or the folder of a checkout")
    parser.add_argument("new", help="a commit, or the folder of a checkout")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", nargs="+", default=[f"{modality}/{objective}" for modality, objective in PAIRS])
    parser.add_argument(
        "--ignore", nargs="+", default=[], metavar="METRIC", help="columns of metrics.csv that are meant to differ"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="after --: settings of every run")
    options = parser.parse_args()
    differing = 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compare_losses_")))
        sides = (("old", options.old), ("new", options.new))
        checkouts = [checkout(name, folder / side, stack) for side, name in sides]
        for pair in options.pairs:
            modality, objective = pair.split("/")
            settings = [f"modality={modality}", f"objective={objective}", f"trainer.max_steps={options.steps}"]
            runs = [
                losses_of(code, [*settings, *options.overrides], folder / f"{modality}_{objective}_{number}")
                for number, code in enumerate(checkouts)
            ]
            answer = first_difference(*runs, ignored={*TIMES, *options.ignore})
            differing += answer is not None
            print(f"{pair}: {answer or f'{options.steps} steps are equal'}", flush=True)
    sys.exit(1 if differing else 0)


def checkout(name: str, folder: Path, stack: ExitStack) -> Path:
    """A folder with the code: the one that `name` is, or a worktree of that commit until `stack` closes."""
    if (Path(name) / "data2vec_train").is_dir():
        return Path(name).resolve()
    git = ["git", "-C", str(ROOT), "worktree"]
    added = subprocess.run([*git, "add", "--detach", str(folder), name], capture_output=True, text=True)
    if added.returncode:
        sys.exit(f"{name} is neither a folder with a checkout nor a commit: {added.stderr.strip()}")
    stack.callback(subprocess.run, [*git, "remove", "--force", str(folder)], check=True)
    return folder


def losses_of(code: Path, settings: list[str], run: Path) -> list[Row]:
    """The rows of metrics.csv of a run of that checkout."""
    environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("DATA2VEC_RECIPES", None)
    command = [sys.executable, "-m", "data2vec_train", *SHORT, *settings, f"hydra.run.dir={run}"]
    ended = subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{code}: {' '.join(settings)} ended with status {ended.returncode}:\n{ended.stdout}{ended.stderr}")
    with (run / "metrics.csv").open(newline="") as file:
        return [{RENAMED.get(name, name): value for name, value in row.items()} for row in csv.DictReader(file)]


def first_difference(old: list[Row], new: list[Row], *, ignored: set[str]) -> str | None:
    """A sentence about the first step whose numbers differ; None when none does."""
    if not old or not new:
        return "nothing was logged"
    renamed = sorted((old[0].keys() ^ new[0].keys()) - ignored)
    if renamed:
        return f"only one of the two logs {', '.join(renamed)}"
    for before, after in zip(old, new, strict=False):
        metric = next((name for name in before if name not in ignored and before[name] != after[name]), None)
        if metric is not None:
            return f"step {before['step']} differs: {metric} was {before[metric]}, is {after[metric]}"
    return None if len(old) == len(new) else f"{len(old)} rows were logged, now {len(new)}"


if __name__ == "__main__":
    main()
