"""What torch unpickles of what other processes have sent: data, and never a function of the sender's choice.

The agents of torchrun keep a pickle of their common state in a store; the processes of a run send each other pickles
over gloo: RPC's devices, what is to be read and written of a checkpoint.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import io
import pickle
import sys
import traceback
from types import SimpleNamespace

import torch
from torch.distributed import distributed_c10d
from torch.distributed.elastic.rendezvous import dynamic_rendezvous

from launch.errors import RunFailed

# Classes whose making does nothing else, and one function, which looks a name up in a table.
PLAIN = (set, frozenset, complex, collections.OrderedDict, datetime.datetime, datetime.timedelta, datetime.timezone,
         traceback.StackSummary, traceback.FrameSummary, torch.Size, torch.device, torch.serialization._get_layout,
         dynamic_rendezvous._RendezvousState)
RECORDS = "torch.distributed.checkpoint.", "torch.distributed.elastic.rendezvous.dynamic_rendezvous"


class DataUnpickler(pickle.Unpickler):
    """Makes PLAIN classes, the dataclasses and enumerations of RECORDS, exceptions, torch's dtypes and the like."""

    def find_class(self, module: str, name: str) -> object:
        found = vars(sys.modules.get(module, SimpleNamespace())).get(name)  # no module is imported for it
        if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)) or any(found is one for one in PLAIN):
            return found
        if isinstance(found, type) and (issubclass(found, Exception) or f"{module}.".startswith(RECORDS) and (
                dataclasses.is_dataclass(found) or issubclass(found, (enum.Enum, BaseException)))):
            return found
        if found is getattr:
            return _member
        raise pickle.UnpicklingError(f"{module}.{name} is no data: refused")


def _member(of: object, name: object) -> enum.Enum:
    """Stands in for getattr, as which Python 3.11.0 to 3.11.3 pickle the members of enumerations."""
    if isinstance(of, type) and issubclass(of, enum.Enum) and name in of.__members__:
        return of[name]
    raise pickle.UnpicklingError("getattr of what is no enumeration: refused")


def data_alone_between_processes() -> None:
    """Have c10d's collectives of objects make data alone. RunFailed where torch has another place for it."""
    _check(distributed_c10d, "_unpickler", pickle.Unpickler, DataUnpickler)
    distributed_c10d._unpickler = DataUnpickler


def data_alone_between_agents() -> None:
    """Have torchrun's agent make data alone of what its store holds. RunFailed where torch has another place for it."""
    _check(dynamic_rendezvous, "pickle", pickle, _Pickle)
    dynamic_rendezvous.pickle = _Pickle


class _Pickle:
    """Stands in for the module."""

    PickleError, dumps = pickle.PickleError, pickle.dumps

    @staticmethod
    def loads(data: bytes) -> object:
        return DataUnpickler(io.BytesIO(data)).load()


def _check(place: object, name: str, *expected: object) -> None:
    if getattr(place, name, None) not in expected:
        raise RunFailed(f"torch {torch.__version__} unpickles elsewhere what other processes send "
                        f"({place.__name__}.{name} is not there): use torch 2.11 to 2.13")
