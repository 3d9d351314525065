"""Shards are hashed before a run, and after a restart only where they have been touched."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launch.shard_check import check_shards
from pipeline import manifest as manifests
from pipeline.errors import DataError
from pipeline.manifest import load_manifest
from pipeline.shards import ShardImages


@pytest.fixture
def folder(shards, tmp_path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The names of the files that are hashed from now on."""
    names, sha256_of = [], manifests.sha256_of
    monkeypatch.setattr(manifests, "sha256_of", lambda path: names.append(path.name) or sha256_of(path))
    return names


def test_after_a_restart_only_what_was_touched_is_hashed(folder, hashed):
    manifest, _ = load_manifest(folder)
    names = [file.name for file in manifest.files()]
    known = check_shards(folder, manifest, {})
    assert hashed == names and known.keys() == set(names)
    hashed.clear()
    assert check_shards(folder, manifest, known) == known and hashed == []
    (folder / names[0]).touch()
    again = check_shards(folder, manifest, known)
    assert hashed == names[:1] and again != known
    hashed.clear()
    assert check_shards(folder, manifest, None) == {} and hashed == []  # --no-check


def test_a_file_that_was_touched_to_its_harm(folder):
    manifest, _ = load_manifest(folder)
    known = check_shards(folder, manifest, {})
    path = folder / manifest.files()[0].name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path.name}: its bytes have changed"):
        check_shards(folder, manifest, known)
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name}: No such file"):
        check_shards(folder, manifest, known)


@pytest.mark.parametrize("change, told", [
    (lambda path: path.touch(), "changed since it was opened"),
    (lambda path: shutil.copy(path, path.with_suffix(".new")) and path.with_suffix(".new").replace(path),
     "changed since it was opened"),
    (Path.unlink, "gone since it was opened"),
])  # fmt: skip
def test_open_shards_know_when_they_are_touched(folder, change, told):
    manifest, _ = load_manifest(folder)
    images = ShardImages(folder, manifest, "train")
    images.check_unchanged()
    change(folder / manifest.splits["train"].files[0].name)
    with pytest.raises(DataError, match=told):
        images.check_unchanged()
