"""fit: the right part of the picture, evenly averaged; what is hostile or damaged costs little, and a line says so."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from image_files import blots, lossless_jpeg, png, saved, scan_by_scan, tiff
from PIL import Image, JpegImagePlugin

from pipeline.images import BrokenImage, encode, fit

ROOT = Path(__file__).resolve().parent.parent
PICTURE = blots(80, 60)
BASELINE = saved(PICTURE, "JPEG")


def weights(side: int) -> np.ndarray:
    """Return float64 [256, side]: the part of each pixel of the picture in each of 256, by the definition.

    The side is enlarged bilinearly to the next multiple of 256, then blocks are averaged.
    """
    block = -(-side // 256)
    places = np.clip((np.arange(256 * block) + 0.5) * side / (256 * block) - 0.5, 0, side - 1)
    enlarging = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(side)))
    return enlarging.reshape(256, block, side).mean(axis=1)


@pytest.mark.parametrize("width, height", [(500, 375), (375, 500), (257, 301), (258, 257), (511, 900), (512, 512),
                                           (1283, 769), (1024, 2048), (3001, 1999)])
def test_shrinking_averages_blocks_of_the_centre_square(width, height):
    pixels = blots(width, height)
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side].astype(np.float64)
    reference = np.einsum("yh,hwc,xw->yxc", weights(side), square, weights(side), optimize=True)
    fitted = fit(saved(pixels, compress_level=1))
    assert fitted.shape == (256, 256, 3) and fitted.dtype == np.uint8
    assert np.abs(fitted - reference).max() <= 1
    assert np.abs(fitted - reference).mean() < 0.35  # rounding alone is 0.25


@pytest.mark.parametrize("width, height, top, left", [(256, 256, 0, 0), (256, 301, 22, 0), (999, 256, 0, 371)])
def test_a_side_of_256_is_cut_and_not_resampled(width, height, top, left):
    pixels = blots(width, height)
    np.testing.assert_array_equal(fit(saved(pixels)), pixels[top : top + 256, left : left + 256])


@pytest.mark.parametrize("width, height", [(40, 30), (255, 300), (128, 128), (17, 90)])
def test_enlarging_keeps_the_place(width, height):
    side = min(width, height)
    ramp = np.full((height, width, 3), 100, np.uint8)
    ramp[..., 0] = np.rint(255 * (np.arange(width) + 0.5) / width)
    ramp[..., 1] = np.rint(255 * (np.arange(height) + 0.5) / height)[:, None]
    fitted = fit(saved(ramp)).astype(float)
    centres = (np.arange(256) + 0.5) * side / 256
    border = 256 // side * 2 + 1  # flat, for want of neighbours
    inner = slice(border, -border)
    red = 255 * ((width - side) // 2 + centres) / width
    green = 255 * ((height - side) // 2 + centres) / height
    assert np.abs(fitted[inner, inner, 0] - red[inner]).max() < 1.6
    assert np.abs(fitted[inner, inner, 1] - green[inner, None]).max() < 1.6
    assert abs((fitted[inner, inner, 0] - red[inner]).mean()) < 0.3  # half a pixel aside is 0.5 or more
    assert (fitted[..., 2] == 100).all()


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1000, 1), (1, 1000)])
def test_tiny_pictures_and_strips(size):
    fitted = fit(saved(Image.new("RGB", size, (200, 30, 40))))
    np.testing.assert_array_equal(fitted, np.broadcast_to(np.uint8([200, 30, 40]), (256, 256, 3)))


def test_encoded_as_the_manifest_says():
    pixels = fit(saved(blots(300, 280)))
    data = encode(pixels)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "JPEG" and image.size == (256, 256) and image.mode == "RGB"
        assert JpegImagePlugin.get_sampling(image) == 2  # 4:2:0
        with Image.open(io.BytesIO(saved(PICTURE, "JPEG", quality=90))) as quality_90:
            assert image.quantization == quality_90.quantization
        error = np.square(np.asarray(image).astype(float) - pixels).mean()
    assert 10 * np.log10(255**2 / error) > 36  # dB
    assert encode(pixels) == data


def resized(data: bytes, place: int, code: str, *size: int | bytes) -> bytes:
    new = struct.pack(code, *size)
    return data[:place] + new + data[place + len(new) :]


def bombs() -> dict[str, bytes]:
    jpeg = BASELINE.index(b"\xff\xc0") + 5
    twelve = imagecodecs.jpeg_encode(PICTURE.astype(np.uint16), level=90, bitspersample=12)
    lossless = lossless_jpeg(PICTURE.astype(np.uint16), 16)
    codestream = saved(PICTURE, "JPEG2000", no_jp2=True)
    jp2 = saved(PICTURE, "JPEG2000")
    gif = resized(saved(PICTURE, "GIF"), 6, "<HH", 65535, 65535)
    webp = saved(PICTURE, "WEBP", save_all=True, append_images=[Image.new("RGB", (80, 60))])
    scans = scan_by_scan(Image.fromarray(PICTURE), 1500)
    second = scans.index(b"\xff\xda", scans.index(b"\xff\xda") + 2)
    full = saved(PICTURE, "JPEG", subsampling=0)
    canvas = (16382).to_bytes(3, "little") * 2  # less 1
    return {
        "JPEG": resized(BASELINE, jpeg, ">HH", 65535, 65535)[:700],
        "JPEG, 12 bits": resized(twelve, twelve.index(b"\xff\xc1") + 5, ">HH", 65535, 65535),
        "JPEG, 16 bits": resized(lossless, lossless.index(b"\xff\xc3") + 5, ">HH", 65535, 65535),
        "PNG": png(60_000, 60_000, chunks=((b"IDAT", zlib.compress(bytes(1000))),)),
        "PNG, a line": png(170_000_000, 1, chunks=((b"IDAT", zlib.compress(bytes(1000))),)),
        "TIFF": tiff(65535, 65535, [zlib.compress(bytes(1000))], 8, deflated=True),
        "TIFF, 101 million": tiff(101_000, 1000, [zlib.compress(bytes(1000))], 8, deflated=True),
        "TIFF, tile": tiff(10, 10, [zlib.compress(bytes(30720 * 30720))], 8, 1, deflated=True, tile=(30720, 30720)),
        "GIF": gif,
        "GIF, frame": resized(gif, gif.index(b",\0\0\0\0") + 5, "<HH", 65535, 65535),
        "WebP": resized(webp, webp.index(b"VP8X") + 12, "6s", canvas),
        "BMP": resized(saved(PICTURE, "BMP"), 18, "<ii", 60_000, 60_000),
        "PPM": b"P6 60000 60000 255\n" + bytes(100),
        "PPM, text": b"P3 60000 60000 255\n" + b"1 " * 100,
        "JPEG 2000": resized(codestream, 8, ">II", 60_000, 60_000),
        "JP2": resized(resized(jp2, jp2.index(b"ihdr") + 4, ">II", 60_000, 60_000),
                       jp2.index(b"\xff\x4f\xff\x51") + 8, ">II", 60_000, 60_000),
        "JPEG, 3,000 scans": many_scans(3000),
        "JPEG, 1,500 scans a component": scans,
        "JPEG, the second of all components": scans[:second] + full[full.rindex(b"\xff\xda") : -2] + scans[second:],
        "JPEG, baseline, 3,000 scans": many_scans(3000, progressive=False),
        "PNG, text": png(10, 10, chunks=((b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 1)),
                                         (b"IDAT", zlib.compress(bytes(310))))),
    }


def many_scans(scans: int, progressive: bool = True) -> bytes:
    data = saved(PICTURE, "JPEG", progressive=progressive)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def test_bombs_are_refused_at_once_and_without_memory(tmp_path):
    cases = bombs()
    (tmp_path / "bombs").write_bytes(pickle.dumps(cases))
    program = """
