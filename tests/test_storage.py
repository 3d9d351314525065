"""Shards in an object store: an S3 server on the loopback address stands in for one."""

from __future__ import annotations

import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest
from conftest import PROGRAMS
from pyarrow import fs
from sources_on_the_spot import contents, pack, write_folders

from pipeline.cache import local_shards
from pipeline.errors import DataError, PreprocessError
from pipeline.manifest import load_manifest
from pipeline.packing import agreement, chunks, plan
from pipeline.packing.agreement import Share
from pipeline.storage import ObjectStorage, open_storage
from pipeline.verify import verify, verify_place


@pytest.fixture(scope="module")
def server():
    """The query that leads an s3:// location to a server of our own."""
    program = subprocess.Popen([sys.executable, PROGRAMS / "s3_server.py"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        try:
            yield f"?scheme=http&endpoint_override=127.0.0.1:{int(program.stdout.readline())}&region=us-east-1"
        finally:
            program.communicate(timeout=20)


@pytest.fixture
def bucket(server) -> str:
    name = f"bucket{uuid.uuid4().hex[:8]}"
    files, _ = fs.FileSystem.from_uri(f"s3://{name}{server}&allow_bucket_creation=true")
    files.create_dir(name)
    return name


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp("source") / "data")


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "PATIENCE_S", 30)
        patch.setattr(chunks, "CHUNK_IMAGES", 2)
        patch.setattr(plan, "ROWS_PER_SHARD", {"jpeg": 4, "raw": 4})
        yield


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory) -> dict[str, bytes]:
    """What a local folder would hold."""
    out = tmp_path_factory.mktemp("local") / "shards"
    pack(source, out)
    return contents(out)


def stored(location: str) -> dict[str, bytes]:
    storage = open_storage(location)
    return {name: storage.read(name) for name in storage.sizes() if not name.endswith("/")}


def test_an_object_store_gets_the_same_files_from_two_processes(server, bucket, source, packed):
    location = f"s3://{bucket}/deep/shards{server}"
    other = threading.Thread(target=pack, args=(source, location), kwargs={"share": Share(1, 2)})
    other.start()
    manifest = pack(source, location, share=Share(0, 2))
    other.join()
    assert stored(location) == packed and manifest.splits["train"].images == 12
    assert pack(source, location) == manifest


def test_an_upload_that_fails_is_one_line_and_the_next_run_goes_on(server, bucket, source, packed, monkeypatch):
    location = f"s3://{bucket}/shards{server}"
    create = ObjectStorage.create

    def fails(self, name):
        if name.startswith("train-00002"):
            raise OSError("AWS Error NETWORK_CONNECTION\nduring upload")
        return create(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStorage, "create", fails)
        with pytest.raises(PreprocessError, match="AWS Error NETWORK_CONNECTION during upload") as caught:
            pack(source, location)
    assert "\n" not in str(caught.value)
    left = stored(location)
    assert "manifest.json" not in left and "train-00001.arrow" in left and "train-00002.arrow" not in left
    pack(source, location)
    assert stored(location) == packed


def test_a_foreign_file_in_the_store_is_left_alone(server, bucket, source):
    location = f"s3://{bucket}/mine{server}"
    with open_storage(location).create("notes.txt") as file:
        file.write(b"mine")
    with pytest.raises(DataError, match="holds notes.txt, which is not ours"):
        pack(source, location)
    assert stored(location) == {"notes.txt": b"mine"}


def test_a_block_that_fails_uploads_nothing(server, bucket):
    storage = open_storage(f"s3://{bucket}/x{server}")
    with pytest.raises(RuntimeError), storage.create("half") as file:
        file.write(b"half")
        raise RuntimeError
    assert storage.sizes() == {}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_upload_that_breaks_off_leaves_nothing(server, bucket, monkeypatch, error):
    def breaks_off(file, upload, size):
        upload.write(file.read(1 << 20))
        raise error("cut")

    storage = open_storage(f"s3://{bucket}/x{server}")
    monkeypatch.setattr("pipeline.storage.shutil.copyfileobj", breaks_off)
    with pytest.raises(error, match="cut"), storage.create("half") as file:
        file.write(bytes(3 << 20))
    assert storage.sizes() == {}


