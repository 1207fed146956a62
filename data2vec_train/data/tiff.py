"""TIFF files: their pages and their stored pixels.

PIL decodes grey, palette, RGB, CMYK and YCbCr images, with or without alpha. It drops bands of unspecified meaning,
divides colours by an associated alpha, and reads signed bytes as unsigned. tifffile reads such files instead.
"""

import logging
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from data2vec_train.errors import BadSample

if TYPE_CHECKING:
    from PIL import Image

MAGIC = (b"II*\0", b"MM\0*", b"II+\0")
KINDS = {1: "uint", 2: "int", 3: "float"}  # tag SampleFormat
MINISWHITE, MINISBLACK, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
PHOTOMETRIC = {0: "grey, 0 is white", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "LAB"}
UNSPECIFIED, ASSOCIATED, UNASSOCIATED = 0, 1, 2  # tag ExtraSamples
EXTRA = {UNSPECIFIED: "unspecified", ASSOCIATED: "associated alpha", UNASSOCIATED: "alpha"}
COLOURS = {MINISWHITE: 1, MINISBLACK: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3, 8: 3}
SMALLER, MASK = 1, 4  # bits of the tag NewSubfileType: a thumbnail or an overview, a mask of another page
MAX_PAGES = 10_000
# Turns of (h, w, ...) for each value of the tag Orientation.
TURNS = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}


@dataclass(frozen=True)
class Page:
    """One image of a file, by its tags.

    Attributes:
        index: of all images in the file, thumbnails included.
        bits: of the widest band.
        kind: "uint", "int" or "float".
        extra: meaning of each band beyond the colours, see `EXTRA`.
    """

    index: int
    width: int
    height: int
    bands: int
    bits: int
    kind: str
    photometric: int
    extra: tuple[int, ...]
    orientation: int

    def __str__(self) -> str:
        """Description for messages."""
        colours = PHOTOMETRIC.get(self.photometric, f"photometric {self.photometric}")
        more = [EXTRA.get(meaning, f"extra sample {meaning}") for meaning in self.extra]
        bands = f"{self.bands} band{'s' * (self.bands > 1)} ({', '.join([colours, *more])})"
        return f"{self.width}x{self.height} pixels, {bands} of {self.kind}{self.bits}"

    def is_picture(self, *, scaled: bool) -> bool:
        """Whether PIL decodes it correctly; pages of 16 bits whose values will be `scaled` only with one band."""
        colours = COLOURS.get(self.photometric)
        has_alpha = self.extra == (UNASSOCIATED,) and self.photometric not in (CMYK, YCBCR)
        if self.bands != (colours or 0) + has_alpha or (self.extra and not has_alpha):
            return False
        if self.bands == 1 and self.bits > 8:
            return True
        return self.kind == "uint" and (self.bits <= 8 or (self.bits == 16 and not scaled))


def read_pages(data: bytes) -> list[Page]:
    """The images of a TIFF without its thumbnails, overviews and masks.

    Raises:
        BadSample: there is none.
    """
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    file = BytesIO(data)
    header = file.read(16 if data[2] == 43 else 8)
    found, seen, place = [], set(), ImageFileDirectory_v2(header).next
    while place and place not in seen and len(seen) < MAX_PAGES:
        seen.add(place)
        file.seek(place)
        tags = ImageFileDirectory_v2(header)
        tags.load(file)
        if 256 not in tags or 257 not in tags:
            raise BadSample("broken image file: a TIFF without a width or height")
        if not int(tags.get(254, 0)) & (SMALLER | MASK):
            found.append(_page(tags, len(seen) - 1))
        place = tags.next
    if not found:
        raise BadSample("broken image file: a TIFF without an image")
    return found


def _page(tags: "dict", index: int) -> Page:
    def numbers(tag: int, default: tuple[int, ...]) -> tuple[int, ...]:
        value = tags.get(tag, default)
        return tuple(map(int, value if isinstance(value, tuple) else (value,)))

    bands, photometric = numbers(277, (1,))[0], numbers(262, (-1,))[0]
    extra = numbers(338, ())
    # The tag may be missing although there are more bands than colours.
    more = bands - COLOURS.get(photometric, bands) - len(extra)
    return Page(
        index=index,
        width=numbers(256, (0,))[0],
        height=numbers(257, (0,))[0],
        bands=bands,
        bits=max(numbers(258, (1,))),
        kind=KINDS.get(max(numbers(339, (1,))), "unknown"),
        photometric=photometric,
        extra=extra + (UNSPECIFIED,) * max(more, 0),
        orientation=numbers(274, (1,))[0],
    )


def stored(data: bytes, page: Page) -> np.ndarray:
    """The pixels of a page as they are stored, upright, (h, w) or (h, w, bands).

    Raises:
        BadSample: they are not grey or RGB values, or cannot be decompressed.
    """
    if page.photometric not in (MINISBLACK, RGB):
        raise BadSample(f"a TIFF of {page}, which is not read; save it as grey or RGB")
    try:
        from tifffile import TiffFile
    except ImportError:
        raise BadSample(f"a TIFF of {page}, which needs tifffile: pip install tifffile") from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # faults of a file become a `BadSample`
    with TiffFile(BytesIO(data)) as file:
        source = file.pages[page.index]
        try:
            pixels = source.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            raise BadSample(f"a TIFF of {page}, compressed: pip install imagecodecs") from error
        if source.planarconfig == 2 and page.bands > 1:  # bands stored one after the other
            pixels = np.moveaxis(pixels, 0, -1)
    wanted = (page.height, page.width, page.bands)
    if pixels.size != np.prod(wanted):
        raise BadSample(f"broken image file: a TIFF of {page} that holds {pixels.shape}")
    pixels = pixels.reshape(wanted if page.bands > 1 else wanted[:2])
    return np.ascontiguousarray(TURNS.get(page.orientation, lambda same: same)(pixels))


def numbers_of(image: "Image.Image", page: Page) -> np.ndarray:
    """The stored values (h, w) of a page of one band that PIL decoded; inverted if 0 is white.

    Raises:
        BadSample: 0 is white, and the value of black is unknown.
    """
    values = np.asarray(image)
    if page.bits == 32 and page.kind == "uint":
        values = values.view(np.uint32)  # PIL has no such mode
    if page.photometric != MINISWHITE:
        return values
    if page.kind != "uint" or page.bits > 16:
        raise BadSample(f"a TIFF of {page}: the value of black is unknown")
    return (2**page.bits - 1 - values.astype(np.int64)).astype(values.dtype)
