"""Stores that only this host can reach.

torch's own listen on every address of it, and whoever reaches one can stop the run, or send its processes elsewhere.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from datetime import timedelta

import torch
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend, static_tcp_rendezvous

LOOPBACK = "127.0.0.1"


def loopback_store(port: int, processes: int, serves: bool, timeout: timedelta) -> TCPStore:
    """Return the store of so many processes of one host, which the one that `serves` has at `port` of the loopback
    address. RuntimeError where they do not all come, or the port is taken."""
    return _store(LOOPBACK, port, processes, serves, timeout)


def keep_agents_on_loopback() -> None:
    """Have torchrun's agent listen on the loopback address alone where its endpoint is one, as with --standalone."""
    for place in (c10d_rendezvous_backend, static_tcp_rendezvous):
        if getattr(place, "TCPStore", None) in (TCPStore, _store):
            place.TCPStore = _store
        else:
            print(f"alexnet: note: torch {torch.__version__} makes torchrun's store elsewhere: it listens on all "
                  "addresses of this host", file=sys.stderr)


def _store(host_name: str, port: int, world_size: int | None = None, is_master: bool = False, *rest,
           **options) -> TCPStore:
    """TCPStore, with a socket of the loopback address to listen on where that is the host."""
    address = LOOPBACK if host_name == "localhost" else host_name
    if is_master and _is_loopback(address):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            listener = socket.create_server((address, port), family=family)
        except OSError as error:
            raise RuntimeError(f"{address}:{port}: {error.strerror}") from None  # as of TCPStore
        host_name, port, options["master_listen_fd"] = address, listener.getsockname()[1], listener.detach()
    return TCPStore(host_name, port, world_size, is_master, *rest, **options)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
