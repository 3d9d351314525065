"""What a peer can have this process run over RPC: the functions of a list, given numbers, text and tensors.

torch pickles calls and answers, and to unpickle is to run whatever the sender wrote. Here both are JSON, beside which
the tensors travel as torch sends them anyway. A process without this understands no message of one that has it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.distributed.rpc import api, internal

from model.errors import PeerError

# RPC's own: how it starts and ends together, with no more than the towers' names and None.
_OF_RPC = "_gather_to_leader", "_broadcast_to_followers"
_listed: dict[str, Callable] = {}


def allow_only(*functions: Callable) -> None:
    """Have RPC send and take calls of `functions` alone. Called before RPC starts, which keeps what it finds.

    PeerError where torch has not the places for it that 2.11 to 2.13 have.
    """
    for place, names in ((internal, ("serialize", "deserialize", "PythonUDF", "RemoteException")),
                         (api, ("_default_pickler", *_OF_RPC))):
        for name in names:
            if not hasattr(place, name):
                raise PeerError(f"torch {torch.__version__}: what the other tower runs here cannot be kept to a list "
                                f"(no {place.__name__}.{name}): use another --transport, or torch 2.11 to 2.13")
    functions += tuple(getattr(api, name) for name in _OF_RPC)
    _listed.clear()
    _listed.update({function.__name__: function for function in functions})
    internal.serialize, internal.deserialize = _serialize, _deserialize  # which RPC's C++ side takes by these names
    api._default_pickler = SimpleNamespace(serialize=_serialize)


def _serialize(message: object) -> tuple[bytes, list[Tensor]]:
    """Return JSON, and the tensors that it refers to by number, of a call, an error or a result."""
    tensors: list[Tensor] = []

    def encode(value: object) -> dict:
        if isinstance(value, Tensor):
            tensors.append(value)
            return {"tensor": len(tensors) - 1}
        if isinstance(value, set):
            return {"set": sorted(value)}
        raise TypeError(f"{type(value).__name__} does not travel")

    if isinstance(message, internal.PythonUDF):
        if _listed.get(message.func.__name__) is not message.func or message.kwargs:
            raise ValueError(f"{message.func.__name__} is not on the list, or is given keywords")
        fields = {"call": message.func.__name__, "arguments": list(message.args)}
    elif isinstance(message, internal.RemoteException):
        fields = {"error": message.msg}
    else:
        fields = {"result": message}
    return json.dumps(fields, default=encode).encode(), tensors


def _deserialize(message: bytes, tensors: list[Tensor]) -> object:
    """Return what `_serialize` was given; for anything else an AttributeError, which RPC raises in place of a call."""

    def decode(fields: dict) -> object:
        if fields.keys() == {"tensor"}:
            return tensors[fields["tensor"]]
        return set(fields["set"]) if fields.keys() == {"set"} else fields

    try:
        fields = json.loads(message, object_hook=decode)
        if "call" in fields:
            return internal.PythonUDF(_listed[fields["call"]], fields["arguments"], {})
        return internal.RemoteException(fields["error"], RuntimeError) if "error" in fields else fields["result"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return AttributeError("no call or answer that is on the list: nothing was run")
