"""Start-up times from the shell: until help, an error message and the first training step, and import times."""

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from data2vec_train.benchmark.context import Bench
from data2vec_train.benchmark.measurements import Arm, Case

PROGRAM = [sys.executable, "-m", "data2vec_train"]
ANSWERS = {"--help": (["--help"], 0), "a mistake": (["modality=visoin"], 2)}
# Stage -> start of the demo's output line that marks it, in order.
STAGES = {"built": "run directory:", "first probe": "step 0/", "first training step": "step 1/"}
IMPORTED = "data2vec_train.pretrain.run"


def measure_startup(bench: Bench, *, demo: list[str], packages: int, timeout_s: float) -> Iterator[Case]:
    """One case for answers, one for the demo until its first step, one for imports.

    Args:
        bench: how to measure; the warm-up is one run, which fills the disk cache.
        demo: settings of the run whose first step is measured.
        packages: number of packages with the longest imports that are listed.
        timeout_s: limit of a run.

    Raises:
        RuntimeError: a command does not give the expected answer.
    """
    answers = Case(
        "startup", "until an answer", None, [Arm(f"python -m data2vec_train {arguments}") for arguments in ANSWERS]
    )
    _answer(*ANSWERS["--help"], timeout_s)
    for _ in range(bench.effort.rounds):
        for arm, (arguments, status) in zip(answers.arms, ANSWERS.values(), strict=True):
            _note(arm, *_answer(arguments, status, timeout_s))
    answers.notes.append("CPU seconds are of the command")
    yield answers
    steps = Case("startup", f"{' '.join(['python -m data2vec_train', *demo])}, until", None)
    steps.arms = [Arm(stage) for stage in STAGES]
    for _ in range(bench.effort.rounds):
        for arm, wall in zip(steps.arms, _stages(demo, timeout_s), strict=True):
            _note(arm, wall, 0.0)
    steps.notes.append("each from the start of the command; CPU seconds are not measured")
    yield steps
    yield _imports(bench.effort.rounds, packages, timeout_s)


def _note(arm: Arm, wall: float, cpu: float) -> None:
    arm.seconds.append(wall)
    arm.cpu_seconds.append(cpu)


def _answer(arguments: list[str], status: int, timeout_s: float) -> tuple[float, float]:
    cpu, wall = os.times(), time.perf_counter()
    done = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False)
    wall, after = time.perf_counter() - wall, os.times()
    if done.returncode != status:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}, expected {status}: {done.stderr}")
    used = after.children_user + after.children_system - cpu.children_user - cpu.children_system
    return wall, used


def _stages(demo: list[str], timeout_s: float) -> list[float]:
    """Seconds until each stage of one run; the run is then killed."""
    with TemporaryDirectory(prefix="data2vec_benchmark_") as folder:
        own = ["trainer.log_every_n_steps=1", "callbacks.monitor.progress=lines", f"hydra.run.dir={folder}/run"]
        start, found = time.perf_counter(), []
        errors = Path(folder, "errors")
        with errors.open("w") as file:
            process = subprocess.Popen([*PROGRAM, *demo, *own], stdout=subprocess.PIPE, stderr=file, text=True)
        waiting, printed = list(STAGES.values()), []
        try:
            for line in process.stdout:
                printed.append(line)
                if line.startswith(waiting[0]):
                    found.append(time.perf_counter() - start)
                    waiting.pop(0)
                if not waiting or time.perf_counter() - start > timeout_s:
                    break
        finally:
            process.kill()
            process.wait()
        if waiting:
            raise RuntimeError(f"the demo never printed {waiting[0]!r}: {''.join(printed)}{errors.read_text()}")
    return found


def _imports(rounds: int, packages: int, timeout_s: float) -> Case:
    """Import time of each package, without its imports of other packages."""
    measured = [_own_seconds(timeout_s) for _ in range(rounds)]
    total = [sum(seconds.values()) for seconds in measured]
    named = [name for name, _ in measured[0].most_common(packages)]
    case = Case("startup", f"import {IMPORTED}, by package", None)
    case.arms = [Arm(name, [seconds[name] for seconds in measured], [0.0] * rounds) for name in named]
    rest = [whole - sum(seconds[name] for name in named) for whole, seconds in zip(total, measured, strict=True)]
    case.arms += [Arm("others", rest, [0.0] * rounds), Arm("all", total, [0.0] * rounds)]
    case.notes.append("python -X importtime, which itself slows imports down; CPU seconds are not measured")
    return case


def _own_seconds(timeout_s: float) -> Counter[str]:
    command = [sys.executable, "-X", "importtime", "-c", f"import {IMPORTED}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True)
    found: Counter[str] = Counter()
    for own, module in re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", done.stderr, re.MULTILINE):
        found[module.partition(".")[0]] += int(own) / 1e6
    return found
