"""decode: the right pixels from every kind of file, and nothing from half of one."""

from __future__ import annotations

import io
import os
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import simplejpeg
from image_files import ARITHMETIC_JPEG, blots, lossless_jpeg, png, saved, scan_by_scan, tiff
from PIL import Image

from pipeline import decoders
from pipeline.decoders import BrokenImage, decode

PIXELS = blots(80, 60)
PICTURE = Image.fromarray(PIXELS)
GREY = np.repeat(PIXELS[..., :1], 3, axis=2)
WIDE = PIXELS.astype(np.uint16) * 257  # the same in 16 bits
TWELVE = PIXELS.astype(np.uint16) * 16
PLANES = [np.ascontiguousarray(WIDE[..., channel]).tobytes() for channel in range(3)]
OPAQUE = np.full((60, 80, 1), 255, np.uint8)
BASELINE = saved(PICTURE, "JPEG")
PROGRESSIVE = saved(PICTURE, "JPEG", progressive=True)

# Name: file, pixels to expect, largest difference.
EXACT = {
    "PNG": (saved(PICTURE), PIXELS),
    "BMP": (saved(PICTURE, "BMP"), PIXELS),
    "PPM": (saved(PICTURE, "PPM"), PIXELS),
    "WebP": (saved(PICTURE, "WEBP", lossless=True), PIXELS),
    "JPEG 2000": (saved(PICTURE, "JPEG2000"), PIXELS),
    "GIF": (saved(PICTURE.quantize(64, dither=Image.Dither.NONE), "GIF"),
            np.asarray(PICTURE.quantize(64, dither=Image.Dither.NONE).convert("RGB"))),
    "TIFF": (saved(PICTURE, "TIFF"), PIXELS),
    "TIFF, LZW": (saved(PICTURE, "TIFF", compression="tiff_lzw"), PIXELS),
    "TIFF, fax": (saved(PICTURE.convert("1"), "TIFF", compression="group4"),
                  np.asarray(PICTURE.convert("1").convert("RGB"))),
    "TIFF, 16 bits": (tiff(80, 60, [WIDE.tobytes()], 16), PIXELS),
    "TIFF, 16 bits, planes": (tiff(80, 60, PLANES, 16, planes=True), PIXELS),
    "TIFF, 16 bits, grey": (tiff(80, 60, PLANES[:1], 16, 1), GREY),
    "PNG, 16 bits": (imagecodecs.png_encode(WIDE), PIXELS),
    "PNG, 16 bits, alpha": (imagecodecs.png_encode(np.dstack([WIDE, OPAQUE.astype(np.uint16) * 257])), PIXELS),
    "PNG, 16 bits, grey": (saved(WIDE[..., 0].copy()), GREY),
    "PNG, palette": (saved(PICTURE.quantize(200)), np.asarray(PICTURE.quantize(200).convert("RGB"))),
    "1 bit": (saved(PICTURE.convert("1")), np.asarray(PICTURE.convert("1").convert("RGB"))),
    "RGBA": (saved(np.dstack([PIXELS, OPAQUE])), PIXELS),
    "LA": (saved(Image.merge("LA", [PICTURE.getchannel("R"), Image.new("L", (80, 60), 255)])), GREY),
    "lossless JPEG, grey": (imagecodecs.ljpeg_encode(GREY[..., 0].copy()), GREY),
    "lossless JPEG": (lossless_jpeg(PIXELS, 8), PIXELS),
    "lossless JPEG, 12 bits": (lossless_jpeg(TWELVE, 12), PIXELS),
    "lossless JPEG, 12 bits, grey": (imagecodecs.ljpeg_encode(TWELVE[..., 0].copy(), bitspersample=12), GREY),
    "lossless JPEG, 16 bits": (lossless_jpeg(WIDE, 16), PIXELS),
}


