"""`python -m tests.stress.saves --kills 200 --full-disks 20`: killed while saving, and disks that are full.

The run directory lies on a file system of its own (a tmpfs, if this may be mounted; a folder otherwise). A process is
killed in the middle of writing a checkpoint; afterwards the checkpoint that was the newest before has to be whole, or a
newer one. At the end the run has to be the same as one that nobody disturbed, to the last bit.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from data2vec_train import checkpoints
from tests.stress import tiny


@contextmanager
def file_system(size: str):
    """A folder on a file system of its own; the reason is printed where that is not permitted."""
    folder = Path(tempfile.mkdtemp())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        print(f"no file system of its own: {mounted.stderr.strip()}", flush=True)
    try:
        yield folder, not mounted.returncode
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", "-l", folder], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_save(processes: tiny.Processes, directory: Path, after: int) -> bool:
    """Until a checkpoint of a step after `after` is being written; False when the run ended before."""
    while processes.running():
        for path in directory.glob(".step-*"):
            if int(path.name.split("-")[1].split(".")[0]) > after:
                return True
    return False


def kill_while_saving(arguments: list[str], reference: Path, folder: Path, kills: int, rng: random.Random) -> dict:
    """Kill again and again, a few times per run."""
    done, during, wrong, runs = 0, 0, [], 0
    while done < kills:
        run = tiny.fresh(folder / f"{runs:04d}")
        directory = run / "checkpoints"
        for _ in range(4):
            before = checkpoints.newest(directory) if directory.is_dir() else None
            newest = -1 if before is None else checkpoints.step_of(before)
            processes = tiny.Processes(arguments, run, count=1, log=folder / "log")
            if not wait_for_save(processes, directory, newest + rng.randrange(4)):
                break
            time.sleep(rng.uniform(0, 0.01))  # a save takes about as long
            processes.kill()
            done += 1
            during += any(directory.glob(".*"))
            whole = checkpoints.newest(directory)
            if before is not None and (whole is None or checkpoints.step_of(whole) < newest):
                wrong.append(f"{run}: step {newest} was saved, and {whole} is the newest")
        processes = tiny.Processes(arguments, run, count=1, log=folder / "log")
        if not processes.wait(300) or any(processes.statuses.values()):
            wrong.append(f"{run}: did not end: {processes.statuses}")
        elif found := tiny.differences(run, reference):
            wrong.append(f"{run}: {len(found)} differ, such as {found[:3]}")
        elif left := list(directory.glob(".*")):
            wrong.append(f"{run}: {left} was left")
        shutil.rmtree(run)
        runs += 1
        print(f"{done} kills ({during} while a checkpoint was half written), {len(wrong)} wrong", flush=True)
    return {"kills": done, "half_written": during, "runs": runs, "wrong": wrong}


def fill_disks(arguments: list[str], reference: Path, folder: Path, count: int, rng: random.Random) -> dict:
    """Leave too little room for the next checkpoints, look at what is said and what is left, make room, go on."""
    wrong, stopped = [], 0
    for number in range(count):
        run = tiny.fresh(folder / "run")
        processes = tiny.Processes(arguments, run, count=1, log=folder.parent / f"full-{number}.log")
        step = rng.randrange(3, tiny.STEPS - 3)
        while processes.running() and tiny.step_of(run) < step:
            time.sleep(0.0005)
        free = shutil.disk_usage(folder).free
        ballast, room = folder / "ballast", rng.randrange(0, 60_000)
        # Where the run is faster the disk is full all the same, which is what is wanted.
        with suppress(OSError), ballast.open("wb") as file:
            file.write(b"\0" * max(free - room, 0))
        if not processes.wait(120):
            wrong.append(f"{number}: hung on a full disk")
        said = (folder.parent / f"full-{number}.log").read_text()
        status = processes.statuses[processes.ids[0]]
        stopped += status == 2
        if status not in (0, 2) or "Traceback" in said or (status == 2 and "could not be saved" not in said):
            wrong.append(f"{number}: status {status}, said {said[-300:]!r}")
        before = checkpoints.newest(run / "checkpoints")
        if before is None:
            wrong.append(f"{number}: no checkpoint is left")
        ballast.unlink(missing_ok=True)
        processes = tiny.Processes(arguments, run, count=1, log=folder.parent / f"full-{number}.log")
        if not processes.wait(300) or any(processes.statuses.values()):
            wrong.append(f"{number}: did not go on: {processes.statuses}")
        elif found := tiny.differences(run, reference):
            wrong.append(f"{number}: {len(found)} differ, such as {found[:3]}")
        print(f"{number + 1} full disks, {stopped} stopped the run, {len(wrong)} wrong", flush=True)
    return {"full_disks": count, "stopped": stopped, "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--full-disks", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    tiny.import_everything()
    arguments = [*tiny.make_data(options.folder / "data")["vision"], "callbacks.checkpoint.every_n_steps=1"]
    arguments += ["data.num_workers=0"]
    reference = tiny.reference(arguments, options.folder / "whole")
    rng = random.Random(options.seed)
    result: dict = {}
    if options.kills:
        with file_system("64m") as (folder, own):
            result["kills"] = kill_while_saving(arguments, reference, folder, options.kills, rng) | {"own_disk": own}
    if options.full_disks:
        with file_system("1500k") as (folder, own):
            if own:
                (folder / "runs").mkdir()
                result["full"] = fill_disks(arguments, reference, folder / "runs", options.full_disks, rng)
    print(json.dumps(result, indent=2))
    sys.exit(any(part["wrong"] for part in result.values()))


if __name__ == "__main__":
    main()
