"""Durations that are never negative."""

import time


def seconds_since(start: float) -> float:
    """Since `time.perf_counter()` gave `start`.

    0 where that clock ran backward, as it does on virtual machines that move or wake up, and under tools that set it.
    """
    return max(0.0, time.perf_counter() - start)