@pytest.mark.parametrize("name", EXACT)
def test_lossless_files_give_their_pixels(name):
    data, expected = EXACT[name]
    pixels = decode(data)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("options", [
    {"subsampling": "4:2:0"}, {"subsampling": "4:4:4"}, {"subsampling": "4:2:2"}, {"progressive": True},
    {"keep_rgb": True}, {"restart_marker_blocks": 3}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_equal_pillow_bit_for_bit(options, mode, monkeypatch):
    data = saved(PICTURE.convert(mode), "JPEG", quality=92, **options)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    monkeypatch.setattr(decoders, "_decode_with_pillow", None)  # simplejpeg must do it
    np.testing.assert_array_equal(decode(data), expected)
    assert np.abs(expected.astype(int) - (PIXELS if mode == "RGB" else expected)).mean() < 4


def close(data: bytes, expected: np.ndarray, mean: float) -> bool:
    return np.abs(decode(data).astype(int) - expected).mean() < mean


def test_rare_jpegs():
    assert close(imagecodecs.jpeg_encode(TWELVE, level=95, bitspersample=12), PIXELS, 1.5)
    assert close(imagecodecs.jpeg_encode(TWELVE[..., 0].copy(), level=95, bitspersample=12), GREY, 0.6)
    assert close(scan_by_scan(PICTURE), PIXELS, 4) and close(scan_by_scan(PICTURE, 30), PIXELS, 4)
    halves = np.empty((16, 16, 3), int)
    halves[:8], halves[8:] = (200, 60, 20), (30, 90, 220)
    assert np.abs(decode(ARITHMETIC_JPEG) - halves).max() <= 1


@pytest.mark.parametrize("stored", ["CMYK", "YCCK"])
def test_ink_becomes_light(stored):
    """Adobe writes 255 where there is no ink; without its marker, 0 means none."""
    light = np.full((60, 80, 1), 200, np.uint8)  # of 255: a little black
    data = imagecodecs.jpeg8_encode(np.dstack([PIXELS, light]), level=98, colorspace="CMYK", outcolorspace=stored)
    assert simplejpeg.decode_jpeg_header(data)[2] == stored
    assert close(data, PIXELS * (200 / 255), 4)
    assert close(saved(Image.new("CMYK", (30, 20), (0, 255, 255, 0)), "JPEG", quality=98), (255, 0, 0), 1)


@pytest.mark.parametrize("data, expected", [
    (saved(Image.new("RGBA", (9, 7), (200, 30, 40, 0))), (255, 255, 255)),
    (saved(Image.new("LA", (9, 7), (55, 128))), (155, 155, 155)),
    (saved(Image.new("RGB", (9, 7), (200, 30, 40)), transparency=(200, 30, 40)), (255, 255, 255)),
    (saved(Image.new("RGB", (9, 7), (200, 30, 40)).quantize(4), transparency=0), (255, 255, 255)),
    (saved(Image.new("RGB", (9, 7), (200, 30, 40)).quantize(4), "GIF", transparency=0), (255, 255, 255)),
], ids=["RGBA", "LA", "colour key", "palette", "GIF"])
def test_what_is_transparent_is_laid_on_white(data, expected):
    np.testing.assert_array_equal(decode(data), np.broadcast_to(np.uint8(expected), (7, 9, 3)))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(decode(data), np.broadcast_to(np.uint8([255, 0, 0]), (10, 20, 3)))


def test_exif_orientation_is_ignored():
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("JPEG", "PNG", "WEBP"):
            np.testing.assert_array_equal(decode(saved(PICTURE, kind, exif=exif)), decode(saved(PICTURE, kind)))


def test_bytes_between_and_behind_are_overlooked():
    expected = decode(BASELINE)
    tables = BASELINE.index(b"\xff\xdb")
    for data in (BASELINE[:-2] + b"\0\1\2" + BASELINE[-2:], BASELINE[:tables] + b"\0\1\2" + BASELINE[tables:],
                 BASELINE + b"\xff\xda" * 1000):  # a film behind the picture, say
        np.testing.assert_array_equal(decode(data), expected)


CUT = {name: data for name, (data, _) in EXACT.items()} | {
    "JPEG": BASELINE, "progressive": PROGRESSIVE, "CMYK": saved(PICTURE.convert("CMYK"), "JPEG"),
    "restarts": saved(PICTURE, "JPEG", restart_marker_blocks=3), "12 bits": imagecodecs.jpeg_encode(
        TWELVE, level=95, bitspersample=12), "TIFF of JPEG": saved(PICTURE, "TIFF", compression="jpeg"),
    "scan by scan": scan_by_scan(PICTURE), "WebP, lossy": saved(PICTURE, "WEBP"), "arithmetic": ARITHMETIC_JPEG,
}


@pytest.mark.parametrize("name", CUT)
def test_a_file_cut_short_is_rejected_or_whole(name):
    """Only what stands behind the pixels may be missing."""
    data = CUT[name]
    whole, accepted = decode(data), 0
    cuts = {*range(min(len(data), 250)), *range(0, len(data), max(1, len(data) // 150)),
            *range(len(data) - 40, len(data))}  # where the headers end, in the middle, and at the end
    for cut in sorted(cuts):
        try:
            pixels = decode(data[:cut])
        except BrokenImage:
            continue
        accepted += 1
        np.testing.assert_array_equal(pixels, whole, err_msg=f"cut at {cut} of {len(data)}")
    assert accepted < 30


@pytest.mark.parametrize("name", ["JPEG", "restarts", "CMYK"])
def test_a_jpeg_cut_short_with_an_end_behind_it(name):
    data = CUT[name]
    with pytest.raises(BrokenImage):
        decode(data[: len(data) * 3 // 4] + b"\xff\xd9")


def not_images() -> dict[str, tuple[bytes, str]]:
    floating = saved(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF")
    height = BASELINE.index(b"\xff\xc0") + 5
    four_channels = imagecodecs.jpeg8_encode(np.zeros((9, 9, 4), np.uint16), level=9, bitspersample=12)
    return {
        "empty": (b"", "empty file"),
        "zeros": (bytes(1000), "not an image of a known format"),
        "HTML": (b"<html>404</html>", "not an image of a known format"),
        "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
        "no height": (BASELINE[:height] + b"\0\0" + BASELINE[height + 2 :], "not an image of a known format"),
        "header only": (BASELINE[:200], "."),
        "float": (floating, "floating-point pixels"),
        "no data": (png(10, 10), "."),
        "frame header cut": (b"\xff\xd8\xff\xc1\0\x0b\x0c", "."),
        "12 bits, 4 channels": (four_channels, "JPEG of 12 bits with 4 channels"),
    }


@pytest.mark.parametrize("name", not_images())
def test_reasons_are_one_short_line_and_repeat(name):
    data, reason = not_images()[name]
    said = set()
    for _ in range(2):
        with pytest.raises(BrokenImage, match=reason) as caught:
            decode(data)
        said.add(str(caught.value))
    (text,) = said
    assert 0 < len(text) < 250 and "\n" not in text and " at 0x" not in text


# Of each file of a collection of odd JPEGs: the decoder that reads it, and its size; or why it is rejected.
OUTCOMES = {
    "adobe_rgb_not_ycc.jpg": ("simplejpeg", 500, 333),
    "arithmetic.jpg": ("simplejpeg", 227, 149),
    "bad_exif.jpg": ("Pillow", 500, 500),
    "big_7680x4320.jpg": ("simplejpeg", 7680, 4320),
    "cmyk_adobe0.jpg": ("Pillow", 160, 227),
    "cmyk_adobe2_ycck_pillow.jpg": ("Pillow", 100, 100),
    "cmyk_mozilla1.jpg": ("Pillow", 32, 32),
    "empty.jpg": "empty file",
    **{f"exif_orient{orientation}.jpg": ("simplejpeg", 1800, 1200) for orientation in (1, 2, 4)},
    **{f"exif_orient{orientation}.jpg": ("simplejpeg", 1200, 1800) for orientation in (6, 7)},
    "grayscale.jpg": ("simplejpeg", 128, 128),
    "huge_icc.jpg": ("simplejpeg", 425, 250),
    "imagenet_png_named_JPEG__n02105855_2933.JPEG": ("Pillow", 213, 189),
    "lossless_8bit_gray.jpg": ("Pillow", 512, 512),
    "null_height.jpg": "not an image of a known format",
    "png_named.jpg": ("Pillow", 640, 426),
    "progressive_rgb.jpg": ("simplejpeg", 320, 240),
    "strip_1000x1.jpg": ("simplejpeg", 1000, 1),
    "tiff_named.jpg": ("Pillow", 640, 475),
    "tiny_2x2.jpg": ("simplejpeg", 2, 2),
    "truncated_progressive.jpg": "truncated: ValueError: Premature end of JPEG file",
}


@pytest.mark.skipif("ALEXNET_TEST_DATA" not in os.environ, reason="ALEXNET_TEST_DATA is not set")
def test_odd_jpegs(monkeypatch):
    used = []
    with_pillow = decoders._decode_with_pillow
    monkeypatch.setattr(decoders, "_decode_with_pillow", lambda data: (used.append("Pillow"), with_pillow(data))[1])
    outcomes = {}
    for path in sorted((Path(os.environ["ALEXNET_TEST_DATA"]) / "odd-jpegs").iterdir()):
        used.clear()
        try:
            height, width, _ = decode(path.read_bytes()).shape
            outcomes[path.name] = (*(used or ["simplejpeg"]), width, height)
        except BrokenImage as error:
            outcomes[path.name] = str(error)
    assert outcomes == OUTCOMES