def test_no_room_for_temporary_files_is_told_as_such(server, bucket, source, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere/at/all")
    with pytest.raises(PreprocessError, match="^/nowhere/at/all: cannot be written .*TMPDIR"):
        pack(source, f"s3://{bucket}/x{server}")


@pytest.mark.parametrize("location, said", [
    ("s3://", "names no folder"), ("ftp://host/x", "not a usable location"),
    ("s3://no-bucket-of-that-name/x", "cannot be read or written"), ("file:///data/x", "by its path, /data/x"),
])
def test_locations_that_are_none(server, source, location, said):
    with pytest.raises((DataError, PreprocessError), match=said) as caught:
        pack(source, location + (server if "no-bucket" in location else ""))
    assert "\n" not in str(caught.value)


def test_keys_in_a_location_are_not_shown():
    assert open_storage("s3://key:secret@bucket/x?region=us-east-1").location == "s3://bucket/x?region=us-east-1"


def test_what_the_store_has_lost_is_told_though_a_copy_is_whole(server, bucket, source, tmp_path):
    location = f"s3://{bucket}/shards{server}"
    manifest, storage = pack(source, location), open_storage(location)
    verify(local_shards(location, tmp_path), manifest, 1)
    verify_place(storage, manifest)
    files, base = fs.FileSystem.from_uri(location)
    shard, rejected = storage.read("train-00001.arrow"), storage.read("rejected.jsonl")
    files.delete_file(f"{base}/train-00001.arrow")
    with pytest.raises(DataError, match="train-00001.arrow is missing"):
        verify_place(storage, manifest)
    with storage.create("train-00001.arrow") as file:
        file.write(shard)
    for lines, said in ((rejected[:-9], "damaged"), (b"".join(rejected.splitlines(True)[1:]), "has other lines")):
        with storage.create("rejected.jsonl") as file:
            file.write(lines)
        with pytest.raises(DataError, match=f"rejected.jsonl .*{said}"):
            verify_place(storage, manifest)
    files.delete_file(f"{base}/train-00001.arrow")
    pack(source, location)
    assert storage.read("train-00001.arrow") == shard


def test_a_cache_holds_a_copy_that_is_checked_and_kept(server, bucket, source, packed, tmp_path):
    location = f"s3://{bucket}/shards{server}"
    pack(source, location)
    folder = local_shards(location, tmp_path / "cache")
    copy = contents(folder)
    assert {name: copy[name] for name in copy.keys() - {"lock"}} == {
        name: packed[name] for name in packed.keys() - {"rejected.jsonl"}
    }
    manifest, _ = load_manifest(folder)
    verify(folder, manifest, 1)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}
    assert local_shards(location, tmp_path / "cache") == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}


def test_processes_of_one_host_fetch_once(server, bucket, source, tmp_path, monkeypatch):
    location = f"s3://{bucket}/shards{server}"
    manifest = pack(source, location)
    fetched = []
    download = ObjectStorage.download
    monkeypatch.setattr(ObjectStorage, "download", lambda *a: (fetched.append(a[1]), download(*a)))
    both = [threading.Thread(target=local_shards, args=(location, tmp_path)) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert sorted(fetched) == sorted(file.name for file in manifest.files())


def test_a_changed_file_is_named_and_the_next_fetch_goes_on(server, bucket, source, packed, tmp_path, monkeypatch):
    location = f"s3://{bucket}/shards{server}"
    manifest, storage = pack(source, location), open_storage(location)
    names = [file.name for file in manifest.files()]
    with storage.create(names[1]) as file:
        file.write(b"another file")
    with pytest.raises(DataError, match=f"{names[1]} is not the file that its manifest names"):
        local_shards(location, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert not (folder / "manifest.json").exists() and sorted(contents(folder)) == sorted(["lock", names[0]])

    with storage.create(names[1]) as file:
        file.write(packed[names[1]])
    fetched, download = [], ObjectStorage.download
    monkeypatch.setattr(ObjectStorage, "download", lambda *a: (fetched.append(a[1]), download(*a)))
    assert local_shards(location, tmp_path) == folder and fetched == names[1:]
    verify(folder, manifest, 1)


def test_no_shards_there(server, bucket, tmp_path):
    with pytest.raises(DataError, match="no manifest can be read there"):
        local_shards(f"s3://{bucket}/nothing{server}", tmp_path)


def test_a_local_folder_is_its_own_cache(tmp_path):
    assert local_shards(str(tmp_path)) == tmp_path
