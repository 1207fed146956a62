import io
import json
import logging
import os
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data2vec_train.data.image import decode_image
from data2vec_train.data.sources.files import EMBEDDED_DIGITS, ArraySource, FolderSource, RawSample
from data2vec_train.data.sources.hf import HFSource, HFStreamingSource, shards_of
from data2vec_train.errors import BadSample, ConfigError, DataError

IMAGES = [".png", ".jpg", ".jpeg"]
COUNT = 32
RNG = np.random.default_rng(0)
PIXELS = [RNG.integers(0, 256, (4 + n % 3, 5, 3), dtype=np.uint8) for n in range(COUNT)]


def png(pixels: np.ndarray, fmt: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, fmt)
    return buffer.getvalue()


ENCODED = [png(pixels) for pixels in PIXELS]
LABELS = [n % 4 for n in range(COUNT)]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


@pytest.fixture
def hf(tmp_path):
    def make(path, **options) -> HFSource:
        base = {"name": None, "split": "train", "column": None, "label_column": None, "data_files": None}
        return HFSource(path=str(path), revision=None, cache_dir=str(tmp_path / "cache"), **base | options)

    return make


@pytest.fixture
def streaming(tmp_path):
    def make(path, shuffle_buffer=1, **options) -> HFStreamingSource:
        base = {"name": None, "split": "train", "column": None, "label_column": None, "data_files": None}
        fixed = {"revision": None, "cache_dir": str(tmp_path / "cache"), "shuffle_buffer": shuffle_buffer}
        return HFStreamingSource(path=str(path), **fixed | base | options)

    return make


def folder(path, *, extensions=IMAGES, class_from_folder="auto") -> FolderSource:
    paths = [str(part) for part in path] if isinstance(path, list) else str(path)
    return FolderSource(path=paths, extensions=extensions, class_from_folder=class_from_folder)


