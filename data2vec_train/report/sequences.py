"""Pictures of speech, text and other sequences for the report; the page itself is in `report/page.py`.

Legend: M masks per sample, T_i tokens of sample i, D feature width, S audio samples, q queries, k neighbours.
"""

import io
from collections.abc import Sequence
from html import escape

import numpy as np

from data2vec_train.report.page import HIDDEN_COLOUR, SHOWN_MASKS, Section, image_tag, pca_colours, table

SHOWN_TOKENS = 72
STRIP_PX = (640, 14)  # width and height of a strip of tokens
INK = "#3a3f47"


def audio_masks_section(
    clips: Sequence[tuple[np.ndarray, np.ndarray, str]],
    masked: Sequence[np.ndarray],
    *,
    sample_rate_hz: int,
    seconds_per_token: float,
    drawn_as: str,
) -> Section:
    """Waveform and spectrogram of each clip, with the frames hidden by the first mask shaded, and strips of more masks.

    Args:
        clips: (waveform (S_i,), log-mel spectrogram (mels, frames), name).
        masked: of each clip (M, T_i) bool, True = hidden from the student.
        sample_rate_hz: of the waveforms.
        seconds_per_token: from one frame to the next.
        drawn_as: a phrase that describes the masks.
    """
    figures = []
    for (waveform, mel, name), masks in zip(clips, masked, strict=True):
        png = _clip_png(waveform, mel, np.asarray(masks, bool)[:SHOWN_MASKS], sample_rate_hz)
        figures.append(
            f"<figure><figcaption>{escape(name)}</figcaption>{image_tag(png, alt=name, css='wave')}</figure>"
        )
    runs = np.concatenate([_run_lengths(masks) for masks in masked])
    share = np.concatenate([np.asarray(masks).ravel() for masks in masked]).mean()
    return Section(
        "What the student hears",
        f"Shaded stretches are hidden from the student, which has to predict the teacher's features there; the strips "
        f"below show the first {SHOWN_MASKS} masks, of which the first is shaded above. {share:.1%} of "
        f"the frames are hidden, in runs of {runs.mean():.1f} frames on average, about "
        f"{1000 * runs.mean() * seconds_per_token:.0f} ms. Masks are drawn as: {drawn_as}.",
        f'<div class="clips">{"".join(figures)}</div>',
    )


def tokens_section(
    documents: Sequence[tuple[Sequence[str], str]], masked: Sequence[np.ndarray], *, drawn_as: str
) -> Section:
    """The beginning of each document with its hidden tokens marked, under two masks.

    Args:
        documents: (text of each token (T_i,), name).
        masked: of each document (M, T_i) bool, True = hidden from the student.
        drawn_as: a phrase that describes the masks.
    """
    parts = []
    for (pieces, name), masks in zip(documents, masked, strict=True):
        for number, mask in enumerate(np.asarray(masks, bool)[:2]):
            tokens = "".join(
                f'<mark title="hidden">{_visible(piece)}</mark>' if hidden else _visible(piece)
                for piece, hidden in zip(pieces[:SHOWN_TOKENS], mask[:SHOWN_TOKENS], strict=True)
            )
            more = " ..." if len(pieces) > SHOWN_TOKENS else ""
            parts.append(
                f'<p class="tokens"><span class="quiet">{escape(name)}, mask {number + 1}</span><br>{tokens}{more}</p>'
            )
    runs = np.concatenate([_run_lengths(masks) for masks in masked])
    share = np.concatenate([np.asarray(masks).ravel() for masks in masked]).mean()
    return Section(
        "What the student reads",
        "Marked tokens are hidden from the student, which has to predict the teacher's features there. "
        f"{share:.1%} of the tokens are hidden, in runs of {runs.mean():.1f} on average. "
        f"Masks are drawn as: {drawn_as}.",
        "".join(parts),
    )


