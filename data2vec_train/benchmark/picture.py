"""A bar chart of cases: ratios with their ranges, or times if nothing is compared."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from data2vec_train.benchmark.measurements import Case, Spread

FASTER, SLOWER, UNRESOLVED, TIME = "#3355cc", "#d9730d", "#b4b8be", "#5a8f7b"
_LINE_INCHES, _PANEL_INCHES, _WIDTH_INCHES = 0.23, 0.95, 9.0


def draw(cases: list[Case], file: Path, *, title: str) -> None:
    """Write a PNG with one panel for each kind of case, separately for cases with and without ratios."""
    panels = [(kind, compared, _bars(cases, kind, compared)) for kind, compared in _kinds(cases)]
    panels = [panel for panel in panels if panel[2]]
    heights = [_PANEL_INCHES + _LINE_INCHES * len(bars) for _, _, bars in panels]
    figure = Figure(figsize=(_WIDTH_INCHES, sum(heights) + 0.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    grid = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (kind, compared, bars) in zip(grid[:, 0], panels, strict=True):
        _draw_panel(axes, kind, compared, bars)
    figure.savefig(file, format="png")


Bar = tuple[str, Spread, str]


def _kinds(cases: list[Case]) -> list[tuple[str, bool]]:
    return list(dict.fromkeys((case.kind, _is_compared(case)) for case in cases))


def _is_compared(case: Case) -> bool:
    """Whether the case has a ratio; otherwise its times are shown."""
    ratios = [case.ratio(arm) for arm in case.arms]
    return any(ratio is not None and ratio.refusal is None for ratio in ratios)


def _bars(cases: list[Case], kind: str, compared: bool) -> list[Bar]:
    bars: list[Bar] = []
    for case in cases:
        if case.kind != kind or _is_compared(case) != compared:
            continue
        for arm in case.arms:
            ratio, label = case.ratio(arm), f"{case.name}\n{arm.name}"
            if not compared and arm.seconds:
                bars.append((label, Spread.of(arm.seconds), TIME))
            elif ratio is not None and ratio.refusal is None:
                spread = Spread.of(ratio.wall)
                colour = (FASTER if spread.median > 1 else SLOWER) if ratio.is_resolved else UNRESOLVED
                bars.append((f"{label} / {case.reference}", spread, colour))
    return bars


def _draw_panel(axes: Axes, kind: str, compared: bool, bars: list[Bar]) -> None:
    places = range(len(bars), 0, -1)
    medians = [spread.median for _, spread, _ in bars]
    errors = [
        [spread.median - spread.low for _, spread, _ in bars],
        [spread.high - spread.median for _, spread, _ in bars],
    ]
    axes.barh(places, medians, height=0.62, color=[colour for _, _, colour in bars])
    axes.errorbar(medians, places, xerr=errors, fmt="none", ecolor="#3a3f47", elinewidth=1.1, capsize=2.5)
    axes.set_yticks(list(places), [label.replace("\n", ": ") for label, _, _ in bars], fontsize=7)
    axes.set_ylim(0.4, len(bars) + 0.6)
    axes.tick_params(axis="x", labelsize=7.5)
    axes.grid(axis="x", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if compared:
        axes.axvline(1.0, color="#3a3f47", linewidth=1.0)
        axes.set_title(f"{kind}: times as fast (line: median, range of all rounds; grey: not resolved)", fontsize=8.5)
    else:
        axes.set_title(f"{kind}: seconds", fontsize=8.5)
        if max(medians) > 30 * min(medians):
            axes.set_xscale("log")
