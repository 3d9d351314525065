"""Where a run is to be written, and the shards that it is to read."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from launch.doctor.finding import NOTE, OK, WRONG, Finding, gib

CHECKPOINTS = 5  # three are kept, one is being written, and the log grows
BYTES_A_PARAMETER = 8  # float32, and as much for its momentum


def run(path: Path) -> Finding:
    """Nothing is left there, nor is RUN made."""
    from launch.run_folder import RunFolder
    from model.recipe import NOTES
    from model.tower import whole_shapes

    folder = RunFolder(path.absolute())
    there = next(place for place in (folder.path, *folder.path.parents) if os.path.exists(place))
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Finding(WRONG, f"{there}: cannot be written ({error.strerror})", "mend that, or name another folder")
    if not folder.is_there():
        folder.check_new()
    elif folder.in_use():
        return Finding(NOTE, f"{path}: another process trains there", "wait for it, or name another folder")
    parameters = sum(shape.numel() for shape in whole_shapes(NOTES, 1000).values())
    finding = judge_room(free, CHECKPOINTS * BYTES_A_PARAMETER * parameters)
    begun = ", holds a run that --resume goes on with" if folder.is_there() else ""
    return Finding(finding.state, f"{path}: {finding.found}{begun}", finding.mend)


def judge_room(free: int, needed: int) -> Finding:
    """In bytes."""
    if free < needed:
        return Finding(WRONG, f"{gib(free)} free; {CHECKPOINTS} checkpoints of recipe `notes` take {gib(needed)}",
                       "free some, or name another folder; `tiny` takes a thirteenth of it")
    return Finding(OK, f"can be written, {gib(free)} free")


def shards(location: str, thorough: bool) -> Finding:
    """The manifest, and that every file is there, as long as it was and readable; `thorough`: open them, too, and
    look at places in object stores. DataError for what is wrong."""
    from pipeline.manifest import FILE_NAME, check_files, load_manifest, parse_manifest
    from pipeline.storage import LocalStorage, open_storage

    storage = open_storage(location)
    if isinstance(storage, LocalStorage):
        manifest, _ = load_manifest(storage.folder)
        check_files(storage.folder, manifest.files(), hashes=False)
        for file in manifest.files():
            if not os.access(path := storage.folder / file.name, os.R_OK):
                return Finding(WRONG, f"{path}: may not be read", f"chmod a+r {path}, or train as its owner")
        if thorough:
            from pipeline.shards import ShardImages
            from pipeline.verify import check_mean

            check_mean(storage.folder / manifest.mean.name)
            for split in manifest.splits:
                ShardImages(storage.folder, manifest, split)
    elif thorough:
        from pipeline.verify import verify_place

        try:
            raw = storage.read(FILE_NAME)
        except OSError as error:
            return Finding(WRONG, f"{storage.location}: no manifest can be read there ({error.strerror or error})",
                           "check address and credentials, or make the shards with `alexnet preprocess SOURCE OUT`")
        manifest = parse_manifest(raw, f"{storage.location}: {FILE_NAME}")
        verify_place(storage, manifest)
    else:
        return Finding(NOTE, f"{storage.location}: not looked at", "leave out --quick")
    splits = ", ".join(f"{split.images:,} {name}" for name, split in manifest.splits.items())
    return Finding(OK, f"{location}: {splits} images of {len(manifest.classes):,} classes, "
                       f"{gib(sum(file.bytes for file in manifest.files()))} in {len(manifest.files())} files")
