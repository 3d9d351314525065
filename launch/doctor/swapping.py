"""What launch.doctor.exchange starts under torchrun, in two processes: `python -m launch.doctor.swapping TRANSPORT`.

They swap tensors through the exchange that towers have, and the first prints how long that takes.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from typing import TYPE_CHECKING

from launch.environment import die_with_torchrun
from model.errors import reason

if TYPE_CHECKING:
    from launch.world import World

TIMEOUT_S = 20.0
LARGE = 128 * 128 * 13 * 13  # floats, 11 MB: what conv3 reads of the other tower, in a step of recipe `notes`


def measured(world: World) -> dict:
    """Return the median seconds of a swap of one number, and bytes/s each way of many."""
    import torch

    seconds = {}
    for count, repeats in ((1, 50), (LARGE, 7)):
        x = torch.full((count,), world.rank + 1.0, device=world.device)
        times = []
        for _ in range(3 + repeats):
            began = time.perf_counter()
            received = world.exchange.swap(x, f"{count} numbers")
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        if not (received == 2.0 - world.rank).all():
            raise RuntimeError(f"of {count} numbers others came than the other tower sent")
        seconds[count] = statistics.median(times[3:])  # the first ones make connections
    return {"device": world.device.type.upper(), "swap_s": seconds[1], "bytes_per_s": 4 * LARGE / seconds[LARGE]}


def main(transport: str) -> None:
    die_with_torchrun()
    try:
        from launch.world import join_world

        with join_world(device=None, transport=transport, timeout_s=TIMEOUT_S, threads=1) as world:
            world.connect()
            found = measured(world)
    except Exception as error:
        print(f"alexnet: {reason(error)}", file=sys.stderr, flush=True)
        os._exit(1)  # RPC's threads, which wait for the other process, are not to be joined
    if world.leads:
        print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
