"""Pictures of spectrograms and their patches for the report; the page itself is in `report.page`.

Legend: F mel bins, S_i frames of clip i, M masks per sample, (H_i, W) its patches in time and mel, T_i = H_i * W, D
feature width. Time runs from left to right, low frequencies are at the bottom.
"""

from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from data2vec_train.report.page import SHOWN_MASKS, Section, cover, image_tag, pca_colours, png_of, table

HEIGHT_PX = 96
WIDTH_PX = (96, 400)  # smallest and largest width of a picture
PX_PER_FRAME = 1.5


def spectrogram_masks_section(
    spectrograms: Sequence[np.ndarray], masked: Sequence[np.ndarray], names: Sequence[str], *, drawn_as: str
) -> Section:
    """Each spectrogram above the same one under its first masks.

    Args:
        spectrograms: (F, S_i) each.
        masked: (M, H_i, W) bool each, True where the student does not see the patch.
        names: of the clips.
        drawn_as: one phrase, how the masks are drawn.
    """
    rows = []
    for mel, masks, name in zip(spectrograms, masked, names, strict=False):
        picture = _picture(mel)
        hidden = [cover(picture, _upright(mask)) for mask in masks[: SHOWN_MASKS - 1]]
        pictures = [image_tag(png_of(shown), alt=name) for shown in (picture, *hidden)]
        rows += [[f'<th colspan="{SHOWN_MASKS}">{escape(name)}</th>'], [f"<td>{cell}</td>" for cell in pictures]]
    share = np.concatenate([np.asarray(masks).ravel() for masks in masked]).mean()
    return Section(
        "What the student hears",
        "Each spectrogram, and what of it is hidden in the first masks: blue patches are hidden from the student, "
        f"which has to predict the teacher's features there. {share:.1%} of the patches are hidden. Masks are drawn "
        f"as: {drawn_as}.",
        table([], rows, css="pictures"),
    )


def spectrogram_features_section(
    spectrograms: Sequence[np.ndarray],
    names: Sequence[str],
    untrained: Sequence[np.ndarray],
    trained: Sequence[np.ndarray],
    *,
    columns: int,
) -> Section:
    """Patch features as colours: per model the first 3 principal components over all clips as RGB.

    Args:
        spectrograms: (F, S_i) each.
        names: of the clips.
        untrained: features (T_i, D) of each clip before training.
        trained: the same after training.
        columns: W.
    """
    (before, before_share), (after, after_share) = _colours(untrained), _colours(trained)
    rows = []
    for mel, name, *maps in zip(spectrograms, names, before, after, strict=False):
        picture = _picture(mel)
        grids = [_upright(colours.reshape(-1, columns, 3)) for colours in maps]
        pictures = [picture, *(_resized(np.uint8(255 * grid), picture.shape[1]) for grid in grids)]
        rows += [
            [f'<th colspan="3">{escape(name)}</th>'],
            [f"<td>{image_tag(png_of(shown), alt=name)}</td>" for shown in pictures],
        ]
    return Section(
        "Patch features as colours",
        "Spectrogram, features untrained and trained: patches of like colour have like features. Good features give "
        "the same sound the same colour in every recording; a pattern that only follows the frequency, noise, or one "
        f"flat colour mean that little was learnt. The three components shown hold {before_share:.0%} of the variance "
        f"untrained and {after_share:.0%} trained.",
        table([], rows, css="pictures"),
    )


def _colours(features: Sequence[np.ndarray]) -> tuple[list[np.ndarray], float]:
    """Features (T_i, D) of each clip -> colours (T_i, 3) in [0, 1], and the share of the variance they hold."""
    colours, share = pca_colours(np.concatenate(list(features))[None])
    return np.split(colours[0], np.cumsum([len(rows) for rows in features])[:-1]), share


def _picture(mel: np.ndarray) -> np.ndarray:
    """(F, S) -> (height, width, 3) 8-bit."""
    from matplotlib import colormaps

    low, high = np.percentile(mel, [5, 99.5])
    scaled = ((mel - low) / max(high - low, 1e-6)).clip(0, 1)[::-1]
    width = int(np.clip(PX_PER_FRAME * mel.shape[1], *WIDTH_PX))
    return _resized(np.uint8(255 * colormaps["magma"](scaled)[..., :3]), width)


def _resized(pixels: np.ndarray, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((width, HEIGHT_PX), Image.Resampling.NEAREST))


def _upright(grid: np.ndarray) -> np.ndarray:
    """(H, W, ...) in time and mel -> (W, H, ...) with low frequencies in the last row."""
    return grid.swapaxes(0, 1)[::-1]
