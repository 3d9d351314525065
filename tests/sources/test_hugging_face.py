"""Parquet files of Hugging Face: the right label for every row, and one clear line for whatever is wrong."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from tars_on_the_spot import open_descriptors, read, refusal, refused

from pipeline.manifest import SynsetClass
from pipeline.sources import open_source
from pipeline.sources.numbered import wnid_in
from pipeline.sources.source import Entry

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["tench, Tinca tinca", "goldfish", "crane", "crane"]  # ImageNet, too, has two of one name
WNIDS = ["n01440764", "n01443537", "n02012849", "n03126707"]
Row = tuple[str | None, int | None]  # path, label; the image's bytes are made from it


def image_of(row: Row) -> bytes:
    return f"image {row}".encode()


def metadata(label: object) -> dict[bytes, bytes]:
    features = {"image": {"_type": "Image"}, "label": label}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def class_label(names: list[str]) -> dict[bytes, bytes]:
    return metadata({"names": names, "_type": "ClassLabel"})


def write(path: Path, rows: Sequence[Row | None], said: dict[bytes, bytes] | None = None, **options) -> None:
    """Write as `datasets` does; None is a row without an image, of class 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [row and {"bytes": image_of(row), "path": row[0]} for row in rows]
    labels = [row[1] if row else 0 for row in rows]
    table = pa.table({"image": pa.array(images, IMAGE), "label": pa.array(labels, pa.int64())})
    pq.write_table(table.replace_schema_metadata(said), path, **options)


def train_rows(wnids: Sequence[str] = WNIDS, each: int = 3) -> list[Row]:
    rows = [(f"{wnid}_{i}_{wnid}.JPEG", label) for label, wnid in enumerate(wnids) for i in range(each)]
    random.Random(0).shuffle(rows)
    return rows


def val_rows(wnids: Sequence[str] = WNIDS) -> list[Row]:
    return [(f"ILSVRC2012_val_{i:08d}_{wnid}.JPEG", label) for i, (label, wnid) in enumerate(enumerate(wnids))]


def no_paths(rows: list[Row]) -> list[Row]:
    return [(None, label) for _, label in rows]


def write_whole(folder: Path, said: dict[bytes, bytes] | None = None) -> Path:
    rows = train_rows()
    write(folder / "data" / "train-00000-of-00002.parquet", rows[:7], said, row_group_size=3)
    write(folder / "data" / "train-00001-of-00002.parquet", rows[7:], said, row_group_size=3)
    write(folder / "data" / "validation-00000-of-00001.parquet", val_rows(), said)
    return folder


def expected(rows: list[Row]) -> list[tuple[str, int, bytes]]:
    return [(path or f"row {row}", label, image_of((path, label))) for row, (path, label) in enumerate(rows)]


def opened(folder: Path, train: Sequence[Row | None], said: dict[bytes, bytes] | None = None, name="train-0.parquet"):
    write(folder / name, train, said)
    return open_source(folder)


