import io
import pickle
import re
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data2vec_train.data.image import ImageTransform, decode_image, remarks_on
from data2vec_train.errors import BadSample, ConfigError
from tests.tiffs import tiff

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)
PLAIN = {
    "image_px": 28,
    "channels": 1,
    "crop_scale": None,
    "crop_ratio": None,
    "shift_px": 0,
    "horizontal_flip": 0.0,
    "color_jitter": None,
    "interpolation": "bicubic",
    "mean": [0.0],
    "std": [1.0],
}


def encode(image: Image.Image, fmt: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def smooth(width: int, height: int) -> Image.Image:
    """An image without fine detail, so that two ways of resizing agree."""
    return Image.fromarray(PIXELS[:5, :5]).resize((width, height), Image.Resampling.BICUBIC)


def decode(value, channels=3, max_pixels=10**6, **more):
    return decode_image(value, channels=channels, max_pixels=max_pixels, **more)


def pixels_of(*given, **more) -> np.ndarray:
    return np.asarray(decode(*given, **more))


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its pixels do not have."""
    good = encode(Image.new("1", (1, 1)))
    header = b"IHDR" + struct.pack(">II", width, height) + good[24:29]
    return good[:12] + header + struct.pack(">I", zlib.crc32(header)) + good[33:]


# ---------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize(("channels", "wanted"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_every_common_mode_gives_the_asked_channels(mode, channels, wanted):
    image = Image.fromarray(PIXELS)
    image = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
    decoded = decode(encode(image, "TIFF" if mode == "CMYK" else "PNG"), channels)
    assert (decoded.mode, decoded.size) == (wanted, (17, 12))


def test_lossless_colours_come_back_exactly():
    assert np.array_equal(decode(encode(Image.fromarray(PIXELS))), PIXELS)
    assert np.array_equal(decode(encode(Image.fromarray(PIXELS[..., 0])), 1), PIXELS[..., 0])


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 257, 128 * 257, 65535, 300]], dtype=np.uint16)
    assert np.asarray(decode(encode(Image.fromarray(values)), 1)).tolist() == [[0, 1, 128, 255, 1]]
    wide = Image.fromarray(values.astype(np.int32))  # mode I: nothing says that they have 16 bits
    with pytest.raises(BadSample, match="1 band .grey. of int32 with values up to 65535; set modality.max_value"):
        decode(encode(wide, "TIFF"), 1)
    assert pixels_of(encode(wide, "TIFF"), 1, max_value=65535).tolist() == [[0, 1, 128, 255, 1]]


def test_adobe_inverted_cmyk_keeps_its_colour():
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixel = np.asarray(decode(encode(red, "JPEG", quality=100)))[8, 8]  # PIL writes CMYK JPEG inverted, as Adobe does
    assert pixel[0] > 240
    assert pixel[1:].max() < 15


def test_palette_with_transparency_keeps_its_alpha():
    image = Image.fromarray(PIXELS[..., 0]).convert("P")
    data = encode(image, "PNG", transparency=bytes(range(256)))
    alpha = np.asarray(decode(data, 4))[..., 3]
    assert np.array_equal(alpha, np.asarray(image))


# What a camera held that way stores, after the EXIF standard's table of where row 0 and column 0 are.
STORED = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](PIXELS)))
    assert np.array_equal(decode(encode(stored, "PNG", exif=exif)), PIXELS)


def test_a_broken_exif_block_does_not_cost_the_image():
    data = encode(smooth(16, 16), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert decode(data).size == (16, 16)


@pytest.mark.parametrize("fmt", ["GIF", "WEBP"])
def test_an_animation_gives_its_first_frame(fmt):
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    data = encode(first, fmt, save_all=True, append_images=[second])
    assert np.asarray(decode(data))[4, 4, 0] > 240


def broken_crc() -> bytes:
    data = bytearray(encode(Image.fromarray(PIXELS)))
    data[data.index(b"IDAT") + 10] ^= 0xFF
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404 not found</html>", "not an image"),
        ("a caption", "a text, not an image"),
        (encode(smooth(64, 64), "JPEG")[:-200], r"truncated: image file is truncated \(\d+ bytes not processed\)"),
        (encode(smooth(64, 64), "JPEG")[:12], "not an image|truncated.*|broken image file: .*"),
        (broken_crc(), "broken image file: .*"),
        (bomb(29000, 29000), "29000x29000 pixels, more than modality.decode.max_pixels=1000000"),
        (
            bomb(10000, 10000),
            "10000x10000 pixels, more than modality.decode.max_pixels=1000000",
        ),  # PIL itself only warns here
        (
            encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
            "a TIFF of .* of float32; set modality.max_value .*",
        ),
        (
            encode(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"),
            r"a TIFF of 4x4 pixels, 1 band \(grey\) of int32 with values up to 70000; set modality.max_value .*",
        ),
        (np.ones((4, 4), np.float32), r"float32 array of shape \(4, 4\); set modality.max_value to the value .*"),
        (np.full((4, 4), 256, np.int32), r"int32 array of shape \(4, 4\) with values up to 256; set .*"),
        (np.ones((4, 4, 5), np.uint8), r".*array of shape \(4, 4, 5\), which is 5 channels; expected 3; set .*=5.*"),
        (np.ones((0, 4), np.uint8), "4x0 pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unusable_image_says_why_and_warns_nobody(data, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadSample) as error:
            decode(data)
    assert re.fullmatch(reason, str(error.value))


def test_files_say_why_they_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(BadSample, match="^file is missing$"):
        decode(tmp_path / "none.png")
    with pytest.raises(BadSample, match="^not readable: Is a directory$"):
        decode(tmp_path)

    def refuse(path, mode):  # the superuser may read everything, so the file system cannot play this
        raise PermissionError(13, "Permission denied")

    (tmp_path / "secret.png").touch()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BadSample, match="^not readable: permission denied$"):
        decode(tmp_path / "secret.png")


def test_the_limit_replaces_that_of_pil_and_puts_it_back(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # PIL refuses more than twice that; it is 179 million otherwise
    data = encode(Image.fromarray(PIXELS))
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data))
    assert np.array_equal(decode(data), PIXELS)
    assert Image.MAX_IMAGE_PIXELS == 50


def test_random_damage_never_escapes_as_another_error():
    rng = np.random.default_rng(3)
    good = [encode(smooth(24, 24), fmt) for fmt in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP")]
    for trial in range(300):
        data = bytearray(good[trial % len(good)])
        for place in rng.integers(len(data), size=4):
            data[place] = rng.integers(256)
        try:
            image = decode(bytes(data[: rng.integers(1, 2 * len(data))]))
        except BadSample:
            continue
        assert image.mode == "RGB"


def test_arrays_with_the_right_channels_are_not_copied():
    for array, channels in ((PIXELS, 3), (PIXELS[..., 0], 1), (np.zeros((4, 4, 7), np.uint8), 7)):
        assert decode(array, channels) is array
    assert np.array_equal(np.asarray(decode(PIXELS[..., :1]))[..., 2], PIXELS[..., 0])


# ---------------------------------------------------------------------------------------------------- bands and values

BANDS = np.random.default_rng(7).integers(0, 256, (12, 17, 6), dtype=np.uint8)


@pytest.mark.parametrize("bands", [2, 4, 5, 6])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_gives_all_its_bands_as_they_are_stored(bands, dtype):
    pytest.importorskip("tifffile")
    factor = 257 if dtype == np.uint16 else 1
    stored = BANDS[..., :bands].astype(dtype) * factor
    data = tiff(stored, extra=(0,) * (bands - (3 if bands > 2 else 1)))
    assert np.array_equal(decode(data, bands), BANDS[..., :bands])
    assert np.array_equal(decode(stored, bands), BANDS[..., :bands])


def test_a_tiff_without_the_tag_of_extra_samples_has_bands_too():
    pytest.importorskip("tifffile")
    assert np.array_equal(decode(tiff(BANDS[..., :4]), 4), BANDS[..., :4])


@pytest.mark.parametrize("bands", [2, 4, 5, 6])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("as_file", [True, False], ids=["file", "array"])
def test_bands_without_a_meaning_are_not_left_out(bands, channels, as_file):
    value = BANDS[..., :bands]
    if as_file:
        value = tiff(value, extra=(0,) * (bands - (3 if bands > 2 else 1)))
    with pytest.raises(BadSample, match=f"{bands} channels; expected {channels}; set modality.channels={bands}"):
        decode(value, channels)


def test_associated_alpha_neither_divides_nor_darkens():
    pytest.importorskip("tifffile")
    stored = BANDS[..., :4]
    data = tiff(stored, extra=(1,))
    assert np.array_equal(decode(data, 4), stored)
    with pytest.raises(BadSample, match=r"RGB, associated alpha.*multiplied by its opacity; set modality.channels=4"):
        decode(data)
    opaque = stored.copy()
    opaque[..., 3] = 255
    assert np.array_equal(decode(tiff(opaque, extra=(1,))), stored[..., :3])


def test_alpha_that_colours_are_not_multiplied_by_is_dropped_or_kept():
    data = tiff(BANDS[..., :4], extra=(2,))
    assert np.array_equal(decode(data, 4), BANDS[..., :4])
    assert np.array_equal(decode(data, 3), BANDS[..., :3])


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint32, np.int64])
def test_wide_integers_from_0_to_255_are_what_they_are(dtype):
    values = BANDS[..., 0].astype(dtype)
    assert np.array_equal(decode(values, 1), BANDS[..., 0])
    if dtype != np.int64:
        assert np.array_equal(decode(tiff(values), 1), BANDS[..., 0])


@pytest.mark.parametrize("form", [tiff, lambda array: array], ids=["file", "array"])
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint32, np.float32])
def test_values_of_no_known_range_need_one(form, dtype):
    values = np.array([[0, 1000, 4000, 9000]], dtype)
    with pytest.raises(BadSample, match="set modality.max_value"):
        decode(form(values), 1)
    assert pixels_of(form(values), 1, max_value=4000).tolist() == [[0, 64, 255, 255]]


@pytest.mark.parametrize("form", [tiff, lambda array: array], ids=["file", "array"])
@pytest.mark.parametrize(("values", "reason"), [([-1, 5], "none below 0"), ([float("nan"), 0.5], "finite")])
def test_values_that_no_pixel_can_have(form, values, reason):
    values = np.array([values], np.int16 if reason == "none below 0" else np.float32)
    with pytest.raises(BadSample, match=reason):
        decode(form(values), 1, max_value=1)


def test_twelve_bits_in_sixteen_by_tag_or_by_setting():
    values = np.array([[0, 2048, 4095]], np.uint16)
    assert pixels_of(values, 1, max_value=4095).tolist() == [[0, 128, 255]]
    assert pixels_of(tiff(values), 1, max_value=4095).tolist() == [[0, 128, 255]]
    packed = np.array([[0x80, 0x0F, 0xFF]], np.uint8)  # 0x800 and 0xFFF
    data = tiff(packed, bits=12, tags={256: 2})
    assert pixels_of(data, 1).tolist() == [[128, 255]]


def test_grey_whose_0_is_white_is_turned_in_all_depths():
    eight, sixteen = BANDS[..., 0], BANDS[..., 0].astype(np.uint16) * 257
    assert np.array_equal(decode(tiff(eight, photometric=0), 1), 255 - eight)
    assert np.array_equal(decode(tiff(sixteen, photometric=0), 1), 255 - eight)


def test_signed_bytes_are_not_taken_for_unsigned_ones():
    pytest.importorskip("tifffile")
    with pytest.raises(BadSample, match=r"of int8 with values from -100"):
        decode(tiff(np.array([[-100, 5]], np.int8)), 1)
    assert pixels_of(tiff(np.array([[100, 5]], np.int8)), 1).tolist() == [[100, 5]]


def test_a_stack_is_refused_or_read_as_told():
    pages = [BANDS[..., number] for number in range(6)]
    data = tiff(*pages)
    with pytest.raises(BadSample, match=r"a TIFF of 6 pages.*modality.pages=first.*modality.channels=6"):
        decode(data, 1)
    assert np.array_equal(decode(data, 1, pages="first"), pages[0])
    assert np.array_equal(decode(data, 6, pages="channels"), BANDS)
    with pytest.raises(BadSample, match="6 pages.*expected 3 of one band"):
        decode(data, 3, pages="channels")


def test_overviews_and_masks_are_no_pages():
    small = np.ascontiguousarray(BANDS[::2, ::2, 0])
    data = tiff(BANDS[..., 0], small, small, page_tags=({}, {254: 1}, {254: 4}))
    assert np.array_equal(decode(data, 1), BANDS[..., 0])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extra", [(), (0,)], ids=["by PIL", "as stored"])
def test_tiffs_are_turned_upright(orientation, extra):
    if extra:
        pytest.importorskip("tifffile")
    pixels = BANDS[..., : 3 + len(extra)]
    stored = np.ascontiguousarray(STORED[orientation](pixels))
    decoded = decode(tiff(stored, extra=extra, tags={274: orientation}), 3 + len(extra))
    assert np.array_equal(decoded, pixels)


def test_what_is_unusual_about_images_is_said():
    narrow = [np.full((4, 4, 3), value, np.uint8) for value in (0, 1)]
    said = remarks_on(narrow, decode)
    assert "0 to 1 of 0 to 255" in said[0]
    fourth = np.dstack([PIXELS, np.full(PIXELS.shape[:2], 255, np.uint8)])
    assert remarks_on([fourth, fourth], lambda content: decode(content, 4)) == [
        "channel 3 of 0 to 3 has the same value everywhere"
    ]
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 9, 255))
    data = encode(first, "GIF", save_all=True, append_images=[second])
    assert "1 are animations, of which the first frame is used" in remarks_on([data, PIXELS], decode)
    assert remarks_on([PIXELS, b"broken"], decode) == []


def test_files_that_pil_does_not_open_are_looked_at_too(tmp_path, monkeypatch):
    pytest.importorskip("tifffile")
    (tmp_path / "a.tif").write_bytes(tiff(BANDS.astype(np.uint16), extra=(0,) * 3))  # of 16 bits, six bands
    assert "values are 0 to 1 of 0 to 255" in remarks_on([tmp_path / "a.tif"], lambda content: decode(content, 6))[0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert remarks_on([encode(Image.fromarray(PIXELS))], decode) == []


# --------------------------------------------------------------------------------------------------------- transform


def test_an_image_is_a_pure_function_of_the_seed():
    options = {"image_px": [20, 24], "channels": 3, "crop_scale": [0.3, 1.0], "crop_ratio": [0.75, 1.33], "shift_px": 3}
    transform = ImageTransform(**PLAIN | options | {"horizontal_flip": 0.5, "color_jitter": [0.4, 0.4, 0.4]})
    image = smooth(50, 40)

    def draw(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return transform.train(image)

    first = draw(5)
    np.random.seed(1)
    torch.rand(7)
    assert torch.equal(draw(5), first)
    transform = pickle.loads(pickle.dumps(transform))  # as a spawned worker gets it
    assert torch.equal(draw(5), first)
    pickle.dumps(ImageTransform(**PLAIN))
    assert not torch.equal(draw(6), first)
    assert first.shape == (3, 20, 24)
    assert first.dtype == torch.float32
    assert first.is_contiguous()


@pytest.mark.parametrize("form", [lambda image: image, np.asarray], ids=["pil", "array"])
def test_a_random_crop_is_torchvisions(form):
    from torchvision.transforms import v2

    transform = ImageTransform(
        **PLAIN | {"image_px": 32, "channels": 3, "crop_scale": [0.2, 0.9], "crop_ratio": [0.75, 1.3]}
    )
    theirs = v2.RandomResizedCrop(32, (0.2, 0.9), (0.75, 1.3), v2.InterpolationMode.BICUBIC, antialias=True)
    for seed in range(5):
        torch.manual_seed(seed)
        ours = transform.train(form(smooth(80, 60)))
        torch.manual_seed(seed)
        expected = v2.functional.pil_to_tensor(theirs(smooth(80, 60))) / 255
        assert (ours - expected).abs().max() <= 2.01 / 255  # PIL rounds after each direction, torch otherwise


def test_a_shift_moves_the_digit_and_fills_with_zero():
    digit = np.zeros((28, 28), np.uint8)
    digit[14, 14] = 255
    transform = ImageTransform(**PLAIN | {"shift_px": 2})
    places = set()
    for seed in range(200):
        torch.manual_seed(seed)
        moved = transform.train(digit)
        assert moved.sum() == 1
        places.add(tuple((moved[0].nonzero()[0] - 14).tolist()))
    assert places == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}
    full = ImageTransform(**PLAIN | {"shift_px": 2}).train(np.full((28, 28), 255, np.uint8))
    assert set(full.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_random_changes_work_with_any_interpolation(interpolation):
    torch.manual_seed(0)
    changes = {"channels": 3, "rand_augment": [2, 9], "interpolation": interpolation}
    transform = ImageTransform(**PLAIN | changes)
    for _ in range(40):  # all kinds of change come
        assert transform.train(PIXELS).isfinite().all()


def test_a_flip_happens_as_often_as_asked():
    image = np.zeros((28, 28), np.uint8)
    image[:, 0] = 255
    torch.manual_seed(0)
    transform = ImageTransform(**PLAIN | {"horizontal_flip": 0.25})
    flipped = sum(transform.train(image)[0, 0, -1].item() for _ in range(2000)) / 2000
    assert abs(flipped - 0.25) < 0.04  # 4 standard deviations


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_display_undoes_the_normalisation_of_untouched_images(channels):
    array = np.random.default_rng(1).integers(0, 256, (28, 28, channels), dtype=np.uint8)
    transform = ImageTransform(
        **PLAIN | {"channels": channels, "mean": [0.4] * channels, "std": np.linspace(0.2, 0.3, channels).tolist()}
    )
    tensor = transform.evaluate(array)
    expected = torch.from_numpy((array / 255 - 0.4) / np.linspace(0.2, 0.3, channels)).permute(2, 0, 1).float()
    assert torch.allclose(tensor, expected, atol=1e-5)
    shown = transform.display(tensor)
    assert shown.shape == (28, 28, channels)
    assert np.allclose(shown, array / 255, atol=1e-6)
    assert np.allclose(transform.display(tensor + 100), 1)


def test_evaluation_is_torchvisions_resize_and_centre_crop():
    from torchvision.transforms import v2

    image = smooth(90, 70)
    theirs = v2.Compose([v2.Resize(64, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(56)])
    ours = ImageTransform(**PLAIN | {"image_px": 56, "channels": 3}).evaluate(image)
    assert (
        ours - v2.functional.pil_to_tensor(theirs(image)) / 255
    ).abs().max() <= 3.01 / 255  # 64 x 82 and not 64 x 82.3


@pytest.mark.parametrize("size", [(10, 13), (28, 28), (29, 29), (200, 5), (28, 90), (600, 400)])
@pytest.mark.parametrize("image_px", [28, [28, 40]])
def test_any_size_of_image_fills_the_whole_result(size, image_px):
    transform = ImageTransform(**PLAIN | {"image_px": image_px})
    white = np.full(size, 255, np.uint8)
    for result in (transform.train(white), transform.evaluate(white), transform.evaluate(Image.fromarray(white))):
        assert result.shape == (1, 28, 28 if image_px == 28 else 40)
        assert result.min() == 1


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"image_px": [28]}, "image_px"),
        ({"image_px": 0}, "image_px"),
        ({"crop_scale": [0.5, 1.0]}, "crop_ratio"),
        ({"crop_scale": [0.5, 1.5], "crop_ratio": [1, 1]}, "crop_scale"),
        ({"shift_px": 28}, "shift_px"),
        ({"horizontal_flip": 2}, "horizontal_flip"),
        ({"color_jitter": [0.4]}, "color_jitter"),
        ({"color_jitter": [0.4, 0.4, 0.4], "channels": 4}, "color_jitter"),
        ({"interpolation": "nearest"}, "interpolation"),
        ({"mean": [0.1, 0.2], "channels": 3}, "mean has 2 values"),
        ({"std": [0.0]}, "std"),
    ],
)
def test_settings_that_cannot_work_are_named(wrong, text):
    with pytest.raises(ConfigError, match=text):
        ImageTransform(**PLAIN | wrong)


def test_importing_does_not_load_the_heavy_libraries():
    code = "import sys, data2vec_train.data.image, data2vec_train.data.sources.files as s; " + (
        "sys.exit(bool({'datasets', 'torchvision', 'PIL.Image'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------------------ on device


def test_bytes_that_are_normalised_later_give_the_same_image():
    options = {"channels": 3, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "crop_scale": [0.2, 1.0]}
    options |= {"crop_ratio": [0.75, 1.33], "horizontal_flip": 0.5, "shift_px": 3, "color_jitter": [0.4, 0.4, 0.4]}
    transform = ImageTransform(**PLAIN | options)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = transform.train(PIXELS)
        torch.manual_seed(seed)
        travelling = transform.train_bytes(PIXELS)
        assert travelling.dtype == torch.uint8
        assert torch.equal(transform.normalise_on_device(torch.stack([travelling] * 2))[1], expected)


def test_a_shift_is_torchvisions_crop_of_a_padded_image():
    from torchvision.transforms import v2

    transform = ImageTransform(**PLAIN | {"image_px": [12, 17], "channels": 3, "shift_px": 2})
    reference = v2.RandomCrop((12, 17), padding=2)
    for seed in range(30):
        torch.manual_seed(seed)
        expected = reference(torch.from_numpy(PIXELS).permute(2, 0, 1))
        torch.manual_seed(seed)
        assert torch.equal(transform.train_bytes(PIXELS), expected)
