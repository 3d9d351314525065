"""Checkpoints: the whole network's names and shapes, whoever wrote them.

`torch.distributed.checkpoint` reads them, safetensors of each tower's rows (`Shard(0)` of the towers of a mesh), back
into any number of processes. Loading runs no code. launch.checkpoint_writer writes them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from launch.errors import UserError
from model.errors import PeerError, reason
from pipeline.files import read_plain, sha256_of

# One process asks for `no_dist` on purpose. (For good: while a thread writes, no other way keeps torch from warning.)
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

STATE, BEST = "state.json", "best.json"


class Damaged(UserError):
    """A checkpoint that is not what was written; the one before it may be."""


def name_of(step: int) -> str:
    return f"step-{step:09d}"


def steps(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch("step-[0-9]+", path.name))


def best(folder: Path) -> Path | None:
    """Return the checkpoint with the lowest validation error so far; None where that is not known."""
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError, OverflowError):
        return folder / name_of(int(json.loads(read_plain(folder / BEST))["step"]))
    return None


def sealed(state: dict) -> bytes:
    """Return the bytes of a state.json, which tell of a change in them."""
    return json.dumps({**state, "seal": _seal(state)}, indent=1).encode()


def _seal(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def read_state(checkpoint: Path) -> dict:
    """Return what lies beside the tensors; Damaged where it is not what was written."""
    try:
        state = json.loads(read_plain(checkpoint / STATE))
        if "seal" in state and state.pop("seal") != _seal(state):  # earlier versions had none
            raise ValueError("changed since it was written")
        files = state["files"]
        if checkpoint.name != name_of(state["step"]) or not isinstance(files, dict) or not files or not all(
            re.fullmatch(r"\w[\w.-]*", name) and isinstance(digest, str) for name, digest in files.items()
        ):
            raise ValueError("of another step, or without files")
        return state
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{checkpoint / STATE}: damaged ({reason(error)})") from None


def check(checkpoint: Path) -> dict:
    """Return its state; Damaged where anything in it is not as it was written."""
    state = read_state(checkpoint)
    for name, digest in state["files"].items():
        try:
            found = sha256_of(checkpoint / name)
        except OSError as error:
            raise Damaged(f"{checkpoint / name}: cannot be read ({error.strerror})") from None
        if found != digest:
            raise Damaged(f"{checkpoint / name}: changed since it was written")
    return state


def set_aside(checkpoint: Path) -> None:
    """Rename a damaged checkpoint, whose place is wanted, to step-N.damaged."""
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
    remove(aside)
    checkpoint.rename(aside)


def remove(path: Path) -> None:
    """Remove what is in the way, a folder or a file, as far as that goes."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def load(checkpoint: Path, tensors: dict[str, Tensor], whole: dict[str, torch.Size],
         mesh: DeviceMesh | None = None) -> None:
    """Fill `tensors` (this process's part, of `mesh`'s; None: there is one process) from a checkpoint, which `check`
    has found good.

    Raises UserError where it does not fit, PeerError where another process dies meanwhile.
    """
    reader = HuggingFaceStorageReader(str(checkpoint))
    try:
        held = reader.read_metadata().state_dict_metadata
    except Exception as error:  # safetensors raises exceptions of its own
        raise UserError(f"{checkpoint}: cannot be read ({cause(error)}); remove what does not belong there") from None
    for name in tensors:
        if name not in held or held[name].size != whole[name]:
            found = list(held[name].size) if name in held else "nothing"
            raise UserError(f"{checkpoint}: does not fit this network ({name}: {list(whole[name])} wanted, {found} "
                            f"there); remove {checkpoint}")
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    try:
        dcp.load(whole_network(copies, whole, mesh), no_dist=mesh is None, storage_reader=reader)
    except dcp.CheckpointException as error:
        raise UserError(f"{checkpoint}: cannot be read ({cause(error)}); mend that, or remove it to use the one "
                        "before") from None
    except RuntimeError as error:
        if mesh is None:
            raise
        raise PeerError(f"another process died or hangs at a checkpoint ({reason(error)})") from None
    for name, tensor in tensors.items():
        tensor.copy_(copies[name])


def whole_network(tensors: dict[str, Tensor], whole: dict[str, torch.Size],
                  mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """Present this process's tensors as parts of the whole network's: of the same memory, where that is the CPU's."""
    if mesh is None:
        return dict(tensors)
    placements = [Replicate(), Shard(0) if mesh.size(1) == 2 else Replicate()]
    return {
        name: DTensor.from_local(tensor.detach(), mesh, placements, run_check=False,
                                 shape=whole[name], stride=torch.empty(whole[name], device="meta").stride())
        for name, tensor in tensors.items()
    }


def cause(error: BaseException) -> str:
    """Return in one line what went wrong first: torch's exception holds that of each process."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return reason(error)
