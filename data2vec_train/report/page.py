"""The page that shows whether pretraining worked: one `report.html` without external resources.

It is made of numpy arrays and plain values; every picture is a PNG inside the page.

Legend: n images, H W C image height, width and channels, h w patch grid, T = h * w patches in row-major order,
M masks per image, D feature width, q queries, k neighbours.
"""

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from data2vec_train.system.outputs import replace_file

Metrics = dict[str, tuple[np.ndarray, np.ndarray]]

TILE_PX = 140  # longest edge of a picture: five fit beside each other on the page, and 28 px digits grow by exactly 5
NEIGHBOUR_TILE_PX = 60  # five neighbours and a label fit into half the page
SHOWN_MASKS = 4
HIDDEN_COLOUR = np.array([79, 91, 213], np.float32)  # neither black nor white nor grey, so it shows on digits as well
PANELS = {  # title: {label: column of metrics.csv}
    "Loss": {"": "train/loss"},
    "Spread (std) of the features": {"targets": "train/target_std", "predictions": "train/prediction_std"},
    "Difference between samples before normalisation (std)": {"": "train/feature_std"},
    "Target variance explained, held out": {"": "heldout/r2"},
    "k-NN probe accuracy": {"pretrained": "probe/knn"},
    "Linear probe accuracy": {"pretrained": "probe/linear"},
    "RankMe: directions the features use": {"": "probe/rankme"},
    "Teacher decay tau": {"": "train/tau"},
    "Learning rate": {"": "train/lr"},
    "Gradient norm": {"": "train/grad_norm"},
    "Samples per second": {"": "train/samples_per_second"},
    "Share of time spent waiting for data": {"": "train/data_wait"},
}
_RENAMED = {"heldout/explained": "heldout/r2"}  # columns of runs that an earlier version began
# Keys of the summary in the order of the table; other single values follow.
FACTS = ("modality", "objective", "seed", "steps", "seconds", "samples_per_second", "loss_first", "loss_last")
FACTS += ("target_std", "prediction_std", "rankme")


@dataclass(frozen=True)
class Section:
    """One heading of the page: `title` and `explanation` are plain text, escaped on rendering; `html` is not."""

    title: str
    explanation: str
    html: str


def read_metrics(path: Path) -> Metrics:
    """Logged series by column name: (steps int64, values float64), sorted by step, without the empty cells.

    A resumed run logs some steps a second time; the later row is used. A run that ended before its first row has no
    file, and no series.
    """
    series: dict[str, dict[int, float]] = {}
    if not Path(path).is_file():
        return {}
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        for row in rows:
            if "step" not in row or None in row:
                raise ValueError(f"{path}, line {rows.line_num}: expected a cell `step` and one per column, got {row}")
            for name, cell in row.items():
                if name != "step" and cell:
                    series.setdefault(_RENAMED.get(name, name), {})[int(row["step"])] = float(cell)
    return {
        name: (np.array(sorted(points), np.int64), np.array([points[step] for step in sorted(points)], np.float64))
        for name, points in series.items()
    }


def curves_section(metrics: Metrics, *, baselines: dict) -> Section:
    """Small multiples of what was logged; a panel without data is left out.

    Args:
        metrics: result of `read_metrics`.
        baselines: `summary["probe"]`, that is {"knn": {"untrained": 0.35, "raw_input": 0.84}, "linear": {...}} with
            accuracies as fractions. Without baselines an accuracy cannot be judged: {} hides both accuracy panels.
    """
    panels = {title: columns for title, columns in PANELS.items() if baselines or "accuracy" not in title}
    return Section(
        "Training curves",
        "In data2vec the loss often falls, then rises and levels off as the targets get richer, so a low loss is not a "
        "measure of success. Look at the spread and the probes: a std near 0 means collapse (every position gives the "
        "same features), and a probe above the dashed line of the untrained encoder means that something was learnt. "
        "Faint lines are logged values, strong lines beside them their moving averages.",
        charts(metrics, panels, baselines),
    )


