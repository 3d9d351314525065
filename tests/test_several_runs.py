"""Runs of packing that come one after the other, or at the same time, into one folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from sources_on_the_spot import contents, pack, picture, write_folders

from pipeline.errors import DataError, PreprocessError
from pipeline.packing import agreement, chunks, plan, preprocess
from pipeline.packing.agreement import Share


class Stopped(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    """Five shards: train-00000 to 2 and val-00000 to 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "PATIENCE_S", 20)
        patch.setattr(agreement, "POLL_S", 0.05)
        patch.setattr(chunks, "CHUNK_IMAGES", 2)
        patch.setattr(plan, "ROWS_PER_SHARD", {"jpeg": 5, "raw": 5})
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("source") / "data")


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "out"
    pack(source, folder)
    return folder


@pytest.fixture(scope="module")
def almost_packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All shards and their receipts, but no manifest yet."""
    folder = tmp_path_factory.mktemp("almost") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess, "finish", stop)
        with pytest.raises(Stopped):
            pack(source, folder)
    assert "manifest.json" not in contents(folder) and "packing/train-00002.arrow.receipt" in contents(folder)
    return folder


@pytest.fixture
def unfinished(almost_packed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(almost_packed, tmp_path / "out")


def stop(*_) -> None:
    raise Stopped


def pack_with(ranks: int, source: Path, out: Path, **settings) -> list[Exception]:
    """Pack with several processes, which are threads here; return what they raised."""
    raised = []
    threads = [rank_of(number, ranks, source, out, raised, **settings) for number in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return raised


def rank_of(number: int, ranks: int, source: Path, out: Path, raised: list[Exception], **settings) -> threading.Thread:
    def rank() -> None:
        try:
            pack(source, out, share=Share(number, ranks), **settings)
        except Exception as error:
            raised.append(error)

    return threading.Thread(target=rank)


def test_a_run_that_has_only_to_finish(packed, source, unfinished, monkeypatch):
    monkeypatch.setattr(preprocess, "make_shards", stop)
    pack(source, unfinished)
    assert contents(unfinished) == contents(packed)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("damage", ["torn", "missing", "changed", "receipt torn", "receipt missing", "receipt changed"])
def test_what_is_damaged_is_made_again_before_there_is_a_manifest(packed, source, unfinished, ranks, damage):
    shard = unfinished / "train-00001.arrow"  # of two processes the second one's
    if damage.startswith("receipt"):
        shard = unfinished / "packing" / "train-00001.arrow.receipt"
    whole = shard.read_bytes()
    shard.unlink()
    if damage.endswith("torn"):
        shard.write_bytes(whole[:-5])
    elif damage.endswith("changed"):
        shard.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    assert pack_with(ranks, source, unfinished) == []
    assert contents(unfinished) == contents(packed)


@pytest.mark.parametrize(("changed", "differs"), [
    ({"seed": 1}, "seed"), ({"store": "raw"}, "encoding, store"), ("image", "images"), ("class", "classes, images"),
    ("hold_out", "hold_out"),
])
def test_an_unfinished_folder_of_something_else_is_refused_and_left_alone(source, tmp_path, changed, differs):
    there = shutil.copytree(source, tmp_path / "source", symlinks=True)
    settings = changed if isinstance(changed, dict) else {}
    if changed == "hold_out":
        shutil.rmtree(there / "val")
        settings = {"hold_out": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess, "finish", stop)
        with pytest.raises(Stopped):
            pack(there, tmp_path / "out")
    if changed == "image":
        (there / "train" / "n01" / "new.JPEG").write_bytes(picture(7))
    elif changed == "class":
        (there / "train" / "n04").mkdir()
        (there / "train" / "n04" / "new.JPEG").write_bytes(picture(7))
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=f"begun with other {differs}; choose another folder"):
        pack(there, tmp_path / "out", **settings)
    assert contents(tmp_path / "out") == before


def test_receipts_without_a_plan_are_refused(source, unfinished):
    (unfinished / "packing" / "plan.json").unlink()
    before = contents(unfinished)
    with pytest.raises(DataError, match="nothing that says what it was made of"):
        pack(source, unfinished)
    assert contents(unfinished) == before


@pytest.mark.parametrize("ranks", [1, 2])
def test_strict_refuses_what_an_earlier_run_left_out(source, unfinished, ranks):
    raised = pack_with(ranks, source, unfinished, strict=True)
    assert len(raised) == ranks  # none ends as if all were well
    assert any("without --strict" in str(error) for error in raised)
    assert not (unfinished / "manifest.json").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_leftovers_of_killed_processes_are_removed(packed, source, unfinished, ranks):
    (unfinished / "train-00001.arrow.0123abcd.tmp").write_bytes(b"half a shard")
    assert pack_with(ranks, source, unfinished) == []
    assert contents(unfinished) == contents(packed)


def test_a_run_killed_while_it_wrote_its_plan_is_no_obstacle(packed, source, tmp_path):
    (tmp_path / "out" / "packing").mkdir(parents=True)
    (tmp_path / "out" / "packing" / "plan.json.0123abcd.tmp").write_bytes(b"half a plan")
    pack(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(packed)


def test_a_process_may_come_while_the_first_one_writes_the_plan(packed, source, tmp_path, monkeypatch):
    """It sees the folder with what is half written, of which it cannot tell yet what it belongs to."""
    raised = []
    other = rank_of(1, 2, source, tmp_path / "out", raised)

    def slow_dump(facts, **settings):
        assert [path.suffix for path in (tmp_path / "out" / "packing").iterdir()] == [".tmp"]
        other.start()
        time.sleep(0.3)
        return json.dumps(facts, **settings)

    monkeypatch.setattr(agreement, "json", SimpleNamespace(dumps=slow_dump, loads=json.loads))
    pack(source, tmp_path / "out", share=Share(0, 2))
    other.join(60)
    assert raised == [] and contents(tmp_path / "out") == contents(packed)


@pytest.mark.parametrize("name", ["packing/thesis.txt", "packing/important/thesis.txt", "train-00000.arrow"])
def test_what_is_not_ours_is_left_alone(source, tmp_path, name):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / "packing").mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_bytes(b"mine")
    with pytest.raises(DataError, match="which is not ours|nothing that says what it was made of"):
        pack(source, tmp_path / "out")
    assert contents(tmp_path / "out") == {name: b"mine"}


def test_nobody_waits_for_what_has_vanished(source, tmp_path, monkeypatch):
    await_all = preprocess.await_all

    def vanished(storage, *rest):
        (storage.folder / "packing" / "train-00001.arrow.receipt").unlink()
        await_all(storage, *rest)

    monkeypatch.setattr(preprocess, "await_all", vanished)
    with pytest.raises(PreprocessError, match="train-00001.arrow or its receipt has vanished"):
        pack(source, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.undo()


def test_a_pipe_in_place_of_a_file_does_not_block(source, unfinished):
    for name in ("packing/plan.json", "manifest.json"):
        (unfinished / name).unlink(missing_ok=True)
        os.mkfifo(unfinished / name)
        with pytest.raises((DataError, PreprocessError), match="not a plain file"):
            pack(source, unfinished)
        (unfinished / name).unlink()


def test_an_out_that_is_a_circle_of_links(source, tmp_path):
    (tmp_path / "out").symlink_to("out")
    for out in (tmp_path / "out", tmp_path / "out" / "x"):
        with pytest.raises(DataError, match="choose another"):
            pack(source, out)


def test_a_process_that_comes_late_finds_all_done(packed, source, tmp_path, monkeypatch):
    """It has read the plan before another process wrote the manifest and tidied up."""
    out = shutil.copytree(packed, tmp_path / "out")
    monkeypatch.setattr(preprocess, "agree_on_plan", lambda *_: None)
    monkeypatch.setattr(preprocess, "make_shards", stop)
    assert pack(source, out, share=Share(1, 2)) is None
    assert contents(out) == contents(packed)
    assert not (out / "packing").exists()


def test_two_runs_at_once(source, unfinished):
    script = ("import fcntl, sys\nfile = open(sys.argv[1], 'w')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
              "print('locked', flush=True)\nsys.stdin.read()")
    lock = unfinished / "packing" / "rank-0.lock"
    with subprocess.Popen([sys.executable, "-c", script, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        before = contents(unfinished)
        with pytest.raises(DataError, match="another run is packing there"):
            pack(source, unfinished)
        assert contents(unfinished) == before
        other.stdin.close()
    pack(source, unfinished)
    assert (unfinished / "manifest.json").exists()


def test_a_file_system_without_locks(packed, source, unfinished, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("pipeline.files.fcntl.flock", no_locks)
    pack(source, unfinished)
    assert contents(unfinished) == contents(packed)
    assert [record.message for record in caplog.records] == [
        f"{unfinished}: no locks on this file system; see that no other run packs there"]


@pytest.mark.parametrize("damage", ["torn", "missing", "changed"])
def test_damaged_shards_of_a_finished_folder_are_made_again(packed, source, tmp_path, damage):
    out = shutil.copytree(packed, tmp_path / "out")
    shard = out / "train-00002.arrow"
    data = bytearray(shard.read_bytes())
    shard.unlink()
    if damage != "missing":
        data[len(data) // 2] ^= 1
        shard.write_bytes(data if damage == "changed" else data[:-9])
    pack(source, out)
    assert contents(out) == contents(packed)


def test_a_damaged_mean_cannot_be_made_alone(packed, source, tmp_path):
    out = shutil.copytree(packed, tmp_path / "out")
    (out / "mean.npy").write_bytes(b"")
    with pytest.raises(DataError, match="mean.npy is damaged"):
        pack(source, out)


def test_a_shard_that_cannot_become_what_it_was(packed, source, tmp_path):
    out = shutil.copytree(packed, tmp_path / "out")
    (out / "train-00000.arrow").unlink()
    there = shutil.copytree(source, tmp_path / "source", symlinks=True)
    for label, wnid in enumerate(("n01", "n02", "n03")):
        for path in (there / "train" / wnid).glob("[1-4].JPEG"):
            size = path.stat().st_size
            path.write_bytes((picture(50 + label) + bytes(size))[:size])  # other pixels of the same length
    with pytest.raises(PreprocessError, match="train-00000.arrow, made again, is not what the manifest says"):
        pack(there, out)
