import re
from html.parser import HTMLParser

import numpy as np
import pytest

from data2vec_train.report.page import (
    PANELS,
    Section,
    cover,
    curves_section,
    facts_section,
    image_tag,
    masks_section,
    neighbours_section,
    pca_colours,
    pca_section,
    probe_section,
    r2_section,
    read_metrics,
    tiled,
    write_report,
)

SUMMARY = {
    "modality": "vision",
    "seed": 12345,
    "steps": 12000,
    "seconds": 3725.4,
    "loss_last": 0.448123,
    "rankme": 50.14,
    "note": "<b>",
    "probe": {
        "knn": {"untrained": 0.35, "raw_input": 0.84, "trained": 0.61},
        "linear": {"untrained": 0.6, "raw_input": 0.86, "trained": 0.55},
        "classes": 10,
        "weights": "student",
    },
}


def attributes(html: str) -> list[dict]:
    """Attributes of every <img>, as a browser would read them."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: found.append(dict(attrs)) if tag == "img" else None
    parser.feed(html)
    return found


@pytest.fixture
def images():
    return np.random.default_rng(0).random((3, 28, 28, 1), dtype=np.float32)


def test_probe_table_shows_percent_and_gain_in_points():
    html = probe_section(SUMMARY).html
    for text in ("35.0 %", "84.0 %", "61.0 %", "+26.0", "-5.0", "23.0 points below the raw input", "lost 5.0 points"):
        assert text in html


@pytest.mark.parametrize("probe", [{}, {"probe": None}])
def test_without_labels_only_rankme_is_shown(probe):
    section = probe_section({"rankme": 50.14} | probe)
    assert "no labels" in section.explanation
    assert "50.14" in section.html
    assert "<table" not in section.html


def test_probe_without_every_score_has_no_gain():
    html = probe_section({"probe": {"knn": {"trained": 0.5}}}).html
    assert "50.0 %" in html
    assert "points;" not in html


def test_probe_names_are_escaped_and_empty_keys_leave_no_trace():
    probe = {"knn": {"untrained": 0.4, "raw_input": 0.5, "trained": 0.4}, "raw_input_name": "<i>pixels"}
    html = probe_section({"probe": probe | {"note": None, "pooling": None}}).html
    assert "<i>" not in html
    assert html.count("&lt;i&gt;pixels") == 2  # head of the column and verdict
    assert "None" not in html


@pytest.mark.parametrize("trained", [0.4, 0.40001, 0.39999])
def test_a_tie_is_neither_a_gain_nor_a_loss(trained):
    html = probe_section({"probe": {"knn": {"untrained": 0.4, "trained": trained}}}).html
    assert "no difference" in html
    assert "gained" not in html
    assert "lost" not in html


def test_a_name_cannot_leave_the_alt_attribute():
    name = 'a "b" onload="x" <c>'
    (found,) = attributes(image_tag(b"", alt=name, css="wave"))
    assert found["alt"] == name
    assert set(found) == {"class", "alt", "src"}


def test_r2_below_zero_stays_in_the_panel(monkeypatch):
    from matplotlib.figure import Figure

    lowest, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (lowest.append(self.axes[0].get_ylim()[0]), save(self, *a, **k))
    )
    section = curves_section({"heldout/r2": (np.arange(3), np.array([-1.2, -0.1, 0.4]))}, baselines={})
    assert "Target variance explained, held out" in section.html
    assert lowest[0] < -1.2


def test_r2_of_a_run_that_an_earlier_version_began_is_one_line(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,heldout/explained,heldout/r2\n1,0.1,\n2,0.2,\n3,,0.3\n")
    steps, values = read_metrics(tmp_path / "metrics.csv")["heldout/r2"]
    assert (steps.tolist(), values.tolist()) == ([1, 2, 3], [0.1, 0.2, 0.3])


@pytest.mark.parametrize("word", ["patch", "image", "pixel"])
def test_sections_of_all_modalities_speak_of_no_image(word):
    summary = SUMMARY | {"modality": "audio", "r2": {"trained": 0.2, "samples": 3, "tokens": 9}}
    metrics = {column: (np.arange(3), np.ones(3)) for panel in PANELS.values() for column in panel.values()}
    sections = [
        probe_section(summary),
        probe_section({"rankme": 2.0}),
        r2_section(summary),
        curves_section(metrics, baselines=SUMMARY["probe"]),
        facts_section(summary, command="train modality=audio"),
    ]
    for section in sections:
        html = re.sub(r"data:image/png;base64,[^\"]*", "", section.html)
        assert word not in (section.title + section.explanation + html).lower()


def test_facts_skip_missing_keys_and_are_escaped():
    html = facts_section(SUMMARY, command="train 'a=<x>'").html
    for text in ("1:02:05", "12,000", "0.4481", "12345", "&lt;b&gt;", "a=&lt;x&gt;"):
        assert text in html
    assert "objective" not in html
    assert "knn" not in html


def test_metrics_without_empty_cells_and_a_step_logged_twice_counts_once(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("step,train/loss,probe/knn\n10,1.5,\n20,1.25,0.5\n20,1.0,\n")
    metrics = read_metrics(file)
    assert metrics["train/loss"][0].tolist() == [10, 20]
    assert metrics["train/loss"][1].tolist() == [1.5, 1.0]
    assert metrics["probe/knn"][0].tolist() == [20]
    file.write_text("step,train/loss\n10,1.5,7\n")
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(file)


def test_curves_have_a_panel_only_where_there_is_data():
    steps = np.arange(300)
    metrics = {
        "train/loss": (steps, np.where(steps == 7, np.nan, 1.0)),
        "probe/knn": (steps[:1], np.array([0.5])),
        "probe/rankme": (steps[:2], np.array([3.0, 4.0])),
    }
    html = curves_section(metrics, baselines=SUMMARY["probe"]).html
    assert re.findall("<figcaption>([^<:]*)", html) == ["Loss ", "k-NN probe accuracy", "RankMe"]
    assert "1 values are not finite" in html
    assert "accuracy" not in curves_section(metrics, baselines={}).html
    assert "No metrics" in curves_section({}, baselines={}).html


def test_masks_tell_the_hidden_share_and_cover_exactly_the_hidden_patches(images):
    masked = np.zeros((3, 5, 49), bool)
    masked[:, :, :35] = True
    section = masks_section(images, masked, (7, 7), drawn_as="blocks <3>")
    assert "71.4%" in section.explanation
    assert "between" not in section.explanation
    assert section.html.count("<img") == 3 * (1 + 4)
    tile = tiled(images[0], side=140)
    changed = (cover(tile, masked[0, 0].reshape(7, 7)) != tile).any(-1)
    assert changed[:100].mean() > 0.99  # 5 of 7 rows of patches, 20 px each
    assert changed[100:].mean() < 0.15  # patch borders only


@pytest.mark.parametrize("value", [0.0, 3.7, np.nan])
def test_pca_of_a_constant_feature_is_grey(images, value):
    features = np.full((3, 49, 8), value, np.float32)
    colours, share = pca_colours(features)
    assert (colours == 0.5).all()
    assert share == 0
    assert "nan" not in pca_section(images, features, features, (7, 7)).explanation


def test_pca_colours_tell_two_kinds_of_patches_apart():
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, (2, 16))
    colours, share = pca_colours(
        (kind[..., None] * rng.normal(size=12) + rng.normal(size=(2, 16, 12)) * 1e-3).astype("f")
    )
    assert abs(colours[kind == 0, 0].mean() - colours[kind == 1, 0].mean()) > 0.9
    assert share > 0.99


def test_images_with_five_channels_show_the_first_one():
    images = np.random.default_rng(0).random((2, 8, 8, 5))
    tile = tiled(images[0], side=16)
    assert tile.shape == (16, 16, 3)
    assert (tile[::2, ::2, 1] == np.round(images[0, :, :, 0] * 255)).all()
    assert "5 channels" in masks_section(images, np.ones((2, 1, 4), bool), (2, 2), drawn_as="x").explanation


def test_neighbours_of_the_same_class_are_counted_and_framed(images):
    found = {"trained": np.stack([images[:2]] * 3), "raw input": np.stack([images[:2]] * 3)}
    labels = {"trained": np.array([[0, 0], [1, 0], [2, 1]]), "raw input": np.full((3, 2), 9)}
    names = [f"<{number}>" for number in range(10)]
    section = neighbours_section(
        images, found, query_labels=np.arange(3), found_labels=labels, class_names=names
    )  # right: 2 + 1 + 1 of 6
    assert "trained 66.7%, raw input 0.0%" in section.explanation
    assert section.html.count('class="right"') == 4
    assert section.html.count('class="wrong"') == 8
    assert "&lt;9&gt;" in section.html
    assert attributes(section.html)[-1]["alt"] == "wrong <9>"  # escaped once, not twice
    assert "right" not in neighbours_section(images, found).html


def test_page_is_escaped_complete_and_asks_for_nothing_from_outside(tmp_path, images):
    features = np.random.default_rng(0).normal(size=(3, 49, 8))
    sections = [
        Section("<title>", "a & b", "<p>kept</p>"),
        probe_section(SUMMARY),
        curves_section({"train/loss": (np.arange(3), np.ones(3))}, baselines={}),
        pca_section(images, features, features, (7, 7)),
    ]
    path = write_report(tmp_path / "report.html", title="run <1>", sections=sections, config_yaml="path: <\udcff>")
    page = path.read_text(encoding="utf-8")
    for text in (
        "<h1>run &lt;1&gt;</h1>",
        "&lt;title&gt;",
        "a &amp; b",
        "<p>kept</p>",
        "path: &lt;&#56575;&gt;",
        "</html>",
    ):
        assert text in page
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert not re.search(r"https?://|<script|url\(|@import", page)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