def write(root: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(ENCODED[number % COUNT])
    return root


def parquet(path: Path, numbers=range(COUNT), **columns) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = list(numbers)
    table = {
        "image": [{"bytes": ENCODED[n], "path": f"{n}.png"} for n in numbers],
        "label": [LABELS[n] for n in numbers],
    }
    pq.write_table(pa.table(table | columns), path, row_group_size=5)
    return path


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def shard(path: Path, numbers=range(COUNT)) -> Path:
    return tar(
        path, {f"{n:03}.{end}": v for n in numbers for end, v in (("png", ENCODED[n]), ("cls", b"%d" % LABELS[n]))}
    )


def contents(records) -> Counter:
    """Decoded pixels with their label, as a multiset."""
    decoded = [(np.asarray(decode_image(r.value, channels=3, max_pixels=10**4)), r.label) for r in records]
    return Counter((image.shape, image.tobytes(), label) for image, label in decoded)


EXPECTED = Counter((pixels.shape, pixels.tobytes(), label) for pixels, label in zip(PIXELS, LABELS, strict=True))


# ------------------------------------------------------------------------------------------------------------- arrays


def test_the_embedded_digits_split_is_disjoint_complete_and_stratified():
    parts = {split: ArraySource(path=None, split=split, held_out=100) for split in ("train", "test", "all")}
    assert [len(parts[split]) for split in ("train", "test", "all")] == [4000, 1000, 5000]
    keys = {split: {part[n].key for n in range(len(part))} for split, part in parts.items()}
    assert not keys["train"] & keys["test"]
    assert keys["train"] | keys["test"] == keys["all"]
    assert np.bincount(parts["test"].labels()).tolist() == [100] * 10
    assert np.bincount(parts["train"].labels()).tolist() == [400] * 10
    with np.load(EMBEDDED_DIGITS) as archive:
        x, y = archive["x"], archive["y"]
    # The embedded file is sorted by class, 500 each: the tail of each class is rows 400 to 499 of its 500.
    assert {int(key.split(":")[1]) % 500 for key in keys["test"]} == set(range(400, 500))
    for part in parts.values():
        record = part[len(part) - 1]
        row = int(record.key.split(":")[1])
        assert record.key.startswith("mnist_5k.npz:")
        assert np.array_equal(record.value, x[row])
        assert record.label == y[row] == part.labels()[-1]
    assert parts["all"].class_names == list("0123456789")
    assert len({part[n].value.tobytes() for part in (parts["train"], parts["test"]) for n in range(len(part))}) == 5000


@pytest.mark.parametrize(
    ("options", "text"),
    [({"split": "val", "held_out": 10}, "split='val'"), ({"split": "test", "held_out": 500}, "smallest class has 500")],
)
def test_an_impossible_split_is_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        ArraySource(path=None, **options)


def test_files_that_are_no_such_archive_are_data_errors(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "other.npz", z=np.zeros(3))
    np.savez(tmp_path / "short.npz", x=np.zeros((3, 2, 2)), y=np.zeros(2, int))
    np.savez(tmp_path / "pickled.npz", x=np.array([{}]), y=np.zeros(1, int))
    for name, text in (
        ("text", "not an .npz"),
        ("other", "'x' and 'y'"),
        ("short", "each of x"),
        ("pickled", "not an"),
    ):
        with pytest.raises(DataError, match=text):
            ArraySource(path=str(tmp_path / f"{name}.npz"), split="all", held_out=0)
    with pytest.raises(DataError, match="does not exist; the nearest existing folder is"):
        ArraySource(path=str(tmp_path / "no" / "such.npz"), split="all", held_out=0)


# ------------------------------------------------------------------------------------------------------------ folders


def test_files_are_found_at_any_depth_sorted_without_the_hidden(tmp_path, caplog):
    root = write(tmp_path / "data", ["b/1.png", "a/x/2.JPG", "top.jpeg", ".hidden.png", ".cache/3.png", "a/notes.txt"])
    caplog.set_level(logging.INFO)
    source = folder(root, extensions=["png", ".JPG", "jpeg"])
    assert [source[n].key for n in range(len(source))] == ["a/x/2.JPG", "b/1.png", "top.jpeg"]
    assert source[-1].value == root / "top.jpeg"
    assert source.class_names is source.labels() is source[0].label is None
    assert "3 files, 1 ignored because of their extension, no labels" in caplog.text
    with pytest.raises(IndexError):
        source[3]


def test_links_are_followed_loops_end_and_dangling_links_stay_visible(tmp_path):
    store = write(tmp_path / "store", ["real.png", "deep/other.png"])
    root = write(tmp_path / "data", ["own.png"])
    (root / "file.png").symlink_to(store / "real.png")
    (root / "folder").symlink_to(store)
    (root / "loop").symlink_to(root)
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = folder(root)
    keys = [source[n].key for n in range(len(source))]
    assert keys == ["file.png", "folder/deep/other.png", "folder/real.png", "gone.png", "own.png"]


def test_two_disks_are_one_data_set(tmp_path):
    first, second = (
        write(tmp_path / "x", ["a/1.png", "b/2.png"]),
        write(tmp_path / "y", ["a/3.png", "a/4.png", "b/5.png"]),
    )
    source = folder([first, second])
    assert [source[n].value for n in (1, 2, -1)] == [first / "b/2.png", second / "a/3.png", second / "b/5.png"]
    assert source[2].key == str(second / "a/3.png")
    assert source.labels().tolist() == [0, 1, 0, 0, 1]
    with pytest.raises(ConfigError, match="same folder twice"):
        folder([first, tmp_path / "x"])


def test_class_folders_are_labels_when_they_look_like_classes(tmp_path):
    root = write(tmp_path, ["cat/1.png", "cat/deep/2.png", "ant/3.png", "ant/4.png", "ant/5.png"])
    source = folder(root)
    assert source.class_names == ["ant", "cat"]
    assert source.labels().tolist() == [0, 0, 0, 1, 1] == [source[n].label for n in range(5)]
    assert source.labels().dtype == np.int64
    assert folder(root, class_from_folder=False).labels() is None


@pytest.mark.parametrize(
    "names",
    [
        ["a/1.png", "a/2.png", "b/3.png"],  # 2 classes of 3 files
        [f"{n}/only.png" for n in range(9)],  # one class per file
        ["a/1.png", "a/2.png", "b/3.png", "b/4.png", "b/5.png", "loose.png"],
        ["one/1.png", "one/2.png", "one/3.png"],
        [f"{split}/{n}.png" for split in ("train", "val") for n in range(4)],
    ],
)
def test_folders_that_are_no_classes_give_no_labels(tmp_path, names):
    source = folder(write(tmp_path, names))
    assert len(source) == len(names)
    assert source.class_names is source.labels() is None


def test_asking_for_classes_that_are_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="loose.png lies directly in"):
        folder(write(tmp_path / "a", ["x/1.png", "loose.png"]), class_from_folder=True)
    with pytest.raises(ConfigError, match="single file"):
        folder(write(tmp_path / "b", ["x/1.png", "y/2.png"]), class_from_folder=True)
    few = write(tmp_path / "c", ["x/1.png", "x/2.png", "y/2.png"])
    assert folder(few, class_from_folder=True).class_names == ["x", "y"]


