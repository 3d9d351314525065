"""Reading by place: the right bytes from anywhere, few open files, little memory, and one line for what has changed."""

from __future__ import annotations

import gzip
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from tars_on_the_spot import open_descriptors, peak_bytes, tar_of

from pipeline.errors import DataError
from pipeline.sources import reading
from pipeline.sources.archives import open_tar
from pipeline.sources.reading import OPEN_FILES, Reader, unpack
from pipeline.sources.source import Entry


def image(number: int) -> bytes:
    return random.Random(number).randbytes(100 + number)


def write_tar(folder: Path, name: str, numbers: range) -> list[tuple[Entry, bytes]]:
    data = tar_of(*((f"{number}.JPEG", image(number)) for number in numbers))
    (folder / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with open_tar(folder / name) as tar:
        return [(Entry(name, m.name, 0, m.offset, m.size), image(int(m.name[:-5]))) for m in tar.members()]


def write_files(folder: Path, numbers: range) -> list[tuple[Entry, bytes]]:
    (folder / "files").mkdir()
    for number in numbers:
        (folder / "files" / str(number)).write_bytes(image(number))
    return [(Entry("", f"files/{n}", 0, 0, len(image(n))), image(n)) for n in numbers]


def write_parquet(folder: Path, name: str, numbers: range, **options) -> list[tuple[Entry, bytes]]:
    images = pa.array([{"bytes": image(n), "path": f"{n}.JPEG"} for n in numbers])
    pq.write_table(pa.table({"image": images, "label": [0] * len(images)}), folder / name, **options)
    return [(Entry(name, str(n), 0, row), image(n)) for row, n in enumerate(numbers)]


def refusal(reader: Reader, entry: Entry) -> str:
    with pytest.raises(DataError) as caught:
        reader.read([entry])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bytes_come_in_the_order_asked_for(tmp_path):
    entries = [
        *write_tar(tmp_path, "a.tar", range(9)), *write_tar(tmp_path, "b.tar", range(9, 20)),
        *write_tar(tmp_path, "c.tar.gz", range(20, 30)), *write_files(tmp_path, range(30, 40)),
        *write_parquet(tmp_path, "d.parquet", range(40, 150), row_group_size=40),
        *write_parquet(tmp_path, "e.parquet", range(150, 160), compression="gzip"),
    ]
    unpack(tmp_path / "c.tar.gz", tmp_path / "copy")
    reader = Reader(tmp_path, {"c.tar.gz": tmp_path / "copy"})
    for seed in range(3):
        random.Random(seed).shuffle(entries)
        some = entries[:100] + entries[:2]  # the same one twice is fine
        assert reader.read([entry for entry, _ in some]) == [data for _, data in some]
    assert reader.read([]) == []


def test_a_compressed_archive_is_never_read_without_its_copy(tmp_path):
    [(entry, _)] = write_tar(tmp_path, "c.tgz", range(1))
    with pytest.raises(KeyError):
        Reader(tmp_path).read([entry])


def test_few_files_stay_open(tmp_path):
    entries = [pair for i in range(OPEN_FILES + 40) for pair in write_tar(tmp_path, f"{i}.tar", range(i, i + 2))]
    entries += write_files(tmp_path, range(9))
    before = open_descriptors()
    reader = Reader(tmp_path)
    for _ in range(2):
        assert reader.read([entry for entry, _ in entries]) == [data for _, data in entries]
        assert open_descriptors() - before == OPEN_FILES
    del reader
    assert open_descriptors() == before


def test_parquet_rows_without_an_image_are_empty(tmp_path):
    images = pa.array([{"bytes": b"1"}, None, {"bytes": None}, {"bytes": b"4"}])
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet")
    entries = [Entry("a.parquet", str(row), 0, row) for row in range(4)]
    assert Reader(tmp_path).read(entries) == [b"1", b"", b"", b"4"]


@pytest.mark.parametrize("most_kept, reads", [(reading._MOST_KEPT_BYTES, [0, 1, 2, 0]), (0, [0, 0, 1, 1, 2, 0])])
def test_a_row_group_is_kept_for_the_chunks_that_follow(tmp_path, monkeypatch, most_kept, reads):
    entries, images = zip(*write_parquet(tmp_path, "a.parquet", range(30), row_group_size=10))
    groups, iter_batches = [], pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda self, rows, group, *rest, **settings: (
        groups.extend(group), iter_batches(self, rows, group, *rest, **settings))[1])
    monkeypatch.setattr(reading, "_MOST_KEPT_BYTES", most_kept)
    reader = Reader(tmp_path)
    for chunk in (slice(0, 5), slice(5, 15), slice(15, 30), slice(3, 4)):
        assert reader.read(entries[chunk]) == list(images[chunk])
    assert groups == reads


