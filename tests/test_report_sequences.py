"""Pictures of speech and text: the right things in the right places, as far as HTML and pixels can tell."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from data2vec_train.report.page import probe_section, r2_section
from data2vec_train.report.sequences import (
    STRIP_PX,
    audio_masks_section,
    sequence_features_section,
    sequence_masks_section,
    text_neighbours_section,
    token_features_section,
    tokens_section,
)

RNG = np.random.default_rng(0)


def pictures(html: str) -> list[np.ndarray]:
    """All PNGs of a section, (H, W, 4)."""
    found = re.findall(r"base64,([A-Za-z0-9+/=]+)", html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGBA")) for picture in found]


def test_masks_are_strips_with_hidden_tokens_in_their_place():
    mask = np.zeros((2, 10), bool)
    mask[0, 2:5], mask[1, 9] = True, True
    section = sequence_masks_section([mask], drawn_as="spans <b>")
    first, second = (picture[0, :, :3].astype(int) for picture in pictures(section.html))
    token = STRIP_PX[0] // 10
    hidden = first[3 * token + token // 2]
    assert hidden[2] > hidden[0] + 50  # blue
    assert np.array_equal(first[4 * token + 5], hidden)
    assert np.ptp(first[token]) == 0  # grey
    assert np.array_equal(second[9 * token + 5], hidden)
    assert "20.0%" in section.explanation
    assert "spans <b>" in section.explanation  # escaped when the page is written


def test_hidden_tokens_are_marked_and_texts_escaped():
    pieces = ["<s>", " a", "&b", "\n", " end"]
    masks = np.array([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]], bool)
    section = tokens_section([(pieces, "doc <1>")], [masks], drawn_as="spans")
    assert "doc &lt;1&gt;, mask 1" in section.html
    assert "mask 3" not in section.html  # two are shown
    first, second = section.html.split("mask 2")
    assert first.count("<mark") == 2
    assert '<mark title="hidden"> a</mark>&amp;b<mark title="hidden">⏎</mark> end' in first
    assert second.count("<mark") == 1
    assert '<mark title="hidden">&lt;s&gt;</mark>' in second
    assert "26.7%" in section.explanation


def test_clips_show_waveform_spectrogram_and_masks_and_say_how_long_the_runs_are():
    wave, mel = RNG.normal(size=16_000).astype(np.float32), RNG.normal(size=(80, 101))
    masks = np.zeros((3, 50), bool)
    masks[:, 10:20] = True
    section = audio_masks_section(
        [(wave, mel, 'a "clip"')], [masks], sample_rate_hz=16_000, seconds_per_token=0.02, drawn_as="spans"
    )
    (picture,) = pictures(section.html)
    assert picture.shape[1] > 800
    assert "20.0% of the frames" in section.explanation
    assert "runs of 10.0 frames on average, about 200 ms" in section.explanation
    shaded = (picture[..., 2].astype(int) - picture[..., 0] > 60) & (picture[..., 3] > 60)
    columns = shaded.mean(axis=0)
    width = picture.shape[1]
    assert columns[int(0.3 * width)] > columns[int(0.75 * width)] + 0.3  # 0.2 to 0.4 s of 1 s are hidden


def test_features_of_samples_of_different_length_share_their_colours():
    steps = [np.repeat(np.eye(4)[[0, 1]], 5, axis=0), np.repeat(np.eye(4)[[1, 2, 0]], 5, axis=0)]
    noise = [RNG.normal(size=(10, 4)), RNG.normal(size=(15, 4))]
    section = sequence_features_section(["one", "two"], noise, steps, seconds_per_token=0.02)
    _, first, _, two = (picture[5, :, :3].astype(int) for picture in pictures(section.html))
    width = STRIP_PX[0]
    assert np.abs(first[3] - first[-4]).sum() > 50
    assert np.abs(first[3] - two[-4]).sum() < 3  # the same feature, the same colour
    assert "0.20 s" in section.html
    assert "0.30 s" in section.html
    assert len(first) == width


def test_tokens_stand_on_the_colour_of_their_features():
    features = np.eye(3)[[0, 0, 1, 2]] * 5
    section = token_features_section([(["a", "b", "c", "<"], "doc")], [features + 0.1], [features])
    colours = re.findall(r"background:rgb\((\d+),(\d+),(\d+)\);color:(#\w+)\">([^<]+)<", section.html)
    assert len(colours) == 8
    trained = colours[4:]
    assert trained[0][:3] == trained[1][:3] != trained[2][:3]
    assert trained[3][4] == "&lt;"
    assert {ink for *_, ink, _ in colours} <= {"#000", "#fff"}


@pytest.mark.parametrize("labelled", [True, False])
def test_neighbours_are_listed_nearest_first_and_marked_where_classes_are_known(labelled):
    labels = {"query_labels": np.array([1]), "found_labels": {"trained": np.array([[1, 0]])}} if labelled else {}
    section = text_neighbours_section(["what <is> this"], {"trained": [["near", "far"]]}, **labels)
    assert "what &lt;is&gt; this" in section.html
    assert section.html.index("near") < section.html.index("far")
    assert (section.html.count("✓"), section.html.count("✗")) == ((1, 1) if labelled else (0, 0))
    assert ("trained 50.0%" in section.explanation) == labelled


def test_r2_is_shown_only_where_it_was_measured():
    assert r2_section({}) is None
    assert r2_section({"r2": {"untrained": -1.0}}) is None
    section = r2_section({"r2": {"untrained": -1.5, "trained": 0.25, "samples": 1234, "tokens": 5}})
    assert "25.0 %" in section.html
    assert "-150.0 %" in section.html
    assert "1,234 held-out samples" in section.html
    earlier = {"explained": {"untrained": -1.5, "trained": 0.25, "samples": 1234, "tokens": 5}}
    assert r2_section(earlier) == section


def test_the_probe_table_names_its_baseline_its_pooling_and_what_should_be_known():
    probe = {"knn": {"raw_input": 0.5, "untrained": 0.2, "trained": 0.4}, "raw_input_name": "log-mel statistics"}
    probe |= {"note": "one speaker & little else", "pooling": "mean over tokens"}
    html = probe_section({"probe": probe, "rankme": 3.0}).html
    assert "<th>log-mel statistics</th>" in html
    assert "10.0 points below the log-mel statistics" in html
    assert "one speaker &amp; little else" in html
    assert "mean over tokens as features" in html
