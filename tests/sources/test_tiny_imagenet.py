"""Tiny-ImageNet: the right label for every image, and one clear line where images and label files disagree."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tars_on_the_spot import change, peak_bytes, read, refusal, refused

from pipeline.manifest import SynsetClass
from pipeline.sources import open_source

A, B, C = "n00000001", "n00000002", "n00000003"
TRAIN = [f"train/{wnid}/images/{wnid}_{i}.JPEG" for wnid in (A, B, C) for i in (0, 1)]
VAL = {0: C, 1: A, 10: C, 2: B}  # by number, in the order of the files' names
ANNOTATIONS = "val/val_annotations.txt"
TEXTS = {
    "wnids.txt": f"{B}\n{A}\n{C}\n",
    "words.txt": f"n00000000\tother\n{A}\tfirst, one\n{B}\tsecond\n{C}\tthird\n",
    ANNOTATIONS: "".join(f"val_{n}.JPEG\t{VAL[n]}\t0\t32\t44\t62\n" for n in sorted(VAL)),
}


def write(folder: Path) -> Path:
    """Images that hold their own names."""
    for name in [*TRAIN, *(f"val/images/val_{n}.JPEG" for n in VAL), "test/images/test_0.JPEG"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (folder / "train" / A / f"{A}_boxes.txt").touch()
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_labels_and_bytes(tmp_path, line_end):
    write(tmp_path)
    for name in TEXTS:
        change(tmp_path / name, lambda data: data.replace(b"\n", line_end.encode()))
    source = open_source(tmp_path)
    assert (source.layout, source.splits, source.root) == ("tiny-imagenet", ("train", "val"), tmp_path)
    assert source.classes == [SynsetClass(A, "first, one"), SynsetClass(B, "second"), SynsetClass(C, "third")]
    assert source.archives == tuple(tmp_path / name for name in TEXTS)
    assert source.missing == ("the test images' classes: they are left out",)
    for _ in range(2):  # it can be listed again
        assert read(source, "train") == [(name, int(name[14]) - 1, name.encode()) for name in TRAIN]
        assert read(source, "val") == [(name := f"val/images/val_{n}.JPEG", int(wnid[-1]) - 1, name.encode())
                                       for n, wnid in VAL.items()]
    shutil.rmtree(tmp_path / "test")
    assert open_source(tmp_path).missing == ()


def test_of_the_words_of_wordnet_few_are_held(tmp_path):
    (write(tmp_path) / "words.txt").write_text(
        "".join(f"n{i:08d}\twords of {i}, and more of them\n" for i in range(80_000)))
    source, peak = peak_bytes(lambda: open_source(tmp_path))
    assert [c.words for c in source.classes] == [f"words of {i}, and more of them" for i in (1, 2, 3)]
    assert peak < 500_000  # all of them would be 13 MB


def test_what_is_no_plain_file_is_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "val/images/val_2.JPEG").unlink()
    os.mkfifo(tmp_path / "val/images/val_2.JPEG")
    (tmp_path / f"train/{B}/images/{B}_9.JPEG").symlink_to("nowhere")
    source = open_source(tmp_path)
    assert refused(source, "train") == [(f"train/{B}/images/{B}_9.JPEG", 1, "not a plain file")]
    assert refused(source, "val") == [("val/images/val_2.JPEG", 1, "not a plain file")]
    assert len(read(source, "train")) == len(TRAIN) and len(read(source, "val")) == 3


@pytest.mark.parametrize("without, said", [
    (["words.txt"], "words.txt missing"), ([ANNOTATIONS], f"{ANNOTATIONS} missing"),
    (["val"], f"{ANNOTATIONS} and val/images/ missing"), (["train"], "train/ missing"),
    (["val/images", "words.txt"], "words.txt and val/images/ missing"),
])
def test_what_is_missing_is_named(tmp_path, without, said):
    write(tmp_path)
    for name in without:
        (shutil.rmtree if (tmp_path / name).is_dir() else os.unlink)(tmp_path / name)
    assert refusal(tmp_path) == f"{tmp_path}: {said}: unzip all of the download"


@pytest.mark.parametrize("name, old, new, said", [
    ("wnids.txt", A, B, f"line 2 names {B} again"), ("wnids.txt", TEXTS["wnids.txt"], "\n", "names no class"),
    ("wnids.txt", A, "\udcff", "line 2 is not UTF-8"), ("words.txt", "first", "\udcff", "line 2 is not UTF-8"),
    ("words.txt", B, "n00000009", f"has no words for {B} of wnids.txt"),
    ("words.txt", "\tsecond", "", f"line 3 names no words after {B}"),
    (ANNOTATIONS, "\t62", "", "line 1 has not the 6 columns"), (ANNOTATIONS, "\t", " ", "line 1 has not the 6 columns"),
    (ANNOTATIONS, "val_1.JPEG", "", "line 2 has not the 6 columns"),
    (ANNOTATIONS, "val_1.JPEG", "val_\udcff.JPEG", "line 2 is not UTF-8"),
    (ANNOTATIONS, B, "n00000009", "line 3 gives val_2.JPEG the class n00000009, which is not in wnids.txt"),
    (ANNOTATIONS, "val_1.JPEG", "val_0.JPEG", "line 2 names val_0.JPEG again"),
])
def test_damaged_label_files(tmp_path, name, old, new, said):
    assert old in TEXTS[name]
    (write(tmp_path) / name).write_bytes(TEXTS[name].replace(old, new).encode("utf-8", "surrogateescape"))
    assert refusal(tmp_path).startswith(f"{tmp_path / name}: {said}")


def test_classes_of_the_list_are_those_of_the_folders(tmp_path):
    train = write(tmp_path) / "train"
    (train / "n00000000").mkdir()
    assert f"{train}: holds 1 folders that are no class of wnids.txt (n00000000): " in refusal(tmp_path)
    change(tmp_path / "wnids.txt", lambda data: data + b"n00000000\n")
    shutil.rmtree(train / B)
    assert refusal(tmp_path) == f"{train}: 1 classes of wnids.txt missing ({B}): copy it again"


def test_every_class_has_images_and_only_its_own(tmp_path):
    train = write(tmp_path) / "train"
    (train / A / "images" / f"{C}_7.JPEG").touch()
    assert refusal(tmp_path, "train").startswith(f"{train / A}/images: holds {C}_7.JPEG, an image of {C}: ")
    shutil.rmtree(train / A / "images")
    assert refusal(tmp_path, "train") == f"{train / A}/images: cannot be read (No such file or directory)"
    (train / A / "images").mkdir()
    assert refusal(tmp_path, "train") == f"{train / A}/images: holds no image: copy it again"


def test_every_validation_image_has_a_label_and_every_label_an_image(tmp_path):
    images = write(tmp_path) / "val/images"
    (images / "val_5.JPEG").touch()
    assert refusal(tmp_path, "val").startswith(f"{images}: val_5.JPEG has no label in val_annotations.txt")
    (images / "val_5.JPEG").unlink()
    (images / "val_10.JPEG").unlink()
    assert refusal(tmp_path, "val") == f"{images}: 1 images of val_annotations.txt missing (val_10.JPEG): copy it again"


def test_a_copy_sorted_into_class_folders_is_one_of_those(tmp_path):
    for wnid in (A, B):
        for split in ("train", "val"):
            (tmp_path / split / wnid).mkdir(parents=True)
            (tmp_path / split / wnid / "x.JPEG").touch()
    (tmp_path / "wnids.txt").write_text(TEXTS["wnids.txt"])
    assert open_source(tmp_path).layout == "class-folders"
