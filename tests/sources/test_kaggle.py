"""Kaggle's CLS-LOC: the right label for every image, and one clear line where images and label files disagree."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tars_on_the_spot import change, read, refusal, refused

from pipeline.manifest import SynsetClass
from pipeline.sources import open_source
from pipeline.sources.kaggle import CLS_LOC, SOLUTION
from pipeline.sources.words import LOC_SYNSET_MAPPING as MAPPING

A, B, C = "n00000001", "n00000002", "n00000003"
TRAIN = [f"train/{wnid}/{wnid}_{i}.JPEG" for wnid in (A, B, C) for i in (3, 4)]
VAL = {1: C, 2: A, 3: C, 4: B}  # by number
SOLUTION_TEXT = (f"ImageId,PredictionString\nILSVRC2012_val_00000003,{C} 1 2 3 4 {C} 5 6 7 8 \n"
                 f"ILSVRC2012_val_00000001,{C} 1 2 3 4 \nILSVRC2012_val_00000002,{A} 0 0 1 1 \n"
                 f"ILSVRC2012_val_00000004,{B} 0 0 1 1 \n")
MAPPING_TEXT = f"{C} third, 3\n{A} first\n{B} second one\n"


def val(number: int) -> str:
    return f"val/ILSVRC2012_val_{number:08d}.JPEG"


def write(folder: Path) -> Path:
    """Files that hold their own names."""
    for name in [*TRAIN, *map(val, VAL), "test/ILSVRC2012_test_00000001.JPEG"]:
        (folder / CLS_LOC / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / CLS_LOC / name).write_bytes(name.encode())
    (folder / SOLUTION).write_text(SOLUTION_TEXT)
    (folder / MAPPING).write_text(MAPPING_TEXT)
    return folder


def check(path: Path, root: Path):
    source = open_source(path)
    assert (source.layout, source.splits, source.root) == ("kaggle", ("train", "val"), root)
    assert source.classes == [SynsetClass(A, "first"), SynsetClass(B, "second one"), SynsetClass(C, "third, 3")]
    for _ in range(2):  # it can be listed again
        assert read(source, "train") == [(name, int(name[14]) - 1, name.encode()) for name in TRAIN]
        assert read(source, "val") == [(val(n), int(wnid[-1]) - 1, val(n).encode()) for n, wnid in VAL.items()]
    return source


@pytest.mark.parametrize("given", [".", "ILSVRC", CLS_LOC])
@pytest.mark.parametrize("labels_in", [".", "ILSVRC", CLS_LOC])
def test_labels_and_bytes(tmp_path, monkeypatch, given, labels_in):
    write(tmp_path)
    for name in (SOLUTION, MAPPING):
        (tmp_path / name).rename(tmp_path / labels_in / name)
    source = check(tmp_path / given, tmp_path / CLS_LOC)
    assert source.archives == (tmp_path / labels_in / SOLUTION, tmp_path / labels_in / MAPPING)
    assert source.missing == ("the test images' classes: they are left out",)
    monkeypatch.chdir(tmp_path / given)
    check(Path("."), Path(CLS_LOC[len(given) + 1 if given != "." else 0 :]))


def test_a_copy_without_test_images_by_another_name_with_other_line_ends(tmp_path):
    path = write(tmp_path / "download") / CLS_LOC
    shutil.rmtree(path / "test")
    for name, text in ((SOLUTION, SOLUTION_TEXT), (MAPPING, MAPPING_TEXT)):
        (path / name).write_text(text.replace("\n", "\r\n"))
    path = path.rename(tmp_path / "imagenet")
    assert check(path, path).missing == ()


def test_validation_images_sorted_into_class_folders(tmp_path):
    path = write(tmp_path) / CLS_LOC
    for number, wnid in VAL.items():
        (path / "val" / wnid).mkdir(exist_ok=True)
        (path / val(number)).rename(path / "val" / wnid / f"{number}.JPEG")
    assert f"{path}/val: has been sorted into class folders: give {path} instead" in refusal(tmp_path)
    (tmp_path / SOLUTION).rename(path / SOLUTION)
    source = open_source(path)
    assert source.layout == "class-folders"
    assert [(name, label) for name, label, _ in read(source, "val")] == [
        (f"val/{A}/2.JPEG", 0), (f"val/{B}/4.JPEG", 1), (f"val/{C}/1.JPEG", 2), (f"val/{C}/3.JPEG", 2)
    ]


def test_what_is_no_plain_file_is_refused(tmp_path):
    folder = write(tmp_path) / CLS_LOC
    (folder / val(2)).unlink()
    os.mkfifo(folder / val(2))
    (folder / "train" / B / f"{B}_9.JPEG").symlink_to("nowhere")
    source = open_source(tmp_path)
    assert refused(source, "train") == [(f"train/{B}/{B}_9.JPEG", 1, "not a plain file")]
    assert refused(source, "val") == [(val(2), 0, "not a plain file")]
    assert len(read(source, "train")) == len(TRAIN) and len(read(source, "val")) == 3


@pytest.mark.parametrize("without, said", [
    ([SOLUTION], f"{SOLUTION} missing"), ([MAPPING], f"{MAPPING} missing"),
    ([MAPPING, SOLUTION], f"{SOLUTION} and {MAPPING} missing"), ([f"{CLS_LOC}/train"], "train/ missing"),
    ([f"{CLS_LOC}/val", MAPPING], f"val/ and {MAPPING} missing"), (["ILSVRC"], f"{CLS_LOC}/ missing"),
])
def test_what_is_missing_is_named(tmp_path, without, said):
    write(tmp_path)
    for name in without:
        (shutil.rmtree if (tmp_path / name).is_dir() else os.unlink)(tmp_path / name)
    assert refusal(tmp_path) == f"{tmp_path}: {said}: unzip all of the download"


@pytest.mark.parametrize("name, old, new, said", [
    (SOLUTION, "ImageId,PredictionString\n", "", "does not begin with ImageId,PredictionString"),
    (SOLUTION, SOLUTION_TEXT, "", "does not begin with ImageId,PredictionString"),
    (SOLUTION, f",{A} 0 0 1 1 ", "", "line 4 is not an image and boxes"),
    (SOLUTION, f"{A} 0 0 1 1 ", "", "line 4 is not an image and boxes"),
    (SOLUTION, f"{A} 0 0 1 1 ", f"{A} 0 0", "line 4 is not an image and boxes"),
    (SOLUTION, "ILSVRC2012_val_00000001", "", "line 3 is not an image and boxes"),
    (SOLUTION, f"{C} 5", f"{B} 5", "line 2 gives ILSVRC2012_val_00000003 more than one class"),
    (SOLUTION, A, "n00000009", "line 4 gives ILSVRC2012_val_00000002.JPEG the class n00000009, which is not in"),
    (SOLUTION, "00000001,", "00000003,", "line 3 names ILSVRC2012_val_00000003.JPEG again"),
    (SOLUTION, A, "\udcff", "line 4 is not UTF-8"), (MAPPING, "third", "\udcff", "line 1 is not UTF-8"),
    (MAPPING, A, "n\udcff", "line 2 is not UTF-8"), (MAPPING, " first", "", f"line 2 names no words after {A}"),
    (MAPPING, f"{B} ", f"{A} ", f"line 3 names {A} again"), (MAPPING, MAPPING_TEXT, "", "names no class"),
])
def test_damaged_label_files(tmp_path, name, old, new, said):
    data = (write(tmp_path) / name).read_text()
    assert old in data
    (tmp_path / name).write_bytes(data.replace(old, new).encode("utf-8", "surrogateescape"))
    assert refusal(tmp_path).startswith(f"{tmp_path / name}: {said}")


def test_classes_of_the_mapping_are_those_of_the_folders(tmp_path):
    train = write(tmp_path) / CLS_LOC / "train"
    (train / "n00000004").mkdir()
    assert f"{train}: holds 1 folders that are no class of {MAPPING} (n00000004): " in refusal(tmp_path)
    change(tmp_path / MAPPING, lambda data: data + b"n00000004 fourth\nn00000005 fifth\n")
    assert refusal(tmp_path) == f"{train}: 1 classes of {MAPPING} missing (n00000005): copy it again"


def test_every_class_has_images_and_only_its_own(tmp_path):
    train = write(tmp_path) / CLS_LOC / "train"
    (train / A / f"{C}_7.JPEG").touch()
    assert refusal(tmp_path, "train").startswith(f"{train / A}: holds {C}_7.JPEG, an image of {C}: ")
    shutil.rmtree(train / A)
    (train / A).mkdir()
    assert refusal(tmp_path, "train") == f"{train / A}: holds no image: copy it again"


def test_every_validation_image_has_a_label_and_every_label_an_image(tmp_path):
    folder = write(tmp_path) / CLS_LOC
    (folder / val(5)).touch()
    assert refusal(tmp_path, "val").startswith(f"{folder}/val: ILSVRC2012_val_00000005.JPEG has no label in {SOLUTION}")
    (folder / val(5)).unlink()
    (folder / val(4)).unlink()
    assert refusal(tmp_path, "val") == (f"{folder}/val: 1 images of {SOLUTION} missing "
                                        "(ILSVRC2012_val_00000004.JPEG): copy it again")
