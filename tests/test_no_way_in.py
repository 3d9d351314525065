"""What others can have a process run, and who can reach one: attacks, each with a look that it is one."""

from __future__ import annotations

import io
import ipaddress
import json
import os
import pickle
import socket
import subprocess
import sys
import time
import traceback
from base64 import b64encode
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend, dynamic_rendezvous, static_tcp_rendezvous
from torch.distributed.rpc import api, internal

from launch import loopback
from launch.errors import RunFailed
from launch.unpickling import DataUnpickler, data_alone_between_agents, data_alone_between_processes
from model.errors import PeerError
from model.exchange import calls
from model.exchange.listeners import deafen, listening

INTERFACES = Path("/proc/net/if_inet6")
IPV6 = pytest.mark.skipif(not INTERFACES.exists() or " lo\n" not in INTERFACES.read_text(), reason="no IPv6 here")
ATTACKS = {"function", "builtin", "argument", "message", "asynchronous", "remote", "answer"}


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "as torch has it"])
def test_what_the_other_tower_can_have_this_one_run(torchrun, tmp_path, guarded):
    done = torchrun(2, "hostile_tower.py", tmp_path, "guarded" if guarded else "open")
    told = {line["rank"]: line for line in map(json.loads, done.stdout.splitlines())}
    answers = told[0]["answers"] | told[1]["answers"]
    assert told[1]["ports"] > 0
    if not guarded:
        assert {path.name for path in tmp_path.iterdir()} == ATTACKS
        assert told[1]["reached"] == told[1]["ports"]
        return
    assert not list(tmp_path.iterdir())
    assert told[1]["reached"] == 0
    assert answers.pop("operator") == "returned 2.0"  # C++ runs these, for the other tower alone: docs/security.md
    assert answers.pop("no call").startswith("RuntimeError")
    assert answers.pop("answer") == "returned no call or answer that is on the list: nothing was run"
    assert len(answers) == 10
    assert all("RuntimeError" in answer and "nothing was run" in answer for answer in answers.values()), answers
    assert told[0]["swap"] == [1, 1, 1] and told[1]["swap"] == [0, 0, 0]


@pytest.mark.parametrize("place, name", [
    (internal, "deserialize"), (api, "_default_pickler"), (api, "_gather_to_leader"),
])  # fmt: skip
def test_another_torch_is_refused(monkeypatch, place, name):
    monkeypatch.delattr(place, name)
    with pytest.raises(PeerError, match=f"cannot be kept to a list .no {place.__name__}.{name}.: use another --"):
        calls.allow_only()


def test_only_what_is_listed_is_sent():
    with pytest.raises(ValueError, match="system is not on the list"):
        calls._serialize(internal.PythonUDF(os.system, ("true",), {}))


def test_deaf_sockets_keep_whom_they_have():
    before = listening()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as old:
        accepted, _ = server.accept()
        assert listening() - before == {server.fileno()}
        deafen({server.fileno()})
        with accepted, pytest.raises(TimeoutError):
            old.sendall(b"still here")
            assert accepted.recv(10) == b"still here"
            socket.create_connection(server.getsockname(), timeout=0.5)


class Reduced:
    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def named(module: str, name: str) -> bytes:
    return pickle.PROTO + b"\x04" + b"".join(
        pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode() for text in (module, name)
    ) + pickle.STACK_GLOBAL + pickle.STOP


@pytest.mark.parametrize("module, name", [
    ("os", "system"), ("builtins", "eval"), ("builtins", "setattr"), ("subprocess", "Popen"), ("torch", "load"),
    ("launch.unpickling", "data_alone_between_agents"), ("torch.distributed.checkpoint.filesystem", "FileSystemWriter"),
    ("torch.distributed.checkpoint.planner", "WriteItem.__init__"), ("antigravity", "webbrowser"), ("sys", "modules"),
    ("builtins", "SystemExit"), ("torch", "nn"),
])  # fmt: skip
def test_what_is_no_data_is_not_unpickled(module, name):
    with pytest.raises(pickle.UnpicklingError, match="is no data: refused"):
        DataUnpickler(io.BytesIO(named(module, name))).load()
    assert "antigravity" not in sys.modules  # nor is it imported


