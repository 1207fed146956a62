"""How this process was started: alone, by Lightning, by torchrun or by SLURM; and what follows for a run directory.

Nothing heavy is imported. Everything is read from the environment, and from `/proc` where there is one.
"""

import functools
import os
import subprocess
import time
from pathlib import Path

_STARTED_BY_TORCHRUN = "TORCHELASTIC_RUN_ID"
_FORMAT = "%Y-%m-%d_%H-%M-%S"


def rank() -> int:
    """Number of this process among all of the run, as Lightning reads it."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
    return int(next((os.environ[name] for name in names if os.environ.get(name)), 0))


def by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return _STARTED_BY_TORCHRUN in os.environ


def slurm_job() -> str | None:
    """The job's number, or `ARRAYJOB_TASK`; None outside SLURM, and in a shell there, where many runs share a job."""
    if "SLURM_JOB_ID" not in os.environ or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    array = [os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK")]
    return "_".join(array) if all(array) else os.environ["SLURM_JOB_ID"]


def started_processes() -> tuple[int, int] | None:
    """(on each node, altogether), when torchrun or srun started the processes; None when Lightning is to."""
    if by_torchrun():
        return int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if slurm_job() is not None and os.environ.get("SLURM_NTASKS"):
        total = int(os.environ["SLURM_NTASKS"])
        return total // int(os.environ.get("SLURM_NNODES") or 1), total
    return None


def has_a_common_name() -> bool:
    """Whether `name` is the same on all nodes."""
    local, total = started_processes() or (1, 1)
    return bool(os.environ.get("DATA2VEC_LAUNCH")) or slurm_job() is not None or local == total


@functools.cache
def name() -> str:
    """What the processes of one run have in common, as the last part of a directory's name.

    A job of SLURM keeps its name when it is queued again, and torchrun when it starts its processes again, so that the
    run goes on in its directory. Anything else is named after the time.
    """
    given, job = os.environ.get("DATA2VEC_LAUNCH"), slurm_job()
    if given or job:
        return given or f"slurm-{job}"
    return time.strftime(_FORMAT, time.localtime(_start_of_torchrun() if by_torchrun() else time.time()))


def _start_of_torchrun() -> float:
    """Seconds since 1970, whole ones."""
    if not Path("/proc/self/stat").exists():
        return _start_by_ps(os.getppid())
    # A shell may stand between torchrun and this process, and differs between processes.
    process = os.getppid()
    while process > 1 and _STARTED_BY_TORCHRUN.encode() + b"=" in Path(f"/proc/{process}/environ").read_bytes():
        process = int(_stat(process)[1])
    [boot] = [line.split()[1] for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime ")]
    return int(boot) + int(_stat(process)[19]) // os.sysconf("SC_CLK_TCK")


def _stat(process: int) -> list[str]:
    """What follows a process's name, which may contain anything: state, parent, ..., start in ticks after the boot."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def _start_by_ps(process: int) -> float:
    command = ["ps", "-o", "lstart=", "-p", str(process)]
    answer = subprocess.run(command, env=os.environ | {"LC_ALL": "C"}, capture_output=True, text=True, check=True)
    return time.mktime(time.strptime(answer.stdout.strip(), "%a %b %d %H:%M:%S %Y"))


def requeue() -> str | None:
    """Puts this job of SLURM back into the queue; a sentence about what came of it, None outside SLURM."""
    job = slurm_job()
    if job is None or rank() != 0:
        return None
    try:
        command = ["scontrol", "requeue", job]
        subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        reason = " ".join((getattr(error, "stderr", None) or str(error)).split())
        return f"job {job} could not be queued again ({reason}); give the same command again"
    return f"job {job} is queued again"
