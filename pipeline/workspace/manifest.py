"""What a folder holds, as a list of checksums in it: for files of formats that hold none themselves, as weights do."""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from pipeline.workspace.errors import UserError
from pipeline.workspace.files import read_record, read_text, write_record
from pipeline.workspace.seals import DamagedError, name_of

MANIFEST = "manifest.json"


def write_manifest(folder: Path, beside: Iterable[Path] = (), later: Path | None = None) -> None:
    """List all files of a folder, and those ``beside`` it; the list knows the folder's name, or ``later`` one."""
    files = [*_files(folder), *(os.path.relpath(path, folder) for path in beside)]
    _write(folder, later or folder, {name: file_sha256(folder / name) for name in sorted(files)})


def require_whole(folder: Path, moved: bool = False) -> dict[str, str]:
    """Refuse a folder whose files are not those that its manifest lists, or that is another one's, unless it was ``moved``.

    Returns:
        SHA-256 of each file.

    Raises:
        DamagedError: one file is named.
    """
    listed = _listed(folder, moved)
    own = {name for name in listed if not name.startswith("..")}
    if unlike := sorted(own.symmetric_difference(_files(folder))):
        what = "missing" if unlike[0] in own else f"not one of those that {MANIFEST} lists"
        raise DamagedError(f"{folder / unlike[0]}: {what}")
    for name in listed:
        _require(folder, name, listed)
    return listed


def listed_text(folder: Path, path: Path) -> str:
    """A text in UTF-8 that is as a folder's manifest lists it.

    Raises:
        UserError: it is missing; a DamagedError if it is not as it was written.
    """
    require_listed(folder, path)
    return read_text(path)


def require_listed(folder: Path, path: Path) -> None:
    """Refuse a file that is not as a folder's manifest lists it; one without a manifest is taken as it is.

    Raises:
        DamagedError: it is not.
    """
    if (folder / MANIFEST).exists():
        _require(folder, os.path.relpath(path, folder), _listed(folder, True))


def copy_whole(source: Path, target: Path) -> None:
    """Copy a folder to a new one, whose manifest is its own; without a manifest it is copied as it is.

    Raises:
        DamagedError: the source is not as it was written.
    """
    if not (source / MANIFEST).exists():
        shutil.copytree(source, target)
        return
    listed = require_whole(source, moved=True)
    shutil.copytree(source, target)
    _write(target, target, listed)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _write(folder: Path, later: Path, listed: dict[str, str]) -> None:
    write_record(folder / MANIFEST, {"folder": name_of(later), "files": listed}, later / MANIFEST)


def _files(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if not path.is_dir())
    return [name for path in found if (name := path.relative_to(folder).as_posix()) != MANIFEST]


def _listed(folder: Path, moved: bool) -> dict[str, str]:
    record = read_record(folder / MANIFEST)
    if not moved and record["folder"] != name_of(folder):
        raise DamagedError(f"{folder}: another one in its place: {MANIFEST} is that of {record['folder']}")
    listed: dict[str, str] = record["files"]
    return listed


def _require(folder: Path, name: str, listed: dict[str, str]) -> None:
    if listed.get(name) != file_sha256(folder / name):
        raise DamagedError(f"{os.path.normpath(folder / name)}: damaged: it is not what {folder / MANIFEST} lists")