def test_every_unusable_path_gets_one_clear_line(tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "set.parquet").touch()
    (tmp_path / "one.png").touch()
    texts = write(tmp_path / "texts", ["a.txt", "b.txt", "c.TXT", "x.parquet", "README"])
    expected = [
        (
            tmp_path / "no" / "such",
            DataError,
            f"{tmp_path}/no/such does not exist; the nearest existing folder is {tmp_path}",
        ),
        (tmp_path / "set.parquet", ConfigError, "use data=hf data.path="),
        (tmp_path / "one.png", ConfigError, f"is a file: give the folder that contains it, {tmp_path}"),
        (empty, DataError, "no files at all"),
        (texts, DataError, r"5 files \(3 .txt, .*1 .parquet.*\), none of them ending in .png, .jpg, .jpeg; .*data=hf"),
    ]
    for path, error, text in expected:
        with pytest.raises(error, match=text) as caught:
            folder(path)
        assert "\n" not in str(caught.value)

    def refuse(path):  # the superuser may list everything, so the file system cannot play this
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="empty is not readable: permission denied"):
        folder(empty)


# --------------------------------------------------------------------------------------------- Hugging Face and shards


def test_folder_parquet_and_tar_hold_the_same_images(tmp_path, hf, streaming):
    root = write(tmp_path / "folder", [f"class{LABELS[n]}/{n:03}.png" for n in range(COUNT)])
    for part in range(3):
        parquet(tmp_path / "parquet" / f"train-{part}.parquet", range(part, COUNT, 3))
        shard(tmp_path / "tar" / f"train-{part}.tar", range(part, COUNT, 3))
    sources = [folder(root), hf(root, split="train")]
    sources += [hf(tmp_path / kind) for kind in ("parquet", "tar")]
    sources += [hf(tmp_path / kind / f"*.{kind}") for kind in ("parquet", "tar")]
    for source in sources:
        records = [source[n] for n in range(len(source))]
        assert contents(records) == EXPECTED
        assert len({record.key for record in records}) == COUNT
        assert source.labels().tolist() == [record.label for record in records]
        assert len(source.class_names) == 4
    for kind in ("parquet", "tar"):
        stream = streaming(tmp_path / kind)
        records = list(stream.stream(epoch=0, seed=0, worker=0, num_workers=1, rank=0, world_size=1))
        assert contents(records) == EXPECTED
        assert len({record.key for record in records}) == COUNT


def test_keys_name_the_file_and_the_row_or_the_member(tmp_path, hf):
    assert hf(parquet(tmp_path / "set.parquet"))[7].key == "set.parquet:7"
    assert hf("parquet", data_files=str(tmp_path / "set.parquet"))[7].key == "set.parquet:7"
    assert hf(shard(tmp_path / "set.tar"))[7].key == "set.tar:007"


def test_a_saved_data_set_and_class_names_are_read(tmp_path, hf, streaming):
    import datasets

    features = datasets.Features({"label": datasets.ClassLabel(names=list("wxyz")), "picture": datasets.Image()})
    data = datasets.Dataset.from_dict(
        {"label": LABELS, "picture": [{"bytes": b, "path": None} for b in ENCODED]}, features
    )
    datasets.DatasetDict({"train": data, "few": data.select(range(3))}).save_to_disk(tmp_path / "saved")
    source = hf(tmp_path / "saved")
    assert source.class_names == list("wxyz")
    assert contents(source[n] for n in range(len(source))) == EXPECTED
    assert len(hf(tmp_path / "saved", split="few")) == 3
    with pytest.raises(ConfigError, match="no split 'test'; choose data.split= one of train, few"):
        hf(tmp_path / "saved", split="test")
    stream = streaming(tmp_path / "saved")
    assert stream.class_names == list("wxyz")
    records = [
        r for w in range(2) for r in stream.stream(epoch=1, seed=0, worker=w, num_workers=2, rank=0, world_size=1)
    ]
    assert contents(records) == EXPECTED