def test_members_of_enumerations_may_be_looked_up_by_name():
    """As Python 3.11.0 to 3.11.3 pickle them; other attributes may not."""
    def unpickled(*of):
        return DataUnpickler(io.BytesIO(pickle.dumps(Reduced(getattr, *of), protocol=4))).load()

    assert unpickled(WriteItemType, "SHARD") is WriteItemType.SHARD
    for other in ((WriteItemType, "__init__"), (OSError, "__init__"), ("text", "format")):
        with pytest.raises(pickle.UnpicklingError, match="refused"):
            unpickled(*other)


def test_data_are_unpickled():
    data = [{"tower1": (2, {torch.device("cuda", 0): torch.device("cuda", 1)}, [])}, torch.float32, torch.Size([2, 3]),
            torch.strided, OSError(28, "No space left on device"), {dynamic_rendezvous._NodeDesc("host", 1, 0)},
            CheckpointException("full", {1: (OSError(28, "No space left on device"), traceback.StackSummary())}),
            WriteItem(index=dist.checkpoint.metadata.MetadataIndex("conv1.weight"), type=WriteItemType.SHARD)]
    found = DataUnpickler(io.BytesIO(pickle.dumps(data))).load()
    assert repr(found) == repr(data)


def test_what_processes_send_each_other_over_gloo(monkeypatch, tmp_path):
    hostile = torch.frombuffer(bytearray(pickle.dumps(Reduced(os.mkdir, str(tmp_path / "made")))), dtype=torch.uint8)
    distributed_c10d._tensor_to_object(hostile, len(hostile), None)
    assert (tmp_path / "made").is_dir()  # as torch has it
    (tmp_path / "made").rmdir()
    monkeypatch.setattr(distributed_c10d, "_unpickler", distributed_c10d._unpickler)
    data_alone_between_processes()
    data_alone_between_processes()  # changes nothing
    with pytest.raises(pickle.UnpicklingError, match="mkdir is no data"):
        distributed_c10d._tensor_to_object(hostile, len(hostile), None)
    assert not (tmp_path / "made").exists()
    monkeypatch.setattr(distributed_c10d, "_unpickler", None)
    with pytest.raises(RunFailed, match="unpickles elsewhere .* use torch 2.11 to 2.13"):
        data_alone_between_processes()


def test_what_lies_in_the_agents_store(monkeypatch, tmp_path):
    monkeypatch.setattr(dynamic_rendezvous, "pickle", pickle)
    store = dist.HashStore()
    backend = c10d_rendezvous_backend.C10dRendezvousBackend(store, "run")
    settings = dynamic_rendezvous.RendezvousSettings("run", 1, 1, dynamic_rendezvous.RendezvousTimeout(),
                                                     timedelta(seconds=5), 3)

    def holder():
        return dynamic_rendezvous._BackendRendezvousStateHolder(backend, settings, cache_duration=0)

    own = holder()
    own.sync()
    own.state.participants = {dynamic_rendezvous._NodeDesc("host", 1, 0): 0}
    own.mark_dirty()
    assert own.sync()
    data_alone_between_agents()
    other = holder()
    other.sync()
    assert other.state.participants == own.state.participants
    store.set("torch.rendezvous.run", b64encode(pickle.dumps(Reduced(os.mkdir, str(tmp_path / "made")))))
    with pytest.raises(dynamic_rendezvous.RendezvousStateError):
        holder().sync()
    assert not (tmp_path / "made").exists()
    monkeypatch.setattr(dynamic_rendezvous, "pickle", pickle)
    with suppress(AttributeError):  # what it has made is no state
        holder().sync()
    assert (tmp_path / "made").is_dir()


