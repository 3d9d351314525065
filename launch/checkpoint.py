"""Checkpoints: the whole network's names and shapes, whoever wrote them.

`torch.distributed.checkpoint` writes each tower's rows (`Shard(0)` of a mesh of towers) as safetensors
and reads them back into any number of processes. Loading runs no code. A checkpoint is written under
a temporary name and renamed when it is whole, so the newest one there is always good.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from launch.errors import RunFailed, UserError
from model.errors import PeerError, reason
from pipeline.files import sha256_of, sync, write_durably

STATE = "state.json"


def save(folder: Path, step: int, tensors: dict[str, Tensor], whole: dict[str, torch.Size],
         state: dict, keep: int) -> Path:
    """Write checkpoint `folder`/step-N of this process's `tensors` (all processes call it); keep the last `keep`.

    `whole` names the whole network's shapes; `state` is JSON beside the tensors. Raises RunFailed in all
    processes where it cannot be written, PeerError where the other tower dies meanwhile.
    """
    final = folder / f"step-{step:09d}"
    temporary = folder / f"{final.name}.tmp"

    def prepare() -> None:
        for unfinished in folder.glob("step-*.tmp"):  # a kill left it
            shutil.rmtree(unfinished)
        temporary.mkdir(parents=True)

    def publish() -> None:
        files = {path.name: sha256_of(path) for path in sorted(temporary.glob("*.safetensors"))}
        write_durably(temporary / STATE, json.dumps({**state, "step": step, "files": files}, indent=1).encode())
        os.replace(temporary, final)
        sync(folder)
        for old in steps(folder)[:-keep]:
            shutil.rmtree(old)

    try:
        _on_leader(prepare)
        with _alone_without_warning():
            dcp.save(_whole_network(tensors, whole), no_dist=not dist.is_initialized(),
                     storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
        _on_leader(publish)
    except (dcp.CheckpointException, OSError) as error:
        raise RunFailed(f"{temporary}: the checkpoint cannot be written ({_cause(error)}); mend that and go on "
                        "with --resume") from None
    except RuntimeError as error:
        raise _peer_lost(error) from None
    return final


def load(checkpoint: Path, tensors: dict[str, Tensor], whole: dict[str, torch.Size]) -> None:
    """Fill `tensors` (this process's part) from `checkpoint`.

    Raises UserError where it is damaged or does not fit, PeerError where the other tower dies meanwhile.
    """
    for name, digest in read_state(checkpoint)["files"].items():
        if not (checkpoint / name).is_file() or sha256_of(checkpoint / name) != digest:
            raise UserError(f"{checkpoint / name}: missing or changed since it was written; "
                            f"remove {checkpoint} to use the one before")
    reader = HuggingFaceStorageReader(str(checkpoint))
    try:
        held = reader.read_metadata().state_dict_metadata
    except Exception as error:  # safetensors raises exceptions of its own
        raise UserError(f"{checkpoint}: cannot be read ({_cause(error)}); remove what does not belong there") from None
    for name in tensors:
        if name not in held or held[name].size != whole[name]:
            found = list(held[name].size) if name in held else "nothing"
            raise UserError(f"{checkpoint}: does not fit this network ({name}: {list(whole[name])} wanted, {found} "
                            f"there); remove {checkpoint}")
    wanted = _whole_network(tensors, whole)
    try:
        with _alone_without_warning():
            dcp.load(wanted, no_dist=not dist.is_initialized(), storage_reader=reader)
    except dcp.CheckpointException as error:
        raise UserError(f"{checkpoint}: cannot be read ({_cause(error)}); mend that, or remove it to use the one "
                        "before") from None
    except RuntimeError as error:
        raise _peer_lost(error) from None
    for name, tensor in tensors.items():
        value = wanted[name]
        tensor.copy_(value.to_local() if isinstance(value, DTensor) else value)


def steps(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))


def read_state(checkpoint: Path) -> dict:
    """Return what lies beside the tensors; UserError where it cannot be read."""
    try:
        state = json.loads((checkpoint / STATE).read_bytes())
        if checkpoint.name != f"step-{state['step']:09d}" or not dict(state["files"]):
            raise ValueError("of another step, or without files")
        return state
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{checkpoint / STATE}: damaged ({reason(error)}); "
                        f"remove {checkpoint} to use the one before") from None


def _whole_network(tensors: dict[str, Tensor], whole: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Present a copy of this process's tensors, in the CPU's memory, as parts of the whole network's."""
    values = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    if not dist.is_initialized():
        return values
    return {
        name: DTensor.from_local(value, _mesh(), [Shard(0)], run_check=False,
                                 shape=whole[name], stride=torch.empty(whole[name], device="meta").stride())
        for name, value in values.items()
    }


@functools.cache
def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tower",))


@contextmanager
def _alone_without_warning() -> Iterator[None]:
    """torch warns whenever `no_dist` is asked for, which one process does on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _on_leader(act: Callable[[], None]) -> None:
    """Run `act` in rank 0 while the others wait; its OSError is raised in all of them."""
    failure: list[OSError | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            act()
        except OSError as error:
            failure[0] = error
    if dist.is_initialized():
        dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]


def _peer_lost(error: RuntimeError) -> Exception:
    if not dist.is_initialized():
        return error
    return PeerError(f"the other tower died or hangs at a checkpoint ({reason(error)})")


def _cause(error: BaseException) -> str:
    """Return in one line what went wrong first: torch's exception holds that of each process."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return reason(error)
