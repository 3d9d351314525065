"""Layouts: the right label for every image, nothing held in memory, and one clear line for whatever is wrong."""

from __future__ import annotations

import gzip
import io
import os
import re
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from pipeline.errors import DataError
from pipeline.manifest import SynsetClass
from pipeline.sources import open_source
from pipeline.sources.archives import entries, open_tar
from pipeline.sources.devkit import read_devkit

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
# Ids in another order than the wnids', as in the real kit; the last is an ancestor of the others.
SYNSETS = [(1, "n03", "third", 0), (2, "n01", "first, one", 0), (3, "n02", "second", 0), (4, "n00", "above", 3)]
ANSWERS = [3, 1, 2, 2, 1]  # ids of validation images 1 to 5
DATA = Path(os.environ.get("ALEXNET_TEST_DATA", "nowhere"))  # a folder with ilsvrc-meta/, the published lists


def meta_mat(synsets: list[tuple[int, str, str, int]]) -> bytes:
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height",
              "num_train_images")
    rows = np.empty((len(synsets), 1), [(field, object) for field in fields])
    for i, (number, wnid, words, children) in enumerate(synsets):
        below = np.arange(1.0, children + 1)[None]
        rows[i, 0] = (float(number), wnid, words, "gloss", float(children), below, 0.0, 0.0 if children else 2.0)
    file = io.BytesIO()
    savemat(file, {"synsets": rows}, do_compression=True)
    return file.getvalue()