def charts(metrics: Metrics, panels: Mapping[str, Mapping[str, str]], baselines: Mapping | None = None) -> str:
    """Small multiples, HTML; a panel without data is left out.

    Args:
        metrics: result of `read_metrics`.
        panels: {title: {label of a line: column}}.
        baselines: see `curves_section`.
    """
    shown = []
    for title, columns in panels.items():
        lines = {label: metrics[column] for label, column in columns.items() if column in metrics}
        if not lines:
            continue
        levels = {"k-NN probe accuracy": "knn", "Linear probe accuracy": "linear"}.get(title)
        png = _curve_png(
            lines,
            levels=(baselines or {}).get(levels) or {},
            fraction=any(word in title for word in ("accuracy", "Share", "variance")),
            from_zero=any(word in title for word in ("accuracy", "Share", "std")),
        )
        broken = sum(int((~np.isfinite(values)).sum()) for _, values in lines.values())
        note = f' <span class="bad">{broken} values are not finite</span>' if broken else ""
        picture = image_tag(png, alt=f"{title} over steps")
        shown.append(f"<figure><figcaption>{escape(title)}{note}</figcaption>{picture}</figure>")
    return f'<div class="charts">{"".join(shown)}</div>' if shown else "<p>No metrics were logged.</p>"


def probe_section(summary: dict) -> Section:
    """Table of `summary["probe"]`: accuracy on raw input, untrained and trained features, and the gain in points."""
    probe, rankme = summary.get("probe"), summary.get("rankme")
    measured = "was not measured" if rankme is None else f"<b>{_value(rankme)}</b>"
    rank_line = f"<p>RankMe, the number of directions the features use: {measured}</p>"
    if not probe:
        return Section(
            "Probes of the features",
            f"Nothing was probed ({summary.get('probes', 'no labels')}). RankMe is the number of directions that the "
            "features use: close to 1 means collapse, but a high number alone does not mean that they are useful.",
            rank_line,
        )
    rows, verdicts = [], []
    raw_name = escape(probe.get("raw_input_name") or "raw input")
    for key, name in (("knn", "k-NN"), ("linear", "linear")):
        raw, untrained, trained = ((probe.get(key) or {}).get(kind) for kind in ("raw_input", "untrained", "trained"))
        gain = "–"
        if trained is not None and untrained is not None:
            points = 100 * (trained - untrained)
            gain = f"<b>{points:+.1f}</b>"
            gained = f"{'gained' if points > 0 else 'lost'} {abs(points):.1f} points"
            verdict = f"{name}: pretraining {gained if abs(points) >= 0.05 else 'made no difference'}"
            if raw is not None:
                above = "above" if trained > raw else "below"
                verdict += f"; the result is {100 * abs(trained - raw):.1f} points {above} the {raw_name}"
            verdicts.append(f"{verdict}.")
        if probe.get(key):
            rows.append([f"<th>{name}</th>", *(_share_cell(share) for share in (raw, untrained, trained)), _td(gain)])
    details = {"fit_samples": "samples to fit", "test_samples": "to test", "classes": "classes", "weights": "weights"}
    details["pooling"] = "as features"
    known = [f"{_value(probe[key])} {what}" for key, what in details.items() if probe.get(key) is not None]
    note = f"<p>{escape(probe['note'])}</p>" if probe.get("note") else ""
    return Section(
        "Probes of the features",
        "A simple classifier on frozen features: k-NN has nothing to train, linear trains one layer. Trained should be "
        "clearly above untrained; above raw input as well means that the features beat the plain input values.",
        table(["probe", raw_name, "untrained", "trained", "gain over untrained, points"], rows)
        + f"<p>{'<br>'.join(verdicts)}</p>{note}{'' if rankme is None else rank_line}"
        + f'<p class="quiet">{", ".join(known)}</p>',
    )


def r2_section(summary: dict) -> Section | None:
    """How well the pretext task is solved on held-out samples, from `summary["r2"]`; None if not measured."""
    r2 = summary.get("r2") or summary.get("explained")  # the name in earlier versions
    if not r2 or "trained" not in r2:
        return None
    rows = [[f"<th>{which}</th>", _td(f"{100 * r2[which]:.1f} %")] for which in ("untrained", "trained") if which in r2]
    return Section(
        "The task on held-out samples",
        "Share of the variance of the teacher's features at hidden positions that the student predicts, on samples "
        "that it was not trained on. 100 % is a perfect prediction, 0 % is no better than always predicting the mean, "
        "below 0 is worse. The targets change with the teacher: the share may fall while the features get richer, so "
        "it shows that the task is being learnt, not how useful the features are.",
        f"{table([], rows)}<p class='quiet'>{_value(r2['samples'])} held-out samples, "
        f"{_value(r2['tokens'])} hidden positions</p>",
    )


