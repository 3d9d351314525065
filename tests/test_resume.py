"""Killed at any moment and started again, packing goes on where it was and ends with the same bytes."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from sources_on_the_spot import contents, picture

KILLS = 20
CHILD = """
import multiprocessing, signal, sys
from pathlib import Path
from pipeline.packing import chunks, plan, preprocess
from pipeline.errors import DataError, PreprocessError
from pipeline.sources import open_source
from pipeline.storage import open_storage

def report(done, total, task):
    print(task, done, *(p.pid for p in multiprocessing.active_children()), flush=True)
    if sys.argv[3:] == ["pause"] and task.startswith("packing"):
        signal.pause()  # until the test's signal comes

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    chunks.CHUNK_IMAGES = 4
    plan.ROWS_PER_SHARD = {"jpeg": 16, "raw": 4}
    try:
        preprocess.preprocess(open_source(Path(sys.argv[1])), open_storage(sys.argv[2]), plan.Packing(), 2,
                              progress=report)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    except (DataError, PreprocessError) as error:
        sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "data"
    for split, each in (("train", 240), ("val", 10)):
        for wnid in ("n01", "n02", "n03"):
            (folder / split / wnid).mkdir(parents=True)
            for i in range(each):
                data = picture(i % 7) if i % 20 else b"broken"
                (folder / split / wnid / f"{i}.JPEG").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def start(source, tmp_path_factory):
    script = tmp_path_factory.mktemp("child") / "child.py"
    script.write_text(CHILD)

    def start(out: Path, *words: str, **options) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, script, source, out, *words], text=True, start_new_session=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}, **options,
        )

    return start


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "shards"
    child = start(out)
    said, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors
    found = contents(out)
    assert len(found) == 3 + 45 + 2
    return found


def test_twenty_kills_at_random_moments_and_one_result(start, undisturbed, tmp_path):
    rng = random.Random(20)
    kills = rounds = resumed = 0
    while kills < KILLS:
        rounds += 1
        out = tmp_path / f"round{rounds}"
        while True:
            child = start(out)
            first = child.stdout.readline()  # it lists: from here on it may be anywhere
            receipts_before = len(list(out.glob("packing/*.receipt")))
            time.sleep(rng.uniform(0, 1.0))
            child.kill()
            child.communicate(timeout=20)
            assert first.startswith("listing")
            if child.returncode == 0:  # it was faster
                break
            assert child.returncode == -signal.SIGKILL
            kills += 1
            resumed += receipts_before > 0
            assert (out / "manifest.json").exists() <= (contents(out).keys() >= undisturbed.keys())
        assert contents(out) == undisturbed
        shutil.rmtree(out)
    assert resumed > 3


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_an_interrupted_or_killed_run(start, tmp_path, number):
    child = start(tmp_path / "shards", "pause")
    try:
        for line in child.stdout:
            if line.startswith("packing"):
                break
        workers = [int(pid) for pid in line.split()[3:]]
        assert len(workers) == 2
        if number == signal.SIGINT:  # Ctrl-C reaches every process of the terminal
            for pid in workers:
                os.kill(pid, number)
            time.sleep(0.3)
            os.killpg(child.pid, number)
        else:
            child.kill()
        said, errors = child.communicate(timeout=20)
    finally:
        child.kill()
        child.wait()
    if number == signal.SIGINT:
        assert said == "interrupted\n" and errors == ""
    deadline = time.monotonic() + 10
    while not all(map(gone, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(gone, workers))
    assert not (tmp_path / "shards" / "manifest.json").exists()


def test_out_of_file_handles_is_one_line_and_the_next_run_goes_on(start, undisturbed, tmp_path):
    out, failed = tmp_path / "shards", 0
    for handles in (12, 16, 20, 26, 40):
        child = start(out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (handles, handles)))
        _, errors = child.communicate(timeout=60)
        failed += child.returncode != 0
    assert failed
    child = start(out)
    child.communicate(timeout=60)
    assert child.returncode == 0 and contents(out) == undisturbed


def test_a_full_disk_in_earnest(start, undisturbed, tmp_path):
    """The kernel refuses to let a file grow beyond a limit, as a full disk does."""
    out = tmp_path / "shards"
    largest = max(len(data) for name, data in undisturbed.items() if name.startswith("train"))

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1000, largest - 1000))

    child = start(out, preexec_fn=limit)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 1
    (line,) = errors.strip().splitlines()
    assert "File too large" in line and "goes on where it was" in line
    child = start(out)
    child.communicate(timeout=60)
    assert child.returncode == 0 and contents(out) == undisturbed


def test_damaged_leftovers_are_made_anew(start, undisturbed, tmp_path):
    out = tmp_path / "shards"
    child = start(out, "pause")
    for line in child.stdout:
        if line.startswith("packing"):
            break
    child.kill()
    child.communicate(timeout=20)
    (out / "packing/train-00000.arrow.receipt").write_bytes(b"{}\nnot a receipt")
    (out / "packing/train-00001.arrow.receipt").write_bytes(b"")
    (out / "train-00000.arrow").write_bytes(b"torn")
    (out / "train-00001.arrow.01234567.tmp").write_bytes(b"torn")
    child = start(out)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors
    assert contents(out) == undisturbed
