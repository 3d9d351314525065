"""ILSVRC-2012 and 2010: the right label for every image, and one clear line for whatever is wrong."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from tars_on_the_spot import (
    DAMAGES,
    SYNSETS,
    change,
    class_tar,
    cut,
    devkit,
    meta_mat,
    numbered,
    peak_bytes,
    read,
    refusal,
    refused,
    special,
    tar_of,
)

from pipeline.errors import DataError
from pipeline.manifest import SynsetClass
from pipeline.sources import ilsvrc2010, md5, open_source
from pipeline.sources.devkit import read_devkit
from pipeline.sources.ilsvrc2012 import DEVKIT, TRAIN, VAL

VAL_NAME, VAL_2010, TEST_2010 = "ILSVRC2012_val_", "val/ILSVRC2010_val_", "test/ILSVRC2010_test_"
CLASSES = [SynsetClass("n01", "first, one"), SynsetClass("n02", "second"), SynsetClass("n03", "third")]
LABELS = [1, 2, 0, 0, 2]  # of images 1 to 5, as the kit has them
DATA = Path(os.environ.get("ALEXNET_TEST_DATA", "nowhere"))  # a folder with ilsvrc-meta/, the published lists


def train_tar(*wnids: str) -> bytes:
    return tar_of(*map(class_tar, wnids or ("n02", "n03", "n01")))  # not in order


def write_archives(folder: Path, train: bytes | None = None, val: bytes | None = None, kit: bytes | None = None):
    folder.mkdir(exist_ok=True)
    (folder / TRAIN).write_bytes(train_tar() if train is None else train)
    (folder / VAL).write_bytes(tar_of(*numbered(VAL_NAME, (2, 1, 3, 5, 4))) if val is None else val)
    (folder / DEVKIT).write_bytes(devkit() if kit is None else kit)
    return folder


def write_2010(folder: Path, **more: bytes) -> Path:
    """`more` is keyed by the names of the module's constants; b"" leaves a file out."""
    files = {
        "TRAIN": train_tar(), "VAL": tar_of(*numbered(VAL_2010, (2, 1, 3, 5, 4))), "DEVKIT": devkit(year=2010),
        "TEST": tar_of(*numbered(TEST_2010, (3, 1, 2))), "TEST_ANSWERS": b"3\r\n1\r\n2\r\n",
        "PATCH": tar_of(("patch_images/readme.txt", b""), ("patch_images/train/n03_1.JPEG", b"mended n03 1"),
                        (f"patch_images/{VAL_2010}00000005.JPEG", b"mended val 5"),
                        (f"patch_images/{TEST_2010}00000001.JPEG", b"mended test 1")),
    } | more
    for name, data in files.items():
        if data:
            (folder / getattr(ilsvrc2010, name)).write_bytes(data)
    return folder


def test_labels_are_positions_by_sorted_wnid(tmp_path):
    source = open_source(write_archives(tmp_path))
    assert (source.layout, source.splits, source.missing) == ("ilsvrc2012", ("train", "val"), ())
    assert source.classes == CLASSES and source.root == tmp_path
    assert source.archives == (tmp_path / TRAIN, tmp_path / VAL, tmp_path / DEVKIT)
    for _ in range(2):  # it can be listed again
        assert read(source, "train") == [(f"{wnid}/{wnid}_{i}.JPEG", label, f"{wnid} {i}".encode())
                                         for wnid, label in (("n02", 1), ("n03", 2), ("n01", 0)) for i in range(2)]
        assert read(source, "val") == [(f"{VAL_NAME}{n:08d}.JPEG", LABELS[n - 1], f"{VAL_NAME} {n}".encode())
                                       for n in (2, 1, 3, 5, 4)]


def test_2010_with_test_images_and_replacements(tmp_path):
    source = open_source(write_2010(tmp_path))
    assert (source.layout, source.splits, source.missing) == ("ilsvrc2010", ("train", "val", "test"), ())
    assert source.classes == CLASSES and len(source.archives) == 6
    train, val, test = (read(source, split) for split in source.splits)
    assert [(label, data) for _, label, data in train] == [
        (1, b"n02 0"), (1, b"n02 1"), (2, b"n03 0"), (2, b"mended n03 1"), (0, b"n01 0"), (0, b"n01 1")
    ]
    assert [(label, data[-5:]) for _, label, data in val] == [
        (LABELS[n - 1], b"val 5" if n == 5 else f"al_ {n}".encode()) for n in (2, 1, 3, 5, 4)
    ]
    assert [(label, data[-6:]) for _, label, data in test] == [(0, b"test_ 3"[-6:]), (1, b"test 1"), (2, b"est_ 2")]
    assert [e.member for e in source.entries("val") if e.archive == ilsvrc2010.PATCH] == [
        f"patch_images/{VAL_2010}00000005.JPEG"
    ]


