"""The processes of a run: who this one is, on which device, and its exchange with the other tower."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from launch.addresses import address_of, interface_towards, warning_about
from launch.choice import choose, graphs_by_default
from launch.environment import (
    allow_open_files,
    die_with_torchrun,
    from_environment,
    keep_freed_memory,
    local_size,
    rank_and_size,
    restarts,
    tell_ending,
    usable_cores,
)
from launch.errors import UserError
from launch.heartbeat import Heartbeat
from launch.loopback import loopback_store
from launch.picture_swap import GlooSwap
from launch.precision import MIXED
from launch.unpickling import data_alone_between_processes
from model.errors import PeerError, reason
from model.exchange import Exchange
from model.network import AlexNet
from model.recipe import Recipe
from model.tower import build

# Rank 0 may have terabytes to hash before it speaks; if it dies meanwhile, torchrun ends the others.
FIRST_WORD = timedelta(hours=6)
# Rank 0 may write and hash for minutes while the others wait beside their training; a death is told at once.
WRITING = timedelta(hours=1)


@dataclass
class World:
    """One process: of the mesh (replica, tower), rank = towers * replica + tower.

    A network is held by two processes, a tower in each, or by one: where there is only one, or each holds the `whole`
    of it. Several replicas train on an equal part of every batch each. `exchange` is the link to the other tower, None
    for the whole network. `threads` are for arithmetic; DALI has as many of its own.
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
    whole: bool = False
    mesh: DeviceMesh | None = None  # of the CPUs' memory; once connected, where there are several processes
    gradients: dist.ProcessGroup | None = None  # of this part's replicas; None where there is one
    writing: dist.ProcessGroup | None = None  # of all, for what goes on beside the training
    heartbeat: Heartbeat | None = None  # where there are several processes

    @property
    def leads(self) -> bool:
        """Whether this process writes the log, checks the input first and speaks to the user."""
        return self.rank == 0

    @property
    def towers(self) -> int:
        """The number of processes that hold one network."""
        return 1 if self.size == 1 or self.whole else 2

    @property
    def replicas(self) -> int:
        return self.size // self.towers

    @property
    def replica(self) -> int:
        return self.rank // self.towers

    def agree(self, facts: dict) -> None:
        """Compare `facts` with rank 0's; UserError names those that differ, PeerError if a process is silent.

        Rank 0 speaks first, so call `await_leader` before looking at input that rank 0 looks at too.
        """
        if self.size == 1:
            return
        mine, limit = _flat(facts), timedelta(seconds=self.timeout_s)
        told = {}
        if self.leads:
            self.store.set("facts/0", json.dumps(mine))
            told = {rank: json.loads(self._hear(f"facts/{rank}", limit)) for rank in range(1, self.size)}
        else:  # heard before told: rank 0 may end, and the store with it, as soon as it knows of a difference
            told[0] = json.loads(self._hear("facts/0", limit))
            self.store.set(f"facts/{self.rank}", json.dumps(mine))
        differing = [f"{key} ({mine.get(key)} in process {self.rank}, {theirs.get(key)} in process {rank})"
                     for rank, theirs in told.items()
                     for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
        if differing:
            raise UserError(f"the processes were started differently: {'; '.join(differing)}")

    def await_leader(self) -> None:
        """Wait until rank 0 has found its input good: a mistake is then told once."""
        if not self.leads:
            self._hear("facts/0", FIRST_WORD)

    def build(self, recipe: Recipe, classes: int, seed: int) -> AlexNet:
        """Return the whole network, or this process's tower once it is connected, on its device, in its precision."""
        network = build(recipe, classes, seed, self.exchange)
        network.mixed = MIXED.get(self.precision)
        network.take_part(self.replica, self.replicas)
        return network.to(self.device)

    def averaged(self, network: AlexNet) -> nn.Module | None:
        """Return what is to take training steps for `network` where it has replicas: their gradients are averaged, a
        few layers' at a time, while the backward pass goes on."""
        if self.gradients is None:
            return None
        # After its first step DDP would sum in another order, unless it looks for unused parameters (there are none): a
        # resumed run would not be the same.
        return DistributedDataParallel(network, process_group=self.gradients, gradient_as_bucket_view=True,
                                       find_unused_parameters=True)

    def gather(self, numbers: list[float]) -> list[list[float]]:
        """Return the numbers of every process, as many in each, by rank. PeerError where one does not give them in
        time."""
        if self.size == 1:
            return [numbers]
        mine = torch.tensor(numbers, dtype=torch.float64)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            dist.all_gather(gathered, mine)
        except RuntimeError as error:
            raise PeerError(f"another process died or hangs ({reason(error)})") from None
        return [one.tolist() for one in gathered]

    def _hear(self, key: str, limit: timedelta) -> str:
        try:
            self.store.wait([key], limit)
            return self.store.get(key).decode()
        except RuntimeError as error:
            raise PeerError(f"another process died, or did not speak within {limit} ({reason(error)})") from None

    def connect(self, towers: int = 2) -> None:
        """Set up the groups and the exchange. PeerError if a process does not join in time, UserError where there is
        nothing to exchange."""
        if self.size == 1:
            return
        if towers == 1 and self.towers == 2:
            raise UserError("a network of one tower runs in one process: start it without torchrun, or with "
                            "--nproc-per-node=1 (launch/train.sh: PROCESSES=1), or train --whole")
        limit = timedelta(seconds=self.timeout_s)
        data_alone_between_processes()
        try:
            dist.init_process_group("gloo", store=dist.PrefixStore("control", self.store),
                                    rank=self.rank, world_size=self.size, timeout=limit)
            self.mesh = init_device_mesh("cpu", (self.replicas, self.towers), mesh_dim_names=("replica", "tower"))
            self.writing = dist.new_group(backend="gloo", timeout=WRITING)
            pairs = [self.mesh.mesh[replica].tolist() for replica in range(self.replicas)]
            if self.replicas > 1:
                self.gradients = self._gradients(limit)
        except RuntimeError as error:
            raise PeerError(f"no connection to the other processes ({reason(error)})") from None
        if self.towers == 1:
            return
        tower = self.rank % 2
        store = dist.PrefixStore(f"pair{self.replica}", self.store)
        if self.device.type == "cpu":
            self.pictures = GlooSwap(tower, _own(pairs, self.rank, "gloo", limit), self.timeout_s)
        if self.transport in ("rpc", "rpc-staged"):
            from model.exchange.rpc import RpcExchange

            self.exchange = RpcExchange(
                dist.PrefixStore("rpc", store), tower, self.device, self.timeout_s,
                staged=self.transport == "rpc-staged", idle_cores=usable_cores() >= 4 * local_size())
        elif self.transport == "cuda-ipc":
            from model.exchange.cuda_ipc import CudaIpcExchange

            self.exchange = CudaIpcExchange(dist.PrefixStore("ipc", store), tower, self.device, self.timeout_s)
        else:
            from model.exchange.collectives import CollectiveExchange

            self.exchange = CollectiveExchange(tower, self.timeout_s, _own(pairs, self.rank, self.transport, limit))

    def _gradients(self, limit: timedelta) -> dist.ProcessGroup:
        """Return the group of this part's replicas: NCCL's where each process of all hosts has a GPU of its own."""
        own_gpu = self.device.type == "cuda" and torch.cuda.device_count() >= local_size()
        if not all(own for own, in self.gather([own_gpu])):
            return self.mesh.get_group("replica")
        parts = [self.mesh.mesh[:, tower].tolist() for tower in range(self.towers)]
        return _own(parts, self.rank, "nccl", limit)


def _own(parts: list[list[int]], rank: int, backend: str, limit: timedelta) -> dist.ProcessGroup:
    """Make a group of each of `parts`, which all processes do alike; return the one that `rank` is in."""
    groups = [dist.new_group(ranks, backend=backend, timeout=limit) for ranks in parts]
    return next(group for ranks, group in zip(parts, groups) if rank in ranks)


def _flat(facts: dict, prefix: str = "") -> dict[str, str]:
    """Return one JSON text a fact, so that a difference deep inside is named alone."""
    flat: dict[str, str] = {}
    for key, value in facts.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: json.dumps(value)}
    return flat