def facts_section(summary: dict, *, command: str) -> Section:
    """Table of the single values in `summary`, those of every run first, and the command that repeats the run."""
    rows = []
    for key in dict.fromkeys([*FACTS, *summary]):
        label, value = key.replace("_", " "), summary.get(key)
        if key == "seconds" and value is not None:
            label, value = "duration, h:min:s", timedelta(seconds=round(value))
        if value is not None and (key in FACTS or isinstance(value, (str, int, float, np.number))):
            rows.append([f"<th>{escape(label)}</th>", _td(str(value) if key == "seed" else _value(value))])
    return Section(
        "The run",
        "What was run, and the numbers at its end. The command repeats it.",
        f"{table([], rows)}<pre>{escape(command)}</pre>",
    )


def masks_section(images: np.ndarray, masked: np.ndarray, grid: tuple[int, int], *, drawn_as: str) -> Section:
    """Each image beside its first few masks, hidden patches covered.

    Args:
        images: (n, H, W, C) in [0, 1]; other than 3 channels: the first one in grey.
        masked: (n, M, T) bool, True where the student does not see the patch.
        grid: (h, w).
        drawn_as: one phrase, how the masks are drawn ("inverse blocks of 3 x 3 patches").
    """
    masked = np.asarray(masked, bool)
    rows = []
    for image, masks in zip(images, masked, strict=True):
        tile = tiled(image, side=TILE_PX)
        covered = [
            image_tag(png_of(cover(tile, hidden.reshape(grid))), alt=f"{hidden.mean():.0%} of the patches hidden")
            for hidden in masks[:SHOWN_MASKS]
        ]
        rows.append([_td(cell) for cell in (image_tag(png_of(tile), alt="image"), *covered)])
    lowest, highest = masked.mean(-1).min(), masked.mean(-1).max()
    between = f" (between {lowest:.1%} and {highest:.1%})" if highest - lowest > 5e-4 else ""
    return Section(
        "What the student sees",
        f"Blue patches are hidden from the student, which has to predict the teacher's features there; it sees only "
        f"the others. {masked.mean():.1%} of the {grid[0]} x {grid[1]} patches are hidden{between}. "
        f"Masks are drawn as: {drawn_as}.{_channel_note(images)}",
        table(["image", *(f"mask {number + 1}" for number in range(len(rows[0]) - 1))], rows, css="pictures"),
    )


def pca_section(
    images: np.ndarray, patches_untrained: np.ndarray, patches_trained: np.ndarray, grid: tuple[int, int]
) -> Section:
    """Patch features as colours: per model the first 3 principal components over all patches of all images as RGB.

    Args:
        images: (n, H, W, C) in [0, 1].
        patches_untrained: (n, T, D) float, features of the encoder before training.
        patches_trained: (n, T, D) float.
        grid: (h, w).
    """
    untrained, untrained_share = pca_colours(patches_untrained)
    trained, trained_share = pca_colours(patches_trained)
    rows = []
    for image, *maps in zip(images, untrained, trained, strict=True):
        tile = tiled(image, side=TILE_PX)
        squares = [Image.fromarray(np.uint8(255 * colours.reshape(*grid, 3))) for colours in maps]
        pictures = [tile, *(map_.resize(tile.shape[1::-1], Image.Resampling.NEAREST) for map_ in squares)]
        names = ("input", "untrained", "trained")
        rows.append([_td(image_tag(png_of(np.asarray(p)), alt=name)) for p, name in zip(pictures, names, strict=True)])
    return Section(
        "Patch features as colours",
        "Patches of similar colour have similar features. Good features give the parts of an object their own "
        "colour, the same in every image; noise, a pattern that only follows the position, or one flat colour mean "
        "that little was learnt. Compare colours within a column, not between columns. The three components shown hold "
        f"{untrained_share:.0%} of the variance untrained and {trained_share:.0%} trained.{_channel_note(images)}",
        table(["input", "untrained", "trained"], rows, css="pictures"),
    )