def test_a_missing_split_names_those_that_exist(tmp_path, hf, streaming):
    for split in ("train", "test"):
        parquet(tmp_path / "data" / f"{split}-0.parquet")
    for make in (hf, streaming):
        with pytest.raises(ConfigError, match="no split 'val'; choose data.split= one of train, test"):
            make(tmp_path / "data", split="val")
        with pytest.raises(ConfigError, match="several splits"):
            make(tmp_path / "data", split=None)
    assert len(hf(tmp_path / "data", split="train[:25%]+test[:2]")) == 10


def test_columns_are_found_named_or_listed(tmp_path, hf):
    path = parquet(tmp_path / "a.parquet", number=list(range(10, 10 + COUNT)), caption=["x"] * COUNT)
    by_number = hf(path, label_column="number")
    assert by_number.class_names == [str(n) for n in range(10, 10 + COUNT)]
    assert by_number.labels().tolist() == list(range(COUNT))
    assert hf(path, label_column="caption").class_names == ["x"]
    assert hf(path, label_column=False).labels() is None
    assert hf(path, column="caption", kind="text", label_column=False)[3] == RawSample("a.parquet:3", "x", None)
    for options in ({"column": "img"}, {"kind": "text", "column": None, "label_column": "lbl"}):
        with pytest.raises(ConfigError, match=r"its columns: image \(struct of bytes, path\), label \(int64\), number"):
            hf(path, **options)
    (tmp_path / "t.csv").write_text("text,label\nhello,1\n")
    with pytest.raises(ConfigError, match=r"no image column; name it with data.column=.* text \(\w*string\)"):
        hf(tmp_path / "t.csv")


def columns_of(path: Path, **columns) -> Path:
    """A table of these columns; "bytes" stands for an image, and so do pixels typed Image by "typed"."""
    import datasets

    given = {"bytes": {"bytes": ENCODED[0], "path": None}, "typed": {"bytes": ENCODED[0], "path": None}}
    given |= {"array": [[1, 2], [3, 4]], "text": "words", "number": 3}
    table = datasets.Dataset.from_dict({name: [given[kind]] * 4 for name, kind in columns.items()})
    for name, kind in columns.items():
        if kind == "typed":
            table = table.cast_column(name, datasets.Image(decode=False))
    table.to_parquet(path)
    return path


@pytest.mark.parametrize(
    ("columns", "kind", "taken"),
    [
        ({"segmentation_mask": "bytes", "image": "bytes"}, "image", "image"),
        ({"segmentation_mask": "typed", "image": "typed"}, "image", "image"),
        ({"thumbnail": "bytes", "img": "bytes"}, "image", "img"),
        ({"image": "bytes", "shot": "typed"}, "image", "shot"),
        ({"mask": "typed", "image": "bytes"}, "image", "image"),
        ({"label_map": "typed", "shot": "typed"}, "image", "shot"),
        ({"Image": "bytes", "other": "bytes"}, "image", "Image"),
        ({"number": "number", "pixel_values": "array", "more": "array"}, "image", "pixel_values"),
        ({"title": "text", "text": "text"}, "text", "text"),
        ({"label": "text", "review": "text"}, "text", "review"),
    ],
)
def test_of_several_columns_the_likely_one_is_taken_and_said(tmp_path, hf, caplog, columns, kind, taken):
    caplog.set_level("INFO")
    source = hf(columns_of(tmp_path / "a.parquet", **columns), kind=kind)
    assert source._columns == [taken]
    assert f"{kind}s from {taken}, " in caplog.text


@pytest.mark.parametrize(
    ("columns", "kind", "message"),
    [
        ({"left": "bytes", "right": "bytes"}, "image", "several columns could be the images: left, right; choose one"),
        ({"left": "typed", "right": "typed"}, "image", "several columns could be the images: left, right; choose one"),
        (
            {"mask": "typed", "number": "number"},
            "image",
            "image columns .* mask; .*data.column=mask",
        ),
        (
            {"question": "text", "answer": "text"},
            "text",
            "several columns could be the texts: question, answer; choose",
        ),
    ],
)
def test_columns_that_may_be_anything_are_named_and_refused(tmp_path, hf, streaming, columns, kind, message):
    path = columns_of(tmp_path / "a.parquet", **columns)
    for make in (hf, streaming):
        with pytest.raises(ConfigError, match=message):
            make(path, kind=kind)
    assert len(hf(path, kind=kind, column=next(iter(columns)))) == 4


