"""A long training that is killed all the time, against one that is left alone: the same weights, bit for bit.

    python tests/soak.py SHARDS FOLDER [--minutes 60] [--every 60] [--processes 2] [options of `alexnet train`]

Every so many seconds one process of the run, chosen by chance, gets SIGKILL, SIGSTOP or SIGTERM; now and then it is
torchrun itself that gets SIGTERM, as from a scheduler. After the given time the run is stopped, and another one goes to
the same step undisturbed. Prints one JSON object: kills, seconds from a kill to the next training step, steps done
twice, memory, what was left behind, and whether the weights are equal. Exit code 1 where anything is not as it should
be.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 10  # after which a stopped process is given up
LIMIT_S = 120  # after which a run that does not go on has failed
SIGNALS = [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM]


class Job:
    """A run under launch/train.sh, started again whenever its torchrun has ended but the run has not."""

    def __init__(self, arguments: argparse.Namespace, run: Path):
        self.run = run
        self._command = ["bash", ROOT / "launch/train.sh", arguments.shards, run, "--recipe", "tiny", "--threads", "1",
                         "--epochs", "100000", "--checkpoint-minutes", "0.25", "--timeout", str(TIMEOUT_S),
                         *arguments.options]
        self._environment = {**os.environ, "PROCESSES": str(arguments.processes), "RESTARTS": "9999",
                             "PYTHON": sys.executable, "TMPDIR": str(arguments.folder / "tmp")}
        self._output = open(run.with_suffix(".txt"), "ab")
        self.launcher: subprocess.Popen | None = None

    def start(self, *options: str) -> None:
        self.launcher = subprocess.Popen([*map(str, self._command), *options], env=self._environment,
                                         stdout=self._output, stderr=self._output, start_new_session=True)

    def workers(self) -> list[int]:
        if self.launcher.poll() is not None:
            sys.exit(f"soak: {self.run}: the run ended by itself; see {self._output.name}")
        path = Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def step(self) -> int:
        try:
            return int((self.run / "step").read_bytes().split()[0])
        except (OSError, ValueError, IndexError):
            return 0

    def records(self, event: str) -> list[dict]:
        try:
            lines = (self.run / "log.jsonl").read_text().splitlines()
        except OSError:
            return []
        records = [json.loads(line) for line in lines if line.endswith("}")]
        return [record for record in records if record["event"] == event]

    def wait_until(self, true, what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not true():
            if time.monotonic() > deadline:
                os.killpg(self.launcher.pid, signal.SIGKILL)
                sys.exit(f"soak: {self.run}: {what} did not come in {LIMIT_S} s; see {self._output.name}")
            time.sleep(0.02)


def memory_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def left_behind(folder: Path) -> set[str]:
    """Return what a run in `folder` might leave: shared memory, temporary files, processes (and with them sockets)."""
    left = {str(path) for place in (Path("/dev/shm"), folder / "tmp") for path in place.iterdir()
            if not path.name.startswith("torchinductor_")}  # torch's cache
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "cmdline").read_bytes() and int(process.name) != os.getpid():
                left.add(f"process {process.name}")
        except OSError:
            pass  # it has ended
    return left


def disturb(job: Job, chance: random.Random) -> tuple[str, float]:
    """Hit one process; return what was done and the seconds to the next step."""
    attempts = len(job.records("resume"))
    if chance.random() < 0.15:
        name, victim, number = "SIGTERM to torchrun", job.launcher.pid, signal.SIGTERM
    else:
        victim, number = chance.choice(job.workers()), chance.choice(SIGNALS)
        name = f"{number.name} to a worker"
    hit = time.monotonic()
    os.kill(victim, number)
    if victim == job.launcher.pid:
        code = job.launcher.wait(LIMIT_S)
        if code != 75:
            sys.exit(f"soak: torchrun ended with {code} and not 75 on SIGTERM")
        job.start("--resume")
    job.wait_until(lambda: len(job.records("resume")) > attempts, "the next attempt")
    step = job.step()
    job.wait_until(lambda: job.step() != step, "the next step")
    return name, time.monotonic() - hit


def weights(run: Path) -> tuple[int, list[dict]]:
    newest = sorted((run / "checkpoints").glob("step-?????????"))[-1]
    return int(newest.name[5:]), [load_file(path) for path in sorted(newest.glob("*.safetensors"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=60, help="seconds between kills, on average")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments, arguments.options = parser.parse_known_args()
    (arguments.folder / "tmp").mkdir(parents=True)
    chance, before = random.Random(arguments.seed), left_behind(arguments.folder)
    job = Job(arguments, arguments.folder / "killed")
    job.start()
    job.wait_until(job.step, "the first step")
    began, seconds, launcher_mib = time.monotonic(), collections.defaultdict(list), [memory_mib(job.launcher.pid)]
    while time.monotonic() - began < 60 * arguments.minutes:
        time.sleep(chance.uniform(0.5, 1.5) * arguments.every)
        name, to_next_step = disturb(job, chance)
        seconds[name].append(round(to_next_step, 1))
        launcher_mib.append(memory_mib(job.launcher.pid))
        print(f"{(time.monotonic() - began) / 60:.1f} min: {name}, next step after {to_next_step:.1f} s, "
              f"at step {job.step()}", file=sys.stderr, flush=True)
    lasted = time.monotonic() - began
    job.launcher.terminate()
    if (code := job.launcher.wait(LIMIT_S)) != 75:
        sys.exit(f"soak: torchrun ended with {code} and not 75 on SIGTERM")
    step, killed = weights(job.run)
    time.sleep(1)
    left = sorted(left_behind(arguments.folder) - before)
    alone = Job(arguments, arguments.folder / "alone")
    alone.start("--steps", str(step))
    print(f"to step {step} undisturbed ...", file=sys.stderr)
    alone.launcher.wait()
    other_step, undisturbed = weights(alone.run)
    equal = step == other_step and all(
        one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
        for one, other in zip(killed, undisturbed, strict=True))
    memory = [record["memory_gib"] for record in alone.records("steps")]
    everything = [value for values in seconds.values() for value in values]
    resumed = job.records("resume")
    print(json.dumps({
        "equal": equal, "step": step, "minutes": round(lasted / 60, 1), "processes": arguments.processes,
        "kills": len(everything), "by_signal": {name: len(values) for name, values in seconds.items()},
        "seconds_to_next_step": {"median": statistics.median(everything), "most": max(everything),
                                 **{name: max(values) for name, values in seconds.items()}},
        "attempts": 1 + len(resumed), "steps_repeated": sum(record["repeats"] for record in resumed),
        "launcher_mib": [round(launcher_mib[0], 1), round(launcher_mib[-1], 1)],
        "worker_gib_undisturbed": [memory[len(memory) // 10], memory[-1]], "left_behind": left,
        "undisturbed_s": round(alone.records("end")[-1]["trained_s"], 1),
    }, indent=1))
    shutil.rmtree(arguments.folder / "alone")
    sys.exit(0 if equal and not left else 1)


if __name__ == "__main__":
    main()