def neighbours_section(
    query_images: np.ndarray,
    found: dict[str, np.ndarray],
    *,
    query_labels: np.ndarray | None = None,
    found_labels: dict[str, np.ndarray] | None = None,
    class_names: Sequence[str] | None = None,
) -> Section:
    """Nearest neighbours of a few images under each kind of feature.

    Args:
        query_images: (q, H, W, C) in [0, 1].
        found: by feature ("trained", "untrained", "raw input"), nearest first: (q, k, H, W, C).
        query_labels: (q,) int, class of each query.
        found_labels: by feature, (q, k) int. With both labels, right and wrong neighbours are framed and counted.
        class_names: name of each class; its number if not given.
    """

    def cell(image: np.ndarray, label: int | None, *, frame: str) -> str:
        name = "" if label is None else str(label if class_names is None else class_names[int(label)])
        picture = image_tag(png_of(tiled(image, side=NEIGHBOUR_TILE_PX)), alt=f"{frame} {name}", css=frame)
        return _td(f'{picture}<span class="name">{escape(name)}</span>')

    labelled = query_labels is not None and found_labels is not None
    cards = []
    for query, image in enumerate(query_images):
        wanted = query_labels[query] if labelled else None
        rows = [["<th>query</th>", cell(image, wanted, frame="query")]]
        for feature, neighbours in found.items():
            labels = found_labels[feature][query] if labelled else [None] * len(neighbours[query])
            frames = ["neighbour" if label is None else "right" if label == wanted else "wrong" for label in labels]
            cells = [cell(*each, frame=frame) for *each, frame in zip(neighbours[query], labels, frames, strict=True)]
            rows.append([f"<th>{escape(feature)}</th>", *cells])
        cards.append(table([], rows))
    explanation = "Each image above the images whose features are most similar to its own, nearest first. "
    if labelled:
        same = {name: np.mean(found_labels[name] == np.asarray(query_labels)[:, None]) for name in found}
        explanation += "A solid green frame is a neighbour of the same class, a dashed red one of another class. "
        explanation += f"Same class: {', '.join(f'{name} {share:.1%}' for name, share in same.items())}."
    else:
        explanation += "Trained features should find similar content, not only similar colour or brightness."
    explanation += _channel_note(query_images)
    return Section("Nearest neighbours", explanation, f'<div class="cards">{"".join(cards)}</div>')


def write_report(path: Path, *, title: str, sections: list[Section], config_yaml: str) -> Path:
    """Write the page to `path`, replacing the file at once, and return `path`."""
    links = "".join(f'<a href="#s{number}">{escape(section.title)}</a>' for number, section in enumerate(sections))
    body = "".join(
        f'<section id="s{number}"><h2>{escape(section.title)}</h2><p class="explain">{escape(section.explanation)}</p>'
        f"{section.html}</section>"
        for number, section in enumerate(sections)
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><h1>{escape(title)}</h1><nav>{links}</nav>"
        f"{body}<section><details><summary>Resolved configuration</summary><pre>{escape(config_yaml)}</pre></details>"
        "</section></body></html>\n"
    )
    # A path in the configuration may hold bytes that are not UTF-8 (surrogates here): write them as references.
    replace_file(path, page.encode("utf-8", errors="xmlcharrefreplace"))
    return path