def test_of_several_class_columns_the_usual_name_is_taken_or_none(tmp_path, hf, caplog):
    import datasets

    rows = {"image": [{"bytes": ENCODED[0], "path": None}] * 4}
    for names, taken in ((("source", "label"), "label"), (("fine", "coarse"), None), (("kind",), "kind")):
        classes = {name: [0, 1, 0, 1] for name in names}
        features = {name: datasets.ClassLabel(names=[f"{name}0", f"{name}1"]) for name in names}
        table = datasets.Dataset.from_dict(rows | classes)
        for name, feature in features.items():
            table = table.cast_column(name, feature)
        path = tmp_path / f"{'_'.join(names)}.parquet"
        table.to_parquet(path)
        assert hf(path).class_names == (None if taken is None else [f"{taken}0", f"{taken}1"])
    assert "no labels: they may be fine or coarse; choose with data.label_column=" in caplog.text


@pytest.mark.parametrize(
    ("members", "taken"),
    [
        (["seg.png", "jpg"], "jpg"),
        (["seg.png", "png"], "png"),
        (["mask.png", "image.png"], "image.png"),
        (["v2.jpg"], "v2.jpg"),
        (["seg.jpg", "rgb.jpg"], "rgb.jpg"),
    ],
)
def test_of_the_members_of_a_tar_the_likely_one_is_taken(tmp_path, hf, streaming, members, taken):
    contents = {f"a.b/{n}.{name}": b"image%d" % n if name == taken else b"mask" for n in range(3) for name in members}
    path = tar(tmp_path / "a.tar", contents)
    assert [hf(path)[n].value for n in range(3)] == [b"image0", b"image1", b"image2"]
    records = streaming(path).stream(epoch=0, seed=0, worker=0, num_workers=1, rank=0, world_size=1)
    assert sorted(record.value for record in records) == [b"image0", b"image1", b"image2"]


@pytest.mark.parametrize("members", [["jpg", "png"], ["left.png", "right.png"], ["001.jpg", "002.jpg"], ["seg.png"]])
def test_members_that_may_be_anything_are_named_and_refused(tmp_path, hf, streaming, members):
    path = tar(tmp_path / "a.tar", {f"{n}.{name}": name.encode() for n in range(3) for name in members})
    for make in (hf, streaming):
        with pytest.raises(ConfigError, match=f"not clear which members are the images: {', '.join(members)} "):
            make(path)
    assert hf(path, column=members[-1])[0].value == members[-1].encode()


