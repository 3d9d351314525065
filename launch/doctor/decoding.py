"""Whether DALI decodes a JPEG, on the CPU and on a GPU, and with what."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from launch.doctor.finding import INSTALL, NOTE, OK, WRONG, Finding
from launch.doctor.gpus import usable

if TYPE_CHECKING:
    import numpy as np

MOST_LEVELS = 8  # of 0-255 that a decoder's rounding may make of difference


def on_cpu() -> Finding:
    return judge_pixels(_difference("cpu"))


def on_gpu() -> Finding | None:
    if not usable():
        return None
    import torch

    finding = judge_pixels(_difference("mixed"))
    return finding if finding.state == WRONG else judge_engine(_engine_serves(), torch.cuda.get_device_name(0))


def judge_pixels(difference: int) -> Finding:
    """`difference` is the largest of any level, 0-255, from Pillow's."""
    if difference > MOST_LEVELS:
        return Finding(WRONG, f"pixels differ by up to {difference} of 255 from Pillow's",
                       f"install DALI anew: {INSTALL} --force-reinstall")
    return Finding(OK, f"pixels {f'within {difference} of' if difference else 'like'} Pillow's")


def judge_engine(serves: bool, gpu: str) -> Finding:
    if not serves:
        return Finding(NOTE, "by CUDA alone: there is no JPEG engine, or it cannot be reached",
                       f"where {gpu} has one: docker run --gpus 'all,\"capabilities=compute,utility,video\"'")
    return Finding(OK, "by CUDA and the GPU's JPEG engine")


def _jpeg() -> tuple[bytes, np.ndarray]:
    """Return a picture's JPEG, and its pixels as Pillow has them, uint8 [256, 256, 3]."""
    import numpy as np
    from PIL import Image

    file = io.BytesIO()
    Image.merge("RGB", [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.new("L", (256, 256), 99)]).save(
        file, "JPEG")
    return file.getvalue(), np.asarray(Image.open(file))


def _difference(device: str) -> int:
    """Decode it with DALI as the loader does."""
    import numpy as np
    from nvidia.dali import fn, pipeline_def

    from pipeline.pixels.dali import DECODING, STORED, fed

    jpeg, expected = _jpeg()

    @pipeline_def(batch_size=1, num_threads=1, device_id=None if device == "cpu" else 0)
    def decode():
        (data,) = fed(lambda: [[np.frombuffer(jpeg, np.uint8)]], STORED["jpeg"])
        return fn.decoders.image(data, device=device, **DECODING)

    (output,) = decode().run()
    pixels = output.as_cpu().at(0)
    return int(np.abs(pixels.astype(int) - expected).max())


def _engine_serves() -> bool:
    """Whether the library that DALI decodes with can do so with the JPEG engine alone."""
    try:
        from nvidia import nvimgcodec

        decoder = nvimgcodec.Decoder(device_id=0, backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.HW_GPU_ONLY)])
        return decoder.decode(nvimgcodec.CodeStream(_jpeg()[0])) is not None
    except (ImportError, RuntimeError):  # the latter also where no decoder can be made of it
        return False