LARGE_GROUP = """
import re, sys
from pathlib import Path
from pipeline.sources.reading import Reader
from pipeline.sources.source import Entry
def peak_kib():  # getrusage's begins with that of the parent
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
folder = Path(sys.argv[1])
reader = Reader(folder)
reader.read([Entry("small.parquet", "0", 0, 0)])
before = peak_kib()
found = [reader.read([Entry("large.parquet", "x", 0, row)])[0] for row in (0, 99, 399)]
assert [data[:3] for data in found] == [b"%03d" % row for row in (0, 99, 399)]
print((peak_kib() - before) // 1024)
"""


def test_a_large_row_group_is_not_held_in_memory(tmp_path):
    write_parquet(tmp_path, "small.parquet", range(1))
    noise = os.urandom(1 << 19)
    images = pa.array([{"bytes": b"%03d" % row + noise} for row in range(400)])
    pq.write_table(pa.table({"image": images}), tmp_path / "large.parquet", compression="none", use_dictionary=False,
                   write_batch_size=8)
    assert pq.ParquetFile(tmp_path / "large.parquet").num_row_groups == 1
    done = subprocess.run([sys.executable, "-c", LARGE_GROUP, tmp_path], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 130  # MiB; the group has 200, and as much again once it is decoded


def test_what_has_changed_since_it_was_listed_is_named(tmp_path):
    for number, change in enumerate([os.unlink, lambda p: os.truncate(p, 600), lambda p: os.truncate(p, 0)]):
        [*_, (entry, _)] = write_tar(tmp_path, f"{number}.tar", range(5))
        change(tmp_path / entry.archive)
        assert refusal(Reader(tmp_path), entry).startswith(f"{tmp_path / entry.archive}: ")
    for (entry, _), change in zip(write_files(tmp_path, range(4)), [
        os.unlink, lambda p: os.truncate(p, 5), lambda p: p.write_bytes(bytes(999)), lambda p: os.truncate(p, 0),
    ]):
        change(tmp_path / entry.member)
        assert refusal(Reader(tmp_path), entry).startswith(f"{tmp_path / entry.member}: ")


def test_pipes_devices_and_folders_do_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "memory").symlink_to("/proc/self/mem")  # reading its first page is an error
    for name in ("pipe", "zeros", "folder"):
        assert "not a plain file" in refusal(Reader(tmp_path), Entry("", name, 0, 0, 0))
        assert "not a plain file" in refusal(Reader(tmp_path), Entry(name, "x", 0, 0, 9))
        (tmp_path / f"{name}.parquet").symlink_to(name)
        assert "plain file" in refusal(Reader(tmp_path), Entry(f"{name}.parquet", "0", 0))
    assert "cannot be read (" in refusal(Reader(tmp_path), Entry("", "memory", 0, 0, 0))


@pytest.mark.parametrize("damage, said", [
    (lambda data: b"", "damaged ("), (lambda data: data[:200], "damaged ("), (lambda data: data[-200:], "damaged ("),
    (lambda data: data[:4] + bytes(2000) + data[2004:], ""), (lambda data: b"not Parquet" * 99, "damaged ("),
])
def test_damaged_parquet_is_named(tmp_path, damage, said):
    [*_, (entry, _)] = write_parquet(tmp_path, "a.parquet", range(50), row_group_size=10)
    path = tmp_path / "a.parquet"
    Reader(tmp_path).read([entry])
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(Reader(tmp_path), Entry("a.parquet", "0", 0, 0))
    assert message.startswith(f"{path}: ") and said in message


def test_parquet_of_other_contents_is_named(tmp_path):
    pq.write_table(pa.table({"image": [b"no struct"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"picture": [b"x"]}), tmp_path / "b.parquet")
    write_parquet(tmp_path, "c.parquet", range(5))
    assert "a.parquet: " in refusal(Reader(tmp_path), Entry("a.parquet", "0", 0, 0))
    assert "b.parquet: " in refusal(Reader(tmp_path), Entry("b.parquet", "0", 0, 0))
    assert "c.parquet: has fewer rows" in refusal(Reader(tmp_path), Entry("c.parquet", "5", 0, 5))


def test_unpacking_is_all_or_nothing(tmp_path):
    data = random.Random(0).randbytes(3 << 20)
    (tmp_path / "a.gz").write_bytes(gzip.compress(data, 1))
    unpack(tmp_path / "a.gz", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    os.truncate(tmp_path / "a.gz", 2 << 20)
    for name in ("a.gz", "missing.gz"):
        with pytest.raises(DataError, match=f"{name}: "):
            unpack(tmp_path / name, tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["a.gz", "copy"]


def test_unpacking_streams(tmp_path):
    with gzip.open(tmp_path / "a.gz", "wb", compresslevel=1) as file:
        for _ in range(32):
            file.write(bytes(1 << 20))
    _, peak = peak_bytes(lambda: unpack(tmp_path / "a.gz", tmp_path / "copy"))
    assert (tmp_path / "copy").stat().st_size == 32 << 20 and peak < 8 << 20


def test_a_full_disk_is_not_blamed_on_the_archive(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(OSError):
        unpack(tmp_path / "a.gz", tmp_path / "nowhere" / "copy")
