"""`alexnet doctor`: what it thinks of made-up machines, of this one, and of this one with something missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT

from launch.cli import cli
from launch.doctor import decoding, exchange, folders, gpus, host, network, software
from launch.doctor.cgroup import Limits, limits
from launch.doctor.examination import found_by
from launch.doctor.finding import INSTALL, NOTE, OK, WRONG, Finding
from launch.doctor.gpus import Gpu
from pipeline import storage
from pipeline.errors import DataError
from pipeline.manifest import load_manifest

GIB = 1 << 30
NO_LIMIT = float("inf")
H100 = Gpu("NVIDIA H100", 80 * GIB, 79 * GIB, "Default", "580.65")
PAIRS = [(0, 1), (0, 2), (1, 2)]
ALWAYS = {"Python", "torch", "packages", "DALI", "CPU decoding", "GPUs", "cores", "memory", "shared memory",
          "open files", "clock", "loopback", "host name"}


def doctor(*arguments, program: str = "from launch.cli import main; main()", **environment):
    """Run the command in a process of its own."""
    return subprocess.run([sys.executable, "-c", program, "doctor", *map(str, arguments)], cwd=ROOT, timeout=120,
                          env={**os.environ, **environment}, capture_output=True, text=True)


def checks(done) -> dict[str, Finding]:
    told = json.loads(done.stdout)["checks"]
    found = {check.pop("name"): Finding(**check) for check in told}
    assert len(found) == len(told)
    return found


def quick(*arguments) -> dict[str, Finding]:
    """What the command finds in this process, which may have been tampered with."""
    done = CliRunner().invoke(cli, ["doctor", "--quick", "--json", *map(str, arguments)])
    found = checks(done)
    assert done.exit_code == (1 if any(finding.state == WRONG for finding in found.values()) else 0)
    return found


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    for words in (["sample", folder / "archives", "--train-per-class", 2, "--val-per-class", 1],
                  ["preprocess", folder / "archives", folder / "shards", "--workers", 1]):
        assert CliRunner().invoke(cli, [str(word) for word in words]).exit_code == 0
    return folder / "shards"


@pytest.mark.parametrize("finding, state, words", [
    (software.judge_python((3, 10, 0)), OK, "3.10.0"),
    (software.judge_python((3, 9, 18)), WRONG, "Python 3.10 or newer"),
    (software.judge_torch("2.11.0+cu130", "13.0"), OK, "built for CUDA 13.0"),
    (software.judge_torch("2.13.1", None), OK, "built for CPUs"),
    (software.judge_torch("2.10.1", None), NOTE, "2.11 to 2.13 are tested"),
    (software.judge_torch("2.14.0a0+git1", "14.0"), NOTE, "2.11 to 2.13 are tested"),
    (software.judge_dali("2.4.0", "2.4.0"), OK, "2.4.0"),
    (software.judge_dali("1.50.0", "2.4.0"), NOTE, "2.4.0 is tested"),
    (software.judge_packages({"a": "1.0", "b": "2"}, {"a": "1.0+cpu", "b": "2"}), OK, "2 others"),
    (software.judge_packages({"a": "1.0", "b": "2"}, {"a": "1.0", "b": "3"}), NOTE, "b 3 (pinned: 2)"),
    (software.judge_packages({"a": "1.0", "b": "2"}, {"a": None, "b": "3"}), WRONG, "missing: a |"),
    (gpus.judge_no_gpu(False, None, None, []), OK, "trains on the CPU"),
    (gpus.judge_no_gpu(False, "0", "13.0", []), OK, "trains on the CPU"),
    (gpus.judge_no_gpu(True, "", "13.0", []), NOTE, "unset CUDA_VISIBLE_DEVICES"),
    (gpus.judge_no_gpu(True, None, None, []), WRONG, "torch's build for CUDA"),
    (gpus.judge_no_gpu(True, "0", "13.0", ["driver too old (12.2)\nmore"]), WRONG,
     "it (driver too old (12.2)) | install a driver that has CUDA 13.0"),
    (gpus.judge_gpus([H100]), OK, "0: NVIDIA H100, 80.0 GiB, 79.0 GiB free; driver 580.65"),
    (gpus.judge_gpus([Gpu("T4", 15 * GIB)] * 2), OK, "0: T4, 15.0 GiB; 1: T4, 15.0 GiB |"),
    (gpus.judge_gpus([H100, Gpu("T4", 15 * GIB, GIB, "Default")]), NOTE, "others use most of 1's memory"),
    (gpus.judge_gpus([Gpu("T4", 15 * GIB, 15 * GIB, "Exclusive_Process")]), NOTE, "PROCESSES=1"),
    (gpus.judge_gpus([Gpu("T4", 15 * GIB, 15 * GIB, "Exclusive_Process")] * 2), OK, "1: T4"),
    (gpus.judge_gpus([H100, Gpu("T4", 15 * GIB, 15 * GIB, "Prohibited")]), WRONG, "nvidia-smi -i 1 -c DEFAULT"),
    (gpus.judge_links(PAIRS, PAIRS), OK, "directly |"),
    (gpus.judge_links(PAIRS, [(0, 1)]), OK, "not so 0 and 2, 1 and 2"),
    (gpus.judge_links(PAIRS, [(1, 2)]), NOTE, "CUDA_VISIBLE_DEVICES=1,2"),
    (gpus.judge_links(PAIRS, []), NOTE, "topo -p2p"),
    (gpus.judge_triton(True, "gcc"), OK, "gcc"),
    (gpus.judge_triton(True, None), NOTE, "apt-get install gcc"),
    (gpus.judge_triton(False, "gcc"), NOTE, "pip install triton"),
    (host.judge_cores(16, 64, NO_LIMIT), OK, "16 of 64 |"),
    (host.judge_cores(2, 2, 2.0), OK, "2 |"),
    (host.judge_cores(1, 8, NO_LIMIT), NOTE, "1 of 8"),
    (host.judge_cores(64, 64, 8.0), NOTE, "the time of 8 | give each of two processes --threads 4"),
    (host.judge_cores(4, 4, 0.5), NOTE, "--threads 1"),
    (host.judge_memory(64 * GIB, 60 * GIB, NO_LIMIT), OK, "60.0 GiB available |"),
    (host.judge_memory(64 * GIB, 60 * GIB, 2 * GIB), NOTE, "docker run --memory"),
    (host.judge_memory(64 * GIB, GIB // 2, NO_LIMIT), WRONG, "512 MiB available | end other programs: training"),
    (host.judge_memory(64 * GIB, 60 * GIB, GIB // 2), WRONG, "may use 512 MiB"),
    (host.judge_shared_memory(24 * GIB, "24 GiB", True), OK, "24 GiB |"),
    (host.judge_shared_memory(64 << 20, "64 MiB", True), NOTE, "--shm-size=2g"),
    (host.judge_shared_memory(63 << 20, "63 MiB", True), WRONG, "--shm-size=2g"),
    (host.judge_shared_memory(0, "none", False), NOTE, "--shm-size=2g"),
    (host.judge_open_files(1024, 1024), OK, "1024"),
    (host.judge_open_files(NO_LIMIT, NO_LIMIT), OK, "inf"),
    (host.judge_open_files(200, NO_LIMIT), OK, "4096"),
    (host.judge_open_files(256, 1023), NOTE, "--ulimit nofile=4096"),
    (host.judge_open_files(200, 255), WRONG, "--ulimit nofile=4096"),
    (host.judge_clock(0), NOTE, "1970-01-01 00:00 UTC"),
    (host.judge_clock(1.9e9), OK, "2030-03-17"),
    (network.judge_host_name("node7", ["10.0.0.7"]), OK, "node7 is 10.0.0.7"),
    (network.judge_host_name("node7", ["127.0.1.1", "10.0.0.7"]), OK, "10.0.0.7"),
    (network.judge_host_name("node7", ["127.0.1.1", "::1", "fe80::1%lo"]), OK, "fe80::1%lo"),
    (network.judge_host_name("node7", ["127.0.1.1", "::1"]), NOTE, "its real address"),
    (network.judge_host_name("node7", []), NOTE, "does not resolve"),
    (folders.judge_room(3 * GIB, 2 * GIB), OK, "3.0 GiB free"),
    (folders.judge_room(GIB, 2 * GIB), WRONG, "1.0 GiB free; 5 checkpoints of recipe `notes` take 2.0 GiB"),
    (exchange.judge_swaps("CPU", 85e-6, 2.43e9), OK, "swap a number in 85 us, 11 MB at 2.4 GB/s"),
    (exchange.judge_swaps("CPU", 85e-6, 0.09e9), NOTE, "slow"),
    (exchange.judge_swaps("CPU", 11e-3, 2e9), NOTE, "slow"),
    (decoding.judge_pixels(0), OK, "like Pillow's"),
    (decoding.judge_pixels(3), OK, "within 3 of Pillow's"),
    (decoding.judge_pixels(9), WRONG, "differ by up to 9"),
    (decoding.judge_engine(True, "H100"), OK, "JPEG engine"),
    (decoding.judge_engine(False, "H100"), NOTE, "where H100 has one"),
])  # fmt: skip
def test_what_is_thought_of_a_machine(finding, state, words):
    assert finding.state == state
    assert words in f"{finding.found} | {finding.mend}"
    assert finding.mend or state == OK  # whoever is told of something is told what to do


def test_limits_of_a_container(tmp_path):
    def file(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    assert limits(tmp_path) == Limits(NO_LIMIT, NO_LIMIT)
    file("proc/self/cgroup", "0::/system.slice/job\n")
    file("sys/fs/cgroup/system.slice/job/cpu.max", "max 100000\n")
    file("sys/fs/cgroup/system.slice/job/memory.max", "max\n")
    assert limits(tmp_path) == Limits(NO_LIMIT, NO_LIMIT)
    file("sys/fs/cgroup/system.slice/cpu.max", "250000 100000\n")  # of what it lies in
    file("sys/fs/cgroup/system.slice/memory.max", "1073741824\n")
    assert limits(tmp_path) == Limits(GIB, 2.5)
    file("sys/fs/cgroup/system.slice/job/memory.max", "1024\n")
    assert limits(tmp_path) == Limits(1024, 2.5)


def test_limits_of_a_container_of_version_1(tmp_path):
    for name, text in {"proc/self/cgroup": "4:memory:/docker/1a\n2:cpu,cpuacct:/docker/1a\n1:name=systemd:/\n",
                       "sys/fs/cgroup/memory/memory.limit_in_bytes": "2048\n",  # all that the container sees
                       "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
                       "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert limits(tmp_path) == Limits(2048, 1.5)
    (tmp_path / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us").write_text("-1\n")
    assert limits(tmp_path).cores == NO_LIMIT


def test_what_nvidia_smi_answers():
    answer = "GPU-1a-2b, 80000, Default, 580.65\nGPU-3c-4d, [N/A], Exclusive_Process, 580.65\nno such field\n"
    assert gpus.told_of(answer) == {"1a-2b": (80000 << 20, "Default", "580.65"),
                                    "3c-4d": (None, "Exclusive_Process", "580.65")}


def test_two_gpus_and_their_driver_are_asked(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho GPU-3c-4d, 1000, Default, 580.65\necho GPU-1a-2b, 79000, Default, 580.65\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    about = [SimpleNamespace(name=f"H{number}", total_memory=80 * GIB, uuid=uuid)
             for number, uuid in enumerate(["1a-2b", "3c-4d"])]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", about.__getitem__)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a, b) == (0, 1))  # one way does not do
    found = gpus.gpus(with_driver=True)
    assert found.state == NOTE and found.found == (
        "0: H0, 80.0 GiB, 77.1 GiB free; 1: H1, 80.0 GiB, 1000 MiB free; driver 580.65; others use most of 1's memory")
    assert gpus.gpus(with_driver=False) == Finding(OK, "0: H0, 80.0 GiB; 1: H1, 80.0 GiB")
    program.write_text("#!/bin/sh\nexit 9\n")
    assert gpus.gpus(with_driver=True).state == OK
    assert gpus.links().state == NOTE
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpus.links() is None
    monkeypatch.setenv("CC", "my-compiler")
    assert gpus.triton() == Finding(OK, "with my-compiler")


def test_this_machine_is_fit(shards, tmp_path):
    done = doctor("--json", "--run", tmp_path / "new" / "run", "--shards", shards)
    assert done.returncode == 0, done.stdout
    assert done.stderr == ""
    found = checks(done)
    assert ALWAYS | {"RUN", "SHARDS", "RPC"} <= found.keys()
    assert re.fullmatch(r"two processes \(\w+\) swap a number in \d+ us, 11 MB at \d+\.\d GB/s(: slow)?",
                        found["RPC"].found)
    assert "20 train, 10 val images of 10 classes" in found["SHARDS"].found
    assert list(tmp_path.iterdir()) == []  # it changes nothing


@pytest.mark.gpu
def test_this_gpu_is_fit():
    done = doctor("--json")
    found = checks(done)
    assert {"GPUs", "Triton", "RPC", "CUDA IPC", "GPU decoding"} <= found.keys()
    assert not [finding for finding in found.values() if "cannot be looked at" in finding.found]
    assert "GiB" in found["GPUs"].found and "CUDA" in found["GPU decoding"].found
    assert "(CUDA)" in found["RPC"].found


def test_a_quick_look_is_quick():
    began = time.monotonic()
    done = doctor("--quick", "--json")
    assert time.monotonic() - began < 15  # two seconds, where nothing else runs
    found = checks(done)
    assert done.returncode == 0 and ALWAYS <= found.keys() and "RPC" not in found


def test_what_a_person_reads(tmp_path):
    done = doctor("--quick", "--shards", tmp_path)
    assert done.returncode == 1
    assert done.stderr == "alexnet: not fit to train: SHARDS\n"
    *others, wrong, mend = done.stdout.splitlines()
    assert all(re.match(r"(ok   |note )  [\w ]{13}  \S| {22}\S", line) for line in others)
    assert wrong.startswith(f"wrong  SHARDS         {tmp_path}/manifest.json: cannot be read")
    assert mend == " " * 22 + "not a finished folder of shards: make one with `alexnet preprocess SOURCE OUT`"


def test_mistakes_of_use():
    for words in (["--run", ""], ["somewhere"], ["--shards"]):
        assert CliRunner().invoke(cli, ["doctor", *words]).exit_code == 2


@pytest.mark.parametrize("missing, check", [("torch", "torch"), ("nvidia", "DALI"), ("numpy", "CPU decoding"),
                                            ("packaging", "packages")])
def test_a_missing_package_is_told_and_hinders_no_other_check(missing, check, tmp_path):
    program = f"import sys; sys.modules[{missing!r}] = None; from launch.cli import main; main()"
    done = doctor("--quick", "--json", "--run", tmp_path, "--shards", tmp_path, program=program)
    found = checks(done)
    assert done.returncode == 1 and found[check].state == WRONG and found[check].mend == INSTALL
    assert ALWAYS | {"RUN", "SHARDS"} == found.keys()
    assert found["Python"].state == found["loopback"].state == found["open files"].state == OK
    assert found["shared memory"].state != WRONG
    told = done.stderr.splitlines()[-1]  # torch may have said something of its own of NumPy
    assert "Traceback" not in done.stderr
    assert told.startswith("alexnet: not fit to train: ") and check in told


def test_a_package_that_is_not_installed_or_another(monkeypatch):
    version = importlib.metadata.version

    def another(name: str) -> str:
        if name == "safetensors":
            raise importlib.metadata.PackageNotFoundError
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", another)
    assert quick()["packages"] == Finding(WRONG, "missing: safetensors", INSTALL)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == "tqdm" else version(name))
    found = quick()["packages"]
    assert found.state == NOTE and re.fullmatch(r"not as tested: tqdm 0.1 \(pinned: [\d.]+\)", found.found)


def test_whatever_a_check_raises_is_what_it_found():
    def raises(error: Exception):
        def check():
            raise error
        return check

    assert found_by(raises(OSError("no\nsecond line"))) == Finding(WRONG, "cannot be looked at: OSError: no")
    assert found_by(raises(DataError("x: broken; mend it"))) == Finding(WRONG, "x: broken", "mend it")
    assert found_by(raises(ZeroDivisionError())).state == WRONG


def test_no_room_for_a_run(monkeypatch, tmp_path):
    assert quick("--run", tmp_path)["RUN"].state == OK
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5 * 8 * 60_965_224 - 1))
    found = quick("--run", tmp_path / "run")["RUN"]
    assert found.state == WRONG and "5 checkpoints of recipe `notes` take 2.3 GiB" in found.found
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5 * 8 * 60_965_224))
    assert quick("--run", tmp_path / "run")["RUN"].state == OK


def test_no_place_for_a_run(tmp_path):
    assert quick("--run", "/proc/run")["RUN"].state == WRONG  # nobody can write there
    (tmp_path / "notes.txt").write_text("mine")
    found = quick("--run", tmp_path)["RUN"]
    assert found.state == WRONG and found.found == f"{tmp_path}: holds files already" and "--resume" in found.mend
    assert quick("--run", tmp_path / "notes.txt" / "run")["RUN"].state == WRONG  # below a file
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def damaged(shards: Path, out: Path, damage) -> Path:
    copy = Path(shutil.copytree(shards, out))
    manifest, _ = load_manifest(copy)
    damage(copy, manifest)
    return copy


def test_damaged_shards(shards, tmp_path, monkeypatch):
    def of_train(folder: Path, manifest) -> Path:
        return folder / manifest.splits["train"].files[0].name

    def truncate(folder: Path, manifest) -> None:
        os.truncate(of_train(folder, manifest), 1000)

    def overwrite(folder: Path, manifest) -> None:  # as many bytes
        with open(of_train(folder, manifest), "r+b") as file:
            file.write(bytes(1000))

    found = quick("--shards", damaged(shards, tmp_path / "missing", lambda folder, _: (folder / "mean.npy").unlink()))
    assert found["SHARDS"].state == WRONG and "mean.npy: No such file" in found["SHARDS"].found
    found = quick("--shards", damaged(shards, tmp_path / "short", truncate))
    assert found["SHARDS"].state == WRONG and "train-00000.arrow: its bytes have changed" in found["SHARDS"].found
    found = quick("--shards", damaged(
        shards, tmp_path / "no-json", lambda folder, _: (folder / "manifest.json").write_text("{")))
    assert found["SHARDS"].state == WRONG and "damaged" in found["SHARDS"].found

    overwritten = damaged(shards, tmp_path / "overwritten", overwrite)
    assert folders.shards(str(overwritten), thorough=False).state == OK
    finding = found_by(lambda: folders.shards(str(overwritten), thorough=True))
    assert finding.state == WRONG and "train-00000.arrow" in finding.found and finding.mend

    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("mean.npy"))
    found = quick("--shards", shards)["SHARDS"]
    assert found.state == WRONG and found.found == f"{shards / 'mean.npy'}: may not be read"


def test_shards_in_an_object_store(shards, tmp_path, monkeypatch):
    class Elsewhere:
        location = "s3://bucket/shards"

        def __init__(self, folder: Path):
            self._local = storage.LocalStorage(folder)

        def __getattr__(self, name: str):
            return getattr(self._local, name)

    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    monkeypatch.setattr(storage, "open_storage", lambda location: Elsewhere(copy))
    assert folders.shards(Elsewhere.location, thorough=False).state == NOTE
    assert "20 train, 10 val images" in folders.shards(Elsewhere.location, thorough=True).found
    (copy / "mean.npy").unlink()
    finding = found_by(lambda: folders.shards(Elsewhere.location, thorough=True))
    assert finding.state == WRONG and "mean.npy is missing" in finding.found and finding.mend
    (copy / "manifest.json").unlink()
    finding = found_by(lambda: folders.shards(Elsewhere.location, thorough=True))
    assert finding.state == WRONG and "no manifest can be read there" in finding.found and "address" in finding.mend


def test_two_processes_that_cannot_meet(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    finding = exchange.rpc()
    assert finding.state == WRONG and "nowhere0" in finding.found
    assert finding.mend.startswith("try without GLOO_SOCKET_IFNAME=nowhere0;")


def test_two_processes_that_hang(monkeypatch):
    monkeypatch.setattr(exchange, "LIMIT_S", 0.2)
    finding = exchange.rpc()
    assert finding.state == WRONG and finding.found == "two processes did not finish within 0.2 s"


def test_which_of_two_processes_is_to_blame():
    told = "warning\nalexnet: the other tower died (connection closed)\nalexnet: CUDA error: no kernel image\n"
    assert exchange.failure(told, 1) == "CUDA error: no kernel image"
    assert exchange.failure("alexnet: another process died\n", 1) == "another process died"
    assert exchange.failure("Traceback:\nOSError: no temporary folder\n", 1) == "OSError: no temporary folder"
    assert exchange.failure("", 9) == "exit code 9"


def test_a_decoder_that_takes_red_for_blue(monkeypatch):
    from nvidia.dali import types

    from pipeline.pixels import dali

    assert decoding.on_cpu().state == OK
    monkeypatch.setitem(dali.DECODING, "output_type", types.BGR)
    assert decoding.on_cpu().state == WRONG


def test_a_loopback_that_cannot_be_used(monkeypatch):
    def refuse(*_):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert network.loopback().state == WRONG and "Connection refused" in network.loopback().found
    monkeypatch.setattr(network, "addresses_of", lambda name: [])
    assert "/etc/hosts" in network.loopback().mend


def test_a_name_server_that_does_not_answer(monkeypatch):
    asked, answered = threading.Event(), threading.Event()

    def wait(*_) -> list:
        asked.set()
        answered.wait(60)
        return [(None, None, None, "", ("10.0.0.7", 0))]

    monkeypatch.setattr(network, "PATIENCE_S", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", wait)
    began = time.monotonic()
    assert network.addresses_of("node7") == []
    assert asked.wait(60) and time.monotonic() - began < 30
    answered.set()
