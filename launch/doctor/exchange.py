"""Whether two processes of this host can swap tensors as two towers do."""

from __future__ import annotations

import json
import os
import re
import subprocess

from launch.doctor.finding import NOTE, OK, WRONG, Finding
from launch.doctor.gpus import usable

LIMIT_S = 60
SLOW_SWAP_S, SLOW_BYTES_PER_S = 10e-3, 1e8


def rpc() -> Finding:
    finding = _two_processes("rpc")
    if finding.state != WRONG:
        return finding
    chosen = [f"{name}={os.environ[name]}" for name in ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME") if name in os.environ]
    mend = f"try without {' '.join(chosen)}" if chosen else "mend what is wrong above, if anything"
    return Finding(WRONG, finding.found, f"{mend}; one process does without: PROCESSES=1 bash launch/train.sh")


def cuda_ipc() -> Finding | None:
    if not usable():
        return None
    finding = _two_processes("cuda-ipc")
    return finding if finding.state != WRONG else Finding(
        NOTE, finding.found, "--transport rpc, the default, does without; in docker, --ipc=host may help")


def _two_processes(transport: str) -> Finding:
    from launch.facts import ROOT
    from launch.processes import ending_with_us

    try:
        done = subprocess.run(
            [*ending_with_us("launch.torchrun"), "--standalone", "--nproc-per-node", "2", "-m",
             "launch.doctor.swapping", transport], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return Finding(WRONG, f"two processes did not finish within {LIMIT_S} s")
    if done.returncode:
        return Finding(WRONG, failure(done.stderr, done.returncode))
    return judge_swaps(**json.loads(done.stdout))


def failure(told: str, code: int) -> str:
    """Return why two processes failed, of what they wrote to stderr."""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    ours = [line.removeprefix("alexnet: ") for line in lines if line.startswith("alexnet: ")]
    # One that tells of the other's death has not died first.
    return min(ours, key=lambda line: bool(re.search("other (tower|process)", line)),
               default=lines[-1] if lines else f"exit code {code}")


def judge_swaps(device: str, swap_s: float, bytes_per_s: float) -> Finding:
    """`swap_s` is a swap of one number, `bytes_per_s` each way in swaps of 11 MB."""
    found = f"two processes ({device}) swap a number in {swap_s * 1e6:.0f} us, 11 MB at {bytes_per_s / 1e9:.1f} GB/s"
    if swap_s > SLOW_SWAP_S or bytes_per_s < SLOW_BYTES_PER_S:
        return Finding(NOTE, f"{found}: slow", "`top` shows what else uses the cores")
    return Finding(OK, found)