def test_every_row_is_listed_and_read(tmp_path):
    said = class_label(NAMES)
    write_whole(tmp_path, said)
    write(tmp_path / "data" / "test-00000-of-00001.parquet", [("ILSVRC2012_test_00000001.JPEG", -1)] * 2, said)
    (tmp_path / "data" / ".cache.parquet").write_bytes(b"x")
    (tmp_path / "README.md").write_bytes(b"x")
    source = open_source(tmp_path)
    assert (source.layout, source.splits, source.root) == ("hugging-face-parquet", ("train", "val"), tmp_path)
    assert source.missing == ("the test images' classes: they are left out",)
    assert [path.name[:10] for path in source.archives] == ["train-0000"] * 2 + ["validation", "test-00000"]
    assert source.classes == [SynsetClass(*pair) for pair in zip(WNIDS, NAMES)]
    rows = train_rows()
    for _ in range(2):  # it can be listed again
        assert read(source, "train") == expected(rows) and read(source, "val") == expected(val_rows())
    places = [("data/train-00000-of-00002.parquet", row, row // 3) for row in range(7)]
    places += [("data/train-00001-of-00002.parquet", row, 3 + row // 3) for row in range(5)]
    assert list(source.entries("train")) == [Entry(archive, path, label, row, block=block)
                                             for (archive, row, block), (path, label) in zip(places, rows)]


@pytest.mark.parametrize("train, val, test", [
    ("train.parquet", "val.parquet", "test.parquet"), ("a-0.parquet", "valid_0.parquet", "test00.parquet"),
    ("train/0.parquet", "validation/0.parquet", "test/train.parquet"),
    ("data/imagenet-train.parquet", "data/val/0.parquet", "data/TEST-0.parquet"),
])
def test_files_belong_to_the_split_that_they_name(tmp_path, train, val, test):
    rows = {"train": train_rows(), "val": val_rows(), "test": val_rows()[::-1]}
    for split, name in zip(rows, (train, val, test)):
        write(tmp_path / name, rows[split])
    source = open_source(tmp_path)
    assert source.splits == ("train", "val", "test") and source.missing == ()
    for split in rows:
        assert read(source, split) == expected(rows[split])


def test_files_that_are_missing_are_told(tmp_path):
    write_whole(tmp_path)
    data = tmp_path / "data"
    shutil.move(data / "train-00001-of-00002.parquet", data / "train-00003-of-00294-a1.parquet")
    assert open_source(tmp_path).missing == (
        "1 of the 2 files train-*-of-00002*, the first of them 00001",
        "293 of the 294 files train-*-of-00294*, the first of them 00000")


def test_names_that_are_wnids(tmp_path):
    source = opened(tmp_path, no_paths(train_rows()), class_label(WNIDS))
    assert source.classes == [SynsetClass(wnid, "") for wnid in WNIDS]
    assert read(source, "train") == expected(no_paths(train_rows()))
    with_paths = opened(tmp_path, train_rows(), class_label(WNIDS))
    assert with_paths.classes == source.classes
    write(tmp_path / "train-0.parquet", train_rows(), class_label(WNIDS[1:] + WNIDS[:1]))
    assert "by its name and has label" in refusal(tmp_path)
    write(tmp_path / "train-0.parquet", train_rows(), class_label(WNIDS + WNIDS[:1]))
    assert "names two classes alike" in refusal(tmp_path)


@pytest.mark.parametrize("said", [{}, {"names": NAMES, "_type": "ClassLabel"}, {"class_label": {"names": NAMES}},
                                  {"dtype": {"class_label": {"names": {str(i): n for i, n in enumerate(NAMES)}}}},
                                  {"class_label": {"names": {str(i): n for i, n in enumerate(NAMES)}}},
                                  {"dtype": "int64", "_type": "Value"}])
def test_names_of_every_version(tmp_path, said):
    source = opened(tmp_path, train_rows(), metadata(said))
    names = NAMES if "names" in str(said) else [""] * 4
    assert source.classes == [SynsetClass(*pair) for pair in zip(WNIDS, names)]


def test_classes_are_sorted_by_wnid_whatever_their_numbers(tmp_path):
    order = [2, 0, 3, 1]  # number 0 is the third wnid
    rows = train_rows([WNIDS[i] for i in order])
    for said, wnids in [(class_label([NAMES[i] for i in order]), None), (class_label([WNIDS[i] for i in order]), 1)]:
        source = opened(tmp_path, rows, said)
        assert source.classes == [SynsetClass(wnid, "" if wnids else name) for wnid, name in zip(WNIDS, NAMES)]
        assert read(source, "train") == [(path, WNIDS.index(wnid_in(path)), image_of((path, number)))
                                         for path, number in rows]


def test_classes_without_wnids_keep_their_order(tmp_path):
    rows = [(None, 2), ("a.png", 0), ("n1_0.png", 10), (None, 2)]
    source = opened(tmp_path, rows)
    assert source.classes == [SynsetClass(f"{number:04d}", "") for number in range(11)]
    assert read(source, "train") == expected(rows)
    names = [f"name {i}" for i in range(12)]
    assert opened(tmp_path, rows, class_label(names)).classes == [
        SynsetClass(f"{number:04d}", name) for number, name in enumerate(names)]
    assert [c.wnid for c in opened(tmp_path, [(None, 12345)]).classes][::12345] == ["00000", "12345"]


def test_wnids_of_some_classes_are_not_used(tmp_path):
    source = opened(tmp_path, train_rows(WNIDS[:3]), class_label(NAMES))  # of the last there is no image
    assert source.classes == [SynsetClass(f"{number:04d}", name) for number, name in enumerate(NAMES)]
    rows = [*train_rows(), ("ILSVRC2012_val_00000001.JPEG", 2)]  # some of Imagenette's validation images are so
    source = opened(tmp_path, rows, class_label(NAMES))
    assert [c.wnid for c in source.classes] == WNIDS and read(source, "train") == expected(rows)


def test_where_a_name_tells_its_wnid():
    assert [wnid_in(name) for name in [
        "n01440764_10026_n01440764.JPEG", "ILSVRC2012_val_00000293_n01440764.JPEG", "n01440764_1.JPEG", "n01440764",
        "a/n01440764.b", "n01440764/1.JPEG", "n014407641.JPEG", "xn01440764.JPEG", "n0144076_1.JPEG", "", "row 7"]
    ] == ["n01440764"] * 5 + [""] * 6


def test_rows_without_an_image(tmp_path):
    rows = [*train_rows(), None, (None, 1)]
    source = opened(tmp_path, rows)
    assert refused(source, "train") == [("row 12", 0, "null, not an image")]
    assert read(source, "train") == [*expected(train_rows()), ("row 13", 1, image_of((None, 1)))]


def test_labels_that_contradict_are_named(tmp_path):
    file = tmp_path / "train-0.parquet"
    good = train_rows()
    for bad, said, reason in [
        ((None, 4), class_label(NAMES), "its label is 4, which is none of 0 to 3, those that train-0.parquet names"),
        ((None, -2), class_label(NAMES), "its label is -2, "), ((None, -2), None, "its label is -2, "),
        ((None, 1 << 62), None, "which is none of 0 to 999999"), ((None, None), None, "has no label"),
        ((None, -1), class_label(NAMES), "has no label"),
        ((f"{WNIDS[0]}_7.JPEG", 1), None, f"is of {WNIDS[0]} by its name and has label 1, but before, label 1 was "),
        (("n09999999_7.JPEG", 1), None, f"label 1 was {WNIDS[1]}"),
        ((f"{WNIDS[0]}_7.JPEG", 4), None, f"but before, {WNIDS[0]} had label 0"),
    ]:
        write(file, [*good, bad], said, row_group_size=5)
        message = refusal(tmp_path)
        assert message.startswith(f"{file}, row 12, {bad[0] or 'row 12'}: ") and reason in message
    write(file, good)
    write(tmp_path / "val.parquet", [*val_rows(), (None, 4)])
    assert "row 4: its label is 4, which is none of 0 to 3, those of the training images" in refusal(tmp_path)
    write(tmp_path / "val.parquet", val_rows())
    write(tmp_path / "test.parquet", [(None, 0), (None, -1)])
    assert f"{tmp_path / 'test.parquet'}, row 1, row 1: has no label" in refusal(tmp_path)


def test_files_that_do_not_belong_together(tmp_path):
    write_whole(tmp_path, class_label(NAMES))
    write(tmp_path / "data" / "test-0.parquet", [(None, -1)], class_label(NAMES[:2]))
    assert "test-0.parquet: its class names are not those of train-00000-of-00002.parquet" in refusal(tmp_path)


def test_training_images_are_needed(tmp_path):
    write(tmp_path / "val.parquet", val_rows())
    assert "holds no training image" in refusal(tmp_path)
    write(tmp_path / "train.parquet", [])
    assert "holds no training image" in refusal(tmp_path)


@pytest.mark.parametrize("text", [
    b"", b"{", b"[]", b"{}", b'{"info": {"features": {"label": 3}}}', b'{"info": {"features": null}}', b"\xff",
    b"[" * 100_000, *(json.dumps({"info": {"features": {"label": {"names": names}}}}).encode()
                      for names in ([], "n", [1], {"1": "a"}, {"0": 7}, 5)),
])
def test_damaged_metadata_is_named(tmp_path, text):
    write(tmp_path / "train.parquet", train_rows(), {b"huggingface": text})
    assert refusal(tmp_path).startswith(f"{tmp_path / 'train.parquet'}: its metadata of huggingface cannot be read (")


@pytest.mark.parametrize("columns, reason", [
    ({"img": [{"bytes": b"x", "path": "x"}], "label": [0]}, "no column image of bytes and path (it has img: struct<"),
    ({"image": [b"x"], "label": [0]}, "no column image of bytes and path"),
    ({"image": [{"bytes": "x", "path": "x"}], "label": [0]}, "no column image of bytes and path"),
    ({"image": [{"bytes": b"x", "path": 1}], "label": [0]}, "no column image of bytes and path"),
    ({"image": [{"bytes": b"x"}], "label": [0]}, "no column image of bytes and path"),
    ({"image": [{"bytes": b"x", "path": "x"}], "label": ["cat"]}, "no column label of integers"),
    ({"image": [{"bytes": b"x", "path": "x"}], "a\nb": [0]}, "no column label of integers"),
])
def test_other_columns_are_named(tmp_path, columns, reason):
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    assert refusal(tmp_path).startswith(f"{tmp_path / 'train.parquet'}: has {reason}")


def test_columns_in_another_order_and_of_other_widths(tmp_path):
    image = pa.struct([("path", pa.large_string()), ("more", pa.int8()), ("bytes", pa.large_binary())])
    rows = train_rows()
    pq.write_table(pa.table({"label": pa.array([label for _, label in rows], pa.uint8()), "x": [0] * len(rows),
                             "image": pa.array([{"path": row[0], "bytes": image_of(row)} for row in rows], image)}),
                   tmp_path / "train.parquet")
    assert read(open_source(tmp_path), "train") == expected(rows)


def test_damaged_files_are_named(tmp_path):
    write_whole(tmp_path)
    file = tmp_path / "data" / "train-00001-of-00002.parquet"
    whole = file.read_bytes()
    source = open_source(tmp_path)
    for data in (b"", whole[:3], whole[:200], whole[:-1], whole[200:], b"PAR1" + bytes(500) + b"PAR1",
                 whole[:4] + b"\xff" * 600 + whole[604:]):
        file.write_bytes(data)
        assert refusal(tmp_path).startswith(f"{file}: truncated or damaged (")
        with pytest.raises(ValueError, match="truncated or damaged"):
            list(source.entries("train"))
    file.unlink()
    os.mkfifo(file)  # it would block
    with pytest.raises(ValueError, match="no plain file any more"):
        list(source.entries("train"))


def test_any_flipped_byte_is_survived(tmp_path):
    write(tmp_path / "train.parquet", train_rows(), class_label(NAMES), compression="none")
    whole, draw, damaged = (tmp_path / "train.parquet").read_bytes(), random.Random(1), 0
    for _ in range(300):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (tmp_path / "train.parquet").write_bytes(data)
        try:
            list(open_source(tmp_path).entries("train"))
        except ValueError as error:
            damaged += 1
            assert "\n" not in str(error)
    assert damaged > 20


def test_labels_that_change_after_opening_are_named(tmp_path):
    source = opened(tmp_path, train_rows())
    for row in ((None, 4), (None, None)):
        write(tmp_path / "train-0.parquet", [row])
        with pytest.raises(ValueError, match="its label is not what it was when the source was opened"):
            list(source.entries("train"))


def test_names_that_cannot_be_printed_stay_on_one_line(tmp_path):
    write(tmp_path / "train.parquet", [("a\nb", -1)])
    assert r"row 0, a\nb: has no label" in refusal(tmp_path)


def test_open_files_do_not_grow(tmp_path):
    source, before = open_source(write_whole(tmp_path)), open_descriptors()
    listing = source.entries("train")
    next(listing)
    listing.close()
    list(source.entries("train"))
    assert open_descriptors() == before


LISTING = """
import re, sys
from pathlib import Path
from pipeline.sources import open_source
def peak_kib():  # getrusage's begins with that of the parent
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
list(open_source(Path(sys.argv[1]) / "small").entries("train"))
before = peak_kib()
assert sum(1 for _ in open_source(Path(sys.argv[1]) / "large").entries("train")) == 400
print((peak_kib() - before) // 1024)
"""


def test_no_image_is_read_to_list_them(tmp_path):
    write(tmp_path / "small" / "train.parquet", train_rows())
    noise = os.urandom(1 << 18)
    images = pa.array([{"bytes": b"%03d" % row + noise, "path": ""} for row in range(400)], IMAGE)
    (tmp_path / "large").mkdir()
    pq.write_table(pa.table({"image": images, "label": [0] * 400}), tmp_path / "large" / "train.parquet",
                   compression="none", use_dictionary=False)
    done = subprocess.run([sys.executable, "-c", LISTING, tmp_path], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 10  # MiB; the images have 100
