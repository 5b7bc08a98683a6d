"""SHA-256 of files and folders; a large file is read once while it is untouched."""

import hashlib
import os
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.workspace.errors import UserError
from pipeline.workspace.files import lock, read_json, read_record, write_record
from pipeline.workspace.layout import Cache

LARGE = 2**20
"""Bytes from which a file's hash is kept in ``KNOWN`` and used again while the file is untouched."""
KNOWN = Cache().hashes
TICK = 2 * 10**9
"""Nanoseconds within which a file may be written twice and show the same times."""


def file_hash(path: Path, algorithm: Literal["sha256", "md5"] = "sha256") -> str:
    """SHA-256 of a file, or the hash by which DVC knows it; one that cannot be read is a UserError."""
    try:
        stamp = stamp_of(path)
        if stamp.size < LARGE:
            return hashlib.new(algorithm, path.read_bytes(), usedforsecurity=False).hexdigest()
        place, known = f"{'' if algorithm == 'sha256' else 'md5:'}{path.resolve()}", _known()
        if known.get(place, [None])[:-1] == [*stamp]:
            return str(known[place][-1])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
        # A file that has just been written could be written again within the same tick of its clock.
        if stamp_of(path) == stamp and time.time_ns() - max(stamp.modified, stamp.changed) > TICK:
            with lock(KNOWN.with_suffix(".lock")):
                write_record(KNOWN, {"files": {**_known(), place: [*stamp, digest]}})
        return digest
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


class Stamp(NamedTuple):
    """Size, times and inode of a file. A write changes one of them: whoever sets ``modified`` back moves ``changed``."""

    size: int
    modified: int
    changed: int
    inode: int


def stamp_of(path: Path) -> Stamp:
    """The stamp of a file now."""
    status = path.stat()
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _known() -> dict[str, list[Any]]:
    """Hashes by file, with the stamps that they were made at; none if what is kept is damaged."""
    try:
        found: dict[str, list[Any]] = read_record(KNOWN)["files"]
        return found
    except (UserError, KeyError, TypeError):
        return {}


def tree_hashes(path: Path) -> dict[str, str]:
    """Hashes of a file (named ``.``) or of all files of a folder, by their names in it; links count as what they lead to."""
    if path.is_file():
        return {".": file_hash(path)}
    found = {}
    for folder, folders, files in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            file = Path(folder, name)
            found[file.relative_to(path).as_posix()] = file_hash(file)
    return found


def holds(folder: Path, manifest: Path) -> bool:
    """Whether a folder holds byte by byte what a manifest says, a file of its ``tree_hashes``, and nothing else."""
    try:
        return bool(read_json(manifest) == tree_hashes(folder))
    except UserError:
        return False