def tar_of(*members: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                entry = tarfile.TarInfo(member[0])
                entry.size = len(member[1])
                tar.addfile(entry, io.BytesIO(member[1]))
    return file.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


def devkit(synsets=SYNSETS, answers=ANSWERS, meta: bytes | None = None, truth: bytes | None = None) -> bytes:
    return gzip.compress(tar_of(
        special("kit", tarfile.DIRTYPE),
        ("kit/readme.txt", b"read me"),
        ("kit/data/meta.mat", meta_mat(synsets) if meta is None else meta),
        ("kit/data/ILSVRC2012_validation_ground_truth.txt",
         "".join(f"{n}\n" for n in answers).encode() if truth is None else truth),
    ))


def class_tar(wnid: str, images: int = 2) -> tuple[str, bytes]:
    return f"{wnid}.tar", tar_of(*((f"{wnid}_{i}.JPEG", f"{wnid} {i}".encode()) for i in range(images)))


def val_image(number: int) -> tuple[str, bytes]:
    return f"ILSVRC2012_val_{number:08d}.JPEG", f"val {number}".encode()


def write_archives(folder: Path, train: bytes | None = None, val: bytes | None = None, kit: bytes | None = None):
    folder.mkdir(exist_ok=True)
    # Neither the classes nor the validation images lie in order.
    (folder / TRAIN).write_bytes(tar_of(*map(class_tar, ("n02", "n03", "n01"))) if train is None else train)
    (folder / VAL).write_bytes(tar_of(*map(val_image, (2, 1, 3, 5, 4))) if val is None else val)
    (folder / DEVKIT).write_bytes(devkit() if kit is None else kit)
    return folder


def peak_bytes(work: Callable[[], int]) -> tuple[int, int]:
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refusal(path: Path, split: str | None = None) -> str:
    """The message of the DataError that opening `path` raises, or, with `split`, of reading that."""
    if split is None:
        with pytest.raises(DataError) as caught:
            open_source(path)
    else:
        images = open_source(path).read(split)
        with pytest.raises(DataError) as caught:
            list(images)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_archives_give_labels_by_sorted_wnid(tmp_path):
    source = open_source(write_archives(tmp_path))
    assert source.layout == "ilsvrc2012"
    assert source.classes == [
        SynsetClass("n01", "first, one"), SynsetClass("n02", "second"), SynsetClass("n03", "third")
    ]
    assert (source.count("train"), source.count("val")) == (6, 5)
    for _ in range(2):  # it can be read again
        assert [(i.name, i.label, i.data) for i in source.read("train")] == [
            (f"{wnid}/{wnid}_{i}.JPEG", label, f"{wnid} {i}".encode())
            for label, wnid in enumerate(["n01", "n02", "n03"]) for i in range(2)
        ]
        # ids 3, 1, 2, 2, 1 are n02, n03, n01, n01, n03
        assert [(i.name[-6], i.label, i.data) for i in source.read("val")] == [
            ("2", 2, b"val 2"), ("1", 1, b"val 1"), ("3", 0, b"val 3"), ("5", 2, b"val 5"), ("4", 0, b"val 4")
        ]


def test_devkit_of_one_class(tmp_path):
    (tmp_path / DEVKIT).write_bytes(devkit(SYNSETS[1:2], [2, 2]))
    kit = read_devkit(tmp_path / DEVKIT)
    assert kit.classes == [SynsetClass("n01", "first, one")]
    assert kit.validation_labels == [0, 0] and kit.train_images == 2


@pytest.mark.skipif(not (DATA / "ilsvrc-meta").is_dir(), reason="ALEXNET_TEST_DATA names no such folder")
def test_published_numbering_gives_the_published_answers(tmp_path):
    lists = DATA / "ilsvrc-meta"
    words = dict(line.split(" ", 1) for line in (lists / "synset_words.txt").read_text().splitlines())
    rows = [line.split() for line in (lists / "map_clsloc.txt").read_text().splitlines()]
    truth = (lists / "ILSVRC2012_validation_ground_truth.derived.txt").read_bytes()
    synsets = [(int(number), wnid, words[wnid], 0) for wnid, number, _ in rows]
    (tmp_path / DEVKIT).write_bytes(devkit([*synsets, (1001, "n00001740", "entity", 2)], truth=truth))
    kit = read_devkit(tmp_path / DEVKIT)
    assert [(c.wnid, c.words) for c in kit.classes] == list(words.items())
    expected = (lists / "imagenet_2012_validation_synset_labels.txt").read_text().split()
    assert len(expected) == 50_000
    assert [kit.classes[label].wnid for label in kit.validation_labels] == expected


def test_links_devices_and_names_that_lead_out_are_refused_by_name(tmp_path):
    odd = [
        special("n01_link.JPEG", tarfile.SYMTYPE, "/etc/passwd"),
        special("n01_hard.JPEG", tarfile.LNKTYPE, "n01_0.JPEG"),
        special("n01_pipe.JPEG", tarfile.FIFOTYPE),
        ("/etc/absolute.JPEG", b"x"),
        ("../../up.JPEG", b"x"),
        special("folder", tarfile.DIRTYPE),
    ]
    inner = tar_of(odd[0], ("n01_0.JPEG", b"n01 0"), *odd[1:])
    train = tar_of(special("x.tar", tarfile.SYMTYPE, "y"), ("n01.tar", inner), class_tar("n02"), class_tar("n03"))
    val = tar_of(special("ILSVRC2012_val_00000009.JPEG", tarfile.CHRTYPE), *map(val_image, range(1, 6)))
    source = open_source(write_archives(tmp_path, train, val))
    images = list(source.read("train"))
    assert [(i.name, i.label) for i in images if i.refused] == [
        ("x.tar", -1), ("n01/n01_link.JPEG", 0), ("n01/n01_hard.JPEG", 0), ("n01/n01_pipe.JPEG", 0),
        ("n01//etc/absolute.JPEG", 0), ("n01/../../up.JPEG", 0),
    ]
    assert all(i.data == b"" for i in images if i.refused)
    assert len([i for i in images if not i.refused]) == 5
    assert [(i.label, i.refused) for i in source.read("val")][0] == (-1, "not a plain file")
    assert len(list(source.read("val"))) == 6


def test_archives_are_read_as_streams(tmp_path):
    mebibyte = bytes(1 << 20)
    large = tar_of(*((f"n01_{i}.JPEG", mebibyte) for i in range(12)))
    write_archives(tmp_path, tar_of(("n01.tar", large), class_tar("n02"), class_tar("n03")))
    del large
    source = open_source(tmp_path)
    images, peak = peak_bytes(lambda: sum(1 for _ in source.read("train")))
    assert images == 16 and peak < 4 << 20  # copies of one image


def test_headers_are_not_remembered(tmp_path):
    (tmp_path / "many.tar").write_bytes(tarfile.TarInfo("train/n01/x").tobuf() * 8000 + bytes(1024))
    with open_tar(tmp_path / "many.tar") as tar:
        members, peak = peak_bytes(lambda: sum(1 for _ in entries(tar)))
    assert members == 8000 and peak < 1 << 20  # remembered, they would be 3 MiB


@pytest.mark.parametrize("name", [TRAIN, VAL, DEVKIT])
def test_a_missing_archive_is_named(tmp_path, name):
    write_archives(tmp_path)
    (tmp_path / name).unlink()
    assert f"{tmp_path}: {name} missing" in refusal(tmp_path)


def cut(at: Callable[[int], int]) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, at(path.stat().st_size))