def sequence_masks_section(masked: Sequence[np.ndarray], *, drawn_as: str) -> Section:
    """Strips of the masks of a few samples of any sequence, (M, T_i) bool each."""
    rows = []
    for sample, masks in enumerate(masked):
        for number, mask in enumerate(np.asarray(masks, bool)[:SHOWN_MASKS]):
            colours = np.where(mask[:, None], HIDDEN_COLOUR, np.float32(220)) / 255
            rows.append(
                [
                    f"<th>sample {sample + 1}, mask {number + 1}</th>",
                    f"<td>{image_tag(_strip(colours), alt='mask')}</td>",
                ]
            )
    share = np.concatenate([np.asarray(masks).ravel() for masks in masked]).mean()
    return Section(
        "What the student sees",
        "One line for each mask, the sequence from left to right; blue tokens are hidden from the student, which has "
        f"to predict the teacher's features there. {share:.1%} are hidden. Masks are drawn as: {drawn_as}.",
        table([], rows, css="pictures"),
    )


def sequence_features_section(
    names: Sequence[str],
    untrained: Sequence[np.ndarray],
    trained: Sequence[np.ndarray],
    *,
    seconds_per_token: float,
) -> Section:
    """Features over time as colours: per model the first 3 principal components over all samples as RGB.

    Args:
        names: of the samples.
        untrained: features (T_i, D) of each sample before training.
        trained: the same after training.
        seconds_per_token: step of the time axis.
    """
    (before, before_share), (after, after_share) = _colours_of(untrained), _colours_of(trained)
    rows = []
    for name, first, second in zip(names, before, after, strict=True):
        title = f"{escape(name)}<br>{len(first) * seconds_per_token:.2f} s"
        pictures = "".join(
            f'<span class="quiet">{which}</span>{image_tag(_strip(colours), alt=which)}'
            for which, colours in (("untrained", first), ("trained", second))
        )
        rows.append([f'<th class="label">{title}</th>', f"<td>{pictures}</td>"])
    return Section(
        "Features over time as colours",
        "Time runs from left to right; similar colours are similar features. Good features change with the sound "
        "and give the same sound the same colour in every recording; noise, or one flat colour, mean that little was "
        "learnt. "
        f"The three components shown hold {before_share:.0%} of the variance untrained and {after_share:.0%} trained.",
        table([], rows, css="pictures"),
    )


def token_features_section(
    documents: Sequence[tuple[Sequence[str], str]], untrained: Sequence[np.ndarray], trained: Sequence[np.ndarray]
) -> Section:
    """The beginning of each document, every token on the colour of its features; arguments as above."""
    (before, before_share), (after, after_share) = _colours_of(untrained), _colours_of(trained)
    parts = []
    for (pieces, name), first, second in zip(documents, before, after, strict=True):
        for which, colours in (("untrained", first), ("trained", second)):
            tokens = "".join(
                _coloured(piece, colour)
                for piece, colour in zip(pieces[:SHOWN_TOKENS], colours[:SHOWN_TOKENS], strict=True)
            )
            parts.append(f'<p class="tokens"><span class="quiet">{escape(name)}, {which}</span><br>{tokens}</p>')
    return Section(
        "Token features as colours",
        "Tokens on similar colours have similar features: the first three principal components over all documents. "
        f"Compare within a model, not between models. They hold {before_share:.0%} of the variance untrained and "
        f"{after_share:.0%} trained.",
        "".join(parts),
    )


def text_neighbours_section(
    queries: Sequence[str],
    found: dict[str, Sequence[Sequence[str]]],
    *,
    query_labels: np.ndarray | None = None,
    found_labels: dict[str, np.ndarray] | None = None,
) -> Section:
    """Nearest neighbours as text.

    Args:
        queries: (q,) a short description of each query.
        found: by kind of feature, (q) of (k) descriptions, nearest first.
        query_labels: (q,) int, class of each query.
        found_labels: by kind of feature, (q, k) int. With both labels, right and wrong neighbours are marked.
    """
    labelled = query_labels is not None and found_labels is not None
    cards = []
    for query, text in enumerate(queries):
        rows = [["<th>query</th>", f"<td><b>{escape(text)}</b></td>"]]
        for feature, neighbours in found.items():
            lines = []
            for place, neighbour in enumerate(neighbours[query]):
                mark = ""
                if labelled:
                    right = found_labels[feature][query][place] == query_labels[query]
                    mark = '<span class="good">✓</span> ' if right else '<span class="bad">✗</span> '
                lines.append(f"{mark}{escape(neighbour)}")
            rows.append([f'<th class="label">{escape(feature)}</th>', f"<td>{'<br>'.join(lines)}</td>"])
        cards.append(table([], rows, css="words"))
    explanation = "Each sample above those whose features are most similar to its own, nearest first. "
    if labelled:
        same = {name: np.mean(found_labels[name] == np.asarray(query_labels)[:, None]) for name in found}
        explanation += "A tick is a neighbour of the same class, a cross one of another. "
        explanation += f"Same class: {', '.join(f'{name} {share:.1%}' for name, share in same.items())}."
    return Section("Nearest neighbours", explanation, "".join(cards))


