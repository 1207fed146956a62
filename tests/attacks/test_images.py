"""Attacks on images: files and arrays that lie about their pixels, columns and tars with several candidates, sizes that
weights do not have. Each ends in the right pixels or in one line that says what came and what to set.
"""

import importlib.util
import io
import re
import struct
import tarfile
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data2vec_train as ours
from data2vec_train.config.check.overrides import find_faults
from data2vec_train.data.image import ImageTransform, decode_image, is_animation, remarks_on
from data2vec_train.data.sources.hf import HFSource, HFStreamingSource
from data2vec_train.errors import BadSample, ConfigError
from data2vec_train.weights.convert import load_pretrained, with_image_size
from data2vec_train.weights.preprocessing import ImageProcessor
from tests.tiffs import tiff

BANDS = np.random.default_rng(5).integers(0, 256, (10, 14, 7), dtype=np.uint8)
GREY = BANDS[..., 0]


def png(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


def raw_png(pixels: np.ndarray, depth: int, colours: int) -> bytes:
    """A PNG whose rows are given as they are packed; colour type 0 grey, 2 RGB."""
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    samples = {0: 1, 2: 3}[colours]
    width = pixels.shape[1] * pixels.dtype.itemsize * 8 // (depth * (samples if pixels.ndim == 2 else 1))
    header = struct.pack(">IIBBBBB", width, len(pixels), depth, colours, 0, 0, 0)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def decoded(value, channels: int = 3, **more) -> np.ndarray:
    return np.asarray(decode_image(value, channels=channels, max_pixels=10**6, **more))


def by_tifffile(pixels: np.ndarray, **options) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------- pixels as stored

STORED = {
    "bands that follow each other plane by plane": lambda: (
        by_tifffile(np.moveaxis(BANDS, 2, 0), planarconfig="separate", photometric="minisblack"),
        BANDS,
    ),
    "bands in tiles": lambda: (
        by_tifffile(BANDS, photometric="minisblack", planarconfig="contig", tile=(16, 16)),
        BANDS,
    ),
    "bands in a BigTIFF": lambda: (
        by_tifffile(BANDS, photometric="minisblack", planarconfig="contig", bigtiff=True),
        BANDS,
    ),
    "bands of a big-endian file": lambda: (
        by_tifffile(BANDS.astype(">u2") * 257, photometric="minisblack", planarconfig="contig", byteorder=">"),
        BANDS,
    ),
    "bands compressed by deflate": lambda: (
        by_tifffile(BANDS, photometric="minisblack", planarconfig="contig", compression="zlib"),
        BANDS,
    ),
    "an opacity and a band that nothing is said about": lambda: (
        tiff(BANDS[..., :5], extra=(2, 0)),
        BANDS[..., :5],
    ),
    "an extra sample of a private kind": lambda: (tiff(BANDS[..., :4], extra=(999,)), BANDS[..., :4]),
    "grey and a band that nothing is said about": lambda: (tiff(BANDS[..., :2], extra=(0,)), BANDS[..., :2]),
    "grey multiplied by its opacity": lambda: (tiff(BANDS[..., :2], extra=(1,)), BANDS[..., :2]),
    "grey with an opacity in a PNG": lambda: (png(Image.fromarray(BANDS[..., :2], "LA")), BANDS[..., :2]),
    "more extra samples than the tag names": lambda: (tiff(BANDS[..., :6], extra=(0,)), BANDS[..., :6]),
    "one band in an array with three axes": lambda: (BANDS[..., :1], BANDS[..., :1]),
    "an array that may not be written to": lambda: (
        np.frombuffer(BANDS.tobytes(), np.uint8).reshape(BANDS.shape),
        BANDS,
    ),
    "an array that is no whole block of memory": lambda: (BANDS[::2, ::-1, ::2], BANDS[::2, ::-1, ::2]),
    "an array of the other byte order": lambda: (BANDS.astype(">u2") * 257, BANDS),
    "booleans, which are black and white": lambda: (GREY > 99, np.where(GREY > 99, 255, 0)),
    "a PGM of 16 bits": lambda: (b"P5 2 1 65535\n" + struct.pack(">HH", 257, 65535), [[1, 255]]),
    "a PGM whose white is 4095": lambda: (b"P5 2 1 4095\n" + struct.pack(">HH", 0, 4095), [[0, 255]]),
    "white is 0 in 16 bits": lambda: (tiff(GREY.astype(np.uint16) * 257, photometric=0), 255 - GREY),
    "a JPEG 2000 of 16 bits": lambda: (png(Image.fromarray(GREY.astype(np.uint16) * 257), "JPEG2000"), GREY),
}


@pytest.mark.parametrize("attack", STORED)
def test_what_is_stored_is_what_comes_out(attack):
    value, wanted = STORED[attack]()
    wanted = np.asarray(wanted)
    assert np.array_equal(decoded(value, 1 if wanted.ndim == 2 else wanted.shape[2]), wanted)


REFUSED = {
    "five bands for a model of colours": (lambda: tiff(BANDS[..., :5], extra=(0, 0)), 3, {}, "set modality.channels=5"),
    "infrared for a model of grey": (lambda: tiff(BANDS[..., :4], extra=(0,)), 1, {}, "RGB, unspecified"),
    "inks with a fifth band": (lambda: tiff(BANDS[..., :5], photometric=5, extra=(0,)), 3, {}, "5 bands .CMYK, unsp"),
    "inks with a fifth band, all wanted": (
        lambda: tiff(BANDS[..., :5], photometric=5, extra=(0,)),
        5,
        {},
        "not read; save it as grey or RGB",
    ),
    "a palette with a band beside it": (
        lambda: tiff(BANDS[..., :2], photometric=3, extra=(0,)),
        2,
        {},
        "palette, unspecified",
    ),
    "colours of LAB": (lambda: tiff(BANDS[..., :3], photometric=8), 3, {}, "LAB.*save it as"),
    "raw pixels of a sensor": (lambda: tiff(GREY, photometric=32803), 1, {}, "photometric 32803"),
    "signed bands": (lambda: tiff(BANDS[..., :4].astype(np.int16) - 99, extra=(0,)), 4, {}, "values from -99"),
    "infinite values": (lambda: np.array([[np.inf, 0.5]], np.float32), 1, {"max_value": 1.0}, "finite"),
    "half floats without a range": (lambda: np.array([[0, 0.5]], np.float16), 1, {}, "set modality.max_value"),
    "complex numbers": (lambda: np.ones((4, 4), np.complex64), 1, {}, "expected numbers"),
    "texts in an array": (lambda: np.array([["a", "b"]]), 1, {}, "expected numbers"),
    "channels before rows": (lambda: np.moveaxis(BANDS[..., :3], 2, 0), 3, {}, "which is 14 channels; expected 3"),
    "an array of frames": (lambda: np.zeros((2, 4, 4, 3), np.uint8), 3, {}, "expected .height, width"),
    "an array without bands": (lambda: np.zeros((4, 4, 0), np.uint8), 3, {}, "0 channels; expected 3"),
    "16 bits of colour in a PNG of which 12 count": (
        lambda: raw_png(np.full((2, 6), 4095, ">u2"), 16, 2),
        3,
        {"max_value": 4095},
        "leave modality.max_value out",
    ),
    "4 bits in a PNG, which PIL spreads": (
        lambda: raw_png(np.full((2, 2), 0x1F, np.uint8), 4, 0),
        1,
        {"max_value": 15},
        "leave modality.max_value out",
    ),
    "4 bits in a TIFF, which PIL spreads": (
        lambda: tiff(np.full((2, 2), 0x1F, np.uint8), bits=4, tags={256: 4}),
        1,
        {"max_value": 15},
        "leave modality.max_value out",
    ),
    "a stack as channels, one too few": (lambda: tiff(GREY, GREY), 3, {"pages": "channels"}, "expected 3 of one band"),
    "a stack of pages of two sizes": (lambda: tiff(GREY, GREY[:4]), 2, {"pages": "channels"}, "different sizes"),
    "a stack of colours as channels": (
        lambda: tiff(*[BANDS[..., :3]] * 3),
        3,
        {"pages": "channels"},
        "3 pages.*of one band",
    ),
    "nothing but thumbnails": (lambda: tiff(GREY, page_tags=({254: 1},)), 1, {}, "a TIFF without an image"),
    "a file that ends within its bands": (lambda: tiff(BANDS, extra=(0,) * 4)[:300], 7, {}, "truncated|broken|not an"),
    "a TIFF of a header alone": (lambda: b"II*\0\x08\0\0\0", 3, {}, "broken|truncated|not an image"),
    "a chain of pages without an end": (lambda: cycle(), 1, {}, "2 pages"),
    "sixty thousand bands": (
        lambda: tiff(GREY, tags={277: 60000, 258: 8}),
        3,
        {},
        "60000 channels|not an image|broken|band",
    ),
    "a later page that is too large to decode": (
        lambda: tiff(GREY, GREY, page_tags=({}, {256: 60000, 257: 60000})),
        2,
        {"pages": "channels"},
        "60000x60000 pixels, more than",
    ),
}


def cycle() -> bytes:
    """Two pages, the second followed by the first."""
    data = bytearray(tiff(GREY, GREY))
    first = struct.unpack("<I", data[4:8])[0]
    data[-4:] = struct.pack("<I", first)
    return bytes(data)


@pytest.mark.parametrize("attack", REFUSED)
def test_what_cannot_be_told_is_refused_in_a_line(attack):
    make, channels, more, reason = REFUSED[attack]
    started = time.monotonic()
    with pytest.raises(BadSample, match=reason) as error:
        decoded(make(), channels, **more)
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 20


@pytest.mark.skipif(importlib.util.find_spec("imagecodecs") is not None, reason="it can be decompressed")
def test_a_compression_that_needs_a_package_names_it():
    pytest.importorskip("tifffile")
    data = tiff(BANDS, extra=(0,) * 4, tags={259: 5})
    with pytest.raises(BadSample, match="pip install imagecodecs"):
        decoded(data, 7)


def test_damaged_bands_never_end_in_another_error():
    pytest.importorskip("tifffile")
    rng = np.random.default_rng(1)
    good = [tiff(BANDS, extra=(0,) * 4), tiff(GREY, GREY), tiff(BANDS[..., :4], extra=(1,)), tiff(GREY.astype("f4"))]
    good += [by_tifffile(BANDS, photometric="minisblack", planarconfig="contig", compression="zlib")]
    for trial in range(400):
        data = bytearray(good[trial % len(good)])
        places = len(data) - rng.integers(1, min(220, len(data)), size=3)  # where the tags are
        for place in places:
            data[place] = rng.integers(256)
        for channels, pages in ((7, None), (1, "first")):
            try:
                image = decoded(bytes(data), channels, pages=pages, max_value=9.0)
            except BadSample:
                continue
            assert image.dtype == np.uint8


@pytest.mark.parametrize(
    ("value", "channels", "max_value", "wanted"),
    [
        (np.array([[0, 15]], np.uint8), 1, 15, [[0, 255]]),
        (np.array([[0.0, 0.5, 1.0]]), 1, 1, [[0, 128, 255]]),
        (np.array([[0, 10000, 20000]], np.int64), 1, 10000, [[0, 255, 255]]),
        (tiff(np.array([[0, 2.0]], np.float32)), 1, 2, [[0, 255]]),
        (tiff(np.full((1, 2, 3), 4095, np.uint16)), 3, 4095, [[[255] * 3] * 2]),
    ],
    ids=[
        "four bits in eight",
        "floating point from 0 to 1",
        "reflectances that are above one",
        "floats in a TIFF",
        "12 bits of colour in a TIFF",
    ],
)
def test_the_value_that_is_white_is_white(value, channels, max_value, wanted):
    if isinstance(value, bytes):
        pytest.importorskip("tifffile")
    assert decoded(value, channels, max_value=max_value).tolist() == wanted


def test_an_animated_png_is_noted_and_two_pictures_of_a_camera_are_not():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 90, 255))]
    assert is_animation(png(frames[0], save_all=True, append_images=frames[1:]))
    assert not is_animation(png(frames[0], "MPO", save_all=True, append_images=frames[1:]))


