"""Tower 1 has tower 0 run whatever it can, over RPC. FOLDER guarded|open, where "open" is RPC as torch has it.

An attack that runs makes a file of its name in FOLDER. Prints JSON, a line a tower: what each attack was answered, how
many of tower 0's ports a newcomer could still connect to, and what an honest swap brought afterwards.
"""

import json
import os
import select
import socket
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed import rpc
from torch.distributed.rpc import api, internal

from model.exchange import calls
from model.exchange import rpc as exchange_module
from model.exchange.listeners import listening

folder, guarded = sys.argv[1], sys.argv[2] == "guarded"
rank = int(os.environ["RANK"])
os.environ["TP_SOCKET_IFNAME"] = os.environ["GLOO_SOCKET_IFNAME"] = "lo"
torchs_own = internal._InternalRPCPickler()
if not guarded:
    exchange_module.allow_only = exchange_module.deafen = lambda *_: None


def command(name: str) -> str:
    return f"touch {folder}/{name}"


class Reduced:
    def __init__(self, name: str):
        self.name = name

    def __reduce__(self):
        return os.system, (command(self.name),)


def pickled(function, *arguments) -> bytes:
    return torchs_own.serialize(internal.PythonUDF(function, arguments, {}))[0]


def attacks() -> dict:
    """Return a call without arguments for each attack."""
    peer = rpc.get_worker_info("tower0")

    def send(message: bytes, waits: bool = False):
        return api._invoke_rpc_python_udf(peer, message, [torch.zeros(1)], 10.0, waits).wait()

    return {
        "function": lambda: send(pickled(os.system, command("function"))),
        "builtin": lambda: send(pickled(eval, f"__import__('os').system({command('builtin')!r})")),
        "argument": lambda: send(pickled(exchange_module.deliver, Reduced("argument"), "conv3", torch.zeros(1))),
        "message": lambda: send(torchs_own.serialize(Reduced("message"))[0]),
        "asynchronous": lambda: send(pickled(os.system, command("asynchronous")), waits=True),
        "remote": lambda: api._invoke_remote_python_udf(
            peer, pickled(os.system, command("remote")), [], 10.0, False).to_here(10.0),
        "by name": lambda: send(json.dumps({"call": "system", "arguments": [command("by name")]}).encode()),
        "no call": lambda: send(b'{"result": 1}'),
        "no message": lambda: send(b"\xff"),
        "deep": lambda: send(b"[" * 100_000),
        "no such tensor": lambda: send(b'{"call": "deliver", "arguments": [1, "conv3", {"tensor": 9}]}'),
        "operator": lambda: rpc.rpc_sync("tower0", torch.add, (torch.ones(1), 1)).item(),
    }


def outcome(attack) -> str:
    try:
        return f"returned {attack()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def answers_with_a_command(answer):
    """Have tower 1 answer calls, but RPC's own and `hold`, with an "exception" of a kind that runs a command."""

    def serialize(message):
        if message is None and attacking:
            return torchs_own.serialize(internal.RemoteException(command("answer"), os.system))[0], []
        return answer(message)

    return serialize


def reached(ports: list[int]) -> int:
    """Return to how many of the ports a connection comes about within a second."""
    sockets = [socket.socket() for _ in ports]
    for one, port in zip(sockets, ports):
        one.setblocking(False)
        one.connect_ex(("127.0.0.1", port))
    time.sleep(1)
    return sum(one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
               for one in select.select([], sockets, [], 0)[1])


attacking = False
if rank == 1:
    calls._serialize = answers_with_a_command(calls._serialize)
    if not guarded:
        internal.serialize = answers_with_a_command(internal.serialize)
store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
before = listening()
exchange = exchange_module.RpcExchange(dist.PrefixStore("rpc", store), rank, torch.device("cpu"), 30)
told = {"rank": rank}
if rank == 0:
    ports = [socket.socket(fileno=os.dup(one)).getsockname()[1] for one in listening() - before]
    store.set("ports", json.dumps(ports))
    store.wait(["over"])
else:
    ports = json.loads(store.get("ports"))
    told |= {"ports": len(ports), "reached": reached(ports)}
    told["answers"] = {name: outcome(attack) for name, attack in attacks().items()}
    attacking = True
    store.set("over", "")
if rank == 0:
    call = exchange_module.deliver, (0, "", torch.ones(1))
    told["answers"] = {"answer": outcome(lambda: rpc.rpc_sync("tower1", *call))}
    store.set("answered", "")
store.wait(["answered"])
attacking = False
if guarded:
    told["swap"] = exchange.swap(torch.full((3,), float(rank)), "conv3").tolist()
    exchange.close()
sys.stdout.write(json.dumps(told) + "\n")
sys.stdout.flush()
os._exit(0)  # torch's own may wait for calls that were never answered
