"""Precisions of convolutions and matrix products. Weights, momentum and the update are float32 in all of them."""

from __future__ import annotations

import torch

from launch.errors import UserError

MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}  # what autocast makes of the factors


def choose_precision(name: str | None, device: torch.device) -> str:
    """Return the precision to run in (fp32, tf32, bf16, fp16) and set torch's switches for it.

    By default it is fp32 on a CPU and tf32 on a GPU. Raises UserError for one that `device` has not.
    """
    on_gpu = device.type == "cuda"
    name = name or ("tf32" if on_gpu else "fp32")
    if not on_gpu and name in ("tf32", "fp16"):
        raise UserError(f"--precision {name} is of GPUs: on a CPU there are fp32 and bf16")
    if on_gpu and name == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"--precision bf16: {torch.cuda.get_device_name(device)} has no such arithmetic; use fp16")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name != "fp32"
    return name
