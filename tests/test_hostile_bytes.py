"""Readers of files take any bytes: they tell in one line what is wrong, or read what is right.

Here the bytes are such as no accident makes: whole files with odd values in them, and hashes that fit.
tests/test_mutations.py damages sources, manifests, shards and mean.npy as accidents do.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import struct
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_mutations import changes, damaged

from launch import checkpoint
from launch.errors import UserError
from launch.run_folder import RunFolder
from launch.runlog import read_log
from model.recipe import NOTES
from pipeline.errors import DataError
from pipeline.files import read_plain
from pipeline.manifest import Manifest, ShardFile, Split, SynsetClass, check_files, parse_manifest
from pipeline.mean import load_mean
from pipeline.shards import RAW_BYTES, SCHEMA, ShardImages, read_batches

thorough = settings(max_examples=200, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))

# JSON values where others belong; the last three are texts in place of which stands what JSON's writer would not write.
ODD = [None, True, False, -1, 0, 1, 2**31, 2**63, 2**70, 0.5, 1e308, float("inf"), float("nan"), "", "two\nlines",
       "\ud800", "../x", "/dev/null", "a" * 300, [], {}, [[]], [None], {"a": 1}, [["a", "b"]], [1, 2, 3],
       "DEEP", "DEEPER", "DIGITS"]
edits = st.lists(st.tuples(st.sampled_from(["replace", "replace", "replace", "remove", "add"]),
                           st.floats(0, 1, exclude_max=True), st.sampled_from(ODD)), min_size=1, max_size=3)
tokens = st.lists(
    st.sampled_from([b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\u", b"1e999", b"-", b"null", b"\xff", b"\n",
                     b'"event"', b'"step"', b"ARROW1\0\0", b"\xff\xff\xff\xff", b"\0\0\0\0"]) | st.binary(),
    max_size=20,
).map(b"".join)  # fmt: skip


def places(value: object) -> list[tuple[dict | list, str | int]]:
    """Return each place inside a JSON value: what holds it, and its key."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in [(value, key), *places(value[key])]]


def edited(value: object, edits: list[tuple[str, float, object]]) -> bytes:
    """Return JSON of `value` after edits, each (kind, place as a share of all, odd value)."""
    value = json.loads(json.dumps(value))
    for kind, share, odd in edits:
        if not (inside := places(value)):
            break
        (holder, key), odd = inside[int(share * len(inside))], copy.deepcopy(odd)
        if kind == "replace":
            holder[key] = odd
        elif kind == "remove":
            del holder[key]
        elif isinstance(holder, dict):
            holder[str(odd)] = holder[key]
        else:
            holder.insert(key, odd)
    return (json.dumps(value).replace('"DEEPER"', "[" * 100_000).replace('"DEEP"', "[" * 900 + "]" * 900)
            .replace('"DIGITS"', "9" * 5000).encode())


def told(error: Exception) -> bool:
    return "\n" not in str(error) and len(str(error)) < 1000


MANIFEST = Manifest(
    "class-folders", "jpeg", "libjpeg", 0, 0.1, "0" * 64, [SynsetClass("n01", "one"), SynsetClass("n02", "two")],
    {"train": Split(3, 1, [1, 2], [ShardFile("train.arrow", 3, 1000, "1" * 64)]), "val": Split(0, 0, [0, 0], [])},
    ShardFile("mean.npy", 0, 786560, "2" * 64), [100.0, 110.0, 120.0], np.eye(3).tolist(),
)  # fmt: skip


@thorough
@given(edits)
def test_manifests(edits):
    try:
        manifest = parse_manifest(edited(asdict(MANIFEST), edits), "manifest.json")
    except DataError as error:
        assert told(error)
        return
    texts = [manifest.layout, manifest.store, manifest.encoding, manifest.plan,
             *(text for one in manifest.classes for text in (one.wnid, one.words)),
             *(text for file in manifest.files() for text in (file.name, file.sha256))]
    assert all(type(text) is str for text in texts)
    assert all(Path(file.name).name == file.name not in ("", ".", "..") for file in manifest.files())
    for split in manifest.splits.values():
        assert split.images == sum(split.class_counts) == sum(file.images for file in split.files) >= 0


def run_of(folder: Path, run: bytes) -> RunFolder:
    (folder / "run.json").write_bytes(run)
    return RunFolder(folder)


RUN = {"recipe": NOTES.to_dict(), "seed": 0, "wnids": ["n01", "n02"], "words": ["one", "two"], "data": "0" * 64,
       "mean": "1" * 64}


