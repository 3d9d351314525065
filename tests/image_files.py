"""Image files made on the spot, of kinds that no library at hand writes as wanted."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import imagecodecs
import numpy as np
from PIL import Image


def blots(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Return uint8 [height, width, 3]: smooth colours, some ten pixels a blot."""
    cells = np.random.default_rng(seed).integers(0, 256, (-(-height // 10), -(-width // 10), 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC))


def saved(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(data, kind, **options)
    return data.getvalue()


def lossless_jpeg(levels: np.ndarray, bits: int) -> bytes:
    return imagecodecs.jpeg8_encode(levels, lossless=True, bitspersample=bits)


def scan_by_scan(picture: Image.Image, repeats: int = 1) -> bytes:
    """A baseline JPEG, 4:4:4, in which each component has a scan of its own, or several times the same."""
    whole = saved(picture, "JPEG", subsampling=0)
    frame = whole.index(b"\xff\xc0")
    header = bytearray(whole[: whole.rindex(b"\xff\xda")])
    header[frame + 12 : frame + 19 : 3] = bytes(3)  # all have the quantization of a grey picture
    data = bytes(header)
    for component, plane in enumerate(picture.convert("YCbCr").split(), start=1):
        grey = saved(plane, "JPEG")
        scan = grey[grey.rindex(b"\xff\xda") : -2]
        data += (scan[:5] + bytes([component]) + scan[6:]) * repeats
    return data + b"\xff\xd9"


def tiff(width: int, height: int, strips: list[bytes], bits: int, channels: int = 3, *, planes: bool = False,
         deflated: bool = False, tile: tuple[int, int] | None = None) -> bytes:
    """A little-endian TIFF of grey or RGB; one strip or tile, or one a plane."""
    where, sizes = (324, 325) if tile else (273, 279)
    offset = 8
    tags = {256: [width], 257: [height], 258: [bits] * channels, 259: [8 if deflated else 1],
            262: [2 if channels == 3 else 1], 277: [channels], 284: [2 if planes else 1], sizes: list(map(len, strips)),
            **({322: [tile[0]], 323: [tile[1]]} if tile else {278: [height]})}
    first = offset + 2 + 12 * (len(tags) + 1) + 4
    longs = {tag: struct.pack(f"<{len(values)}I", *values) for tag, values in tags.items()}
    pixels = first + sum(len(value) for value in longs.values() if len(value) > 4) + 4 * (len(strips) > 1) * len(strips)
    starts = np.cumsum([pixels, *map(len, strips[:-1])])
    longs[where] = struct.pack(f"<{len(strips)}I", *starts)
    entries, behind = b"", b""
    for tag, value in sorted(longs.items()):
        place = value
        if len(value) > 4:
            place = struct.pack("<I", first + len(behind))
            behind += value
        entries += struct.pack("<HHI", tag, 4, len(value) // 4) + place
    return b"II*\0" + struct.pack("<IH", offset, len(longs)) + entries + bytes(4) + behind + b"".join(strips)


def png(width: int, height: int, chunks: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    """A PNG of RGB, of that size, with the given chunks behind its header."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in ((b"IHDR", header), *chunks, (b"IEND", b"")))


# 16 x 16 pixels, arithmetic coding, 4:4:4; the upper half is (200, 60, 20), the lower one (30, 90, 220).
ARITHMETIC_JPEG = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV00RO70|EjA0|NsD0|NvF2n7WM1O*BQ2L=cX3JeSj3JVJj4iXRz4iOFu3lJ6%5fc;@6%`B*7Z?^47!ni"
    "}6#v@*LjeN>1O)^I2?YfS6b%av6ciK`6ciK`6ciK`6ciK`6ciK`6ciK`6ciK`6ciK`6ciK`6ciK`6ciK`6ciK`6cqo-01*fP5C9MZ0TBQK5di}"
    "c0sqVZ3IGrg1pyEd1^?Or3<CiG0ucid06zf#0J~71MdGO|*smpaQUBQ")