def spoil_second_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    second = 512 + -(-int(data[124:135], 8) // 512) * 512
    data[second : second + 512] = b"\xff" * 512
    path.write_bytes(data)


def cut_before_end_mark(path: Path) -> None:
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    os.truncate(path, last.offset_data + -(-last.size // 512) * 512)


@pytest.mark.parametrize("name", [TRAIN, VAL])
@pytest.mark.parametrize("damage", [
    cut(lambda size: 0), cut(lambda size: 300), cut(lambda size: size // 3), cut_before_end_mark, spoil_second_header
], ids=["empty", "in a header", "in the middle", "between members", "a header overwritten"])
def test_a_damaged_outer_archive_is_named_before_work_begins(tmp_path, name, damage):
    write_archives(tmp_path)
    damage(tmp_path / name)
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / name}: truncated or damaged (") and message.endswith("copy it again")


@pytest.mark.parametrize("damage", [cut(lambda size: size // 2), cut(lambda size: size - 4), cut(lambda size: 0)])
def test_a_damaged_devkit_is_named(tmp_path, damage):
    write_archives(tmp_path)
    damage(tmp_path / DEVKIT)
    assert f"{tmp_path / DEVKIT}: truncated or damaged" in refusal(tmp_path)


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:700], lambda data: data[:1536], lambda data: data[:1024] + b"\1" + data[1025:]
], ids=["empty", "in the data", "between members", "a header overwritten"])
def test_a_damaged_inner_archive_is_named(tmp_path, damage):
    name, data = class_tar("n02", 3)
    write_archives(tmp_path, tar_of(class_tar("n01"), (name, damage(data)), class_tar("n03")))
    message = refusal(tmp_path, "train")
    assert message.startswith(f"{tmp_path / TRAIN}: n02.tar inside: truncated or damaged (")


@pytest.mark.parametrize("archives, said", [
    ({"train": tar_of(*map(class_tar, ("n01", "n02", "n03", "n04")))}, "holds n04.tar, which is no class"),
    ({"train": tar_of(*map(class_tar, ("n01", "n02", "n03", "n00")))}, "holds n00.tar, which is no class"),
    ({"train": tar_of(*map(class_tar, ("n01", "n02", "n03")), ("n01.txt", b""))}, "holds n01.txt, which is no class"),
    ({"train": tar_of(*map(class_tar, ("n01", "n02", "n03", "n01")))}, "holds n01.tar twice"),
    ({"train": tar_of(class_tar("n02"))}, r"2 of 3 classes missing \(n01, n03\)"),
    ({"val": tar_of(*map(val_image, range(1, 5)))}, "holds 4 images, 4 of them different; .* answers for 1 to 5"),
    ({"val": tar_of(*map(val_image, range(1, 7)))}, "holds 6 images"),
    ({"val": tar_of(*map(val_image, (1, 2, 3, 4, 4)))}, "holds 5 images, 4 of them different"),
    ({"val": tar_of(*map(val_image, range(0, 5)))}, "holds 5 images, 5 of them different; .* answers for 1 to 5"),
    ({"val": tar_of(("cat.JPEG", b""))}, "holds cat.JPEG, which is not named ILSVRC2012_val_"),
    ({"kit": devkit(answers=[3, 1, 9, 2, 1])}, "line 3: '9' is the id of no class"),
    ({"kit": devkit(answers=[3, 4, 2, 2, 1])}, "line 2: '4' is the id of no class"),
    ({"kit": devkit(truth=b"3\nn01\n")}, "line 2: 'n01' is the id of no class"),
    ({"kit": devkit(meta=b"")}, "data/meta.mat cannot be read"),
    ({"kit": devkit(meta=b"not MATLAB's" * 99)}, "data/meta.mat cannot be read"),
    ({"kit": devkit(meta=meta_mat(SYNSETS)[:300])}, "data/meta.mat cannot be read"),
    ({"kit": devkit([*SYNSETS, SYNSETS[0]])}, "data/meta.mat cannot be read .*the same one twice"),
    ({"kit": devkit(SYNSETS[3:])}, "data/meta.mat cannot be read .*no synsets"),
    ({"kit": gzip.compress(tar_of(("kit/data/meta.mat", meta_mat(SYNSETS))))}, "holds no data/ILSVRC2012_validation"),
])
def test_contradictions_are_found_before_work_begins(tmp_path, archives, said):
    message = refusal(write_archives(tmp_path, **archives))
    [changed] = archives
    name = {"train": TRAIN, "val": VAL, "kit": DEVKIT}[changed]
    assert re.match(f"{re.escape(str(tmp_path / name))}: .*{said}", message), message


FILES = {
    "train/n02/b.JPEG": 1, "train/n02/a.png": 1, "train/n01/x": 0, "train/n03/1.jpg": 2,
    "val/n03/v.JPEG": 2, "val/n01/w.JPEG": 0,
}  # with their labels


def write_folders(folder: Path, files=FILES) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def check_labels(source, split: str) -> list[str]:
    images = list(source.read(split))
    for image in images:
        inside = image.name[image.name.index(split):]
        assert image.label == FILES[inside] and image.data == inside.encode() and not image.refused
    assert len(images) == source.count(split)
    return [image.name for image in images]


def test_folders(tmp_path):
    write_folders(tmp_path)
    write_folders(tmp_path, ["train/.hidden", "train/n01/.hidden", "train/n01/deeper/x.JPEG", "train/loose.JPEG"])
    (tmp_path / "synset_words.txt").write_text("n03 third, 3\nn01 first\n")
    source = open_source(tmp_path)
    assert source.layout == "class-folders"
    assert source.classes == [SynsetClass("n01", "first"), SynsetClass("n02", ""), SynsetClass("n03", "third, 3")]
    assert check_labels(source, "train") == ["train/n01/x", "train/n02/a.png", "train/n02/b.JPEG", "train/n03/1.jpg"]
    assert check_labels(source, "val") == ["val/n01/w.JPEG", "val/n03/v.JPEG"]


def test_words_with_tabs(tmp_path):
    (write_folders(tmp_path) / "words.txt").write_text("n01\tfirst, one\n\nn09\tother\n")
    assert [c.words for c in open_source(tmp_path).classes] == ["first, one", "", ""]


def test_folder_entries_that_are_no_files_are_refused(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "train/n01/broken.JPEG").symlink_to("nowhere")
    os.mkfifo(tmp_path / "train/n01/pipe.JPEG")
    (tmp_path / "train/n01/y.JPEG").symlink_to("x")  # a link to a file is as good as the file
    images = list(open_source(tmp_path).read("train"))
    assert [(i.name, i.label) for i in images if i.refused] == [
        ("train/n01/broken.JPEG", 0), ("train/n01/pipe.JPEG", 0)
    ]
    assert [i.data for i in images if i.name.endswith("y.JPEG")] == [b"train/n01/x"]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "train/n01/y.JPEG").symlink_to("/proc/self/mem")  # reading its first page is an error
    assert "train/n01/y.JPEG: cannot be read (" in refusal(tmp_path, "train")


@pytest.mark.parametrize("pack", ["folder", "tar"])
@pytest.mark.parametrize("files, said", [
    ([name for name in FILES if name.startswith("train")], "holds no val/<wnid>/"),
    ([name for name in FILES if name.startswith("val")], "holds no train/<wnid>/"),
    ([*FILES, "val/n04/x.JPEG"], "1 classes of val/ are not in train/ (n04, ...)"),
])
def test_incomplete_folders(tmp_path, pack, files, said):
    path = write_folders(tmp_path / "data", files)
    if pack == "tar":
        path = tmp_path / "data.tar"
        path.write_bytes(tar_of(*((name, b"") for name in files)))
    assert said in refusal(path)


@pytest.mark.parametrize("top, suffix", [("", "tar"), ("./", "tar"), ("imagenette2/", "tgz"), ("a/b/", "tar.gz")])
def test_archive_of_folders(tmp_path, top, suffix):
    others = [
        special(f"{top}train", tarfile.DIRTYPE), (f"{top}train/n02/._a.JPEG", b""), (f"{top}noise.csv", b"train"),
        (f"{top}train/loose.JPEG", b""), special(f"{top}train/n02", tarfile.DIRTYPE),
    ]
    data = tar_of(*others, *((top + name, name.encode()) for name in FILES))
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(data if suffix == "tar" else gzip.compress(data))
    source = open_source(path)
    assert source.layout == "class-folders" and [c.wnid for c in source.classes] == ["n01", "n02", "n03"]
    assert [name.rpartition("/")[2] for name in check_labels(source, "train")] == ["b.JPEG", "a.png", "x", "1.jpg"]
    assert len(check_labels(source, "val")) == 2


def test_archive_of_folders_refuses_what_is_no_file(tmp_path):
    links = [special("train/n02/link", tarfile.SYMTYPE, "a"), special("val/n01/link", tarfile.LNKTYPE, "val/n01/w"),
             special("dev/null", tarfile.CHRTYPE), ("../train/n01/up.JPEG", b"x")]
    (tmp_path / "data.tar").write_bytes(tar_of(*((name, b"") for name in FILES), *links))
    source = open_source(tmp_path / "data.tar")
    refused = {split: [(i.name, i.label) for i in source.read(split) if i.refused] for split in ("train", "val")}
    assert refused == {
        "train": [("train/n02/link", 1), ("dev/null", -1), ("../train/n01/up.JPEG", 0)], "val": [("val/n01/link", 0)]
    }


def test_archive_of_two_data_sets(tmp_path):
    path = tmp_path / "data.tar"
    path.write_bytes(tar_of(*((top + name, b"") for name in FILES for top in ("a/", "b/"))))
    assert "holds more than one data set (a/ and b/)" in refusal(path)


@pytest.mark.parametrize("damage", [cut(lambda size: size // 2), cut_before_end_mark, spoil_second_header])
def test_damaged_archive_of_folders(tmp_path, damage):
    path = tmp_path / "data.tar"
    path.write_bytes(tar_of(*((name, b"x" * 600) for name in FILES)))
    damage(path)
    assert refusal(path).startswith(f"{path}: truncated or damaged")


def test_unpacked_folders_go_before_left_over_archives(tmp_path):
    write_archives(tmp_path)
    write_folders(tmp_path)
    assert open_source(tmp_path).layout == "ilsvrc2012"  # complete: the published form
    (tmp_path / TRAIN).unlink()
    assert open_source(tmp_path).layout == "class-folders"
    shutil.rmtree(tmp_path / "train")
    assert f"{TRAIN} missing" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["", "nothing", "file.txt", "file.tar"])
def test_what_is_no_layout(tmp_path, name):
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "file.tar").write_bytes(b"x" * 2000)
    said = {"nothing": "does not exist", "file.tar": "truncated or damaged"}.get(name, "known are ilsvrc2012 ")
    message = refusal(tmp_path / name)
    assert message.startswith(f"{tmp_path / name}: ") and said in message