@thorough
@given(edits)
def test_descriptions_of_runs(tmp_path_factory, edits):
    try:
        run = run_of(tmp_path_factory.getbasetemp(), edited(RUN, edits)).read()
    except UserError as error:
        assert told(error)
        return
    assert all(type(text) is str for text in (*run.wnids, *run.words)) and len(run.wnids) == len(run.words)
    assert run.recipe.to_dict()["name"] == run.recipe.name and type(run.seed) is int


@thorough
@given(st.lists(st.one_of(tokens, edits.map(lambda them: edited({"event": "steps", "step": 1, "loss": 2.5}, them)))))
def test_logs(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "log.jsonl"
    whole = b'{"event": "start", "step": 0}'
    path.write_bytes(b"\n".join([whole, *lines, whole]))
    records = read_log(path)
    assert records[0] == records[-1] == json.loads(whole)
    assert all(isinstance(record["event"], str) for record in records)


TENSORS = {"conv1.weight": torch.arange(24.0).reshape(2, 3, 2, 2), "conv1.bias": torch.arange(2.0)}
WHOLE = {name: tensor.shape for name, tensor in TENSORS.items()}
FILE = safetensors.torch.save(TENSORS, {"format": "pt"})
HEADER = FILE[8 : 8 + struct.unpack_from("<Q", FILE)[0]]


def written(base: Path, tensors: bytes, state: bytes | None = None) -> Path:
    """Write a checkpoint whose hashes fit."""
    folder = base / "step-000000005"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(tensors)
    hashes = {"model.safetensors": hashlib.sha256(tensors).hexdigest()}
    (folder / "state.json").write_bytes(state or json.dumps({"step": 5, "files": hashes}).encode())
    return folder


def loaded(folder: Path) -> dict[str, torch.Tensor] | None:
    """Return what a checkpoint holds; None where it was refused."""
    found = {name: torch.full(shape, torch.nan) for name, shape in WHOLE.items()}
    try:
        checkpoint.read_state(folder)
        checkpoint.load(folder, found, WHOLE)
    except UserError as error:
        assert told(error)
        return None
    return found


def test_a_checkpoint_is_read(tmp_path):
    found = loaded(written(tmp_path, FILE))
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@thorough
@given(edits, st.none() | st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1]))
def test_headers_of_tensors(tmp_path_factory, edits, length):
    header = edited(json.loads(HEADER), edits)
    size = struct.pack("<Q", len(header) if length is None else length)
    found = loaded(written(tmp_path_factory.getbasetemp(), size + header + FILE[8 + len(HEADER) :]))
    assert found is None or all(found[name].shape == shape for name, shape in WHOLE.items())


@thorough
@given(changes)
def test_damaged_tensors(tmp_path_factory, changes):
    found = loaded(written(tmp_path_factory.getbasetemp(), damaged(FILE, changes)))
    assert found is None or all(found[name].shape == shape for name, shape in WHOLE.items())


@thorough
@given(edits)
def test_states(tmp_path_factory, edits):
    hashes = {"a.safetensors": "0" * 64, "b.safetensors": "1" * 64}
    state = {"step": 5, "files": hashes, "epoch": 1, "recipe": {"name": "x"}}
    folder = written(tmp_path_factory.getbasetemp(), FILE, edited(state, edits))
    try:
        found = checkpoint.read_state(folder)
    except UserError as error:
        assert told(error)
        return
    assert found["step"] == 5 and found["files"]
    assert all(Path(name).name == name and type(digest) is str for name, digest in found["files"].items())


@pytest.mark.parametrize("files", [
    [["a.safetensors", "0"]], {"/dev/null": hashlib.sha256().hexdigest()}, {"../run.json": "0"}, {"a\0": "0"},
    {"": "0"}, {".": "0"}, {"a.safetensors": 0}, {}, None,
])  # fmt: skip
def test_states_that_name_no_files(tmp_path, files):
    with pytest.raises(UserError, match="state.json: damaged"):
        checkpoint.read_state(written(tmp_path, FILE, json.dumps({"step": 5, "files": files}).encode()))


