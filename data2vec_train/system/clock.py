"""Durations that are never negative."""

import time


def seconds_since(start: float) -> float:
    """Seconds since `time.perf_counter()` returned `start`.

    0 if that clock ran backward, as on virtual machines that are moved or resumed, or if a tool sets it.
    """
    return max(0.0, time.perf_counter() - start)
