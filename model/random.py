"""Random numbers as a function of named keys, so that nothing random needs saving or sending."""

from __future__ import annotations

import hashlib

import torch


def generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """Return a generator on `device` that depends on `key` alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