def test_missing_labels_and_missing_images_stay_visible(tmp_path, hf):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = {"image": [{"bytes": ENCODED[0], "path": None}, None, {"bytes": b"", "path": None}], "label": [5, None, 3]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    source = hf(tmp_path / "a.parquet")
    assert source.class_names == ["3", "5"]
    assert source.labels().tolist() == [1, -1, 0]
    assert [source[n].label for n in range(3)] == [1, None, 0]
    assert [source[n].value for n in range(3)] == [ENCODED[0], b"", b""]


def test_a_table_of_paths_gives_files(tmp_path, hf, streaming):
    root = write(tmp_path / "files", ["1.png", "2.png"])
    rows = [{"file": str(root / name), "label": n} for n, name in enumerate(["1.png", "2.png"])]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = hf(tmp_path / "list.jsonl", column="file")
    assert [source[n].value for n in range(2)] == [root / "1.png", root / "2.png"]
    stream = streaming(tmp_path / "list.jsonl", column="file")
    records = stream.stream(epoch=0, seed=0, worker=0, num_workers=1, rank=0, world_size=1)
    assert sorted((record.value, record.label) for record in records) == [(root / "1.png", 0), (root / "2.png", 1)]


@pytest.mark.parametrize("kind", ["uint8", "uint16", "lists"])
def test_columns_of_arrays_keep_their_numbers(tmp_path, hf, streaming, kind):
    import datasets

    dtype, most = ("uint16", 65535) if kind == "uint16" else ("uint8", 255)
    pixels = np.random.default_rng(0).integers(0, most, (3, 5, 4, 4), endpoint=True).astype(dtype)
    for name, stored, channels in (("grey", pixels[..., 0], 1), ("four", pixels, 4)):
        array = datasets.Array2D if channels == 1 else datasets.Array3D
        features = None if kind == "lists" else datasets.Features({"image": array(stored.shape[1:], dtype)})
        table = datasets.Dataset.from_dict({"image": [image.tolist() for image in stored]}, features=features)
        table.to_parquet(tmp_path / f"{name}.parquet")
        source = hf(tmp_path / f"{name}.parquet", column="image")
        records = list(streaming(tmp_path / f"{name}.parquet", column="image").stream(
            epoch=0, seed=0, worker=0, num_workers=1, rank=0, world_size=1))  # fmt: skip
        records.sort(key=lambda record: int(record.key.rpartition(":")[2]))
        for row, wanted in enumerate(stored):
            for record in (source[row], records[row]):
                decoded = decode_image(record.value, channels=channels, max_pixels=100)
                assert np.array_equal(decoded, np.round(wanted / (most / 255)))
    flat = datasets.Dataset.from_dict({"image": [pixels[0].astype("uint8").ravel().tolist()]})
    flat.to_parquet(tmp_path / "flat.parquet")
    with pytest.raises(BadSample, match=r"array of shape \(80,\); expected \(height, width\)"):
        decode_image(hf(tmp_path / "flat.parquet", column="image")[0].value, channels=1, max_pixels=100)


def test_a_tar_may_mix_kinds_of_images_and_hold_other_members(tmp_path, hf, streaming):
    members = {}
    for n in range(12):
        end, fmt = ("JPG", "JPEG") if n > 8 else ("webp", "WEBP") if n > 7 else ("png", "PNG")
        members |= {f"d/{n}.{end}": png(PIXELS[n], fmt), f"d/{n}.json": b'{"a": %s}' % (b"1" if n < 6 else b'"x"')}
    path = tar(tmp_path / "mixed.tar", members)
    source = hf(path)
    assert source.class_names is source.labels() is None
    assert [source[n].value for n in range(12)] == [v for k, v in members.items() if not k.endswith("json")]
    stream = streaming(path)
    records = list(stream.stream(epoch=0, seed=0, worker=0, num_workers=1, rank=0, world_size=1))
    assert {record.key: record.value for record in records} == {source[n].key: source[n].value for n in range(12)}


def test_recordings_in_tars_and_by_name_need_no_torchcodec(tmp_path, hf, streaming, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    contents = {f"{n}.flac": b"fLaC%d" % n for n in range(6)}
    path = tar(tmp_path / "a.tar", contents)
    source = hf(path, kind="audio")
    assert [source[n].value for n in range(6)] == list(contents.values())
    records = streaming(path, kind="audio").stream(epoch=0, seed=0, worker=0, num_workers=1, rank=0, world_size=1)
    assert {record.key: record.value for record in records} == {source[n].key: source[n].value for n in range(6)}

    write(tmp_path / "files", contents)
    files = [tmp_path / "files" / name for name in contents]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps({"file": str(file)}) for file in files))
    stream = streaming(tmp_path / "list.jsonl", column="file", kind="audio")
    records = stream.stream(epoch=0, seed=0, worker=0, num_workers=1, rank=0, world_size=1)
    assert sorted(record.value for record in records) == files
    with pytest.raises(DataError, match="torchcodec.*; install torchcodec, or read a local folder with data=folder"):
        hf(tmp_path / "files", kind="audio")


def test_members_of_a_tar_do_not_come_from_the_working_directory(tmp_path, hf, monkeypatch):
    write(tmp_path, ["0.png"])
    monkeypatch.chdir(tmp_path)
    assert hf(tar(tmp_path / "a.tar", {"0.png": ENCODED[1]}))[0].value == ENCODED[1]


@pytest.mark.parametrize("ending", ["tar", "parquet"])
def test_a_pattern_that_fits_no_file_says_so(tmp_path, hf, ending):
    with pytest.raises(DataError, match=r"cannot read .*none-\*\..*: no file has such a name"):
        hf(tmp_path / f"none-*.{ending}")


