"""Stand-ins for SLURM's commands on one machine: enough to start a job's processes with the variables they would have.

`sbatch FILE ARGUMENTS` runs a job to its end, array members one after another, and again when `scontrol requeue` was
called; `srun` starts the processes.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

JOB = "4711"


def install(folder: Path, **environment: str) -> dict[str, str]:
    """Put the commands into `folder`; the environment in which they are found first."""
    folder.mkdir()
    for name in ("sbatch", "srun", "scontrol", "sacct"):
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {__file__} {name} "$@"\n')
        command.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "FAKE_SLURM": str(folder), "OMP_NUM_THREADS": "1", **environment}


def sbatch(*arguments: str) -> int:
    """Says the job's number and leaves; what is behind it goes on."""
    at = next(place for place, word in enumerate(arguments) if not word.startswith("--"))
    options, file, rest = arguments[:at], arguments[at], arguments[at + 1 :]
    script = Path(file)
    written = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script.read_text(), flags=re.MULTILINE))
    options = written | dict(option.removeprefix("--").split("=") for option in options)
    last = re.match(r"0-(\d+)", options.get("array", ""))
    spooled = Path(os.environ["FAKE_SLURM"], "script.sh")  # as SLURM runs a copy
    shutil.copy(script, spooled)
    tasks, nodes = options.get("ntasks-per-node", "1"), options.get("nodes", "1")
    assert nodes == "1"
    variables = {"SLURM_JOB_ID": JOB, "SLURM_JOB_NAME": options["job-name"], "SLURM_NTASKS_PER_NODE": tasks}
    variables |= {"SLURM_NNODES": nodes, "SLURM_JOB_NUM_NODES": nodes, "SLURM_NTASKS": tasks, "SLURM_NODEID": "0"}
    variables |= {"SLURM_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost"}
    sys.stdout.write(f"Submitted batch job {JOB}\n")
    sys.stdout.flush()
    if os.fork():
        return 0
    for stream in (0, 1, 2):  # who reads our answer waits for its end
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    for number in range(int(last[1]) + 1 if last else 1):
        array = {"SLURM_ARRAY_JOB_ID": JOB, "SLURM_ARRAY_TASK_ID": str(number), "SLURM_JOB_ID": str(int(JOB) + number)}
        environment = os.environ | variables | (array if last else {})
        again = True
        while again:
            with Path(os.environ["FAKE_SLURM"], "log").open("a") as log:
                status = subprocess.run(
                    ["bash", spooled, *rest], env=environment, stdout=log, stderr=log, check=False
                ).returncode
                log.write(f"exit status {status}\n")
            requeued = Path(os.environ["FAKE_SLURM"], "requeued")
            again = requeued.exists()
            requeued.unlink(missing_ok=True)
    Path(os.environ["FAKE_SLURM"], "ended").touch()
    return 0


def srun(*arguments: str) -> int:
    rest = list(arguments)
    while rest[0].startswith("--"):  # some of submitit's options have their value behind a space
        option = rest.pop(0)
        if option in ("--output", "--error"):
            rest.pop(0)
    tasks = [
        subprocess.Popen(rest, env=os.environ | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)})
        for task in range(int(os.environ["SLURM_NTASKS"]))
    ]
    return max(task.wait() for task in tasks)


def scontrol(action: str, job: str) -> int:
    Path(os.environ["FAKE_SLURM"], f"{action}d").write_text(job)
    with Path(os.environ["FAKE_SLURM"], "calls").open("a") as calls:
        calls.write(f"{action} {job}\n")
    return 0


if __name__ == "__main__":
    name, *given = sys.argv[1:]
    sys.exit(1 if name == "sacct" else {"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[name](*given))