@pytest.mark.parametrize("absent, splits, said", [
    ("TEST_ANSWERS", ("train", "val"), "the test images' classes: they are left out"),
    ("TEST", ("train", "val"), "the test images"),
    ("PATCH", ("train", "val", "test"), "replacements for images that are blank or a banner"),
])
def test_2010_says_what_it_has_not(tmp_path, absent, splits, said):
    source = open_source(write_2010(tmp_path, **{absent: b""}))
    assert source.splits == splits and source.missing == (f"{getattr(ilsvrc2010, absent)}, {said}",)
    assert len(source.archives) == 5 and [len(read(source, split)) for split in splits] == [6, 5, 3][: len(splits)]


@pytest.mark.parametrize("more, split, said", [
    ({"PATCH": tar_of(("train/n03_9.JPEG", b""))}, "train", "holds n03_9.JPEG, which is no train image"),
    ({"PATCH": tar_of(("val/n03_1.JPEG", b""))}, "val", "holds n03_1.JPEG, which is no val image"),
    ({"PATCH": tar_of(("more/n03_1.JPEG", b""))}, None, "holds more/n03_1.JPEG, which is in none of the folders"),
    ({"PATCH": tar_of(("n03_1.JPEG", b""))}, None, "holds n03_1.JPEG, which is in none of the folders"),
    ({"TEST_ANSWERS": b"3\n1\n"}, "test", "holds 3 images, 2 of the numbers that .*test_ground_truth.txt has answers"),
    ({"TEST_ANSWERS": b"3\n1\n7\n"}, None, "line 3: '7' is the id of no class"),
    ({"TEST": tar_of(*numbered(VAL_2010, (1,)))}, "test", r"not named ILSVRC2010_test_<8 digits>\.JPEG"),
    ({"DEVKIT": devkit(year=2012)}, None, "holds no data/ILSVRC2010_validation_ground_truth.txt"),
    ({"DEVKIT": devkit(meta=meta_mat(year=2012), year=2010)}, None, "data/meta.mat cannot be read"),
    ({"TRAIN": b""}, None, "ILSVRC2010_images_train.tar missing"),
])
def test_contradictions_in_2010(tmp_path, more, split, said):
    message = refusal(write_2010(tmp_path, **more), split)
    assert re.search(said, message), message


def test_devkit_of_one_class(tmp_path):
    (tmp_path / DEVKIT).write_bytes(devkit(SYNSETS[1:2], [2, 2]))
    kit = read_devkit(tmp_path / DEVKIT, 2012)
    assert kit.classes == CLASSES[:1] and kit.validation_labels == [0, 0]


@pytest.mark.skipif(not (DATA / "ilsvrc-meta").is_dir(), reason="ALEXNET_TEST_DATA names no such folder")
def test_published_numbering_gives_the_published_answers(tmp_path):
    lists = DATA / "ilsvrc-meta"
    words = dict(line.split(" ", 1) for line in (lists / "synset_words.txt").read_text().splitlines())
    rows = [line.split() for line in (lists / "map_clsloc.txt").read_text().splitlines()]
    truth = (lists / "ILSVRC2012_validation_ground_truth.derived.txt").read_bytes()
    synsets = [(int(number), wnid, words[wnid], 0) for wnid, number, _ in rows]
    (tmp_path / DEVKIT).write_bytes(devkit([*synsets, (1001, "n00001740", "entity", 2)], truth=truth))
    kit = read_devkit(tmp_path / DEVKIT, 2012)
    assert [(c.wnid, c.words) for c in kit.classes] == list(words.items())
    expected = (lists / "imagenet_2012_validation_synset_labels.txt").read_text().split()
    assert len(expected) == 50_000
    assert [kit.classes[label].wnid for label in kit.validation_labels] == expected


