"""Two processes do what one does with the same global batch, and a run may change their number on the way."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "case",
    [
        "vision data2vec2",
        pytest.param("vision data2vec", marks=pytest.mark.slow),
        "audio data2vec2",
        pytest.param("audio data2vec", marks=pytest.mark.slow),
        pytest.param("text data2vec2", marks=pytest.mark.slow),
        "text data2vec",
    ],
)
def test_two_processes_equal_one(case, tmp_path):
    """50 steps: losses to 1e-6 of their size, the teacher to 1e-6; also 2 -> 1 and 1 -> 2 processes."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.stress.processes", *case.split(), "--folder", str(tmp_path)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
