"""Any image file to RGB pixels: libjpeg-turbo for nearly all, Pillow for what it refuses, imagecodecs for the rest."""

from __future__ import annotations

import ctypes
import io
import logging
import re
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import Image, TiffImagePlugin

# Pictures of pixels only: Pillow would start Ghostscript for others.
PILLOW_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000")
MOST_PIXELS = 100_000_000  # 300 MB in RGB; ImageNet's largest has some 60 million
MOST_SCANS = 100  # of a progressive JPEG, each a pass over all of it; the usual number is 10
TOO_MUCH_MEMORY = "needs too much memory"
JPEG_SIGNATURE = b"\xff\xd8\xff"
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers that begin a frame header, which has the size
_PROGRESSIVE = {0xC2, 0xCA}
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # one that may be followed by a length
_TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT = 322, 323

# What is wrong with a file is said once, in the reason; Pillow and its libtiff would write to stderr too.
logging.getLogger("PIL").addHandler(logging.NullHandler())
try:
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)
except AttributeError:  # a Pillow without libtiff
    pass
else:
    TiffImagePlugin.READ_LIBTIFF = True  # Pillow's own reader takes planes of 16 bits for planes of 8


class BrokenImage(ValueError):
    """Bytes that are no picture. The message is a short reason, the same in every run."""


def decode(data: bytes) -> np.ndarray:
    """Return uint8 [H, W, 3], RGB, whatever the file's name says; raise BrokenImage.

    Pixels are taken as stored: EXIF orientation and colour profiles are ignored, as Caffe and torchvision do. Grey and
    palette become RGB, CMYK too (inverted, as Adobe writes it), samples of 12 and 16 bits keep their high byte, what is
    transparent is laid on white, of several frames the first is taken.
    """
    if not data:
        raise BrokenImage("empty file")
    try:
        if data.startswith(JPEG_SIGNATURE):
            return _decode_jpeg(data)
        return _decode_with_pillow(data)
    except MemoryError:
        raise BrokenImage(TOO_MUCH_MEMORY) from None


def _decode_jpeg(data: bytes) -> np.ndarray:
    _check_scans(data)
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        if colorspace in ("YCbCr", "Gray", "RGB"):
            return simplejpeg.decode_jpeg(data, strict=True)
        simplejpeg.decode_jpeg(data, "CMYK", strict=True)  # only to see whether it is whole
    except BrokenImage:
        raise
    except ValueError as error:  # broken, of a rare kind, or with a flaw that others overlook
        if "premature end" in str(error).lower():  # Pillow would make the missing part grey
            raise BrokenImage(f"truncated: {_reason(error)}") from None
        if "insufficient memory" in str(error).lower():
            raise MemoryError from None
    try:
        return _decode_with_pillow(data)
    except BrokenImage as error:
        pixels = _decode_with_imagecodecs(data)
        if pixels is None:
            raise error
        return pixels


def _decode_with_pillow(data: bytes) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata
            with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
                _check_size(*image.size)
                if image.format == "TIFF":  # a tile may be larger than the picture
                    tags = image.tag_v2
                    _check_size(tags.get(_TIFF_TILE_WIDTH, 0), tags.get(_TIFF_TILE_HEIGHT, 0))
                if image.format == "JPEG2000" and data.rfind(b"\xff\xd9") <= data.rfind(b"\xff\x93"):
                    raise BrokenImage("truncated: no end of codestream")  # without any data, it would be black
                image.load()
                return np.asarray(_to_rgb(image))
    except (BrokenImage, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise BrokenImage("not an image of a known format") from None
    except Image.DecompressionBombError:
        raise BrokenImage(f"more than {MOST_PIXELS} pixels") from None
    except Exception as error:  # Pillow's readers fail in many ways on damaged files
        raise BrokenImage(_reason(error)) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BrokenImage("floating-point pixels, whose range is not known")
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        levels = np.clip(np.asarray(image), 0, 65535) >> 8
        image = Image.fromarray(levels.astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _decode_with_imagecodecs(data: bytes) -> np.ndarray | None:
    """Decode JPEGs of 9 to 16 bits, with and without loss; None for other files."""
    frame, marker = b"", None
    for marker, place in _jpeg_markers(data):
        if marker in _FRAMES and not frame:
            frame = data[place + 2 : place + 7]
            if frame[:1] <= b"\x08":
                return None
    if len(frame) < 5:
        return None
    bits = frame[0]
    _check_size(int.from_bytes(frame[3:5], "big"), int.from_bytes(frame[1:3], "big"))
    if marker != _END_OF_IMAGE:  # imagecodecs would make the missing part grey
        raise BrokenImage(f"truncated: JPEG of {bits} bits without an end")
    import imagecodecs

    try:
        # libjpeg-turbo alone: jpeg_decode goes on to a decoder that damaged files crash.
        levels = imagecodecs.jpeg8_decode(data)
    except MemoryError:
        raise
    except Exception as error:  # each codec has errors of its own
        raise BrokenImage(f"JPEG of {bits} bits: {_reason(error)}") from None
    pixels = (levels >> (bits - 8)).astype(np.uint8)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None].repeat(3, axis=2)
    if pixels.shape[2] != 3:
        raise BrokenImage(f"JPEG of {bits} bits with {pixels.shape[2]} channels")
    return pixels


def _check_scans(data: bytes) -> None:
    """Libjpeg reads a second scan only of a progressive file, or where the first one lacks a component."""
    progressive, components, scans = False, b"", 0
    for marker, place in _jpeg_markers(data):
        if marker in _FRAMES:
            progressive, components = marker in _PROGRESSIVE, data[place + 7 : place + 8]
        elif marker == _START_OF_SCAN:
            scans += 1
            if scans == 1 and not progressive and data[place + 2 : place + 3] == components:
                return  # nearly all files, at their first bytes
            if scans > MOST_SCANS:
                raise BrokenImage(f"more than {MOST_SCANS} scans")


def _jpeg_markers(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield each marker and the place behind it, up to the end of the image.

    Bytes that belong to no segment are skipped: inside a scan, 0xff is followed by 0 or by the number of a restart.
    """
    place = 2
    while found := _MARKER.search(data, place):
        marker, place = data[found.end() - 1], found.end()
        yield marker, place
        if marker == _END_OF_IMAGE:
            return
        place += int.from_bytes(data[place : place + 2], "big")


def _check_size(width: int, height: int) -> None:
    """Before anything is decoded: a file of 200 bytes may claim 4 billion pixels."""
    if width * height > MOST_PIXELS:
        raise BrokenImage(f"{width} x {height} pixels: more than {MOST_PIXELS}")


def _reason(error: Exception) -> str:
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split()))[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