def test_links_devices_and_names_that_lead_out_are_refused_by_name(tmp_path):
    odd = [special("n01_link.JPEG", tarfile.SYMTYPE, "/etc/passwd"), ("/etc/absolute.JPEG", b"x"),
           ("../../up.JPEG", b"x"), special("folder", tarfile.DIRTYPE)]
    inner = tar_of(odd[0], ("n01_0.JPEG", b"n01 0"), *odd[1:])
    train = tar_of(special("x.tar", tarfile.SYMTYPE, "y"), ("n01.tar", inner), class_tar("n02"), class_tar("n03"))
    val = tar_of(special(f"{VAL_NAME}00000009.JPEG", tarfile.CHRTYPE), *numbered(VAL_NAME, range(1, 6)))
    source = open_source(write_archives(tmp_path, train, val))
    assert [entry[:2] for entry in refused(source, "train")] == [
        ("x.tar", -1), ("n01/n01_link.JPEG", 0), ("n01//etc/absolute.JPEG", 0), ("n01/../../up.JPEG", 0)
    ]
    assert len(read(source, "train")) == 5
    assert refused(source, "val") == [(f"{VAL_NAME}00000009.JPEG", -1, "not a plain file")]
    assert len(read(source, "val")) == 5


def test_listing_reads_no_images(tmp_path):
    large = tar_of(*((f"n01_{i}.JPEG", bytes(1 << 20)) for i in range(12)))
    source = open_source(write_archives(tmp_path, tar_of(("n01.tar", large), class_tar("n02"), class_tar("n03"))))
    del large
    images, peak = peak_bytes(lambda: sum(1 for _ in source.entries("train")))
    assert images == 16 and peak < 1 << 17


@pytest.mark.parametrize("names", [[TRAIN], [VAL], [DEVKIT], [TRAIN, DEVKIT], [VAL, DEVKIT]])
def test_a_missing_archive_is_named(tmp_path, names):
    write_archives(tmp_path)
    for name in names:
        (tmp_path / name).unlink()
    assert f"{tmp_path}: {' and '.join(names)} missing" in refusal(tmp_path)


@pytest.mark.parametrize("name, split", [(TRAIN, "train"), (VAL, "val")])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_archive_is_named(tmp_path, name, split, damage):
    change(write_archives(tmp_path) / name, damage)
    message = refusal(tmp_path, split)
    assert message.startswith(f"{tmp_path / name}: ") and "truncated or damaged (" in message


@pytest.mark.parametrize("damage", [cut(lambda size: size // 2), cut(lambda size: size - 4), cut(lambda size: 0)])
def test_a_damaged_devkit_is_named(tmp_path, damage):
    change(write_archives(tmp_path) / DEVKIT, damage)
    assert f"{tmp_path / DEVKIT}: truncated or damaged" in refusal(tmp_path)


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:700], lambda data: data[:1536], lambda data: data[:1024] + b"\1" + data[1025:]
], ids=["empty", "in the data", "between members", "a header overwritten"])
def test_a_damaged_inner_archive_is_named(tmp_path, damage):
    name, data = class_tar("n02", 3)
    write_archives(tmp_path, tar_of(class_tar("n01"), (name, damage(data)), class_tar("n03")))
    message = refusal(tmp_path, "train")
    assert message.startswith(f"{tmp_path / TRAIN}: n02.tar inside: truncated or damaged (")


STRANGER = ("n00000001.tar", tar_of(("a/n00000001_1.JPEG", b""), ("a/n00000002_1.JPEG", b"")))


