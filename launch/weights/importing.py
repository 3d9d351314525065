"""From files of weights to a run."""

from __future__ import annotations

import base64
import importlib.util
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from launch.errors import UserError
from launch.weights.bundle import Bundle, write_run
from launch.weights.caffe import caffe_weights, read_mean
from model.errors import reason
from model.recipe import Recipe
from pipeline.files import read_plain
from pipeline.manifest import IMAGE_SIZE, load_manifest
from pipeline.mean import load_mean


@dataclass(frozen=True)
class Given:
    """What a file does not say of itself."""

    recipe: Recipe | None = None
    shards: Path | None = None  # for the classes and the mean image
    classes: Path | None = None  # lines of wnid and words, in the order of the labels
    mean: Path | None = None  # .npy or .binaryproto


def import_weights(file: Path, run: Path, given: Given) -> Bundle:
    """Make the run `run` of an export or Caffe's bvlc_alexnet. UserError for what is neither, or lacks something."""
    readers = {".safetensors": _read_safetensors, ".pt": _read_state_dict, ".pth": _read_state_dict,
               ".onnx": _read_onnx, ".caffemodel": _read_caffe}
    if file.suffix not in readers:
        raise UserError(f"{file}: ends in none of {', '.join(readers)}")
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    bundle = readers[file.suffix](file, given)
    write_run(bundle, run, file)
    return bundle


def _read_safetensors(file: Path, given: Given) -> Bundle:
    try:
        with safe_open(file, "pt") as opened:
            tensors, about = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}
    except Exception as error:  # of all kinds, as the damage
        raise UserError(f"{file}: no readable safetensors file ({reason(error)})") from None
    return _described(file, tensors, about["alexnet"]) if "alexnet" in about else _undescribed(file, tensors, given)


def _read_state_dict(file: Path, given: Given) -> Bundle:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of all kinds, as the damage
        raise UserError(f"{file}: no readable state_dict ({reason(error)})") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{file}: holds no state_dict, tensors by name")
    return _undescribed(file, tensors, given)


def _read_onnx(file: Path, given: Given) -> Bundle:
    if importlib.util.find_spec("onnx") is None:
        raise UserError(f"{file}: needs onnx: pip install onnx")
    import onnx

    try:
        model = onnx.load(file)
        tensors = {one.name: torch.from_numpy(onnx.numpy_helper.to_array(one).copy()) for one in model.graph.initializer
                   if one.name.partition(".")[2] in ("weight", "bias")}
    except Exception as error:  # of all kinds, as the damage
        raise UserError(f"{file}: no readable ONNX model ({reason(error)})") from None
    about = {entry.key: entry.value for entry in model.metadata_props}
    if not {"alexnet", "alexnet.mean"} <= about.keys():
        raise UserError(f"{file}: not an export of this project: its weights have no names that are known")
    try:
        tensors["mean"] = torch.from_numpy(np.frombuffer(base64.b64decode(about["alexnet.mean"]), np.float32).reshape(
            IMAGE_SIZE, IMAGE_SIZE, 3).copy())
    except ValueError as error:
        raise UserError(f"{file}: its mean image is damaged ({error}); export it anew") from None
    return _described(file, tensors, about["alexnet"])


def _read_caffe(file: Path, given: Given) -> Bundle:
    tensors, recipe = caffe_weights(file)
    if given.recipe is not None:
        raise UserError(f"{file}: says itself how it computes; leave --recipe away")
    if given.mean is None:
        raise UserError(f"{file}: name the mean image that it was trained with: --mean imagenet_mean.binaryproto")
    wnids, words = _classes(file, given)
    return Bundle(tensors, _mean(given), recipe, wnids, words)


def _described(file: Path, tensors: dict[str, Tensor], about: str) -> Bundle:
    tensors = _floats(file, tensors)
    if "mean" not in tensors:
        raise UserError(f"{file}: lacks the mean image; export it anew")
    mean = tensors.pop("mean").numpy()
    return Bundle.from_description(about, tensors, mean, file)


def _undescribed(file: Path, tensors: dict[str, Tensor], given: Given) -> Bundle:
    if given.recipe is None:
        raise UserError(f"{file}: does not say what it is; name its recipe with --recipe")
    tensors = _floats(file, tensors)
    mean = tensors.pop("mean", None)
    wnids, words = _classes(file, given)
    if given.mean is not None or given.shards is not None:
        return Bundle(tensors, _mean(given), given.recipe, wnids, words)
    if mean is None:
        raise UserError(f"{file}: holds no mean image; name one with --mean, or the shards with --shards")
    return Bundle(tensors, mean.numpy(), given.recipe, wnids, words)


def _floats(file: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """UserError for tensors of other kinds."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested or tensor.is_quantized or (
            tensor.is_complex()
        ):
            raise UserError(f"{file}: {name} is no plain array of real numbers")
    return {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}


def _classes(file: Path, given: Given) -> tuple[list[str], list[str]]:
    if given.classes is not None:
        try:
            lines = [line.split(maxsplit=1) for line in read_plain(given.classes).decode().splitlines() if line]
            wnids, words = [line[0] for line in lines], [line[1] if line[1:] else "" for line in lines]
        except (OSError, ValueError, IndexError) as error:
            raise UserError(f"{given.classes}: no lines of wnid and words ({reason(error)})") from None
    elif given.shards is not None:
        manifest, _ = load_manifest(given.shards)
        wnids, words = [c.wnid for c in manifest.classes], [c.words for c in manifest.classes]
    else:
        raise UserError(f"{file}: does not say what its classes are; name --classes FILE or --shards SHARDS")
    return wnids, words


def _mean(given: Given) -> np.ndarray:
    if given.mean is None:
        manifest, _ = load_manifest(given.shards)
        return load_mean(given.shards / manifest.mean.name)
    if given.mean.suffix == ".binaryproto":
        return read_mean(given.mean)
    try:
        array = np.load(io.BytesIO(read_plain(given.mean)), allow_pickle=False)
        if array.dtype.kind not in "fiu":
            raise ValueError(f"of {array.dtype}")
        with np.errstate(over="ignore"):  # told later: infinite
            return array.astype(np.float32)
    except Exception as error:  # of all kinds, as the damage
        raise UserError(f"{given.mean}: no readable array of real numbers ({reason(error)})") from None