import json, pickle, resource, sys, time
from pathlib import Path
from pipeline.images import BrokenImage, fit
cases = pickle.loads(Path(sys.argv[1]).read_bytes())
import imagecodecs  # takes time and memory of its own
for name, data in cases.items():
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
    try:
        outcome = f"read: {fit(data).shape}"
    except BrokenImage as error:
        outcome = str(error)
    after, stop = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
    print(json.dumps([name, outcome, stop - start, (after.ru_maxrss - before.ru_maxrss) / 1024]))
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "bombs"], capture_output=True, text=True,
                          timeout=60, cwd=ROOT, check=True)
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in outcomes] == list(cases) and done.stderr == ""
    for name, outcome, seconds, megabytes in outcomes:
        assert not outcome.startswith("read"), name
        assert seconds < 0.5 and megabytes < 30, (name, outcome, seconds, megabytes)


def test_what_needs_too_much_memory_is_rejected_and_does_not_end_the_run():
    program = """
import io, resource, sys
from pathlib import Path
from PIL import Image
from pipeline.images import BrokenImage, fit
kinds = {"baseline": {}, "progressive": {"progressive": True}}
for name, options in kinds.items():
    buffer = io.BytesIO()
    Image.new("RGB", (4000, 3000)).save(buffer, "JPEG", **options)
    outcomes = []
    for megabytes in range(10, 151, 5):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 1_000_000, resource.RLIM_INFINITY))
        try:
            outcomes.append(str(fit(buffer.getvalue()).shape))
        except BrokenImage as error:
            outcomes.append(str(error))
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(name, *dict.fromkeys(outcomes), sep=": ")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.splitlines() == ["baseline: needs too much memory: (256, 256, 3)",
                                        "progressive: needs too much memory: (256, 256, 3)"], done.stderr


def test_many_scans_up_to_the_limit_are_read():
    assert fit(many_scans(80)).shape == (256, 256, 3)


def test_of_thousands_of_frames_only_the_first_is_read():
    once = saved(blots(8, 8), "GIF")
    frame = once[once.index(b",\0\0\0\0") : -1]
    data = once[:-1] + frame * 30_000 + b";"
    with Image.open(io.BytesIO(once[:-1] + frame * 3 + b";")) as image:
        assert image.n_frames == 4
    start = time.process_time()
    np.testing.assert_array_equal(fit(data), fit(once))
    assert time.process_time() - start < 0.2


FILES = {
    "JPEG": BASELINE,
    "JPEG, progressive": saved(PICTURE, "JPEG", progressive=True),
    "JPEG, CMYK": saved(Image.fromarray(PICTURE).convert("CMYK"), "JPEG"),
    "JPEG, 12 bits": imagecodecs.jpeg_encode(PICTURE.astype(np.uint16) * 16, level=90, bitspersample=12),
    "JPEG, lossless": lossless_jpeg(PICTURE.astype(np.uint16) * 257, 16),
    "PNG": saved(PICTURE),
    "GIF": saved(PICTURE, "GIF"),
    "BMP": saved(PICTURE, "BMP"),
    "PPM": saved(PICTURE, "PPM"),
    "TIFF": saved(PICTURE, "TIFF"),
    "TIFF, LZW": saved(PICTURE, "TIFF", compression="tiff_lzw"),
    "WebP": saved(PICTURE, "WEBP"),
    "WebP, lossless": saved(PICTURE, "WEBP", lossless=True),
    "JPEG 2000": saved(PICTURE, "JPEG2000"),
}
DAMAGED = 3000


def outcome(data: bytes) -> bytes | str:
    try:
        pixels = fit(data)
    except BrokenImage as error:
        return str(error)
    assert pixels.shape == (256, 256, 3) and pixels.dtype == np.uint8
    return pixels.tobytes()


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_give_pixels_or_a_line_and_the_same_again(name, capfd):
    whole, rng = FILES[name], np.random.default_rng(list(name.encode()))
    read = 0
    for _ in range(DAMAGED // len(FILES)):
        data = bytearray(whole)
        # Half of the flips hit the first bytes, where the headers are.
        for place in rng.integers(0, rng.choice([len(data), min(len(data), 300)]), rng.integers(1, 5)):
            data[place] ^= 1 << rng.integers(8)
        if rng.random() < 0.3:
            del data[rng.integers(len(data)) :]
        first = outcome(bytes(data))
        assert first == outcome(bytes(data))
        if isinstance(first, str):
            assert 0 < len(first) < 250 and first.isprintable() and " at 0x" not in first
        else:
            read += 1
    assert read < DAMAGED // len(FILES)
    assert capfd.readouterr() == ("", "")
