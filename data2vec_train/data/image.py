"""Images: from encoded bytes, a file or an array to a normalised tensor.

Shape letters: C channels, (h, w) the decoded image, (H, W) the input of the model.

PIL decodes, not torchvision, whose decoders crash (segmentation fault) on a PNG with a bad checksum.
"""

import functools
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from data2vec_train.data import tiff
from data2vec_train.data.files import read_file
from data2vec_train.errors import BadSample
from data2vec_train.system.constraints import checked

if TYPE_CHECKING:
    from PIL import Image

# Not all formats of PIL: EPS starts Ghostscript, others are documents or scientific data.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000", "MPO")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
ORIENTATION = 0x0112  # EXIF tag
MAX_COVERED = 16  # an image resized to cover the result has at most this many times the pixels of the result
EVAL_CROP = 0.875  # part of the shorter side that an evaluation crop keeps: 224 of 256

# Exceptions of PIL's plugins on broken files, apart from OSError; found by damaging files at random.
BROKEN = (
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
)
# Largest useful file: 64 bits per pixel and channel, uncompressed, plus metadata.
BYTES_PER_PIXEL, METADATA_BYTES = 8, 2**24
MAX_BANDS = 1024  # of a TIFF; hyperspectral cameras have a few hundred
# A progressive JPEG has about ten scans, and each may cost as much time as decoding the whole image.
MAX_JPEG_SCANS = 100
JPEG_RESTART, JPEG_END, JPEG_SCAN = range(0xD0, 0xD8), 0xD9, 0xDA
JPEG_BARE = (0x01, 0xD8, JPEG_END)  # markers without a length
# Markers that may follow the data of a scan, apart from restarts: tables, the next scan, comments, the end.
JPEG_AFTER_SCAN = {0xC4, 0xCC, JPEG_END, JPEG_SCAN, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)}
PIL_MODULES = re.compile(r"PIL(\..*)?$")


def decode_image(
    value: bytes | str | Path | np.ndarray | BadSample,
    *,
    channels: int,
    max_pixels: int,
    max_value: float | None = None,
    pages: Literal["first", "channels"] | None = None,
) -> "Image.Image | np.ndarray":
    """An upright image with `channels` channels, 8 bits each: "L" (1), "RGB" (3), "RGBA" (4), or an array.

    The bands and values of files and arrays are used as stored, or the image is refused. An image that has the right
    number of channels is returned unchanged, whatever its bands mean. Otherwise grey becomes RGB and RGB becomes grey;
    alpha is added, or dropped where the model has no fourth channel, as torchvision's ImageFolder does. Palettes, CMYK
    and YCbCr become RGB first. Bands of unknown meaning (a fourth band of an array, unspecified ones of a TIFF) are
    never dropped. Of an animation the first frame is used.

    Values of more than 8 bits become 8 bits: 12 or 16 bits are scaled by the range of their bits; others must lie
    within 0 to 255, or need `max_value`.

    Known limits: in formats without checksums, a few wrong bytes decode to noise. In a JPEG a wrong byte is detected
    only if it reads as a misplaced marker or makes the decoder fail. Of PNG, PPM and JPEG 2000 with several bands of
    16 bits PIL returns the upper 8.

    Args:
        value: File content, a file, or an array (h, w) or (h, w, C).
        channels: Channels the model takes.
        max_pixels: Largest accepted h * w, checked before decoding.
        max_value: The stored value that becomes 255; larger values are clipped to it. None: the largest value of the
            bits.
        pages: For a TIFF with several images: "first" uses the first, "channels" uses each as a channel; None refuses
            such files.

    Raises:
        BadSample: not a usable image; the text is a short reason.
    """
    if isinstance(value, BadSample):
        raise value
    if isinstance(value, np.ndarray):
        return convert_array(value, channels, max_pixels, max_value)
    if isinstance(value, Path):
        limit = f"modality.decode.max_pixels={max_pixels}"
        value = read_file(value, max_bytes=BYTES_PER_PIXEL * channels * max_pixels + METADATA_BYTES, limit=limit)
    if isinstance(value, str):
        raise BadSample("a text, not an image")
    if not value:
        raise BadSample("empty file")

    from PIL import Image, UnidentifiedImageError

    ignore_pil_warnings()
    # Switch off PIL's own limit: it is not the user's setting, and its message leaves out the size.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        if value.startswith(tiff.MAGIC):
            return decode_tiff(value, channels, max_pixels, max_value, pages)
        image = opened(value, max_pixels)
        if image.format in ("JPEG", "MPO"):
            check_jpeg(value)
        if max_value is not None and not keeps_values(image, value):
            raise BadSample(f"a {image.format} file whose values PIL scales to 8 bits; leave modality.max_value out")
        image.load()
        return convert(upright(image), channels, max_value, f"a {image.format} file of mode {image.mode}")
    except BadSample:
        raise
    except UnidentifiedImageError as error:
        raise BadSample("not an image") from error
    except (OSError, *BROKEN) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadSample(f"{'truncated' if 'truncated' in text.lower() else 'broken image file'}: {text}") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def opened(data: bytes, max_pixels: int) -> "Image.Image":
    """An image opened by its header, not decoded; its size is checked."""
    from PIL import Image

    image = Image.open(BytesIO(data), formats=known_formats())
    check_size(*image.size, max_pixels)
    return image