def test_a_tar_without_images_says_so(tmp_path, hf):
    with pytest.raises(DataError, match="no row has .* jpg"):
        hf(tar(tmp_path / "a.tar", {"1.txt": b"a", "2.txt": b"b"}))


def test_broken_and_missing_data_sets_are_one_line_data_errors(tmp_path, hf, streaming):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "empty").mkdir()
    whole = shard(tmp_path / "whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: whole.index(ENCODED[20]) + 30])
    for path, text in (
        (tmp_path / "broken.parquet", "cannot read .*broken.parquet: Parquet magic bytes not found"),
        (tmp_path / "empty", "cannot read .*empty"),
        (tmp_path / "cut.tar", "cannot read .*cut.tar: unexpected end of data"),
        (tmp_path / "none" / "*.parquet", r"cannot read .*none/\*.parquet"),
        (tmp_path / "none" / "x.parquet", "nearest existing folder is"),
        ("./nowhere", "does not exist"),
        ("somebody/some-hub-set", "cannot read somebody/some-hub-set: .*"),
    ):
        with pytest.raises(DataError, match=text) as at_once:
            hf(path)
        with pytest.raises(DataError, match=text) as while_streaming:
            list(streaming(path).stream(epoch=0, seed=0, worker=0, num_workers=1, rank=0, world_size=1))
        assert "\n" not in str(at_once.value) + str(while_streaming.value)
    with pytest.raises(ConfigError, match="data_files"):
        hf("parquet")


# ---------------------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 7, 12])
@pytest.mark.parametrize("consumers", [1, 2, 3, 4, 8])
def test_shards_are_dealt_completely_once_and_evenly(shards, consumers):
    rows = 24
    seen, shares = Counter(), []
    for consumer in range(consumers):
        mine = list(shards_of(np.arange(shards), consumer=consumer, consumers=consumers))
        got = [(shard, row) for shard, part, parts in mine for row in range(rows) if row % parts == part]
        seen.update(got)
        shares.append(len(got))
        assert len(mine) <= shards // consumers + 1
    assert seen == Counter((shard, row) for shard in range(shards) for row in range(rows))
    assert max(shares) <= 2 * min(shares)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (2, 1), (2, 3)])
def test_every_record_comes_exactly_once_over_all_workers(tmp_path, streaming, ranks, workers):
    for part in range(4):
        parquet(tmp_path / "data" / f"train-{part}.parquet", range(part, COUNT, 4))
    source = streaming(tmp_path / "data", shuffle_buffer=5)

    def read(epoch, seed):
        return [
            record
            for rank in range(ranks)
            for worker in range(workers)
            for record in source.stream(
                epoch=epoch, seed=seed, worker=worker, num_workers=workers, rank=rank, world_size=ranks
            )
        ]

    first = read(0, 1)
    assert contents(first) == EXPECTED
    assert read(0, 1) == first
    for other in (read(1, 1), read(0, 2)):
        assert sorted(record.key for record in other) == sorted(record.key for record in first)
        assert [record.key for record in other] != [record.key for record in first]


def test_dataloader_workers_do_not_divide_the_shards_again(tmp_path, streaming):
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    source = streaming(parquet(tmp_path / "one.parquet"))

    class Keys(IterableDataset):
        def __iter__(self):
            info = get_worker_info()
            records = source.stream(epoch=0, seed=0, worker=info.id, num_workers=info.num_workers, rank=0, world_size=1)
            return ((info.id, record.key) for record in records)

    pairs = list(DataLoader(Keys(), batch_size=None, num_workers=2))
    assert Counter(worker for worker, _ in pairs) == {0: COUNT // 2, 1: COUNT // 2}
    assert len({key for _, key in pairs}) == COUNT


def test_a_streamed_image_folder_has_one_shard_per_file(tmp_path, streaming, monkeypatch):
    root = write(tmp_path / "folder", [f"class{LABELS[n]}/{n:03}.png" for n in range(COUNT)])
    monkeypatch.setattr("data2vec_train.data.sources.hf.MAX_SHARD_GROUPS", 8)
    source = streaming(root)
    records = [
        r for w in range(3) for r in source.stream(epoch=0, seed=0, worker=w, num_workers=3, rank=0, world_size=1)
    ]
    assert contents(records) == EXPECTED
    assert source.class_names == [f"class{n}" for n in range(4)]
