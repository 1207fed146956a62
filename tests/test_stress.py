"""A short version of `make stress`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(
            ("kills", "--kills", "4", "--processes", "1", "--kills-per-run", "2", "--modalities", "audio"),
            marks=pytest.mark.slow,
        ),
        ("kills", "--kills", "1", "--processes", "2", "--kills-per-run", "1", "--modalities", "vision"),
        ("saves", "--kills", "2", "--full-disks", "1"),
        pytest.param(("signals", "--signals", "2"), marks=pytest.mark.slow),  # tests/distributed has fast ones
        pytest.param(("sweeps", "--kills", "1"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_runs_that_are_disturbed_end_in_the_same_bits(arguments, tmp_path):
    name, *options = arguments
    result = subprocess.run(
        [sys.executable, "-m", f"tests.stress.{name}", *options, "--folder", str(tmp_path)],
        cwd=CHECKOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