def keeps_values(image: "Image.Image", data: bytes) -> bool:
    """Whether PIL returns the stored values, of 8 or of 16 bits."""
    if image.format == "PNG":
        depth, is_grey = data[24], data[25] == 0  # fields of the header
        return depth == 8 or (depth == 16 and is_grey)
    return image.format in ("JPEG", "MPO", "BMP", "GIF", "WEBP")


def decode_tiff(
    data: bytes, channels: int, max_pixels: int, max_value: float | None, pages: Literal["first", "channels"] | None
) -> "Image.Image | np.ndarray":
    """A TIFF as `decode_image` returns it."""
    found = tiff.read_pages(data)
    for page in found:
        check_size(page.width, page.height, max_pixels)
    if len(found) == 1 or pages == "first":
        return _tiff_page(data, found[0], channels, max_pixels, max_value)
    if pages is None:
        raise BadSample(
            f"a TIFF of {len(found)} pages, the first of {found[0]}; set modality.pages=first to use that one alone, "
            f"or modality.pages=channels and modality.channels={len(found)} to use each as a channel"
        )
    if len(found) != channels or any(page.bands > 1 for page in found):
        raise BadSample(f"a TIFF of {len(found)} pages, the first of {found[0]}; expected {channels} of one band")
    layers = [to_array(_tiff_page(data, page, 1, max_pixels, max_value)) for page in found]
    if len({layer.shape for layer in layers}) > 1:
        raise BadSample(f"a TIFF of {len(found)} pages of different sizes, which cannot be channels")
    return np.stack([layer.reshape(layer.shape[:2]) for layer in layers], axis=2)


def _tiff_page(
    data: bytes, page: tiff.Page, channels: int, max_pixels: int, max_value: float | None
) -> "Image.Image | np.ndarray":
    from PIL import Image

    what = f"a TIFF of {page}"
    if max_value is not None and page.bits < 8:
        raise BadSample(f"{what}, which PIL scales to 8 bits; leave modality.max_value out")
    if page.is_picture(scaled=max_value is not None):
        image = opened(data, max_pixels)
        if page.index:
            image.seek(page.index)
        image.load()  # PIL applies the orientation of a TIFF by itself
        if image.mode == "F" or image.mode.startswith("I"):
            values = to_bytes(tiff.numbers_of(image, page), what, max_value, bits=page.bits)
            return convert(Image.fromarray(values), channels, None, what)
        return convert(image, channels, max_value, what)
    has_alpha = page.bands != channels and page.extra in ((tiff.ASSOCIATED,), (tiff.UNASSOCIATED,))
    check_channels(page.bands - has_alpha, channels, what)
    values = tiff.stored(data, page)
    if has_alpha:
        if page.extra == (tiff.ASSOCIATED,) and (values[..., -1] < 2**page.bits - 1).any():
            raise BadSample(
                f"{what}: its colours are multiplied by its opacity; set modality.channels={page.bands} to use them as "
                "they are stored, or save them without alpha"
            )
        values = values[..., :-1] if page.bands > 2 else values[..., 0]
    return with_channels(to_bytes(values, what, max_value, bits=page.bits), channels, what)


