"""docker/'s image: built step by step in an otherwise empty Debian, and used as docker/compose.yaml does.

Off by default, for it takes root, podman, debootstrap, Debian's mirror and minutes:  bash tests/run.sh -m container
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

from launch.errors import STOPPED
from launch.runlog import read_log

pytestmark = pytest.mark.container
DEVICE = "gpu" if torch.version.cuda else "cpu"  # of the PyTorch that pip finds here, and so in there
BASE, IMAGE, COMMIT = "localhost/debian", "localhost/alexnet", "0123456789abcdef"
SERVICE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text(encoding="utf-8"))["services"]["train"]
VOLUMES = {volume["target"]: "ro" if volume.get("read_only") else "rw" for volume in SERVICE["volumes"]}


class Podman:
    """podman with all that it keeps in `folder`, and the image of docker/ in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        # crun, which Debian's podman prefers, refuses hosts that have both versions of cgroup.
        runtime = ["--runtime=runc"] if shutil.which("runc") else []
        self.command = ["podman", f"--root={folder}/store", f"--runroot={folder}/run", *runtime]

    def __call__(self, *words, timeout_s: float = 60, check: bool = True) -> subprocess.CompletedProcess:
        done = subprocess.run([*self.command, *map(str, words)], capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0 or not check, done.stdout[-4000:] + done.stderr[-4000:]
        return done

    def make_base(self) -> None:
        """Make the release of Debian that the Dockerfile starts from."""
        suite = re.search(r"^FROM debian:([a-z]+)-", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)[1]
        root = self.folder / "debian"
        subprocess.run(["debootstrap", "--variant=minbase", suite, root], check=True, timeout=900)
        subprocess.run(["tar", "--create", f"--directory={root}", f"--file={root}.tar", "."], check=True)
        self("import", f"{root}.tar", BASE, timeout_s=300)

    def build(self, device: str, check: bool = True) -> subprocess.CompletedProcess:
        return self("build", f"--from={BASE}", f"--file={ROOT}/docker/Dockerfile", f"--tag={IMAGE}", "--format=docker",
                    "--network=host", f"--build-arg=DEVICE={device}", f"--build-arg=COMMIT={COMMIT}", *self.for_pip(),
                    ROOT, timeout_s=1800, check=check)

    def for_pip(self) -> list[str]:
        """Return options by which pip in a build finds what pip finds here."""
        pip = [sys.executable, "-m", "pip", "config", "list"]
        listed = subprocess.run(pip, capture_output=True, text=True, check=True).stdout
        settings, folders = {}, []
        for name, value in re.findall(r"^(?::env:|global)\.(\S+?)=(.*)$", listed, re.MULTILINE):
            words = ast.literal_eval(value).split()
            for i, word in enumerate(words):
                path = Path(word.removeprefix("file://"))
                if path.is_absolute() and path.exists():
                    folders.append(path.resolve().parent)  # an index's pages name files in folders beside it
                    words[i] = word.replace(str(path), f"/mnt/{len(folders)}/{path.resolve().name}")
            settings.setdefault(name, " ".join(words))  # the environment's come first
        lines = [f"{name} = {value}" for name, value in settings.items()]
        (self.folder / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
        mounts = {"/etc/pip.conf": self.folder / "pip.conf"} | {f"/mnt/{i}": path for i, path in enumerate(folders, 1)}
        return [f"--volume={path}:{target}:ro" for target, path in mounts.items()]

    def run(self, *words, timeout_s: float = 120, check: bool = True) -> subprocess.CompletedProcess:
        """Run a container as the service has it, but for the GPUs and the network: there is none."""
        mounts = [f"--volume={self.folder}{target}:{target}:{mode}" for target, mode in VOLUMES.items()]
        limits = ["--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096"]  # podman's own take CAP_SYS_RESOURCE
        return self("run", "--network=none", *limits, *mounts, f"--shm-size={SERVICE['shm_size']}",
                    f"--stop-timeout={SERVICE['stop_grace_period'].removesuffix('s')}", *words, timeout_s=timeout_s,
                    check=check)

    def state(self, container: str) -> dict:
        return json.loads(self("inspect", container).stdout)[0]["State"]


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    missing = [name for name in ("podman", "debootstrap") if not shutil.which(name)]
    if os.geteuid() or missing:
        pytest.skip(f"building the image takes {' and '.join(missing) or 'root'}: see docs/docker.md")
    folder = Path(tempfile.mkdtemp(prefix="alexnet-container-"))
    podman = Podman(folder)
    try:
        podman.make_base()
        podman.build(DEVICE)
        for target in VOLUMES:
            (folder / target[1:]).mkdir()
            os.chown(folder / target[1:], 1000, 1000)
        yield podman
    finally:
        podman("rm", "--all", "--force", "--time=0", check=False)
        podman("rmi", "--all", "--force", timeout_s=300, check=False)
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):  # of a step that was broken off
            if line.split()[1].startswith(f"{folder}/"):
                subprocess.run(["umount", "--lazy", line.split()[1]], check=True)
        shutil.rmtree(folder)


def test_another_pytorch_than_was_asked_for_ends_the_build(podman):
    other = "cpu" if DEVICE == "gpu" else "gpu"
    done = podman.build(other, check=False)
    assert done.returncode and f"alexnet: DEVICE is {other}, but pip found PyTorch for {DEVICE}: see" in done.stderr


def test_the_container_may_change_nothing_but_runs(podman):
    script = "id -u; touch /runs/written; touch launch/written; touch /shards/written"
    done = podman.run("--rm", IMAGE, "bash", "-c", script, check=False)
    assert done.stdout == "1000\n" and (podman.folder / "runs/written").exists()
    assert re.findall("written': (.*)", done.stderr) == ["Permission denied", "Read-only file system"]


def test_triton_finds_a_compiler_and_headers(podman):
    """With what triton.runtime.build gives the compiler."""
    script = ("include=$(python -c 'import sysconfig; print(sysconfig.get_path(\"include\"))') && "
              "echo '#include <Python.h>' | gcc -x c - -O3 -shared -fPIC -o /tmp/made.so -I$include")
    podman.run("--rm", IMAGE, "bash", "-c", script)


def test_it_trains_stops_goes_on_and_evaluates(podman):
    """launch/demo.sh's way, stopped once in the middle."""
    packed, shards = (podman.folder / name for name in ("runs/packed", "shards"))
    pack = "alexnet sample /tmp/archives && alexnet preprocess /tmp/archives /runs/packed"
    podman.run("--rm", IMAGE, "bash", "-c", pack, timeout_s=300)
    shards.rmdir()
    packed.rename(shards)

    train = ["--env=RUN=demo", "--env=OPTIONS=--recipe tiny --epochs 6", IMAGE,
             *(word.replace("$$", "$") for word in SERVICE["command"])]
    log = podman.folder / "runs/demo/log.jsonl"
    podman.run("--detach", "--name=train", *train)
    while not (log.exists() and '"event": "steps"' in log.read_text()):
        assert podman.state("train")["Running"], podman("logs", "train").stderr
        time.sleep(0.5)
    podman("healthcheck", "run", "train")
    podman("stop", "train", timeout_s=90)
    assert podman.state("train")["ExitCode"] == STOPPED, podman("logs", "train").stderr
    checkpoints = [int(path.name.removeprefix("step-")) for path in (log.parent / "checkpoints").glob("step-*")]

    podman.run("--rm", *train, timeout_s=900)
    records = {record["event"]: record for record in read_log(log)}
    start, resume = records["start"], records["resume"]
    assert resume["step"] == max(checkpoints) > 0 and start["commit"] == resume["commit"] == COMMIT
    evaluate = ["alexnet", "evaluate", "/runs/demo", "/shards", "--views", "10", "--json"]
    errors = json.loads(podman.run("--rm", IMAGE, *evaluate).stdout)
    assert errors["images"] > 0 and 1 - errors["top1_error"] > 3 / 10  # of ten classes