def _colours_of(features: Sequence[np.ndarray]) -> tuple[list[np.ndarray], float]:
    """Features (T_i, D) of each sample -> colours (T_i, 3) in [0, 1], and the share of the variance they hold."""
    together = np.concatenate(list(features))[None]  # (1, all tokens, D)
    colours, share = pca_colours(together)
    ends = np.cumsum([len(row) for row in features])[:-1]
    return np.split(colours[0], ends), share


def _run_lengths(masks: np.ndarray) -> np.ndarray:
    """Lengths of all runs of hidden positions in (M, T) bool."""
    edges = np.diff(np.pad(np.asarray(masks, np.int8), ((0, 0), (1, 1))), axis=1)
    return np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]


def _strip(colours: np.ndarray) -> bytes:
    """(T, 3) in [0, 1] -> a PNG strip."""
    from PIL import Image

    image = Image.fromarray(np.uint8(255 * colours.clip(0, 1))[None]).resize(STRIP_PX, Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _visible(piece: str) -> str:
    """A token's text in HTML, with visible signs for line ends and tabs."""
    return escape(piece.replace("\r", "").replace("\n", "⏎").replace("\t", "⇥"))


def _coloured(piece: str, colour: np.ndarray) -> str:
    red, green, blue = (int(255 * value) for value in colour)
    ink = "#000" if 0.3 * red + 0.59 * green + 0.11 * blue > 128 else "#fff"
    return f'<span style="background:rgb({red},{green},{blue});color:{ink}">{_visible(piece)}</span>'


def _clip_png(waveform: np.ndarray, mel: np.ndarray, masks: np.ndarray, sample_rate_hz: int) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seconds = len(waveform) / sample_rate_hz
    figure = Figure(figsize=(9, 3.1), dpi=110, facecolor="none", layout="constrained")
    FigureCanvasAgg(figure)
    wave, spectrum, strips = figure.subplots(3, 1, sharex=True, height_ratios=[1, 2, 0.2 + 0.17 * len(masks)])
    colour = tuple(HIDDEN_COLOUR / 255)
    # Lowest and highest value of each of 1,200 slices, which is the resolution of a line of this width.
    slices = np.array_split(waveform, min(1200, len(waveform)))
    time = np.linspace(0, seconds, len(slices))
    wave.fill_between(time, [s.min() for s in slices], [s.max() for s in slices], color=INK, linewidth=0)
    spectrum.imshow(
        mel,
        origin="lower",
        aspect="auto",
        extent=(0, seconds, 0, len(mel)),
        cmap="magma",
        vmin=np.percentile(mel, 5),
        vmax=np.percentile(mel, 99.5),
    )
    frame = seconds / masks.shape[1]
    edges = np.diff(np.pad(masks[0].astype(np.int8), 1))
    for start, stop in zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True):
        for axes, opacity in ((wave, 0.3), (spectrum, 0.62)):
            axes.axvspan(start * frame, stop * frame, color=colour, alpha=opacity, linewidth=0)
    shown = np.where(masks[..., None], (*colour, 1.0), (0.6, 0.6, 0.6, 0.25))
    strips.imshow(shown, aspect="auto", extent=(0, seconds, len(masks), 0), interpolation="nearest")
    strips.set_xlabel("seconds", fontsize=8.5, color=INK)
    strips.set_ylabel("masks", fontsize=8.5, color=INK, rotation=0, ha="right", va="center")
    spectrum.set_ylabel("mel", fontsize=8.5, color=INK, rotation=0, ha="right", va="center")
    for axes in (wave, spectrum, strips):
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.tick_params(labelsize=8.5, colors=INK, length=0)
    strips.set_xlim(0, seconds)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