def read(path: Path) -> bytes:
    """Content of a file of any size."""
    return read_file(path, max_bytes=math.inf, limit="nothing")


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Refuse images that are empty or too large to decode."""
    if width < 1 or height < 1:
        raise BadSample(f"{width}x{height} pixels")
    if width * height > max_pixels:
        raise BadSample(f"{width}x{height} pixels, more than modality.decode.max_pixels={max_pixels}")


def check_jpeg(data: bytes) -> None:
    """Refuse a JPEG whose markers show damage; libjpeg only warns about it, and PIL drops the warning."""
    array = np.frombuffer(data, dtype=np.uint8)
    places = np.flatnonzero(array[:-1] == 0xFF)
    codes = array[places + 1]
    marker = (codes != 0) & (codes != 0xFF)  # 0xFF00 encodes a data byte 0xFF, 0xFFFF is padding
    places, codes = places[marker], codes[marker]
    others = np.flatnonzero((codes < JPEG_RESTART.start) | (codes >= JPEG_RESTART.stop))
    start, scans, in_scan = 2, 0, False  # `start`: where to search for the next marker, after the first one
    while True:
        first = int(np.searchsorted(places, start))
        following = int(np.searchsorted(others, first))
        if following == len(others):  # truncated: PIL reports it
            return
        following = int(others[following])
        restarts, place, code = codes[first:following], int(places[following]), int(codes[following])
        if in_scan and not np.array_equal(restarts - JPEG_RESTART.start, np.arange(len(restarts)) % 8):
            raise BadSample("broken image file: JPEG restart markers out of order")
        if in_scan and code not in JPEG_AFTER_SCAN:
            raise BadSample(f"broken image file: JPEG marker 0x{code:02X} within the image data")
        if code == JPEG_END:
            return
        scans += code == JPEG_SCAN
        if scans > MAX_JPEG_SCANS:
            raise BadSample(f"a JPEG of more than {MAX_JPEG_SCANS} scans, which would take long to decode")
        in_scan = code == JPEG_SCAN
        length = 0 if code in JPEG_BARE else int.from_bytes(data[place + 2 : place + 4], "big")
        start = place + 2 + length


def upright(image: "Image.Image") -> "Image.Image":
    """The image rotated and mirrored by its EXIF orientation; a broken EXIF block is ignored."""
    from PIL import Image

    try:
        orientation = image.getexif().get(ORIENTATION)
    except (OSError, *BROKEN):
        return image
    turn = Image.Transpose
    methods = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    return image.transpose(methods[orientation]) if orientation in methods else image


def convert(image: "Image.Image", channels: int, max_value: float | None, what: str) -> "Image.Image | np.ndarray":
    """An image with `channels` channels, 8 bits each; `what` describes it in messages."""
    from PIL import Image

    if image.mode == "F":
        raise BadSample(f"{what}, with floating-point values; save it as TIFF, and set modality.max_value")
    if image.mode.startswith("I"):
        # PIL's own conversion clips at 255, which turns most images white. A PPM of 16 bits has mode I.
        image, max_value = Image.fromarray(to_bytes(np.asarray(image).astype(np.uint16), what, max_value)), None
    if image.mode == "LAB":
        raise BadSample(f"{what}, which is not read; save it as RGB")
    if image.mode == "LA" and channels == 2:
        return to_bytes(np.asarray(image), what, max_value)
    if channels not in MODES:
        check_channels(len(image.getbands()), channels, what)
    mode = MODES[channels]
    if image.mode not in ("L", "LA", "1", "P", "PA", "RGB", "RGBA") and mode != "RGB":
        image = image.convert("RGB")  # CMYK and similar modes convert to RGB only
    image = image if image.mode == mode else image.convert(mode)
    return image if max_value is None else to_bytes(np.asarray(image), what, max_value)


def to_bytes(values: np.ndarray, what: str, max_value: float | None, *, bits: int | None = None) -> np.ndarray:
    """The stored values as uint8, rounded; `max_value`, or the largest value of `bits`, becomes 255.

    Raises:
        BadSample: the values do not fit this range, or it is unknown.
    """
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "iuf":
        raise BadSample(f"{what}; expected numbers")
    top = max_value
    if top is None and values.dtype.kind == "u" and values.dtype.itemsize <= 2:
        top = 2 ** (bits or 8 * values.dtype.itemsize) - 1
    if top == 255 and values.dtype == np.uint8:
        return values
    if top is None and values.dtype.kind == "f":
        raise BadSample(f"{what}; set modality.max_value to the value that is white, 1 for values from 0 to 1")
    lowest, highest = (values.min(), values.max()) if values.size else (0, 0)
    if not lowest >= 0 or not highest < np.inf:  # also true for NaN
        raise BadSample(f"{what} with values from {lowest} to {highest}; expected none below 0, and finite ones")
    if top is None and highest > 255:
        raise BadSample(f"{what} with values up to {highest}; set modality.max_value to the value that is white")
    if top is None:
        return values.astype(np.uint8)
    if values.dtype.kind == "u" and values.dtype.itemsize <= 2:  # a table takes less memory than floats of all pixels
        return _scaled(np.arange(2 ** (8 * values.dtype.itemsize)), top)[values]
    return _scaled(values, top)


def _scaled(values: np.ndarray, top: float) -> np.ndarray:
    return np.floor(np.minimum(values, top) * (255 / top) + 0.5).astype(np.uint8)


def convert_array(
    array: np.ndarray, channels: int, max_pixels: int, max_value: float | None
) -> "Image.Image | np.ndarray":
    """A decoded image with `channels` channels; the array itself if it has them and is uint8."""
    if array.ndim not in (2, 3):
        raise BadSample(f"array of shape {array.shape}; expected (height, width) or (height, width, channels)")
    check_size(array.shape[1], array.shape[0], max_pixels)
    what = f"{array.dtype} array of shape {array.shape}"
    return with_channels(to_bytes(array, what, max_value), channels, what)


def with_channels(array: np.ndarray, channels: int, what: str) -> "Image.Image | np.ndarray":
    """A uint8 array with `channels` channels; grey and RGB are converted, other bands are refused."""
    got = 1 if array.ndim == 2 else array.shape[2]
    check_channels(got, channels, what)
    if got == channels:
        return array
    from PIL import Image

    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and got == 1 else array).convert(MODES[channels])


def check_channels(got: int, channels: int, what: str) -> None:
    """Refuse an image whose bands can become `channels` channels only by guessing what they mean."""
    if got == channels or (got in (1, 3) and channels in MODES):
        return
    instead = f"; set modality.channels={got}, or store others" if 0 < got <= MAX_BANDS else ""
    raise BadSample(f"{what}, which is {got} channels; expected {channels}{instead}")


def to_array(image: "Image.Image | np.ndarray") -> np.ndarray:
    """(h, w) or (h, w, C) uint8, writable."""
    # PIL's memory is read-only, and torch warns about such arrays.
    return image if isinstance(image, np.ndarray) and image.flags.writeable else np.array(image)


def remarks_on(values: Sequence[object], decode: Callable[[object], "Image.Image | np.ndarray"]) -> list[str]:
    """Sentences about unusual properties of images, to be shown before training on them.

    Args:
        values: a few encoded images; broken ones are skipped.
        decode: see `decode_image`.
    """
    lowest, highest, animated = None, None, 0
    for value in values:
        try:
            pixels = to_array(decode(value))
            animated += is_animation(value)
        except BadSample:
            continue
        flat = pixels.reshape(-1, 1 if pixels.ndim == 2 else pixels.shape[2])  # (h w, C)
        lowest = flat.min(axis=0) if lowest is None else np.minimum(lowest, flat.min(axis=0))
        highest = flat.max(axis=0) if highest is None else np.maximum(highest, flat.max(axis=0))
    if lowest is None:
        return []
    found = []
    if int(highest.max()) - int(lowest.min()) < 26:  # a tenth of 255
        found.append(
            f"their values are {lowest.min()} to {highest.max()} of 0 to 255, less than a tenth of the range; if they "
            "have fewer bits than their type, set modality.max_value to the stored value that is white"
        )
    constant = [str(channel) for channel in np.flatnonzero(lowest == highest)]
    if constant and len(lowest) > 1:
        found.append(f"channel {', '.join(constant)} of 0 to {len(lowest) - 1} has the same value everywhere")
    if animated:
        found.append(f"{animated} are animations, of which the first frame is used")
    return found


def is_animation(value: object) -> bool:
    """Whether a file that can be decoded has several frames."""
    from PIL import Image

    if not isinstance(value, (bytes, Path)):
        return False
    file = BytesIO(value) if isinstance(value, bytes) else value
    formats = [name for name in known_formats() if name in ("GIF", "WEBP", "PNG", "AVIF")]
    try:
        with Image.open(file, formats=formats) as image:
            return getattr(image, "is_animated", False)
    except (OSError, Image.DecompressionBombError, *BROKEN):  # another format, too large for PIL, or a broken frame
        return False


@functools.cache
def known_formats() -> tuple[str, ...]:
    """The formats of `FORMATS` that this build of PIL has."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def ignore_pil_warnings() -> None:
    """Suppress PIL's warnings about odd files; real faults become a `BadSample`.

    Not by `warnings.catch_warnings`: entering it for each image resets Python's record of the warnings shown, so every
    warning of the program would be repeated.
    """
    if not any(entry[3] == PIL_MODULES for entry in warnings.filters):
        warnings.filterwarnings("ignore", module=PIL_MODULES.pattern)