def test_opaque_pictures_for_a_model_with_opacity_are_noted():
    said = remarks_on([png(BANDS[..., :3])] * 3, lambda content: decode_image(content, channels=4, max_pixels=10**6))
    assert said == ["channel 3 of 0 to 3 has the same value everywhere"]


@pytest.mark.parametrize("channels", [2, 5, 12])
def test_any_number_of_channels_is_augmented_alike(channels):
    transform = ImageTransform(
        image_px=8,
        channels=channels,
        crop_scale=[0.5, 1.0],
        crop_ratio=[1.0, 1.0],
        shift_px=1,
        horizontal_flip=0.5,
        color_jitter=None,
        interpolation="bicubic",
        mean=[0.0],
        std=[1 / 255],
    )
    same = np.repeat(GREY[..., None], channels, axis=2)
    made = transform.train(decode_image(same, channels=channels, max_pixels=10**6))
    assert made.shape == (channels, 8, 8)
    assert all(torch.equal(made[0], picture) for picture in made)


# --------------------------------------------------------------------------------------------------- columns and tars


@pytest.fixture
def opened(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")

    def make(path, kind="image", column=None, stream=False):
        given = {"name": None, "split": "train", "column": column, "label_column": None, "data_files": None}
        given |= {"revision": None, "cache_dir": str(tmp_path / "cache"), "kind": kind, "path": str(path)}
        return HFStreamingSource(**given, shuffle_buffer=1) if stream else HFSource(**given)

    return make


def table(path, **columns):
    import datasets

    datasets.Dataset.from_dict({name: [value] * 3 for name, value in columns.items()}).to_parquet(path)
    return path


def archive(path, members: dict[str, bytes], **options):
    with tarfile.open(path, "w", **options) as out:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return path


FILE = {"bytes": b"x", "path": None}
COLUMNS = {
    "a mask before the image, in capitals": ({"MASK": FILE, "IMAGE": FILE}, "image", "IMAGE"),
    "a map of depth before the photo": ({"depth": FILE, "photo": FILE}, "image", "photo"),
    "arrays of classes before arrays of pixels": (
        {"annotation": [[1, 2], [3, 4]], "frame": [[1, 2], [3, 4]]},
        "image",
        "frame",
    ),
    "a thumbnail before pixel_values": ({"thumbnail": [[1, 2]], "pixel_values": [[1, 2]]}, "image", "pixel_values"),
    "bytes before a list of numbers": ({"boxes": [[1, 2]], "scan": FILE}, "image", "scan"),
    "a noise track before the audio": ({"noise": FILE, "audio": FILE}, "audio", "audio"),
    "an address before the text": ({"url": "http://", "text": "words"}, "text", "text"),
    "the name of a class before a review": ({"label": "good", "review": "words"}, "text", "review"),
}


@pytest.mark.parametrize("attack", COLUMNS)
def test_the_column_with_the_samples_is_found(attack, opened, tmp_path):
    columns, kind, wanted = COLUMNS[attack]
    assert opened(table(tmp_path / "a.parquet", **columns), kind)._columns == [wanted]


UNCLEAR = {
    "two cameras": ({"front": FILE, "rear": FILE}, "image", "front, rear"),
    "two microphones": ({"near": FILE, "far": FILE}, "audio", "near, far"),
    "a premise and a hypothesis": ({"premise": "a", "hypothesis": "b"}, "text", "premise, hypothesis"),
    "arrays before and after": ({"before": [[1]], "after": [[2]]}, "image", "before, after"),
    "a ground truth alone": ({"ground_truth": FILE}, "image", "ground_truth"),
}


@pytest.mark.parametrize("attack", UNCLEAR)
@pytest.mark.parametrize("stream", [False, True], ids=["", "as a stream"])
def test_columns_without_a_usual_name_are_asked_for(attack, stream, opened, tmp_path):
    columns, kind, named = UNCLEAR[attack]
    path = table(tmp_path / "a.parquet", **columns)
    with pytest.raises(ConfigError, match=f"{named}.*data.column="):
        opened(path, kind, stream=stream)
    assert opened(path, kind, column=named.split(", ")[0], stream=stream) is not None


TARS = {
    "the mask comes first": ({"seg.png": b"m", "jpg": b"i"}, b"i"),
    "the mask has the image's ending": ({"label.jpg": b"m", "jpg": b"i"}, b"i"),
    "an ending in capitals beside a mask": ({"mask.PNG": b"m", "JPG": b"i"}, b"i"),
    "members with a word for what they are": ({"mask.png": b"m", "img.png": b"i", "thumb.png": b"t"}, b"i"),
    "one version of each image": ({"v1.final.jpg": b"i"}, b"i"),
    "captions and numbers beside it": ({"txt": b"words", "json": b"{}", "webp": b"i"}, b"i"),
}


@pytest.mark.parametrize("attack", TARS)
@pytest.mark.parametrize("stream", [False, True], ids=["", "as a stream"])
def test_the_member_with_the_samples_is_found(attack, stream, opened, tmp_path):
    members, wanted = TARS[attack]
    names = {f"v1.0/x.y/{n}.{end}": content for n in range(3) for end, content in members.items()}
    source = opened(archive(tmp_path / "a.tar", names), stream=stream)
    records = list(source.first()) if stream else [source[n] for n in range(3)]
    assert [record.value for record in records] == [wanted] * 3


def test_a_second_image_late_in_a_tar_is_a_broken_record(opened, tmp_path):
    names = {f"{n:03}.jpg": b"i" for n in range(300)} | {"300.jpg": b"i", "300.png": b"m"}
    source = opened(archive(tmp_path / "a.tar", {"z.png": b"i"} | names))
    values = [source[n].value for n in range(len(source))]
    assert isinstance(values[-1], BadSample)
    assert "has several members: jpg, png; choose one with data.column" in str(values[-1])
    assert values[:-1] == [b"i"] * 301


@pytest.mark.parametrize("damage", ["empty", "cut", "no tar"])
def test_a_broken_tar_is_still_one_line(damage, opened, tmp_path):
    path = archive(tmp_path / "a.tar", {"0.jpg": b"i" * 2000})
    content = {"empty": b"", "cut": path.read_bytes()[:700], "no tar": b"words " * 900}[damage]
    path.write_bytes(content)
    with pytest.raises(Exception, match=r"\S") as error:
        opened(path)[0]
    assert type(error.value).__name__ in ("DataError", "UnreadableShard", "ConfigError")
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------------------- sizes


def model_of(image_px=32, kind=ours.Data2VecVisionModel, **more):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    given = {"image_size": image_px, "patch_size": 8, "out_indices": [0, 1, 2, 3], "use_mean_pooling": True}
    given |= {"use_shared_relative_position_bias": True, "num_labels": 3} | more
    model = kind(ours.Data2VecVisionConfig(**size, **given)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


SIZED = {
    "a head for classes": {"kind": ours.Data2VecVisionForImageClassification},
    "a head for maps": {"kind": ours.Data2VecVisionForSemanticSegmentation},
    "biases for each block": {"use_shared_relative_position_bias": False, "use_relative_position_bias": True},
    "biases of both kinds": {"use_relative_position_bias": True},
    "learned positions and biases": {"use_absolute_position_embeddings": True},
    "five channels": {"num_channels": 5},
}


@pytest.mark.parametrize("attack", SIZED)
@pytest.mark.parametrize("size", [48, [24, 64]], ids=["square", "wide"])
@torch.no_grad()
def test_a_resized_model_says_what_the_model_says_of_such_images(attack, size, tmp_path):
    model = model_of(**SIZED[attack])
    sides = (size, size) if isinstance(size, int) else size
    pixels = torch.randn(2, SIZED[attack].get("num_channels", 3), *sides)
    with_image_size(model, size).save_pretrained(tmp_path)
    again = load_pretrained(tmp_path)
    assert again.get_encoder().image_size == tuple(sides)
    name = "logits" if "kind" in SIZED[attack] else "last_hidden_state"
    torch.testing.assert_close(again(pixels)[name], model(pixels)[name], atol=2e-5, rtol=1e-4)


def test_a_resized_model_keeps_its_type_and_where_it_came_from(tmp_path):
    model = model_of().to(torch.bfloat16)
    model.source = tmp_path
    resized = with_image_size(model, 64)
    assert (resized.dtype, resized.source, resized.training) == (torch.bfloat16, tmp_path, False)
    assert all(parameter.isfinite().all() for parameter in resized.parameters())


def test_a_model_that_was_resized_does_not_change_the_one_it_came_from():
    model = model_of()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with_image_size(model, [64, 32])
    assert model.config.image_size == 32
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_a_processor_crops_is_the_size_of_its_images(composed, tmp_path, monkeypatch):
    from data2vec_train.config import inputs

    model = model_of(32)
    model.save_pretrained(tmp_path)
    ImageProcessor(size=40, crop_size=(32, 32)).save_pretrained(tmp_path)
    monkeypatch.setattr(inputs, "given_settings", set)
    cfg = composed("modality=vision", "data=folder", "data.path=nowhere")
    found = inputs.inherit(cfg, load_pretrained(tmp_path), "init_from=x")
    assert cfg.modality.image_px == 32
    assert found.get_encoder().image_size == (32, 32)


def test_the_white_of_training_is_the_white_of_what_comes_later(composed, tmp_path, monkeypatch):
    from data2vec_train.config import inputs

    model_of(32).save_pretrained(tmp_path)
    ImageProcessor(size=32, max_value=4095, pages="first").save_pretrained(tmp_path)
    monkeypatch.setattr(inputs, "given_settings", set)
    cfg = composed("modality=vision", "data=folder", "data.path=nowhere")
    inputs.inherit(cfg, load_pretrained(tmp_path), "init_from=x")
    assert (cfg.modality.decode.max_value, cfg.modality.decode.pages) == (4095, "first")


def test_a_text_block_that_is_longer_than_the_positions_is_refused(composed):
    from data2vec_train.config.inputs import block_tokens

    cfg = composed("modality=text", "data=folder", "data.path=nowhere", "modality.block_tokens=512")
    with pytest.raises(ConfigError, match=r"modality.block_tokens=512: x has positions for 64; choose at most those"):
        block_tokens(cfg, 64, {"modality.block_tokens"}, "x")
    assert block_tokens(cfg, 64, set(), "x") == 64


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("modality.max_value=0", "modality.max_value: expected a number above 0"),
        ("modality.max_value=inf", "modality.max_value: expected a number above 0"),
        ("modality.max_value=white", "modality.max_value: expected a number or null"),
        ("modality.pages=second", "modality.pages: expected one of 'first', 'channels'"),
        ("modality.channels=5", "modality.mean has 3"),
        ("modality.image_px=[64,8]", "a square of 3 patches|choose at most|cannot be cut"),
    ],
)
def test_settings_that_cannot_work_are_named(setting, said):
    found = find_faults(["modality=vision", "data=folder", "data.path=nowhere", setting], config_name="train")
    assert any(re.search(said, fault) for fault in found), found
