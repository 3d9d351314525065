"""ImageNet as a whole: a folder or a tar of class tars, plain or compressed."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path

import pytest
from tars_on_the_spot import DAMAGES, class_tar, open_descriptors, peak_bytes, read, refusal, refused, special, tar_of

from pipeline.manifest import SynsetClass
from pipeline.sources import open_source
from pipeline.sources.reading import Reader, unpack
from pipeline.sources.synset_tars import WORDS

WNIDS = ["n00000003", "n00000001", "n00000002"]
IMAGES = [(f"{wnid}_{i}.JPEG", label, f"{wnid} {i}".encode()) for label, wnid in enumerate(sorted(WNIDS))
          for i in range(3)]
WORDS_TEXT = b"n00000001\tfirst, one\n\nn00000009\tother\nn00000003\tthird\n"


def write_folder(folder: Path, *others: tuple[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in [*(class_tar(wnid, 3) for wnid in WNIDS), *others]:
        (folder / name).write_bytes(data)
    return folder


def whole(*others: tuple[str, bytes] | tarfile.TarInfo, top: str = "") -> bytes:
    return tar_of(*((top + name, data) for name, data in (class_tar(wnid, 3) for wnid in WNIDS)), *others)


def test_a_folder_of_class_tars(tmp_path):
    write_folder(tmp_path, (WORDS, WORDS_TEXT), ("other.tar", b"x"), ("n1.tar", b"x"), ("readme.txt", b"x"))
    (tmp_path / "n00000009.tar").mkdir()
    source = open_source(tmp_path)
    assert (source.layout, source.splits, source.missing) == ("synset-tars", ("train",), ())
    assert source.classes == [SynsetClass("n00000001", "first, one"), SynsetClass("n00000002", ""),
                              SynsetClass("n00000003", "third")]
    for _ in range(2):  # it can be listed again
        assert read(source, "train") == IMAGES
    assert [path.name for path in source.archives] == [WORDS, *(f"{wnid}.tar" for wnid in sorted(WNIDS))]


@pytest.mark.parametrize("top", ["", "./", "winter21_whole/"])
@pytest.mark.parametrize("name", ["fall11_whole.tar", "winter21_whole.tar.gz"])
def test_one_tar_of_class_tars(tmp_path, top, name):
    data = whole((f"{top}readme.txt", b"x"), special(f"{top}more", tarfile.DIRTYPE), top=top)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    (tmp_path / WORDS).write_bytes(WORDS_TEXT)
    source = open_source(tmp_path / name)
    assert source.layout == "synset-tars" and source.root == tmp_path
    assert [c.words for c in source.classes] == ["first, one", "", "third"]
    entries = list(source.entries("train"))
    assert [entry.member[:9] for entry in entries] == [wnid for wnid in WNIDS for _ in range(3)]
    if name.endswith("gz"):
        unpack(tmp_path / name, tmp_path / "copy")
    images = Reader(tmp_path, {name: tmp_path / "copy"}).read(entries)
    assert sorted((e.member[10:], e.label, data) for e, data in zip(entries, images)) == IMAGES


def test_words_in_the_archive_go_before_those_beside_it(tmp_path):
    (tmp_path / WORDS).write_bytes(b"n00000001\tbeside\n")
    (tmp_path / "a.tar").write_bytes(whole((WORDS, WORDS_TEXT)))
    assert [c.words for c in open_source(tmp_path / "a.tar").classes] == ["first, one", "", "third"]


EMPTY = ("n00000000.tar", tar_of())
ONLY_LINK = ("n00000004.tar", tar_of(special("n00000004_1.JPEG", tarfile.SYMTYPE, "x")))


def test_a_tar_without_an_image_is_no_class(tmp_path):
    folder = write_folder(tmp_path / "folder", EMPTY, ONLY_LINK)
    (tmp_path / "a.tar").write_bytes(whole(EMPTY, ONLY_LINK, special("n00000005.tar", tarfile.LNKTYPE, "x")))
    for path, more in ((folder, []), (tmp_path / "a.tar", [("n00000005.tar", -1, "a link, not a file")])):
        source = open_source(path)
        assert [c.wnid for c in source.classes] == sorted(WNIDS)
        assert len(read(source, "train")) == 9
        assert [(name[-16:] if "_" in name else name, *rest) for name, *rest in refused(source, "train")] == [
            ("n00000004_1.JPEG", -1, "a link, not a file"), *more
        ]
    (tmp_path / "b.tar").write_bytes(tar_of(EMPTY, ONLY_LINK))
    assert "no class tar holds an image" in refusal(tmp_path / "b.tar")


STRANGER = ("n00000004.tar", tar_of(("n00000004_1.JPEG", b"x"), ("n00000001_9.JPEG", b"x")))


def test_an_image_of_another_class_is_a_contradiction(tmp_path):
    folder = write_folder(tmp_path / "folder", STRANGER)
    (tmp_path / "a.tar").write_bytes(whole(STRANGER))
    for path in (folder, tmp_path / "a.tar"):
        assert "the tar of n00000004 holds n00000001_9.JPEG, an image of n00000001" in refusal(path, "train")


def test_contradictions_and_damage_are_named(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(whole(class_tar(WNIDS[0])))
    assert f"{path}: holds n00000003.tar twice" in refusal(path)
    for damage in DAMAGES.values():
        path.write_bytes(damage(whole()))
        assert refusal(path).startswith(f"{path}: truncated or damaged (")
    name, data = class_tar("n00000004", 20)
    for damage in DAMAGES.values():  # found at once or when it is listed
        path.write_bytes(whole((name, damage(data))))
        with pytest.raises(ValueError, match=r"n00000004\.tar inside: truncated or damaged \("):
            list(open_source(path).entries("train"))
        folder = write_folder(tmp_path / "folder", (name, damage(data)))
        with pytest.raises(ValueError, match=r"folder/n00000004\.tar: truncated or damaged \("):
            list(open_source(folder).entries("train"))


def test_names_that_cannot_be_printed_stay_on_one_line(tmp_path):
    (tmp_path / "a.tar").write_bytes(whole(("n00000004.tar", tar_of(("a\nb/n00000001_\udcff.JPEG", b"")))))
    assert r"a\nb/n00000001_\udcff.JPEG" in refusal(tmp_path / "a.tar", "train")


def test_memory_and_open_files_do_not_grow(tmp_path):
    many = tar_of(*((f"n00000004_{i}.JPEG", b"") for i in range(4000)))
    folder = write_folder(tmp_path, ("n00000004.tar", many))
    del many
    source, before = open_source(folder), open_descriptors()
    count, peak = peak_bytes(lambda: sum(1 for _ in source.entries("train")))
    assert count == 4009 and peak < 1 << 18 and open_descriptors() == before