class ImageTransform:
    """From a decoded image to the input tensor of a model: augmented or centre-cropped, and normalised.

    Training: colour jitter, flip, crop of random size and position, shift; torchvision's v2 transforms, in the order
    of BEiT and data2vec.

    All randomness comes from torch's global CPU generator: the result is a pure function of its seed.

    Args:
        image_px: Size of the result, pixels: one number for a square, or (H, W).
        channels: C.
        crop_scale: Smallest and largest part of the area that a random crop covers; None: the whole image, resized so
            that it covers (H, W), centre-cropped.
        crop_ratio: Smallest and largest width / height of a random crop; ignored without `crop_scale`.
        shift_px: Largest random translation each way, pixels; the uncovered pixels are 0 before normalisation.
        horizontal_flip: Probability.
        color_jitter: Largest relative change of brightness, contrast and saturation; None: none.
        interpolation: "bicubic" or "bilinear", always with antialiasing.
        mean: Per channel, or one for all, of values in 0..1.
        std: As `mean`.
        rand_augment: Number of random changes of colour or shape, and their strength from 0 to 30; None: none. Uses
            torchvision's RandAugment; timm's "m9" is 27 here.
        erase: Probability that a random rectangle becomes noise.
        fit: "cover" keeps the aspect ratio of images that are not augmented, see `evaluate`; "stretch" does not.

    Raises:
        ConfigError: a value that cannot work.
    """

    @checked
    def __init__(
        self,
        *,
        image_px: int | Sequence[int],
        channels: int,
        crop_scale: Sequence[float] | None,
        crop_ratio: Sequence[float] | None,
        shift_px: int,
        horizontal_flip: float,
        color_jitter: Sequence[float] | None,
        interpolation: Literal["bicubic", "bilinear"],
        mean: Sequence[float],
        std: Sequence[float],
        rand_augment: Sequence[int] | None = None,
        erase: float = 0.0,
        fit: Literal["cover", "stretch"] = "cover",
    ):
        size = (image_px, image_px) if isinstance(image_px, int) else tuple(image_px)
        from torchvision.transforms import v2

        self.size, self.channels, self.fit = size, channels, fit
        self._interpolation = v2.InterpolationMode(interpolation)
        self._mean, self._std = per_channel(mean), per_channel(std)  # (C, 1, 1)
        steps: list[Callable[[torch.Tensor], torch.Tensor]] = []
        if color_jitter is not None and max(color_jitter) > 0:
            steps.append(v2.ColorJitter(*color_jitter))
        if horizontal_flip:
            steps.append(v2.RandomHorizontalFlip(horizontal_flip))
        if crop_scale is not None:
            steps.append(v2.RandomResizedCrop(size, crop_scale, crop_ratio, self._interpolation, antialias=True))
        else:
            steps.append(functools.partial(self._cover, resized=size))
        if shift_px:
            steps.append(functools.partial(self._shift, pixels_each_way=shift_px))
        if rand_augment is not None:
            bilinear = v2.InterpolationMode.BILINEAR  # torchvision rotates no tensors bicubically
            steps.append(v2.RandAugment(rand_augment[0], rand_augment[1], interpolation=bilinear))
        # Erased pixels become Gaussian noise, which has the scale of normalised images: erasing follows normalisation.
        self.erases = bool(erase)
        self._erase = v2.RandomErasing(erase, scale=(0.02, 1 / 3), value="random") if erase else None
        self._augment = v2.Compose(steps)
        # (x / 255 - mean) / std, as one multiplication and one addition.
        self._gain, self._offset = 1 / (255 * self._std), -self._mean / self._std
        self._moved: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def train(self, image: "Image.Image | np.ndarray") -> torch.Tensor:
        """(C, H, W) float32, augmented with draws from torch's global CPU generator."""
        pixels = self.normalise(self._augment(to_tensor(image)))
        return pixels if self._erase is None else self._erase(pixels)

    def train_bytes(self, image: "Image.Image | np.ndarray") -> torch.Tensor:
        """(C, H, W) uint8: `train` without normalisation and erasing, for `normalise_on_device`."""
        return self._augment(to_tensor(image))

    def evaluate(self, image: "Image.Image | np.ndarray") -> torch.Tensor:
        """(C, H, W) float32: the centre, without randomness.

        An image of exactly (H, W) is not resized. A larger one is resized so that (H, W) is 0.875 of it, a smaller one
        so that it covers (H, W). With fit "stretch" every image is resized to (H, W).
        """
        pixels = to_tensor(image)  # (C, h, w) uint8
        if self.fit == "stretch":
            from torchvision.transforms.v2 import functional

            resized = functional.resize(pixels, list(self.size), self._interpolation, antialias=True)
            return self.normalise(resized)
        larger = all(have >= want for have, want in zip(pixels.shape[1:], self.size, strict=True))
        if pixels.shape[1:] != self.size and larger:
            return self.normalise(self._cover(pixels, tuple(round(side / EVAL_CROP) for side in self.size)))
        return self.normalise(self._cover(pixels, self.size))

    def display(self, tensor: torch.Tensor) -> np.ndarray:
        """(H, W, C) float32 in [0, 1] from a normalised (C, H, W), for display."""
        pixels = tensor.detach().float().cpu() * self._std + self._mean
        return pixels.clamp(0, 1).permute(1, 2, 0).numpy()

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """(C, H, W) uint8 -> float32: (x / 255 - mean) / std."""
        return pixels.float().mul_(self._gain).add_(self._offset)

    def normalise_on_device(self, pixels: torch.Tensor) -> torch.Tensor:
        """`normalise` of a batch (B, C, H, W), on its device."""
        if pixels.device not in self._moved:  # cached: a copy at each step would block the host
            self._moved[pixels.device] = self._gain.to(pixels.device), self._offset.to(pixels.device)
        gain, offset = self._moved[pixels.device]
        return pixels.float().mul_(gain).add_(offset)

    def _cover(self, pixels: torch.Tensor, resized: tuple[int, int]) -> torch.Tensor:
        """(C, H, W) uint8: the centre of the image, resized to the smallest size that covers `resized`."""
        from torchvision.transforms.v2 import functional

        _, height, width = pixels.shape
        scale = max(resized[0] / height, resized[1] / width)
        if scale != 1:
            # Crop a long strip to its middle first: enlarging all of it by the scale of its short side takes memory.
            if height * width * scale**2 > MAX_COVERED * resized[0] * resized[1]:
                kept = [math.ceil(MAX_COVERED / 4 * side / scale) + 8 for side in resized]
                pixels = functional.center_crop(pixels, [min(height, kept[0]), min(width, kept[1])])
                height, width = pixels.shape[1:]
            target = [max(resized[0], round(height * scale)), max(resized[1], round(width * scale))]
            pixels = functional.resize(pixels, target, self._interpolation, antialias=True)
        return functional.center_crop(pixels, list(self.size))

    def _shift(self, pixels: torch.Tensor, pixels_each_way: int) -> torch.Tensor:
        """(C, H, W) shifted at random, padded with 0: torchvision's RandomCrop of a padded image.

        Not torchvision's own, since for small images most of the time is its overhead.
        """
        top, left = (int(torch.randint(2 * pixels_each_way + 1, ())) for _ in range(2))
        padded = torch.nn.functional.pad(pixels, [pixels_each_way] * 4)
        return padded[:, top : top + self.size[0], left : left + self.size[1]]


def to_tensor(image: "Image.Image | np.ndarray") -> torch.Tensor:
    """(C, h, w) uint8, possibly a view of the image."""
    array = to_array(image)
    if array.ndim == 2:
        return torch.from_numpy(array)[None]
    return torch.from_numpy(array).permute(2, 0, 1)


def per_channel(values: Sequence[float]) -> torch.Tensor:
    """(C, 1, 1) float32, or (1, 1, 1) for all channels."""
    return torch.tensor(values, dtype=torch.float32)[:, None, None]
