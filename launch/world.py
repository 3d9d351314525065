"""The processes of a run: who this one is, on which device, and its exchange with the other tower."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from launch.choice import choose, graphs_by_default
from launch.environment import (
    die_with_torchrun,
    from_environment,
    keep_freed_memory,
    local_size,
    rank_and_size,
    usable_cores,
)
from launch.errors import UserError
from launch.picture_swap import GlooSwap
from launch.precision import MIXED
from model.errors import PeerError, reason
from model.exchange import Exchange
from model.network import AlexNet
from model.recipe import Recipe
from model.tower import build

# Rank 0 may have terabytes to hash before it speaks; if it dies meanwhile, torchrun ends the others.
FIRST_WORD = timedelta(hours=6)


@dataclass
class World:
    """One process: the whole network (`size` 1) or tower `rank` of two.

    `exchange` is None for the whole network. `threads` are for arithmetic; DALI has as many of its own.
    """

    rank: int
    size: int
    device: torch.device
    threads: int
    timeout_s: float
    transport: str
    store: dist.Store | None = None
    exchange: Exchange | None = None
    precision: str = "fp32"
    graphs: bool = False  # whether steps are replayed from CUDA graphs
    pictures: GlooSwap | None = None  # where two towers on CPUs share the decoding

    @property
    def leads(self) -> bool:
        """Whether this process writes the log, checks the input first and speaks to the user."""
        return self.rank == 0

    def agree(self, facts: dict) -> None:
        """Compare `facts` with the other tower's; UserError names those that differ, PeerError if it is silent.

        Rank 0 speaks first, so call `await_leader` before looking at input that rank 0 looks at too.
        """
        if self.size == 1:
            return
        mine, limit = _flat(facts), timedelta(seconds=self.timeout_s)
        if self.leads:
            self.store.set("facts/0", json.dumps(mine))
            theirs = json.loads(self._hear("facts/1", limit))
        else:  # heard before told: rank 0 may end, and the store with it, as soon as it knows of a difference
            theirs = json.loads(self._hear("facts/0", limit))
            self.store.set("facts/1", json.dumps(mine))
        differing = [f"{key} ({mine.get(key)} in tower {self.rank}, {theirs.get(key)} in the other)"
                     for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
        if differing:
            raise UserError(f"the two towers were started differently: {'; '.join(differing)}")

    def await_leader(self) -> None:
        """Wait until rank 0 has found its input good: a mistake is then told once."""
        if not self.leads:
            self._hear("facts/0", FIRST_WORD)

    def build(self, recipe: Recipe, classes: int, seed: int) -> AlexNet:
        """Return the whole network, or this process's tower once it is connected, on its device, in its precision."""
        network = build(recipe, classes, seed, self.exchange)
        network.mixed = MIXED.get(self.precision)
        return network.to(self.device)

    def _hear(self, key: str, limit: timedelta) -> str:
        try:
            self.store.wait([key], limit)
            return self.store.get(key).decode()
        except RuntimeError as error:
            raise PeerError(f"the other tower died, or did not speak within {limit} ({reason(error)})") from None

    def connect(self, towers: int = 2) -> None:
        """Set up the exchange. PeerError if the other tower does not join in time, UserError where there is none."""
        if self.size == 1:
            return
        if towers == 1:
            raise UserError("a network of one tower runs in one process: start it without torchrun, or with "
                            "--nproc-per-node=1 (launch/train.sh: PROCESSES=1)")
        limit = timedelta(seconds=self.timeout_s)
        try:
            dist.init_process_group("gloo", store=dist.PrefixStore("control", self.store),
                                    rank=self.rank, world_size=self.size, timeout=limit)
        except RuntimeError as error:
            raise PeerError(f"no connection to the other tower ({reason(error)})") from None
        if self.device.type == "cpu":
            self.pictures = GlooSwap(self.rank, self.timeout_s)
        if self.transport in ("rpc", "rpc-staged"):
            from model.exchange.rpc import RpcExchange

            self.exchange = RpcExchange(
                dist.PrefixStore("rpc", self.store), self.rank, self.device, self.timeout_s,
                staged=self.transport == "rpc-staged", idle_cores=usable_cores() >= 4 * local_size())
        elif self.transport == "cuda-ipc":
            from model.exchange.cuda_ipc import CudaIpcExchange

            self.exchange = CudaIpcExchange(dist.PrefixStore("ipc", self.store), self.rank, self.device, self.timeout_s)
        else:
            from model.exchange.collectives import CollectiveExchange

            group = dist.new_group(backend="nccl", timeout=limit) if self.transport == "nccl" else None
            self.exchange = CollectiveExchange(self.rank, self.timeout_s, group)


def _flat(facts: dict, prefix: str = "") -> dict[str, str]:
    """Return one JSON text a fact, so that a difference deep inside is named alone."""
    flat: dict[str, str] = {}
    for key, value in facts.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: json.dumps(value)}
    return flat


@contextmanager
def join_world(device: str | None, transport: str, timeout_s: float, threads: int | None,
               precision: str | None = None, graphs: bool | None = None) -> Iterator[World]:
    """Join the processes that torchrun started (or be alone), and part from them.

    `graphs` is whether to replay training steps from CUDA graphs; None: as by `graphs_by_default`. UserError for more
    than two processes, or a device, transport or precision that is not to be had here.
    """
    rank, size = rank_and_size()
    if size > 2:
        raise UserError(f"{size} processes: the network has two towers, so start 1 or 2 (torchrun --nproc-per-node)")
    die_with_torchrun()
    keep_freed_memory()
    chosen, precision = choose(device, transport, precision, local_size())
    if transport == "cuda-ipc" and local_size() != size:
        raise UserError("--transport cuda-ipc joins processes of one host: use rpc")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    threads = threads or max(1, usable_cores() // local_size())
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True  # shapes hardly change: cuDNN is to try which convolution is fastest
    if graphs and chosen.type == "cpu":
        raise UserError("--graphs is of GPUs: leave it out, or use --device cuda")
    graphs = graphs_by_default(chosen, transport, size) if graphs is None else graphs
    world = World(rank, size, chosen, threads, timeout_s, transport, _store(rank, size, timeout_s),
                  precision=precision, graphs=graphs)
    yield world
    # Not in a `finally`: after an error the peer may be dead or hang, and nothing is to be waited for.
    if world.exchange is not None:
        world.exchange.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def _store(rank: int, size: int, timeout_s: float) -> dist.Store | None:
    """Return torchrun's store, apart from what an earlier attempt of an elastic restart left in it."""
    if size == 1:
        return None
    if local_size() == size:  # one host: nobody else is to reach these ports
        os.environ.setdefault("TP_SOCKET_IFNAME", "lo")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if missing := {"MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
        raise UserError(f"WORLD_SIZE is {size}, but {' and '.join(sorted(missing))} are not set: start with torchrun")
    served_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], from_environment("MASTER_PORT", 0, 1, 65535)
    try:
        store = dist.TCPStore(address, port, size, is_master=rank == 0 and not served_by_agent,
                              timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise PeerError(f"{address}:{port}: no other tower to be met there ({reason(error)})") from None
    return dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
