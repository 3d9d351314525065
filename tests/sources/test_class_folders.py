"""Class folders, loose or in a tar: the right label for every image, and one clear line for whatever is wrong."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from tars_on_the_spot import DAMAGES, peak_bytes, read, refusal, refused, special, tar_of

from pipeline.errors import DataError
from pipeline.manifest import SynsetClass
from pipeline.sources import folders, open_source
from pipeline.sources.archives import LARGEST_BYTES, TOO_LARGE, Tar
from pipeline.sources.reading import Reader, unpack
from pipeline.sources.words import read_words

TRAIN = ["train/n01/x", "train/n02/a.png", "train/n02/b.JPEG", "train/n03/1.jpg"]
VAL = ["val/n01/w.JPEG", "val/n03/v.JPEG"]
LABELS = {"n01": 0, "n02": 1, "n03": 2}


def write(folder: Path, *names: str) -> Path:
    """Files that hold their own names."""
    for name in names or (*VAL, *reversed(TRAIN)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def images(names: list[str]) -> list[tuple[str, int, bytes]]:
    return [(name, LABELS[name.split("/")[-2]], name.encode()) for name in names]


def test_folders(tmp_path):
    write(tmp_path)
    write(tmp_path, "train/.hidden", "train/n01/.hidden", "train/n01/.deeper/x.JPEG", "train/notes.txt",
          "val/.hidden/x.JPEG", "other/n09/x.JPEG")
    (tmp_path / "synset_words.txt").write_text("n03 third, 3\nn01 first\n")
    source = open_source(tmp_path)
    assert (source.layout, source.splits, source.missing) == ("class-folders", ("train", "val"), ())
    assert source.root == tmp_path and source.archives == (tmp_path / "synset_words.txt",)
    assert source.classes == [SynsetClass("n01", "first"), SynsetClass("n02", ""), SynsetClass("n03", "third, 3")]
    for _ in range(2):  # it can be listed again
        assert read(source, "train") == images(TRAIN)
        assert read(source, "val") == images(VAL)
    assert [entry.size for entry in source.entries("train")] == [len(name) for name in TRAIN]


@pytest.mark.parametrize("pack", ["folder", "tar"])
def test_images_at_any_depth_and_in_no_class_folder(tmp_path, pack):
    """No image is left out without a word."""
    deep = ["train/n01/a/1.JPEG", "train/n01/a/b/c/2", "train/n02/train/3.JPEG", "val/n01/deep/4.JPEG"]
    loose = ["train/loose.JPEG", "val/other.png"]
    path = write(tmp_path / "data", *TRAIN, *VAL, *deep, *loose, "train/notes.txt", "test/5.jpg", "test/notes.txt")
    if pack == "tar":
        path = tmp_path / "data.tar"
        with tarfile.open(path, "w") as tar:
            tar.add(tmp_path / "data", ".")
    source = open_source(path)
    assert source.splits == ("train", "val") and source.missing == ("the test images' classes: they are left out",)
    found = {entry.member.removeprefix("./"): (entry.label, entry.refused)
             for split in source.splits for entry in source.entries(split)}
    labels = {"train/n01/a/1.JPEG": 0, "train/n01/a/b/c/2": 0, "train/n02/train/3.JPEG": 1, "val/n01/deep/4.JPEG": 0}
    assert found == {name: (LABELS[name.split("/")[1]], "") for name in TRAIN + VAL} | {
        name: (label, "") for name, label in labels.items()} | {name: (-1, "in no class folder") for name in loose}


def test_test_images_with_classes_and_validation_by_its_long_name(tmp_path):
    names = [name.replace("val/", "validation/") for name in VAL]
    source = open_source(write(tmp_path, *TRAIN, *names, "test/n02/t"))
    assert source.splits == ("train", "val", "test") and source.missing == ()
    assert read(source, "val") == images(names) and read(source, "test") == images(["test/n02/t"])
    write(tmp_path, *VAL)
    assert "holds both val/ and validation/" in refusal(tmp_path)


def test_test_images_without_classes_are_left_out(tmp_path):
    source = open_source(write(tmp_path, *TRAIN, *VAL, "test/t.JPEG"))
    assert source.splits == ("train", "val") and source.missing == ("the test images' classes: they are left out",)


@pytest.mark.parametrize("name", ["synset_words.txt", "words.txt", "LOC_synset_mapping.txt"])
def test_lists_of_words(tmp_path, name):
    lines = b"\xef\xbb\xbfn01\tfirst, one\r\n\r\nn09 \xff\nn09\nn03   \xc3\xa9t\xc3\xa9  \n"
    (write(tmp_path) / name).write_bytes(lines)
    source = open_source(tmp_path)
    assert [c.words for c in source.classes] == ["first, one", "", "\u00e9t\u00e9"]
    assert source.archives == (tmp_path / name,)


@pytest.mark.parametrize("line, said", [
    (b"n02 \xff", "line 2 is not UTF-8"), (b"n02", "line 2 names no words after n02"),
    (b"n01 again", "line 2 names n01 again"), (b"x" * (1 << 17), "line 2 is too long"),
])
def test_damaged_list_of_words(tmp_path, line, said):
    (write(tmp_path) / "words.txt").write_bytes(b"n01 first\n" + line + b"\n")
    assert refusal(tmp_path).startswith(f"{tmp_path / 'words.txt'}: {said}")


def test_of_a_long_list_only_what_is_wanted_is_held(tmp_path):
    (tmp_path / "words.txt").write_text("".join(f"n{i:08d}\twords of {i}, and more of them\n" for i in range(80_000)))
    words, peak = peak_bytes(lambda: read_words(tmp_path / "words.txt", {"n00000007", "n00079999", "n1"}))
    assert words == {f"n{i:08d}": f"words of {i}, and more of them" for i in (7, 79_999)} and peak < 500_000


def test_a_list_that_is_no_plain_file(tmp_path):
    os.mkfifo(tmp_path / "words.txt")
    with pytest.raises(DataError, match="is missing, or not a plain file"):
        read_words(tmp_path / "words.txt")


def test_what_is_no_plain_file_is_refused(tmp_path, monkeypatch):
    folder = write(tmp_path) / "train/n01"
    (folder / "nowhere").symlink_to("not there")
    (folder / "circle").symlink_to("circle")
    (folder / "through a file").symlink_to("x/y")
    (folder / "device").symlink_to("/dev/null")
    os.mkfifo(folder / "pipe")
    (folder / "to a folder").symlink_to("../n02")
    (folder / "y").symlink_to("x")  # a link to a file is as good as the file
    with open(folder / "large", "wb") as file:
        file.truncate(LARGEST_BYTES + 1)
    with open(folder / "largest", "wb") as file:
        file.truncate(LARGEST_BYTES)
    source = open_source(tmp_path)
    why = {"large": TOO_LARGE, "to a folder": "a link to a folder"}
    assert refused(source, "train") == [
        (f"train/n01/{name}", 0, why.get(name, "not a plain file"))
        for name in sorted(["circle", "device", "large", "nowhere", "pipe", "through a file", "to a folder"])
    ]
    monkeypatch.setattr(folders, "LARGEST_BYTES", 20)
    assert read(source, "train") == [*images(TRAIN[:1]), ("train/n01/y", 0, b"train/n01/x"), *images(TRAIN[1:])]


def test_class_folders_may_be_links(tmp_path):
    write(tmp_path / "else", "n04/z")
    (write(tmp_path / "data") / "train/n04").symlink_to(tmp_path / "else/n04")
    assert read(open_source(tmp_path / "data"), "train")[-1] == ("train/n04/z", 3, b"n04/z")
    shutil.rmtree(tmp_path / "else")
    assert refusal(tmp_path / "data") == f"{tmp_path}/data/train/n04: a link that leads nowhere: mend or remove it"


def test_file_names_that_are_not_utf8(tmp_path):
    write(tmp_path)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/train/n01/\xff\n")).write_bytes(b"odd")
    assert ("train/n01/\udcff\n", 0, b"odd") in read(open_source(tmp_path), "train")


ODD_NAMES = [("two\nlines", "two\\nlines"), ("\udcff", "\\udcff"), ("bell\a", "bell\\x07")]


@pytest.mark.parametrize("name, shown", ODD_NAMES)
def test_class_names_that_cannot_be_printed(tmp_path, name, shown):
    (write(tmp_path) / "train" / name).mkdir()
    assert refusal(tmp_path) == f"{tmp_path}/train: the class {shown} has a name that cannot be printed: rename it"
    archive = tmp_path / "data.tar"
    archive.write_bytes(tar_of(*((n, b"") for n in TRAIN), (f"train/{name}/x", b"")))
    assert refusal(archive) == f"{archive}: the class {shown} has a name that cannot be printed: rename it"


def test_a_file_that_vanishes_while_it_is_listed(tmp_path, monkeypatch):
    source = open_source(write(tmp_path))
    visible = folders._visible

    def list_and_remove(folder: Path) -> list[os.DirEntry]:
        found = visible(folder)
        if folder.name == "n02":
            (folder / "b.JPEG").unlink()
        return found

    monkeypatch.setattr(folders, "_visible", list_and_remove)
    with pytest.raises(DataError) as caught:
        list(source.entries("train"))
    assert str(caught.value) == f"{tmp_path}/train/n02/b.JPEG: vanished while its folder was listed: run again"


def test_a_class_folder_that_vanishes(tmp_path):
    source = open_source(write(tmp_path))
    shutil.rmtree(tmp_path / "train/n02")
    with pytest.raises(DataError) as caught:
        list(source.entries("train"))
    assert str(caught.value) == f"{tmp_path}/train/n02: cannot be read (No such file or directory)"


def test_a_file_that_cannot_be_looked_at(tmp_path):
    (write(tmp_path) / "train/n01/y").symlink_to("z" * 300)  # a name too long for any file system
    assert refusal(tmp_path, "train") == f"{tmp_path}/train/n01/y: cannot be read (File name too long)"


def test_memory_holds_one_class_folder(tmp_path):
    for wnid in range(40):
        (tmp_path / f"train/{wnid:02d}").mkdir(parents=True)
        for i in range(100):
            os.mknod(tmp_path / f"train/{wnid:02d}/{i:03d}.JPEG")
    source = open_source(tmp_path)
    number, peak = peak_bytes(lambda: sum(1 for _ in source.entries("train")))
    assert number == 4000 and peak < 250_000  # all entries would be 0.8 MB


@pytest.mark.parametrize("pack", ["folder", "tar"])
@pytest.mark.parametrize("names, said", [
    (VAL, "holds no train/<class>/ folders"),
    ([*TRAIN, *VAL, "val/n04/x"], "1 classes of val/ are not in train/ (n04): complete train/ or remove them"),
    ([*TRAIN, *VAL, *(f"test/n{i}/x" for i in range(9))],
     "9 classes of test/ are not in train/ (n0, n1, n2, ...): complete train/ or remove them"),
    ([*TRAIN, "val/x.JPEG"], "holds no class folders: "),
    ([*TRAIN, *VAL, "validation/n01/x"], "holds both val/ and validation/"),
])
def test_what_does_not_belong_together(tmp_path, pack, names, said):
    path = write(tmp_path / "data", *names)
    if pack == "tar":
        path = tmp_path / "data.tar"
        path.write_bytes(tar_of(*((name, b"") for name in names)))
    assert said in refusal(path)


@pytest.mark.parametrize("pack", ["folder", "tar"])
def test_only_train(tmp_path, pack):
    path = write(tmp_path / "data", *TRAIN)
    if pack == "tar":
        path = tmp_path / "data.tar"
        path.write_bytes(tar_of(*((name, name.encode()) for name in TRAIN)))
    source = open_source(path)
    assert source.splits == ("train",) and read(source, "train") == images(TRAIN)


@pytest.mark.parametrize("top, suffix", [("", "tar"), ("./", "tar"), ("imagenette2/", "tgz"), ("a/b/", "tar.gz")])
def test_archive_of_folders(tmp_path, top, suffix):
    others = [
        special(f"{top}train", tarfile.DIRTYPE), (f"{top}train/n02/._a.JPEG", b""), (f"{top}noise.csv", b"train"),
        (f"{top}train/notes.txt", b""), special(f"{top}train/n02", tarfile.DIRTYPE), (f"{top}train/.n04/x", b""),
        (f"{top}train/n02/.deeper/x", b""), special(f"{top}train/n01/.link", tarfile.SYMTYPE, "x"),
    ]
    data = tar_of(*others, *((top + name, name.encode()) for name in (*reversed(TRAIN), *VAL)))
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(data if suffix == "tar" else gzip.compress(data))
    source = open_source(path)
    assert (source.layout, source.splits, source.missing) == ("class-folders", ("train", "val"), ())
    assert source.root == tmp_path and source.archives == (path,)
    assert source.classes == [SynsetClass(wnid, "") for wnid in LABELS]
    if suffix != "tar":
        unpack(path, tmp_path / "copy")
    reader = Reader(tmp_path, {path.name: tmp_path / "copy"})
    for split, expected in (("train", images(TRAIN)[::-1]), ("val", images(VAL))):
        entries = list(source.entries(split))
        assert [(e.archive, e.member, e.label, e.refused) for e in entries] == [
            (path.name, top + name, label, "") for name, label, _ in expected
        ]
        assert reader.read(entries) == [data for _, _, data in expected]


def test_archive_refuses_what_is_no_file(tmp_path):
    links = [
        special("train/n02/link", tarfile.SYMTYPE, "a"), special("val/n01/link", tarfile.LNKTYPE, "val/n01/w"),
        special("dev/null", tarfile.CHRTYPE), ("../train/n01/up.JPEG", b"x"),
        special("train/n09/link", tarfile.SYMTYPE, "a"),  # a class of which there is nothing else
    ]
    (tmp_path / "data.tar").write_bytes(tar_of(*((name, b"") for name in TRAIN + VAL), *links))
    source = open_source(tmp_path / "data.tar")
    assert [c.wnid for c in source.classes] == list(LABELS)
    assert refused(source, "train") == [
        ("train/n02/link", 1, "a link, not a file"), ("dev/null", -1, "not a plain file"),
        ("../train/n01/up.JPEG", 0, "its name leads out of the archive"), ("train/n09/link", -1, "a link, not a file"),
    ]
    assert refused(source, "val") == [("val/n01/link", 0, "a link, not a file")]


def test_archive_refuses_images_that_are_too_large(tmp_path, monkeypatch):
    members = [(name, b"") for name in TRAIN + VAL] + [("train/n01/y", b"large"), ("extra.bin", b"large")]
    (tmp_path / "data.tar").write_bytes(tar_of(*members))
    members_of = Tar.members
    monkeypatch.setattr(Tar, "members", lambda tar, largest=4: members_of(tar, largest))
    assert refused(open_source(tmp_path / "data.tar"), "train") == [("train/n01/y", 0, TOO_LARGE)]


@pytest.mark.parametrize("members, found", [
    ([("read\nme", b""), ("n01/x.JPEG", b"")], "the first file found is read\\nme"), ([], "no image found"),
    ([special("train/n01", tarfile.DIRTYPE), ("train/n01/.hidden", b"")], "no image found"),
])
def test_archive_of_something_else_tells_what_was_found(tmp_path, members, found):
    (tmp_path / "data.tar").write_bytes(tar_of(*members))
    assert refusal(tmp_path / "data.tar") == (f"{tmp_path}/data.tar: holds no train/<class>/ folders with images "
                                              f"({found}): give an archive of them")


def test_archive_of_two_data_sets(tmp_path):
    path = tmp_path / "data.tar"
    path.write_bytes(tar_of(*((top + name, b"") for name in TRAIN + VAL for top in ("a/", "b/"))))
    assert "holds more than one data set (a/ and b/)" in refusal(path)


def test_archive_that_has_changed_since_it_was_opened(tmp_path):
    path = tmp_path / "data.tar"
    path.write_bytes(tar_of(*((name, b"") for name in TRAIN)))
    source = open_source(path)
    path.write_bytes(tar_of(("train/n04/x", b"")))
    with pytest.raises(DataError, match="data.tar: holds train/n04/x, which was not there before: run again"):
        list(source.entries("train"))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_archive(tmp_path, damage):
    path = tmp_path / "data.tar"
    path.write_bytes(damage(tar_of(*((name, b"x" * 600) for name in TRAIN + VAL))))
    assert refusal(path).startswith(f"{path}: truncated or damaged")
