"""WebDataset: the right label for every sample, and one clear line for whatever is wrong."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tars_on_the_spot import (
    DAMAGES,
    change,
    class_tar,
    numbered,
    open_descriptors,
    peak_bytes,
    read,
    refusal,
    refused,
    special,
    tar_of,
)

from pipeline.manifest import SynsetClass
from pipeline.sources import open_source
from pipeline.sources.reading import Reader, unpack
from pipeline.sources.webdataset import MEMBERS_LOOKED_AT
from pipeline.sources.words import LOC_SYNSET_MAPPING, SYNSET_WORDS

WNIDS = ["n01440764", "n01443537", "n02012849"]
WORDS = ["tench, Tinca tinca", "goldfish", ""]
WORDS_TEXT = b"n00000000 of no image\nn01440764 tench, Tinca tinca\nn01443537\tgoldfish\n\nno line\n"
Sample = tuple[str, int]  # key, number; the image's bytes are made from it


def members(samples: Sequence[Sample], extension: str = "jpg") -> list[tuple[str, bytes]]:
    """As the publishers write them: the order within a sample is that of the extensions."""
    return [member for key, number in samples for member in [
        (f"{key}.cls", f"{number}".encode()), (f"{key}.{extension}", f"image {key}".encode()), (f"{key}.json", b"{}")]]


def train_samples(wnids: Sequence[str] = WNIDS) -> list[Sample]:
    return [(f"{wnid}_{i}", label) for i in range(3) for label, wnid in enumerate(wnids)]


def unnamed(numbers: Sequence[int]) -> list[Sample]:
    return [(f"s{i:07d}", number) for i, number in enumerate(numbers)]


def write(folder: Path, **tars: Sequence[Sample]) -> Path:
    for name, samples in tars.items():
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.tar").write_bytes(tar_of(*members(samples)))
    return folder


def expected(samples: Sequence[Sample], extension: str = "jpg") -> list[tuple[str, int, bytes]]:
    return [(f"{key}.{extension}", number, f"image {key}".encode()) for key, number in samples]


def test_every_sample_is_listed_and_read(tmp_path):
    train, val = train_samples(), [(f"a/ILSVRC2012_val_{i:08d}_{wnid}", i) for i, wnid in enumerate(WNIDS)]
    write(tmp_path, **{"imagenet-train-0": train[:4], "imagenet-train-1": train[4:], "imagenet-validation-0": val})
    (tmp_path / SYNSET_WORDS).write_bytes(WORDS_TEXT)
    (tmp_path / "_info.json").write_bytes(b"{}")
    source = open_source(tmp_path)
    assert (source.layout, source.splits, source.root) == ("webdataset", ("train", "val"), tmp_path)
    assert source.classes == [SynsetClass(*pair) for pair in zip(WNIDS, WORDS)] and source.missing == ()
    for _ in range(2):  # it can be listed again
        assert read(source, "train") == expected(train) and read(source, "val") == expected(val)
    assert [path.name for path in source.archives] == [
        "imagenet-train-0.tar", "imagenet-train-1.tar", "imagenet-validation-0.tar", SYNSET_WORDS]
    entries = list(source.entries("train"))
    assert [entry.archive[-5] for entry in entries] == list("0000" "11111")
    assert {entry.block for entry in entries} == {-1}
    with tarfile.open(tmp_path / "imagenet-train-0.tar") as tar:
        assert [(e.member, e.offset, e.size) for e in entries[:4]] == [
            (m.name, m.offset_data, m.size) for m in tar if m.name.endswith("jpg")]


@pytest.mark.parametrize("train, val, test", [
    ("train", "val", "test"), ("00000", "x_valid-0", "x_test"), ("train/0", "validation/0", "test/train-0"),
])
def test_tars_belong_to_the_split_that_they_name(tmp_path, train, val, test):
    samples = {"train": train_samples(), "val": train_samples()[:3], "test": train_samples()[3:5]}
    for split, name in zip(samples, (train, val, test)):
        write((tmp_path / name).parent, **{(tmp_path / name).name: samples[split]})
    source = open_source(tmp_path)
    assert source.splits == ("train", "val", "test")
    for split in samples:
        assert read(source, split) == expected(samples[split])


def test_compressed_tars(tmp_path):
    data = tar_of(*members(train_samples()))
    (tmp_path / "train-0.tar.gz").write_bytes(gzip.compress(data))
    source = open_source(tmp_path)
    unpack(tmp_path / "train-0.tar.gz", tmp_path / "copy")
    entries = list(source.entries("train"))
    images = Reader(tmp_path, {"train-0.tar.gz": tmp_path / "copy"}).read(entries)
    assert [(e.member, e.label, image) for e, image in zip(entries, images)] == expected(train_samples())


@pytest.mark.parametrize("extension", ["jpeg", "JPG", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm"])
def test_every_kind_of_image(tmp_path, extension):
    (tmp_path / "a.tar").write_bytes(tar_of(*members(train_samples(), extension)))
    assert read(open_source(tmp_path), "train") == expected(train_samples(), extension)


def test_what_belongs_to_no_sample_is_passed_over(tmp_path):
    others = [("readme", b"x"), ("a.txt", b"x"), ("._n01440764_0.jpg", b"x"), ("d/.jpg", b"x"), ("m.seg.png", b"x"),
              special("d.jpg", tarfile.DIRTYPE)]
    odd = [("v1.0/a.jpg", b"image v1.0/a"), ("v1.0/a.meta.txt", b"x"), ("v1.0/a.CLS", b" 1\n")]
    (tmp_path / "a.tar").write_bytes(tar_of(*others, *members(train_samples()), *odd, *others))
    assert read(open_source(tmp_path), "train") == expected([*train_samples(), ("v1.0/a", 1)])


def test_classes_are_sorted_by_wnid_whatever_their_numbers(tmp_path):
    samples = [(key, 2 - number) for key, number in train_samples()]
    source = open_source(write(tmp_path, train=samples))
    assert [c.wnid for c in source.classes] == WNIDS
    assert read(source, "train") == expected(train_samples())


def test_classes_without_wnids_keep_their_order(tmp_path):
    samples = unnamed([3, 0, 3, 10])
    write(tmp_path, a=samples)
    assert open_source(tmp_path).classes == [SynsetClass(f"{number:04d}", "") for number in range(11)]
    names = [f"name {number}" for number in range(12)]
    (tmp_path / "classnames.txt").write_text("\n".join(names) + "\n\n")
    source = open_source(tmp_path)
    assert source.classes == [SynsetClass(f"{number:04d}", name) for number, name in enumerate(names)]
    assert read(source, "train") == expected(samples) and source.archives[-1].name == "classnames.txt"
    (tmp_path / "classnames.txt").write_text("\n".join(names[:10]))
    assert "its label is 10, which is none of 0 to 9, those that classnames.txt names" in refusal(tmp_path)


@pytest.mark.parametrize("lines, wnids", [
    (WNIDS, WNIDS), (WNIDS[::-1], WNIDS), (WNIDS[:2], ["0000", "0001", "0002"]),
    ([*WNIDS, "n09999999"], ["0000", "0001", "0002"]),  # of a longer list, it is not known which these are
])
def test_a_list_of_as_many_wnids_as_classes_names_them(tmp_path, lines, wnids):
    samples = unnamed([0, 1, 2])
    (tmp_path / SYNSET_WORDS).write_text("".join(f"{wnid} words of {wnid}\n" for wnid in lines))
    source = open_source(write(tmp_path, a=samples))
    words = [f"words of {wnid}" if wnid[0] == "n" else "" for wnid in wnids]
    assert source.classes == [SynsetClass(*pair) for pair in zip(wnids, words)]
    order = [2, 1, 0] if lines == WNIDS[::-1] else [0, 1, 2]
    assert [entry.label for entry in source.entries("train")] == order


@pytest.mark.parametrize("name", [SYNSET_WORDS, LOC_SYNSET_MAPPING])
def test_lists_of_words(tmp_path, name):
    (write(tmp_path, train=train_samples()) / name).write_bytes(b"\xef\xbb\xbf" + WORDS_TEXT)
    (tmp_path / "classnames.txt").write_text("a list of words goes before\n")
    source = open_source(tmp_path)
    assert [c.words for c in source.classes] == WORDS and source.archives[-1] == tmp_path / name


@pytest.mark.parametrize("name, lines, reason", [
    (SYNSET_WORDS, b"n01440764 t\xffnch\n", "line 1 is not UTF-8"),
    (SYNSET_WORDS, b"n01440764 tench\n\nn01440764 crane\n", "line 3 names n01440764 again"),
    (SYNSET_WORDS, b"n01440764\n", "line 1 names no words after n01440764"),
    (SYNSET_WORDS, b"x" * (1 << 17), "line 1 is too long"),
    ("classnames.txt", b"tench\ng\xff\n", "line 2 is not UTF-8"),
    ("classnames.txt", b"tench\n \ngoldfish\ncrane\n", "line 2 is blank, but each names a class"),
    ("imagenet_classes.txt", b"\ntench\ngoldfish\ncrane\n", "line 1 is blank, but each names a class"),
])
def test_damaged_lists_of_classes_are_named(tmp_path, name, lines, reason):
    (write(tmp_path, train=train_samples()) / name).write_bytes(lines)
    assert refusal(tmp_path).startswith(f"{tmp_path / name}: {reason}")


def test_names_of_classes_end_where_their_lines_end(tmp_path):
    names = ["tench\u2028Tinca", "goldfish\x0b", "crane \x85x"]  # str.splitlines would make six of them
    text = "\ufeff" + "\r\n".join(names) + "\n\n"
    (write(tmp_path, train=train_samples()) / "classnames.txt").write_bytes(text.encode())
    assert [c.words for c in open_source(tmp_path).classes] == ["tench\u2028Tinca", "goldfish", "crane \x85x"]


def test_test_images_without_labels_are_left_out(tmp_path):
    write(tmp_path, train=train_samples(), test=unnamed([-1, -1]))
    source = open_source(tmp_path)
    assert source.splits == ("train",) and source.missing == ("the test images' classes: they are left out",)
    write(tmp_path, test=unnamed([-1, 0]))
    assert f"{tmp_path / 'test.tar'}, s0000000.jpg: has no label" in refusal(tmp_path)


def test_links_and_what_leads_out_are_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of(
        *members(train_samples()), special("a.jpg", tarfile.SYMTYPE, "/etc/passwd"), ("a.cls", b"1"),
        special("b.jpg", tarfile.LNKTYPE, "n01440764_0.jpg"), ("../c.jpg", b"x"),
        special("d.json", tarfile.SYMTYPE, "x"),
    ))
    source = open_source(tmp_path)
    assert refused(source, "train") == [("a.jpg", 1, "a link, not a file"), ("b.jpg", -1, "a link, not a file"),
                                        ("../c.jpg", -1, "its name leads out of the archive")]
    assert read(source, "train") == expected(train_samples())


IMAGE, LABEL = ("x/k.jpg", b"x"), ("x/k.cls", b"1")


@pytest.mark.parametrize("bad, reason", [
    ([IMAGE], "has an image, but no .cls next to it"), ([LABEL], "has a .cls, but no image next to it"),
    ([IMAGE, ("between.json", b""), LABEL], "has an image, but no .cls next to it"),
    ([LABEL, ("x/k.json", b"")], "has a .cls, but no image next to it"),
    ([IMAGE, LABEL, ("x/k.png", b"x")], "has two images"), ([IMAGE, LABEL, IMAGE, LABEL], "has two images"),
    ([IMAGE, LABEL, LABEL], "has two .cls"),
    *(([IMAGE, ("x/k.cls", text)], "its .cls is not the number of a class") for text in (
        b"", b"cat", b"1.0", b"1 2", b"+1", b"\xb2", "\u0663".encode(), b"0x1", b"1" * 65, b"1" * 19)),
    ([IMAGE, special("x/k.cls", tarfile.SYMTYPE, "x")], "its .cls is not the number of a class"),
])
@pytest.mark.parametrize("more", [[], members(unnamed([0]))])
def test_samples_that_are_not_whole_are_named(tmp_path, bad, reason, more):
    (tmp_path / "a.tar").write_bytes(tar_of(*members(train_samples()), *bad, *more))
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / 'a.tar'}: x/k: ") and reason in message


@pytest.mark.parametrize("bad, reason", [
    ([("s", -1)], "s.jpg: has no label"), ([("s", -2)], "s.jpg: its label is -2, which is none of 0 to 999999"),
    ([("s", 10**17)], "s.jpg: its label is 1"),
    ([(f"{WNIDS[0]}_9", 1)], f"is of {WNIDS[0]} by its name and has label 1, but before, label 1 was {WNIDS[1]}"),
    ([("n09999999_9", 1)], f"but before, label 1 was {WNIDS[1]}"),
    ([(f"a/{WNIDS[0]}_9", 3)], f"a/{WNIDS[0]}_9.jpg: is of {WNIDS[0]} by its name and has label 3, but before, "
                               f"{WNIDS[0]} had label 0"),
])
def test_labels_that_contradict_are_named(tmp_path, bad, reason):
    message = refusal(write(tmp_path, a=[*train_samples(), *bad]))
    assert message.startswith(f"{tmp_path / 'a.tar'}, ") and reason in message


def test_validation_images_are_of_the_classes_of_training(tmp_path):
    assert "its label is 3, which is none of 0 to 2, those of the training images" in refusal(
        write(tmp_path, train=unnamed([0, 1, 2]), val=unnamed([0, 3])))
    write(tmp_path, val=unnamed([0]))
    (tmp_path / "train.tar").unlink()
    assert "holds no training image" in refusal(tmp_path)


def not_samples(folder: Path) -> None:
    (folder / "images.tar").write_bytes(tar_of(*numbered("a", range(9))))
    (folder / "labels.tar").write_bytes(tar_of(("a.cls", b"1")))


def samples_far_behind(folder: Path) -> None:
    (folder / "a.tar").write_bytes(tar_of(*numbered("a", range(MEMBERS_LOOKED_AT)), *members(train_samples())))


def folder_of_that_name(folder: Path) -> None:
    (folder / "a.tar").mkdir()


@pytest.mark.parametrize("make", [not_samples, samples_far_behind, folder_of_that_name])
def test_other_tars_do_not_match(tmp_path, make: Callable[[Path], None]):
    make(tmp_path)
    assert "not a known layout" in refusal(tmp_path)


def test_class_tars_are_no_samples(tmp_path):
    for name, data in map(class_tar, ("n00000001", "n00000002")):
        (tmp_path / name).write_bytes(data)
    assert open_source(tmp_path).layout == "synset-tars"


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("compressed", [False, True])
def test_damage_is_named(tmp_path, damage, compressed):
    path = tmp_path / ("b.tgz" if compressed else "b.tar")
    data = damage(tar_of(*members(train_samples())))
    path.write_bytes(gzip.compress(data) if compressed else data)
    assert refusal(tmp_path).startswith(f"{path}: truncated or damaged (")
    write(tmp_path, a=train_samples())
    assert refusal(tmp_path).startswith(f"{path}: truncated or damaged (")


def test_damage_after_opening_is_named(tmp_path):
    write(tmp_path, a=train_samples())
    source = open_source(tmp_path)
    for damage in DAMAGES.values():
        write(tmp_path, a=train_samples())
        change(tmp_path / "a.tar", damage)
        with pytest.raises(ValueError, match="a.tar: truncated or damaged"):
            list(source.entries("train"))
    write(tmp_path, a=unnamed([7]))
    with pytest.raises(ValueError, match="its label is not what it was when the source was opened"):
        list(source.entries("train"))


def test_names_that_cannot_be_printed_stay_on_one_line(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of(*members(train_samples()), ("a\nb\udcff.cls", b"1")))
    assert r"a\nb\udcff: has a .cls" in refusal(tmp_path)


def test_memory_and_open_files_do_not_grow(tmp_path):
    write(tmp_path, a=[(f"n01440764_{i}", 0) for i in range(3000)])
    before = open_descriptors()
    source, peak = peak_bytes(lambda: open_source(tmp_path))
    count, peak_of_listing = peak_bytes(lambda: sum(1 for _ in source.entries("train")))
    assert count == 3000 and max(peak, peak_of_listing) < 1 << 18 and open_descriptors() == before