@contextmanager
def join_world(device: str | None, transport: str, timeout_s: float, threads: int | None,
               precision: str | None = None, graphs: bool | None = None, replicas: bool = False,
               whole: bool = False) -> Iterator[World]:
    """Join the processes that torchrun started (or be alone), and part from them.

    `graphs` is whether to replay training steps from CUDA graphs; None: as by `graphs_by_default`. `replicas` says that
    there may be several of the network, `whole` that each process holds all of it. UserError for numbers of processes,
    a device, transport or precision that are not to be had here.
    """
    rank, size = rank_and_size()
    if not whole and size > 1 and size % 2:
        raise UserError(f"{size} processes: the network has two towers, so start 1 or an even number "
                        "(torchrun --nproc-per-node), or train --whole")
    if size > 2 and not replicas:
        raise UserError(f"{size} processes: this command takes 1 or 2 (torchrun --nproc-per-node)")
    die_with_torchrun()
    if from_environment("LOCAL_RANK", 0, 0, 1 << 20) == 0:
        tell_ending(None)  # what an attempt before this one has said holds no longer
    keep_freed_memory()
    allow_open_files()
    chosen, precision = choose(device, transport, precision, local_size())
    if transport == "cuda-ipc" and local_size() % 2 and size > 1 and not whole:
        raise UserError("--transport cuda-ipc joins processes of one host: use rpc")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    threads = threads or max(1, usable_cores() // local_size())
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True  # shapes hardly change: cuDNN is to try which convolution is fastest
    if graphs and chosen.type == "cpu":
        raise UserError("--graphs is of GPUs: leave it out, or use --device cuda")
    several = size > (1 if whole else 2)
    if graphs and several:
        raise UserError("--graphs is of one network: leave it out where replicas train")
    graphs = graphs_by_default(chosen, transport, size) and not several if graphs is None else graphs
    world = World(rank, size, chosen, threads, timeout_s, transport, precision=precision, graphs=graphs, whole=whole)
    if size > 1:
        world.store, beats = _stores(rank, size, timeout_s)
        world.heartbeat = Heartbeat(beats, rank, size)
    try:
        yield world
    except BaseException:
        if world.heartbeat is not None:
            world.heartbeat.judge_no_more()  # this process has an end of its own, and may have to tell why
        raise
    # Not in a `finally`: after an error the peer may be dead or hang, and nothing is to be waited for.
    if world.heartbeat is not None and dist.is_initialized():
        world.heartbeat.part()
        world.gather([])
    if world.exchange is not None:
        world.exchange.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def _stores(rank: int, size: int, timeout_s: float) -> tuple[dist.Store, dist.Store]:
    """Return the store in which the processes of this attempt meet, and the same again over another connection."""
    if missing := {"MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
        raise UserError(f"WORLD_SIZE is {size}, but {' and '.join(sorted(missing))} are not set: start with torchrun")
    address, port = os.environ["MASTER_ADDR"], from_environment("MASTER_PORT", 0, 1, 65535)
    one_host, limit = local_size() == size, timedelta(seconds=timeout_s)
    _choose_interface("lo" if one_host else interface_towards(address))
    served_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank == 0 and not served_by_agent
    try:
        store = (loopback_store(port, size, serves, limit) if one_host
                 else dist.TCPStore(address, port, size, is_master=serves, timeout=limit))
        beats = dist.TCPStore(store.host, port, timeout=limit, wait_for_workers=False)
    except RuntimeError as error:
        raise PeerError(f"{address}:{port}: no other processes to be met there ({reason(error)})") from None
    # torchrun's own store holds what earlier attempts have left there. (Hosts count their attempts apart: where one has
    # come back, they would not meet under a number. launch.torchrun has another store for each.)
    attempt = f"attempt{restarts()}" if served_by_agent else ""
    return dist.PrefixStore(attempt, store), dist.PrefixStore(attempt, beats)


def _choose_interface(name: str | None) -> None:
    """Have RPC, gloo and NCCL's start listen on an interface, where the user has not named one."""
    if name is not None:
        for variable in ("TP_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, name)
    used = os.environ.get("TP_SOCKET_IFNAME")
    warning = warning_about(address_of(used) or "") if used else None
    if warning and os.environ.get("LOCAL_RANK") == "0":
        print(f"alexnet: note: {warning}", file=sys.stderr)