def listeners(process: int) -> dict[str, str]:
    """Return the address on which each socket of a process listens, by the socket's number."""
    links, found = set(), {}
    with suppress(OSError):  # it has ended
        for link in Path(f"/proc/{process}/fd").iterdir():
            with suppress(OSError):  # it has been closed
                links.add(os.readlink(link))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, number = line.split()[:10]
            if state == "0A" and f"socket:[{number}]" in links:
                digits = bytes.fromhex(local.split(":")[0])  # of 32-bit words, each the other way round
                address = b"".join(digits[i : i + 4][::-1] for i in range(0, len(digits), 4))
                found[number] = str(ipaddress.ip_address(address))
    return found


def family(process: int) -> list[int]:
    """Return a process, its children, theirs and so on."""
    try:
        children = [int(child) for thread in Path(f"/proc/{process}/task").iterdir()
                    for child in (thread / "children").read_text().split()]
    except OSError:
        children = []
    return [process, *(one for child in children for one in family(child))]


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1", *(pytest.param(one, marks=IPV6) for one in ("::", "::1"))])
def test_listeners_are_found(address):
    before = listeners(os.getpid())
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET):
        after = listeners(os.getpid())
    assert [after[number] for number in after.keys() - before] == [address]


def test_a_run_on_one_host_listens_on_loopback_alone(tmp_path):
    """Of all its processes, from its start to its end."""
    arguments = [["sample", tmp_path / "archives", "--train-per-class", "4", "--val-per-class", "1"],
                 ["preprocess", tmp_path / "archives", tmp_path / "shards"]]
    for one in arguments:
        subprocess.run([sys.executable, "-m", "launch.cli", *map(str, one)], check=True, capture_output=True, cwd=ROOT)
    command = [sys.executable, "-m", "launch.torchrun", "--standalone", "--nproc-per-node=2", "-m", "launch.cli",
               "train", str(tmp_path / "shards"), str(tmp_path / "run"), "--recipe", "tiny", "--steps", "2"]
    found, processes = set(), set()
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as run:
        while run.poll() is None:
            for process in family(run.pid):
                addresses = set(listeners(process).values())
                found |= addresses
                processes |= {process} if addresses else set()
            time.sleep(0.1)
        assert run.returncode == 0, run.stderr.read()
    assert len(processes) >= 3  # the agent and both workers do listen
    assert found == {"127.0.0.1"}


@pytest.mark.parametrize("host, expected", [
    ("localhost", {"127.0.0.1"}), ("127.0.0.1", {"127.0.0.1"}), pytest.param("::1", {"::1"}, marks=IPV6),
    ("0.0.0.0", {"::", "0.0.0.0"}),
])  # fmt: skip
def test_where_an_agents_store_listens(monkeypatch, host, expected):
    monkeypatch.setattr(static_tcp_rendezvous, "TCPStore", dist.TCPStore)
    monkeypatch.setattr(c10d_rendezvous_backend, "TCPStore", dist.TCPStore)
    loopback.keep_agents_on_loopback()
    assert static_tcp_rendezvous.TCPStore is c10d_rendezvous_backend.TCPStore
    before = listeners(os.getpid())
    store = c10d_rendezvous_backend.TCPStore(host, 0, is_master=True, multi_tenant=True, timeout=timedelta(seconds=10))
    after = listeners(os.getpid())
    (new,) = after.keys() - before
    assert after[new] in expected
    client = c10d_rendezvous_backend.TCPStore(host, store.port, is_master=False)
    client.set("key", "value")
    assert store.get("key") == b"value"


def test_a_torch_that_makes_its_store_elsewhere_is_told(monkeypatch, capsys):
    monkeypatch.delattr(static_tcp_rendezvous, "TCPStore")
    monkeypatch.setattr(c10d_rendezvous_backend, "TCPStore", dist.TCPStore)
    loopback.keep_agents_on_loopback()
    assert "listens on all addresses of this host" in capsys.readouterr().err


def test_the_processes_of_a_host_meet_on_loopback():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"127.0.0.1:{port}: Address already in use"):
            loopback.loopback_store(port, 1, True, timedelta(seconds=5))
    served = loopback.loopback_store(port, 1, True, timedelta(seconds=5))
    loopback.loopback_store(port, 1, False, timedelta(seconds=5)).set("key", "value")
    assert served.get("key") == b"value"