def arrow(images: list[bytes], batches: int = 1, **options) -> bytes:
    """Return a shard of three images, of labels 0, 1 and 1, in so many batches, of which the fourth would be empty."""
    file = io.BytesIO()
    with pa.ipc.new_file(file, SCHEMA, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for rows in np.array_split(np.arange(3), batches):
            columns = [[images[i] for i in rows], [min(i, 1) for i in rows], [f"name{i}" for i in rows]]
            writer.write_batch(pa.record_batch([pa.array(column, field.type) for column, field in zip(columns, SCHEMA)],
                                               schema=SCHEMA))
    return file.getvalue()


SHARDS = [arrow([b"one", b"two or", b"three"]), arrow([b"one", b"", b"three"], 4), arrow([b"", b"", b""]),
          arrow([b"one", b"two", b"three"], compression="zstd")]


def images_of(folder: Path, shard: bytes) -> ShardImages | None:
    """Return what a shard of MANIFEST's holds, all of it read; None where it was refused."""
    (folder / "train.arrow").write_bytes(shard)
    try:
        images = ShardImages(folder, MANIFEST, "train")
    except DataError as error:
        assert told(error)
        return None
    assert len(images) == 3 and all(type(images.name(i)) is str and images.stored(i).tobytes() is not None
                                    for i in range(3))
    return images


@pytest.mark.parametrize("shard", SHARDS[:3], ids=["one batch", "several", "empty images"])
def test_shards_are_read(tmp_path, shard):
    images = images_of(tmp_path, shard)
    assert images.labels.tolist() == [0, 1, 1] and [images.name(i) for i in range(3)] == ["name0", "name1", "name2"]
    assert images.stored(0).tobytes() == (b"" if shard is SHARDS[2] else b"one")


@pytest.mark.parametrize("shard", SHARDS[:2], ids=["one batch", "several"])
def test_shards_of_which_one_number_is_another(tmp_path, shard):
    """Each of them in turn: lengths, places, types, labels."""
    for place in range(0, len(shard) - 8, 4):
        number = struct.unpack_from("<q", shard, place)[0]
        for other in {number ^ 1, -1, 2**40} - {number}:
            images_of(tmp_path, shard[:place] + struct.pack("<q", other) + shard[place + 8 :])


def test_shards_of_which_one_byte_is_another(tmp_path):
    shard = SHARDS[0]
    for place, byte in enumerate(shard):
        for other in {0, byte ^ 1, byte + 1 & 255} - {byte}:
            images_of(tmp_path, shard[:place] + bytes([other]) + shard[place + 1 :])


@thorough
@given(st.sampled_from(SHARDS), changes)
def test_damaged_shards(tmp_path_factory, shard, changes):
    images_of(tmp_path_factory.getbasetemp(), damaged(shard, changes))


def test_a_shard_takes_no_more_memory_than_it_has_bytes(tmp_path):
    """Compressed, 64 MiB of zeros are a few kilobytes."""
    bomb = arrow([bytes(64 << 20), b"", b""], compression="zstd")
    before = pa.default_memory_pool().max_memory()
    (tmp_path / "train.arrow").write_bytes(bomb)
    with pytest.raises(DataError, match="no uncompressed images"):
        read_batches(tmp_path / "train.arrow")
    assert len(bomb) < 1 << 20 and pa.default_memory_pool().max_memory() == before


def test_pixels_are_whole(tmp_path):
    manifest = Manifest(**{**vars(MANIFEST), "store": "raw"})
    (tmp_path / "train.arrow").write_bytes(arrow([bytes(RAW_BYTES), bytes(RAW_BYTES), bytes(RAW_BYTES - 1)]))
    with pytest.raises(DataError, match=f"an image is not {RAW_BYTES} bytes"):
        ShardImages(tmp_path, manifest, "train")


def test_a_mean_image_that_is_none(tmp_path):
    """Its hash may fit a manifest that somebody has made up."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6, 3)}
    vast, odd = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(vast, header)
    np.save(odd, np.array([object()]), allow_pickle=True)
    for content in (b"", b"no array", vast.getvalue(), odd.getvalue()):
        (tmp_path / "mean.npy").write_bytes(content)
        with pytest.raises(DataError, match="mean.npy: cannot be read"):
            load_mean(tmp_path / "mean.npy")


def test_files_without_an_end_are_not_read(tmp_path):
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(200 << 30)
    with pytest.raises(OSError, match="longer than"):
        read_plain(tmp_path / "manifest.json")


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "train.arrow")
    with pytest.raises(DataError, match="no plain file"):
        read_batches(tmp_path / "train.arrow")
    with pytest.raises(DataError, match="have changed"):
        check_files(tmp_path, [ShardFile("train.arrow", 0, 0, hashlib.sha256().hexdigest())])


@settings(thorough, max_examples=300)
@given(tokens)
def test_any_bytes(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    with pytest.raises(DataError):
        parse_manifest(data, "manifest.json")
    assert images_of(folder, data) is None
    assert loaded(written(folder, data)) is None
    state = written(folder, FILE, data or b"x")
    for read in (run_of(folder, data).read, lambda: checkpoint.read_state(state)):
        with pytest.raises(UserError) as error:
            read()
        assert told(error.value)
    (folder / "log.jsonl").write_bytes(data)
    read_log(folder / "log.jsonl")
