"""fit: the right part of the picture, in the right colours, from every kind of file; and what is broken is said."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from pipeline.images import BrokenImage, encode, fit
from pipeline.statistics import PixelStatistics


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def ramp(width: int, height: int) -> Image.Image:
    """Red grows with x and green with y, from 0 to 255; blue is 100."""
    pixels = np.full((height, width, 3), 100, np.uint8)
    pixels[..., 0] = np.rint(255 * (np.arange(width) + 0.5) / width)
    pixels[..., 1] = np.rint(255 * (np.arange(height) + 0.5) / height)[:, None]
    return Image.fromarray(pixels)


def texture(width: int, height: int) -> Image.Image:
    """Coloured blots, some 8 pixels wide once the picture is fitted."""
    scale = 32 / min(width, height)
    cells = np.random.default_rng(5).integers(0, 256, (round(height * scale), round(width * scale), 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("width, height", [(500, 375), (375, 500), (256, 256), (301, 257), (40, 30), (1100, 2300)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_centre_square_lies_where_it_should(width, height, kind):
    options = {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    pixels = fit(file_of(ramp(width, height), kind, **options))
    assert pixels.shape == (256, 256, 3) and pixels.dtype == np.uint8
    side = min(width, height)
    centres = (np.arange(256) + 0.5) * side / 256
    inner = slice(8, -8)  # a small picture's border is flat when enlarged
    expected_red = (255 * ((width - side) / 2 + centres) / width)[inner]
    expected_green = (255 * ((height - side) / 2 + centres) / height)[inner]
    # One pixel is 0.7 to 1 grey level, so half a pixel out of place in the mean would show.
    red_error = pixels[inner, inner, 0].mean(axis=0) - expected_red
    green_error = pixels[inner, inner, 1].mean(axis=1) - expected_green
    assert np.abs(red_error).max() < 1.5 and abs(red_error.mean()) < 0.3
    assert np.abs(green_error).max() < 1.5 and abs(green_error.mean()) < 0.3
    assert np.abs(pixels[..., 2].astype(int) - 100).mean() < 1


@pytest.mark.parametrize("width, height", [(640, 512), (1536, 1024), (1024, 2048)])
def test_equals_rescaling_the_shorter_side_then_cropping(width, height):
    image = texture(width, height)
    scale = 256 / min(width, height)
    size = (int(width * scale), int(height * scale))
    left, top = (size[0] - 256) // 2, (size[1] - 256) // 2
    reference = np.asarray(image.resize(size, Image.Resampling.LANCZOS).crop((left, top, left + 256, top + 256)))
    for data in (file_of(image, compress_level=1), file_of(image, "JPEG", quality=97, subsampling=0)):
        pixels = fit(data).astype(float)
        assert np.abs(pixels - reference).mean() < 0.8
        assert np.abs(pixels[:, 1:] - reference[:, :-1]).mean() > 6  # one pixel aside


def test_large_jpeg_decoded_smaller_matches_full_decoding():
    image = texture(2400, 1600)
    from_jpeg = fit(file_of(image, "JPEG", quality=95)).astype(float)  # decoded at half size
    assert np.abs(from_jpeg - fit(file_of(image, compress_level=1))).mean() < 0.6


def test_exif_orientation_is_ignored():
    image = ramp(400, 300)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert (fit(file_of(image, "JPEG", exif=exif)) == fit(file_of(image, "JPEG"))).all()


RED = (200, 30, 40)


@pytest.mark.parametrize("name, data, expected", [
    ("grey", file_of(Image.new("L", (300, 280), 77), "JPEG"), (77, 77, 77)),
    ("CMYK", file_of(Image.new("CMYK", (300, 280), (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
    ("CMYK black", file_of(Image.new("CMYK", (300, 280), (0, 0, 0, 255)), "JPEG"), (0, 0, 0)),
    ("16 bits", file_of(Image.fromarray(np.full((280, 300), 200 * 257, np.uint16))), (200, 200, 200)),
    ("16 bits, TIFF", file_of(Image.fromarray(np.full((280, 300), 257 * 9, np.uint16)), "TIFF"), (9, 9, 9)),
    ("palette", file_of(Image.new("RGB", (300, 280), RED).quantize(4)), RED),
    ("palette, GIF", file_of(Image.new("RGB", (300, 280), RED).quantize(4), "GIF"), RED),
    ("clear", file_of(Image.new("RGBA", (300, 280), (*RED, 0))), (255, 255, 255)),
    ("half clear", file_of(Image.new("LA", (300, 280), (55, 128))), (155, 155, 155)),
    ("colour key", file_of(Image.new("RGB", (300, 280), RED), transparency=RED), (255, 255, 255)),
    ("opaque", file_of(Image.new("RGBA", (300, 280), (*RED, 255))), RED),
    ("bitmap", file_of(Image.new("1", (300, 280), 1)), (255, 255, 255)),
    ("WebP", file_of(Image.new("RGB", (300, 280), RED), "WEBP", lossless=True), RED),
    ("BMP", file_of(Image.new("RGB", (300, 280), RED), "BMP"), RED),
    ("strip", file_of(Image.new("RGB", (1000, 1), RED)), RED),
    ("one pixel", file_of(Image.new("RGB", (1, 1), RED)), RED),
], ids=lambda value: value if isinstance(value, str) else "")
def test_every_kind_of_pixel_becomes_rgb(name, data, expected):
    pixels = fit(data)
    assert pixels.shape == (256, 256, 3)
    assert np.abs(pixels.astype(int) - expected).max() <= 1


def png_of_size(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    header = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + header + b"\0\0\0\0IDAT"


JPEG = file_of(texture(300, 200), "JPEG")


@pytest.mark.parametrize("data, reason", [
    (b"", "empty file"),
    (b"\0" * 1000, "not an image of a known format"),
    (b"<html>404</html>", "not an image of a known format"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
    (JPEG[:200], "."),
    (JPEG[: len(JPEG) // 2], "truncated"),
    (file_of(texture(300, 200))[:5000], "."),
    (png_of_size(20000, 20000), "DecompressionBombError"),
    (file_of(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF"), "floating-point"),
], ids=["empty", "zeros", "html", "postscript", "jpeg header", "half a jpeg", "part of a png", "bomb", "float"])
def test_broken_files_give_a_short_reason_that_repeats(data, reason):
    said = set()
    for _ in range(2):
        with pytest.raises(BrokenImage, match=reason) as caught:
            fit(data)
        said.add(str(caught.value))
    assert len(said) == 1
    text = said.pop()
    assert len(text) < 250 and "\n" not in text and "0x" not in text


def test_ninety_megapixels_are_read_without_a_warning():
    data = file_of(Image.new("L", (9500, 9500), 33), "JPEG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (fit(data) == 33).all()


def test_encoded_as_the_manifest_says():
    pixels = fit(JPEG)
    data = encode(pixels)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "JPEG" and image.size == (256, 256) and image.mode == "RGB"
        assert JpegImagePlugin.get_sampling(image) == 2  # 4:2:0
        with Image.open(io.BytesIO(file_of(Image.new("RGB", (8, 8)), "JPEG", quality=90))) as quality_90:
            assert image.quantization == quality_90.quantization
        assert np.abs(np.asarray(image).astype(float) - pixels).mean() < 6
    assert encode(pixels) == data


def test_statistics_equal_slow_float64():
    rng = np.random.default_rng(7)
    # Bright noise: the products of its rows come near the largest that float32 holds exactly.
    images = [rng.integers(low, 256, (256, 256, 3), dtype=np.uint8) for low in (0, 0, 250, 255, 128)]
    statistics, other = PixelStatistics(), PixelStatistics()
    for image in images[:3]:
        statistics.add(image)
    for image in images[3:]:
        other.add(image)
    statistics.merge(other)
    assert statistics.images == 5
    stack = np.stack(images).astype(np.float64)
    flat = stack.reshape(-1, 3)
    assert statistics.mean_image().dtype == np.float32
    assert (statistics.mean_image() == stack.mean(axis=0).astype(np.float32)).all()
    np.testing.assert_allclose(statistics.rgb_mean(), flat.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(statistics.rgb_covariance(), np.cov(flat.T, bias=True), rtol=1e-9)


def test_statistics_do_not_depend_on_order_and_are_exact():
    rng = np.random.default_rng(8)
    images = [rng.integers(0, 256, (256, 256, 3), dtype=np.uint8) for _ in range(4)]
    forward, backward = PixelStatistics(), PixelStatistics()
    for image in images:
        forward.add(image)
    for image in reversed(images):
        part = PixelStatistics()
        part.add(image)
        backward.merge(part)
    assert (forward.rgb_covariance() == backward.rgb_covariance()).all()
    assert (forward.mean_image() == backward.mean_image()).all()
    white = PixelStatistics()
    for _ in range(3):
        white.add(np.full((256, 256, 3), 255, np.uint8))
    assert (white.rgb_covariance() == 0).all() and (white.rgb_mean() == 255).all()


def test_an_image_far_too_wide_is_broken():
    """Under Pillow's limit of pixels, but its decoder would fail for want of memory."""
    header = struct.pack(">IIBBBBB", 170_000_000, 1, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    with pytest.raises(BrokenImage, match="170000000 x 1 pixels"):
        fit(data)
