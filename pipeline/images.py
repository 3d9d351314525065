"""One image file to 256x256 RGB pixels, and those to the JPEG that the shards hold."""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
from PIL import Image

from pipeline.manifest import IMAGE_SIZE

ENCODING = "jpeg, quality 90, 4:2:0"
# Pictures of pixels only: Pillow would start Ghostscript for others.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000")
LONGEST_SIDE = 65535  # pixels, JPEG's own limit; far wider ones make Pillow's decoders run out of memory
# Pillow itself refuses to decode more than about 179 million pixels (twice Image.MAX_IMAGE_PIXELS).


class BrokenImage(ValueError):
    """Bytes that are no picture. The message is a short reason."""


def fit(data: bytes) -> np.ndarray:
    """Decode an image file, rescale its shorter side to 256 and cut out the centre: uint8 [256, 256, 3], RGB.

    Pixels are taken as stored: EXIF orientation and colour profiles are ignored, as Caffe and torchvision do.
    Grey and palette become RGB, CMYK too (inverted, as Adobe writes it), 16-bit samples lose their low byte,
    what is transparent is laid on white. Raises BrokenImage.
    """
    if not data:
        raise BrokenImage("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, and sizes below the limit
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if max(image.size) > LONGEST_SIDE:
                    raise BrokenImage(f"{image.width} x {image.height} pixels")
                # A large JPEG is decoded at 1/2, 1/4 or 1/8, yet with twice the pixels that are needed.
                image.draft(None, (2 * IMAGE_SIZE, 2 * IMAGE_SIZE))
                image.load()
                return _fit(_to_rgb(image))
    except (BrokenImage, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise BrokenImage("not an image of a known format") from None
    except Exception as error:  # Pillow's readers fail in many ways on damaged files
        # A reason must not differ from run to run, so no addresses.
        reason = re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split()))[:200]
        raise BrokenImage(f"{type(error).__name__}: {reason}") from None


def _fit(image: Image.Image) -> np.ndarray:
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    square = (left, top, left + side, top + side)
    return np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box=square))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BrokenImage("floating-point pixels, whose range is not known")
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        levels = np.clip(np.asarray(image), 0, 65535) // 257
        image = Image.fromarray(levels.astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def encode(pixels: np.ndarray) -> bytes:
    """Compress uint8 [H, W, 3] RGB as ENCODING says."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90, subsampling="4:2:0")
    return file.getvalue()
