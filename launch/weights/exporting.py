"""From a run to files that other programs read."""

from __future__ import annotations

import base64
import importlib.util
import io
import logging
import pprint
import warnings
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from launch.errors import UserError
from launch.weights import standalone
from launch.weights.bundle import Bundle, bundle_of_run
from pipeline.files import write_durably

KINDS = {".safetensors": "weights", ".pt": "weights, a plain state_dict", ".onnx": "the network with its weights",
         ".py": "its code, which loads the first two"}
_OF_THE_CODE = ("kernels", "neurons", "towers", "joined", "left_out", "activation", "pool_size", "lrn_k", "lrn_n",
                "lrn_alpha", "lrn_beta", "lrn_across_towers", "lrn_before_relu", "map_norm", "dropout", "pixel_scale",
                "crop")


def export(run: Path, file: Path, best: bool = False) -> int:
    """Write the newest checkpoint of `run`, or the best, to `file`, whose ending says as what (KINDS); return its step.
    UserError for others, or where packages are missing."""
    write = {".safetensors": _write_safetensors, ".pt": _write_state_dict, ".onnx": _write_onnx, ".py": _write_code}
    if file.suffix not in write:
        raise UserError(f"{file}: ends in none of {', '.join(KINDS)}; the ending says what is written")
    if not file.parent.is_dir():
        raise UserError(f"{file.parent}: no such folder; make it first")
    if file.is_dir():
        raise UserError(f"{file}: a folder; name a file")
    bundle = bundle_of_run(run, best)
    write[file.suffix](bundle, file)
    return bundle.step


def _named(bundle: Bundle) -> dict[str, Tensor]:
    return {**bundle.tensors, "mean": torch.from_numpy(bundle.mean)}


def _write_safetensors(bundle: Bundle, file: Path) -> None:
    write_durably(file, to_safetensors(_named(bundle), metadata={"format": "pt", "alexnet": bundle.describe()}))


def _write_state_dict(bundle: Bundle, file: Path) -> None:
    saved = io.BytesIO()
    torch.save(_named(bundle), saved)
    write_durably(file, saved.getvalue())


def _config(bundle: Bundle) -> dict:
    recipe = bundle.recipe.to_dict()
    return {"classes": len(bundle.wnids), **{name: recipe[name] for name in _OF_THE_CODE}}


def _write_code(bundle: Bundle, file: Path) -> None:
    code = Path(standalone.__file__).read_text(encoding="utf-8")
    config = pprint.pformat(_config(bundle), sort_dicts=False, width=110)
    write_durably(file, code.replace("CONFIG: dict = {}", f"CONFIG: dict = {config}").encode())


def _write_onnx(bundle: Bundle, file: Path) -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{file}: needs {' and '.join(missing)}: pip install onnx onnxscript")
    network = standalone.AlexNet(_config(bundle))
    network.load_state_dict(_named(bundle))
    crop = bundle.recipe.crop
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, about what it will change
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        # Not optimised, which drops biases that are 0 and would not let them come back; runtimes do that themselves.
        program = torch.onnx.export(
            network.eval(), (torch.zeros(2, 3, crop, crop),), input_names=["pixels"], output_names=["logits"],
            dynamic_shapes={"pixels": {0: torch.export.Dim("images", min=1)}}, dynamo=True, verbose=False,
            optimize=False)
    model = program.model_proto
    for key, value in (("alexnet", bundle.describe()), ("alexnet.mean", base64.b64encode(bundle.mean).decode())):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    write_durably(file, model.SerializeToString())
