"""Cases as lines of text."""

import statistics
from dataclasses import dataclass

from data2vec_train.benchmark.measurements import Arm, Case, Ratio, Spread, ratio_text

_UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def time_text(seconds: float) -> str:
    """Three digits and a unit: "1.24 s"."""
    unit, size = next(((unit, size) for unit, size in _UNITS if seconds >= size), _UNITS[-1])
    return f"{seconds / size:.3g} {unit}"


def spread_text(values: list[float]) -> str:
    """Median and range: "1.24 s [1.19 s..1.40 s]"."""
    spread = Spread.of(values)
    return f"{time_text(spread.median)} [{time_text(spread.low)}..{time_text(spread.high)}]"


def case_lines(case: Case, *, peak: float, stated_peak: float | None = None) -> list[str]:
    """A heading and one line for each arm; empty columns are left out.

    Args:
        case: the measurements.
        peak: floating-point operations per second of this machine's matrix products.
        stated_peak: another peak to compare rates with, such as the vendor's.
    """
    last = f"times as fast as {case.reference}" if case.reference else ""
    heads = ["", "time", "CPU time", *_rate_names(case), "GFLOP", "GFLOP/s", "of peak"]
    heads += ["" if stated_peak is None else f"of {stated_peak / 1e12:g} TFLOP/s", "memory", "at rest"]
    heads += [last, "by CPU time"]
    table = [[arm.name, *_cells(arm, case, peak, stated_peak)] for arm in case.arms]
    kept = [place for place in range(len(heads)) if any(line[place] for line in table)]
    cells = [[line[place] for place in kept] for line in [heads, *table]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return [f"{case.kind}: {case.name}", *(f"  {line}" for line in lines), *(f"  ({note})" for note in case.notes)]


def _rate_names(case: Case) -> list[str]:
    return list(dict.fromkeys(name for arm in case.arms for name in arm.rates))


def _cells(arm: Arm, case: Case, peak: float, stated_peak: float | None) -> list[str]:
    rates = [f"{arm.rates[name]:.4g}" if name in arm.rates else "" for name in _rate_names(case)]
    if arm.refused is not None:
        return ["", "", *rates, "", "", "", "", "", "", arm.refused, ""]
    rate, ratio = arm.flop_rate, case.ratio(arm)
    return [
        spread_text(arm.seconds),
        time_text(Spread.of(arm.cpu_seconds).median) if any(arm.cpu_seconds) else "",
        *rates,
        f"{arm.flops / 1e9:.4g}" if arm.flops else "",
        f"{rate / 1e9:.4g}" if rate else "",
        f"{rate / peak:.0%}" if rate else "",
        f"{rate / stated_peak:.0%}" if rate and stated_peak else "",
        _megabytes(arm.peak_bytes),
        _megabytes(arm.idle_bytes),
        "" if ratio is None else str(ratio),
        "" if ratio is None or ratio.cpu is None or not any(arm.cpu_seconds) else ratio_text(ratio.cpu),
    ]


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.0f} MB"


def progress_line(case: Case) -> str:
    """The line that is logged when a case is finished."""
    results = []
    for arm in case.arms:
        ratio = case.ratio(arm)
        if arm.refused is not None:
            results.append(f"{arm.name}: refused")
        elif ratio is None:
            results.append(f"{arm.name} {time_text(Spread.of(arm.seconds).median)}")
        else:
            results.append(f"{arm.name} {ratio}")
    return f"{case.kind}: {case.name}: {', '.join(results)}"


@dataclass(frozen=True)
class Mean:
    """Geometric mean of the ratios of several cases."""

    ratio: float
    cases: int
    unresolved: int  # number of cases that are not resolved

    def __str__(self) -> str:
        doubt = f", {self.unresolved} of them not resolved" if self.unresolved else ""
        return f"{self.ratio:.2f} times as fast, the geometric mean of {self.cases} cases{doubt}"


def overall(cases: list[Case]) -> dict[str, Mean]:
    """Geometric means over cases, by compared arms: "encoder: ours against transformers sdpa".

    Left out if a case has no ratio, or if there is only one case.
    """
    found: dict[str, list[Ratio]] = {}
    for case in cases:
        for arm in case.arms:
            if (ratio := case.ratio(arm)) is not None:
                found.setdefault(f"{case.kind}: {arm.name} against {case.reference}", []).append(ratio)
    return {
        name: Mean(
            statistics.geometric_mean([Spread.of(ratio.wall).median for ratio in ratios]),
            len(ratios),
            sum(not ratio.is_resolved for ratio in ratios),
        )
        for name, ratios in found.items()
        if len(ratios) > 1 and all(ratio.refusal is None for ratio in ratios)
    }