def _curve_png(lines: Metrics, *, levels: dict, fraction: bool, from_zero: bool) -> bytes:
    """One panel: `lines` over steps, the accuracies in `levels` as dashed lines over the whole width."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter, PercentFormatter

    ink = "#3a3f47"
    figure = Figure(figsize=(4.5, 2.2), dpi=130, facecolor="none", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="none")
    for (label, (steps, values)), colour in zip(lines.items(), ("#3355cc", "#d9730d"), strict=False):
        window = len(values) // 40
        values = np.where(np.isfinite(values), values, np.nan)
        if window >= 5 and not np.isnan(values).any():
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
            steps, values = (np.convolve(series, np.full(window, 1 / window), "valid") for series in (steps, values))
        marker = "o" if len(values) <= 30 else ""
        axes.plot(steps, values, color=colour, linewidth=1.8, label=label, marker=marker, markersize=3.5)
    for key, dashes in (("untrained", (5, 2)), ("raw_input", (1, 1.2))):
        if levels.get(key) is not None:
            axes.axhline(levels[key], color=ink, linewidth=1.4, dashes=dashes, label=key.replace("_", " "))
    if from_zero:
        axes.set_ylim(bottom=0)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        figure.legend(loc="outside upper right", ncols=3, fontsize=8.5, frameon=False, labelcolor=ink, borderpad=0)
    axes.locator_params(axis="both", nbins=5)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(PercentFormatter(1) if fraction else FuncFormatter(lambda y, _: f"{y:,.6g}"))
    axes.set_xlabel("step", fontsize=8.5, color=ink)
    axes.tick_params(labelsize=8.5, colors=ink, length=0)
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.spines.bottom.set_color("#c4c8ce")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def pca_colours(patches: np.ndarray) -> tuple[np.ndarray, float]:
    """(n, T, D) features -> (n, T, 3) colours in [0, 1], and the share of the variance they hold.

    Grey (0.5) where there is nothing to show: a component without variance, a patch with a feature that is not finite.
    """
    features = np.asarray(patches, np.float64).reshape(-1, patches.shape[-1])  # (n*T, D)
    colours = np.full((*patches.shape[:2], 3), 0.5)
    finite = np.isfinite(features).all(axis=1)
    features = features[finite]
    if len(features) < 2:
        return colours, 0.0
    std = features.std(axis=0)
    # Below 1e-5 of its size a float32 feature is constant: dividing by its std would show rounding noise as structure.
    varies = std > 1e-5 * np.abs(features).max(axis=0)
    if not varies.any():
        return colours, 0.0
    standard = (features - features.mean(axis=0))[:, varies] / std[varies]
    scores, strength, _ = np.linalg.svd(standard, full_matrices=False)
    rows = colours.reshape(-1, 3)  # a view
    for component in np.flatnonzero(strength[:3] > 1e-6 * strength[0]):
        low, high = np.percentile(scores[:, component], [2, 98])
        if high > low:
            rows[finite, component] = ((scores[:, component] - low) / (high - low)).clip(0, 1)
    return colours, float((strength[:3] ** 2).sum() / (strength**2).sum())


def tiled(image: np.ndarray, *, side: int) -> np.ndarray:
    """(H, W, C) in [0, 1] -> uint8 RGB with a longest edge of about `side`; small images grow by whole pixels."""
    channels = np.nan_to_num(np.asarray(image if image.shape[-1] == 3 else image[..., :1], np.float32))
    rgb = np.uint8(channels.clip(0, 1) * 255 + 0.5).repeat(3 // channels.shape[-1], axis=2)
    times = side / max(rgb.shape[:2])
    if times >= 2:
        return rgb.repeat(int(times), axis=0).repeat(int(times), axis=1)
    size = (max(1, round(rgb.shape[1] * times)), max(1, round(rgb.shape[0] * times)))
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.LANCZOS))


def cover(tile: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """The tile with its `hidden` (h, w) patches under a translucent colour, and faint patch borders."""
    (height, width), (h, w) = tile.shape[:2], hidden.shape
    row, column = np.arange(height) * h // height, np.arange(width) * w // width  # patch row and column of each pixel
    border = (np.diff(row, prepend=0) > 0)[:, None] | (np.diff(column, prepend=0) > 0)[None, :]
    opacity = np.where(hidden[row][:, column], np.where(border, 0.62, 0.84), np.where(border, 0.3, 0.0))[..., None]
    return np.uint8(tile * (1 - opacity) + HIDDEN_COLOUR * opacity)


def png_of(pixels: np.ndarray) -> bytes:
    """PNG with 256 colours, a third of the size of one with all colours."""
    file = io.BytesIO()
    Image.fromarray(pixels).quantize(256).save(file, "PNG", optimize=True)
    return file.getvalue()


def image_tag(png: bytes, *, alt: str, css: str = "") -> str:
    """An <img> with the picture embedded; `alt` is plain text, escaped here."""
    source = base64.b64encode(png).decode("ascii")
    return f'<img class="{css}" alt="{escape(alt)}" src="data:image/png;base64,{source}">'


def table(heads: list[str], rows: list[list[str]], *, css: str = "") -> str:
    """A table of HTML cells, scrollable if it is too wide."""
    lines = [[f"<th>{head}</th>" for head in heads], *rows] if heads else rows
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in lines)
    return f'<div class="wide"><table class="{css}">{body}</table></div>'


def _td(html: str) -> str:
    return f"<td>{html}</td>"


def _share_cell(share: float | None) -> str:
    return _td("–" if share is None else f'<div class="bar" style="--share:{share:.1%}">{100 * share:.1f} %</div>')


def _channel_note(images: np.ndarray) -> str:
    channels = images.shape[-1]
    return "" if channels in (1, 3) else f" The images have {channels} channels; the first one is shown in grey."


def _value(value: object) -> str:
    """HTML of one value: thousands separators, fractions with four significant digits, `name value` pairs of a dict."""
    if isinstance(value, Mapping):
        return ", ".join(f"{escape(str(key))} {_value(item)}" for key, item in value.items())
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, (float, np.floating)):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"
    return escape(str(value))


CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1d2127; --quiet: #626a75; --line: #e2e5ea;
  --accent: #3355cc; --bar: #dfe6fb; --mark: #b9c1fb; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14161a; --card: #1c1f25; --text: #e6e8eb; --quiet: #9aa2ad; --line: #30353d; --accent: #8ea6ff;
    --bar: #2b3557; --mark: #4149a8; }
  .charts img { filter: invert(0.88) hue-rotate(180deg); }
  .wave { background: #dfe3e8; padding: 8px; } }
* { box-sizing: border-box; }
body { max-width: 1000px; margin: 0 auto; padding: 32px 20px 64px; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 28px; line-height: 1.25; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 0 0 4px; }
nav a { color: var(--accent); text-decoration: none; margin-right: 20px; font-size: 14px;
  display: inline-block; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 22px 24px;
  margin-top: 20px; }
.explain { color: var(--quiet); font-size: 15px; margin: 0 0 16px; max-width: 85ch; }
.quiet { color: var(--quiet); font-size: 14px; margin-bottom: 0; }
.bad { color: #d1242f; font-weight: 400; }
.wide { overflow-x: auto; }
img { display: block; border-radius: 4px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--quiet); font-size: 14px; }
td, th { padding: 7px 20px 7px 0; border-bottom: 1px solid var(--line); }
.bar { min-width: 120px; padding: 2px 8px; border-radius: 4px;
  background: linear-gradient(to right, var(--bar) var(--share), transparent var(--share)); }
.pictures td, .pictures th { border: 0; padding: 0 8px 8px 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)); gap: 20px 16px; }
.charts img { width: 100%; height: auto; }
figure { margin: 0; }
figcaption { font-size: 14px; font-weight: 600; margin-bottom: 4px; }
.clips figure { margin-bottom: 20px; }
.wave { width: 100%; height: auto; }
.tokens { font-size: 14.5px; line-height: 1.75; margin: 0 0 12px; overflow-wrap: anywhere; white-space: pre-wrap; }
.tokens span { border-radius: 3px; }
mark { background: var(--mark); color: inherit; border-radius: 3px; }
.words { margin-bottom: 16px; font-size: 14.5px; }
.words td { padding: 4px 20px 4px 0; }
.label { max-width: 220px; overflow-wrap: anywhere; vertical-align: top; }
.good { color: #1a9850; }
.cards { display: flex; flex-wrap: wrap; gap: 24px 32px; overflow-x: auto; }
.cards td, .cards th { border: 0; padding: 0 4px 4px 0; vertical-align: top; }
.cards th { width: 72px; font-size: 13px; padding-top: 20px; }
.cards img { border: 3px solid transparent; border-radius: 6px; }
.cards .right { border-color: #1a9850; }
.cards .wrong { border: 3px dashed #d1242f; }
.name { display: block; max-width: 66px; text-align: center; font-size: 12px; line-height: 1.3; color: var(--quiet);
  white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
pre { background: var(--page); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; margin: 16px 0 0;
  font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; }
"""