@pytest.mark.parametrize("archive, data, split, said", [
    (TRAIN, train_tar("n01", "n02", "n03", "n04"), "train", "holds n04.tar, which is no class"),
    (TRAIN, train_tar("n01", "n02", "n03", "n00"), "train", "holds n00.tar, which is no class"),
    (TRAIN, tar_of(*map(class_tar, ("n01", "n02", "n03")), ("n01.txt", b"")), "train", "holds n01.txt, which is no"),
    (TRAIN, train_tar("n01", "n02", "n03", "n01"), "train", "holds n01.tar twice"),
    (TRAIN, train_tar("n02"), "train", r"2 of 3 classes missing \(n01, n03\)"),
    (VAL, tar_of(*numbered(VAL_NAME, range(1, 5))), "val", "holds 4 images, 4 of the numbers .* answers for, 1 to 5"),
    (VAL, tar_of(*numbered(VAL_NAME, range(1, 7))), "val", "holds 6 images, 5 of the numbers"),
    (VAL, tar_of(*numbered(VAL_NAME, (1, 2, 3, 4, 4))), "val", "holds 5 images, 4 of the numbers"),
    (VAL, tar_of(*numbered(VAL_NAME, range(0, 5))), "val", "holds 5 images, 4 of the numbers"),
    (VAL, tar_of(("cat.JPEG", b"")), "val", "holds cat.JPEG, which is not named ILSVRC2012_val_"),
    (DEVKIT, devkit(answers=[3, 1, 9, 2, 1]), None, "line 3: '9' is the id of no class"),
    (DEVKIT, devkit(answers=[3, 4, 2, 2, 1]), None, "line 2: '4' is the id of no class"),
    (DEVKIT, devkit(answers=[3, "1" * 5000]), None, "line 2: '11111111111111111111' is the id of no class"),
    (DEVKIT, devkit(truth=b"3\nn01\n"), None, "line 2: 'n01' is the id of no class"),
    (DEVKIT, devkit(meta=b""), None, "data/meta.mat cannot be read"),
    (DEVKIT, devkit(meta=b"not MATLAB's" * 99), None, "data/meta.mat cannot be read"),
    (DEVKIT, devkit(meta=meta_mat()[:300]), None, "data/meta.mat cannot be read"),
    (DEVKIT, devkit([*SYNSETS, SYNSETS[0]]), None, "data/meta.mat cannot be read .*the same one twice"),
    (DEVKIT, devkit(SYNSETS[3:]), None, "data/meta.mat cannot be read .*no synsets"),
    (DEVKIT, gzip.compress(tar_of(("kit/data/meta.mat", meta_mat()))), None, "holds no data/ILSVRC2012_validation"),
])
def test_contradictions_are_found_before_the_listing_ends(tmp_path, archive, data, split, said):
    (write_archives(tmp_path) / archive).write_bytes(data)
    message = refusal(tmp_path, split)
    assert re.match(f"{re.escape(str(tmp_path / archive))}: .*{said}", message), message


def test_an_image_of_another_class_is_a_contradiction(tmp_path):
    kit = devkit([(1, "n00000001", "one", 0), (2, "n00000002", "two", 0)], [1])
    write_archives(tmp_path, tar_of(class_tar("n00000002"), STRANGER), kit=kit)
    assert "the tar of n00000001 holds a/n00000002_1.JPEG, an image of n00000002" in refusal(tmp_path, "train")


def test_unpacked_folders_go_before_left_over_archives(tmp_path):
    write_archives(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "n01").mkdir(parents=True)
        (tmp_path / split / "n01" / "x.JPEG").write_bytes(b"x")
    assert open_source(tmp_path).layout == "ilsvrc2012"  # complete: the published form
    (tmp_path / TRAIN).unlink()
    assert open_source(tmp_path).layout == "class-folders"
    shutil.rmtree(tmp_path / "train")
    assert f"{TRAIN} missing" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["", "nothing", "nothing.zip", "file.txt", "file.tar", "file.ZIP", "pipe.tar"])
def test_what_is_no_layout(tmp_path, name):
    for file in ("file.txt", "file.ZIP"):
        (tmp_path / file).write_text("x")
    if name == "file.tar":  # else it would be what is wrong with the folder
        (tmp_path / "file.tar").write_bytes(b"x" * 2000)
    os.mkfifo(tmp_path / "pipe.tar")
    said = {"nothing": "does not exist", "nothing.zip": "does not exist", "file.tar": "truncated or damaged",
            "file.ZIP": "unzip it first"}.get(name, "known are ilsvrc2012: a folder with ")
    message = refusal(tmp_path / name)
    assert message.startswith(f"{tmp_path / name}: ") and said in message


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)  # root may read everything
    assert refusal(tmp_path) == f"{tmp_path}: cannot be read (Permission denied)"


def test_published_md5_sums(tmp_path, monkeypatch):
    source = open_source(write_archives(tmp_path))
    assert set(md5.KNOWN_MD5) > {TRAIN, VAL, DEVKIT}
    assert all(re.fullmatch("[0-9a-f]{32}", value) for value in md5.KNOWN_MD5.values())
    with pytest.raises(DataError, match=f"{TRAIN}: its MD5 is [0-9a-f]{{32}}, published is 1d675b47"):
        md5.check_md5(source)
    calls = []
    sums = {name: hashlib.md5((tmp_path / name).read_bytes()).hexdigest() for name in (TRAIN, VAL)}
    monkeypatch.setattr(md5, "KNOWN_MD5", sums)
    assert md5.check_md5(source, lambda *call: calls.append(call)) == {
        TRAIN: "as published", VAL: "as published", DEVKIT: "not known"
    }
    total = sum((tmp_path / name).stat().st_size for name in sums)
    assert calls[-1] == (total, total, calls[0][2]) and len(calls) == 2
    (tmp_path / VAL).unlink()
    with pytest.raises(DataError, match=f"{VAL}: cannot be read"):
        md5.check_md5(source)
