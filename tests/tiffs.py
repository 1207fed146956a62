"""TIFF files, written tag by tag: PIL writes only those that it reads."""

import struct

import numpy as np

KINDS = {"u": 1, "i": 2, "f": 3}


def tiff(
    *pages: np.ndarray,
    photometric: int | None = None,
    extra: tuple[int, ...] = (),
    bits: int | None = None,
    tags: dict[int, int] | None = None,
    page_tags: tuple[dict[int, int], ...] = (),
) -> bytes:
    """An uncompressed little-endian file with pages (h, w) or (h, w, bands); `tags` are numbers that all have."""
    out = bytearray(b"II*\0\0\0\0\0")
    link = 4
    for number, page in enumerate(pages):
        pixels = page[:, :, None] if page.ndim == 2 else page
        height, width, bands = pixels.shape
        data = np.ascontiguousarray(pixels).astype(pixels.dtype.newbyteorder("<")).tobytes()
        place = len(out)
        out += data + b"\0" * (len(data) % 2)
        depth = bits or 8 * page.dtype.itemsize
        meaning = (2 if bands >= 3 else 1) if photometric is None else photometric
        found = {256: width, 257: height, 258: (depth,) * bands, 259: 1, 262: meaning, 273: place, 277: bands}
        found |= {278: height, 279: len(data), 284: 1, 339: (KINDS[page.dtype.kind],) * bands}
        found |= {338: extra} if extra else {}
        found |= (tags or {}) | (page_tags[number] if page_tags else {})
        entries = []
        for tag, value in sorted(found.items()):
            values = value if isinstance(value, tuple) else (value,)
            kind, letter = (4, "I") if tag in (254, 256, 257, 273, 278, 279) else (3, "H")
            packed = struct.pack(f"<{len(values)}{letter}", *values)
            if len(packed) > 4:
                spot = len(out)
                out += packed
                packed = struct.pack("<I", spot)
            entries.append(struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0"))
        out += b"\0" * (len(out) % 2)
        out[link : link + 4] = struct.pack("<I", len(out))
        out += struct.pack("<H", len(entries)) + b"".join(entries)
        link = len(out)
        out += b"\0\0\0\0"
    return bytes(out)
