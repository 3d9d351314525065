"""Tar archives: the same members as tarfile finds, at the same places, and one clear line for whatever is wrong."""

from __future__ import annotations

import gzip
import io
import itertools
import math
import random
import struct
import tarfile
from pathlib import Path

import pytest
from tars_on_the_spot import DAMAGES, cut, open_descriptors, peak_bytes, special, tar_of

from pipeline.errors import DataError
from pipeline.sources.archives import LARGEST_BYTES, TOO_LARGE, Member, open_tar

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
LONG = "folder/" * 20 + "a name of some length " * 4  # 228 characters
NAMES = ["a.JPEG", "folder/b", LONG, "\u00e9t\u00e9.JPEG", "undecodable \udcff", "with\nnewline", "x" * 100,
         "y/" * 99 + "z"]


def write(folder: Path, data: bytes, name: str = "a.tar") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def members(path: Path, largest: float = LARGEST_BYTES) -> list[Member]:
    with open_tar(path) as tar:
        return list(tar.members(largest))


def message(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        members(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def header(name: bytes = b"x", size: bytes = b"0" * 11, kind: bytes = b"0", signed: bool = False) -> bytes:
    fields = struct.pack("100s8s8s8s12s12s8sc355x", name, b"644", b"0", b"0", size, b"0", b" " * 8, kind)
    total = sum(fields)
    if signed:
        total -= 256 * sum(byte > 127 for byte in fields)
    return fields[:148] + b"%06o\0 " % total + fields[156:]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz"])
def test_members_are_those_that_tarfile_finds(tmp_path, format, suffix):
    names = [name for name in NAMES if format != tarfile.USTAR_FORMAT or name not in (LONG,)]
    data = tar_of(special("folder", tarfile.DIRTYPE), *((name, name.encode("utf-8", "surrogateescape") * 9)
                                                        for name in names), format=format)
    path = write(tmp_path, data if suffix == "tar" else gzip.compress(data), f"a.{suffix}")
    with tarfile.open(path) as tar:
        expected = [Member(m.name, m.offset_data, m.size, "") for m in tar if m.isfile()]
    assert members(path) == expected and [m.name for m in expected] == names
    for member in expected:
        found = data[member.offset : member.offset + member.size]
        assert found == member.name.encode("utf-8", "surrogateescape") * 9


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_tars_in_a_tar_are_read_in_place(tmp_path, suffix):
    inner = {wnid: [(f"{wnid}_{i}", f"{wnid} {i}".encode() * (300 * i)) for i in range(4)] for wnid in ("n01", "n02")}
    data = tar_of(*((f"{wnid}.tar", tar_of(*images)) for wnid, images in inner.items()), ("last", b"l"))
    path = write(tmp_path, data if suffix == "tar" else gzip.compress(data), f"a.{suffix}")
    found = {}
    with open_tar(path) as tar:
        for outer in tar.members():
            if outer.name != "last":
                found[outer.name[:3]] = [(m.name, data[m.offset : m.offset + m.size]) for m in tar.inside(outer)]
    assert found == inner


def test_a_compressed_tar_is_read_front_to_back(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("went back")

    monkeypatch.setattr(gzip._GzipReader, "_rewind", refuse)
    inner = tar_of(*((str(j), bytes(9000)) for j in range(20)))
    outer = tar_of(*((f"{i}.tar", inner) for i in range(5)), ("t", b"text"))
    listed, text = 0, b""
    with open_tar(write(tmp_path, gzip.compress(outer), "a.tgz")) as tar:
        for member in tar.members():
            if member.name == "t":
                text = tar.read(member)
            else:
                listed += sum(1 for _ in itertools.islice(tar.inside(member), 10))
    assert (listed, text) == (50, b"text")


def test_what_is_no_plain_file_or_leads_out_is_refused(tmp_path):
    sparse = special("sparse", tarfile.GNUTYPE_SPARSE)
    odd = [special("link", tarfile.SYMTYPE, "/etc/passwd"), special("hard", tarfile.LNKTYPE, "a"),
           special("pipe", tarfile.FIFOTYPE), special("device", tarfile.CHRTYPE), ("/etc/passwd", b"x"),
           ("../up", b"x"), ("a/../../up", b"x"), ("a..b/..c", b"x"), sparse]
    by_pax = tarfile.TarInfo("sparse too")
    by_pax.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
    data = tar_of(*odd, by_pax, ("good", b"good"), format=tarfile.PAX_FORMAT)
    assert [(m.name, m.refused) for m in members(write(tmp_path, data))] == [
        ("link", "a link, not a file"), ("hard", "a link, not a file"), ("pipe", "not a plain file"),
        ("device", "not a plain file"), ("/etc/passwd", "its name leads out of the archive"),
        ("../up", "its name leads out of the archive"), ("a/../../up", "its name leads out of the archive"),
        ("a..b/..c", ""), ("sparse", "not a plain file"), ("sparse too", "not a plain file"), ("good", ""),
    ]


def test_more_headers_of_an_old_sparse_file_are_passed_over(tmp_path):
    first = bytearray(header(b"sparse", b"%011o" % 512, b"S"))
    first[482] = 1
    first[148:156] = b" " * 8
    first[148:156] = b"%06o\0 " % sum(first)
    more, last = bytearray(512), bytes(512)
    more[504] = 1
    data = bytes(first) + bytes(more) + last + b"d" * 512 + header(b"good") + bytes(1024)
    assert [(m.name, m.refused) for m in members(write(tmp_path, data))] == [
        ("sparse", "not a plain file"), ("good", "")
    ]


def test_a_huge_member_is_refused_and_passed_over(tmp_path):
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        file.write(header(b"huge", b"%011o" % (LARGEST_BYTES + 1)))
        file.seek(512 + LARGEST_BYTES + 512)
        file.write(header(b"just", b"%011o" % LARGEST_BYTES))
        file.seek(LARGEST_BYTES, io.SEEK_CUR)
        file.write(bytes(1024))
    found, peak = peak_bytes(lambda: members(path))
    assert [(m.name, m.refused) for m in found] == [("huge", TOO_LARGE), ("just", "")]
    assert [m.refused for m in members(path, math.inf)] == ["", ""]
    assert peak < 1 << 20


def test_sizes_that_octal_digits_cannot_hold(tmp_path):
    base_256 = b"\x80" + (9 << 30).to_bytes(11, "big")
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        file.write(header(b"huge", base_256))
        file.truncate(512 + (9 << 30) + 1024)
    assert members(path) == [Member("huge", 512, 9 << 30, TOO_LARGE)]


def test_signed_checksums_and_old_folders(tmp_path):
    data = header(b"\xe9t\xe9", signed=True) + header(b"folder/", kind=b"\0") + header(b"old", kind=b"\0") + bytes(512)
    assert [m.name for m in members(write(tmp_path, data))] == ["\udce9t\udce9", "old"]


def test_what_gnu_tar_keeps_in_the_place_of_a_prefix_is_no_name(tmp_path):
    fields = bytearray(header(b"a.JPEG"))
    fields[257:265], fields[345:356] = b"ustar  \0", b"15301073316"  # time of last access, in incremental archives
    fields[148:156] = b" " * 8
    fields[148:156] = b"%06o\0 " % sum(fields)
    assert [m.name for m in members(write(tmp_path, bytes(fields) + bytes(512)))] == ["a.JPEG"]


def test_global_pax_headers(tmp_path):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "of git"}) as tar:
        tar.addfile(tarfile.TarInfo("x"))
    assert [m.name for m in members(write(tmp_path, data.getvalue()))] == ["x"]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("compressed", [False, True])
def test_damage_is_named(tmp_path, damage, compressed):
    data = damage(tar_of(*((f"{i}", b"x" * 900) for i in range(9))))
    path = write(tmp_path, gzip.compress(data) if compressed else data, "a.tgz" if compressed else "a.tar")
    assert message(path).startswith(f"{path}: truncated or damaged (") and message(path).endswith("copy it again")


@pytest.mark.parametrize("damage", [
    cut(lambda size: 0), cut(lambda size: 5), cut(lambda size: size // 2), cut(lambda size: size - 4),
    lambda data: data[:-8] + b"\1" + data[-7:], lambda data: b"no gzip", lambda data: data + b"more",
])
def test_damaged_compression_is_named(tmp_path, damage):
    path = write(tmp_path, damage(gzip.compress(tar_of(("x", random.Random(0).randbytes(9000))))), "a.tar.gz")
    assert message(path).startswith(f"{path}: truncated or damaged (")


END = bytes(1024)


@pytest.mark.parametrize("data, said", [
    (header(size=b"-0000000777") + END, "a number that is none"),
    (header(size=b"\xff" * 12) + END, "a size of -1 bytes"),
    (header(size=b"\x80" + b"\xff" * 11) + END, "a size of "),
    (header(size=b"\x80" + bytes(3) + b"\x1f" + b"\xff" * 7) + END, "a size of "),
    (header(size=b"\x80" + bytes(4) + b"\x0f" + b"\xff" * 6) + END, "ends before its end mark"),
    (header(size=b"77777777777") + END, "ends before its end mark"),
    (header(size=b"12x") + END, "a number that is none"),
    (header(b"name", b"77777777777", b"L") + END, "an extended header of 8589934591 bytes"),
    (header(b"name", b"%011o" % (1 << 20), b"L") + END, "an extended header of 1048576 bytes"),
    (header(b"pax", b"77777777777", b"x") + END, "an extended header of 8589934591 bytes"),
    (header(b"pax", b"%011o" % 9, b"x") + b"9 size=1\n".ljust(512, b"\0") + END, "ends after an extended header"),
    *((header(b"pax", b"%011o" % len(pax), b"x") + pax.ljust(512, b"\0") + header() + END, said) for pax, said in [
        (b"0 size=1\n", "a damaged pax header"), (b"-9 size=1\n", "a damaged pax header"),
        (b"999 size=1\n", "a damaged pax header"), (b"12 no equals\n", "a damaged pax header"),
        (b"9" * 400, "a damaged pax header"), (b"11 size=-1\n", "a size of -1 bytes"),
        (b"x size=1\n", "invalid literal"), (b"10 size=x\n", "invalid literal"),
        (b"33 size=999999999999999999999999\n", "a size of "),
    ]),
])
def test_hostile_headers_cost_neither_memory_nor_time(tmp_path, data, said):
    found, peak = peak_bytes(lambda: message(write(tmp_path, data)))
    assert said in found and peak < 4 << 20


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
def test_a_long_extended_header_is_not_read(tmp_path, kind):
    path = write(tmp_path, header(size=b"%011o" % (64 << 20), kind=kind))
    with open(path, "r+b") as file:
        file.truncate(65 << 20)
    found, peak = peak_bytes(lambda: message(path))
    assert "an extended header of 67108864 bytes" in found and peak < 4 << 20


def test_what_has_no_data_whatever_its_size_says(tmp_path):
    data = b"".join(header(b"x", b"%011o" % 99, kind) for kind in (b"1", b"2", b"3", b"4", b"5", b"6"))
    found = members(write(tmp_path, data + header(b"good") + bytes(512)))
    assert [m.name for m in found if not m.refused] == ["good"] and len(found) == 6


def test_a_tar_in_a_tar_cannot_reach_beyond_its_end(tmp_path):
    inner = header(b"a", b"%011o" % 4000) + bytes(512)  # 4,000 bytes would end in what comes after it
    path = write(tmp_path, tar_of(("n01.tar", inner), ("n02.tar", bytes(9000))))
    with open_tar(path) as tar:
        outer = next(tar.members())
        with pytest.raises(DataError, match=r"n01\.tar inside: truncated or damaged \(it ends before its end mark\)"):
            list(tar.inside(outer))


def test_headers_are_not_remembered(tmp_path):
    path = write(tmp_path, header() * 8000 + END)
    with open_tar(path) as tar:
        count, peak = peak_bytes(lambda: sum(1 for _ in tar.members()))
    assert count == 8000 and peak < 1 << 17


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_joined_archives_lose_nothing_unseen(tmp_path, compress):
    path = tmp_path / ("a.tar" if compress is bytes else "a.tar.gz")
    one, other = tar_of(("a", b"1")), tar_of(("b", b"2"))
    for between in (b"", bytes(3 << 20)):
        path.write_bytes(compress(one + between + other))
        with open_tar(path) as tar, pytest.raises(DataError, match="more files follow its end mark: unpack it"):
            list(tar.members())
    for behind in (bytes(3 << 20), b"not a header" * 100, bytes(512) + b"x"):  # padding, and what tar ignores too
        path.write_bytes(compress(one + behind))
        with open_tar(path) as tar:
            assert [member.name for member in tar.members()] == ["a"]


def test_spoiled_archives_end_in_members_or_in_one_line(tmp_path):
    rng = random.Random(0)
    for format in FORMATS:
        whole = tar_of(*((f"{i:090d}/{i:050d}", bytes(i)) for i in range(8)), special("s", tarfile.GNUTYPE_SPARSE),
                       (f"{'n' * 240}", b"") if format != tarfile.USTAR_FORMAT else ("n", b""), format=format)
        for _ in range(150):
            data = bytearray(whole)
            at = rng.randrange(len(data) // 512) * 512
            for _ in range(rng.choice([1, 3, 30])):
                data[at + rng.randrange(512)] = rng.choice([0, 32, 48, 49, 128, 255, rng.randrange(256)])
            if rng.random() < 0.8 and any(data[at : at + 512]):  # else hardly one gets past the checksum
                data[at + 148 : at + 156] = b" " * 8
                data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
            path = write(tmp_path, bytes(data))
            try:
                found = members(path)
            except DataError as error:
                told = str(error).removeprefix(f"{path}: ")
                assert told.startswith(("truncated or damaged (", "more files follow its end mark")), told
                assert "\n" not in told
            else:
                assert all(m.offset + m.size <= len(data) for m in found)


def test_open_files_are_closed(tmp_path):
    path = write(tmp_path, tar_of(("x", b"")))
    before = open_descriptors()
    members(path)
    with pytest.raises(DataError):
        members(write(tmp_path, b"damaged" * 99))
    assert open_descriptors() == before


@pytest.mark.parametrize("name", ["nothing.tar", "nothing.tgz", "folder.tar"])
def test_what_cannot_be_opened(tmp_path, name):
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(DataError, match=r"cannot be read \((No such file or directory|Is a directory)\)"):
        with open_tar(tmp_path / name):
            pass
