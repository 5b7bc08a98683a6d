"""What a folder holds, as a list of checksums in it."""

import hashlib
from pathlib import Path

from pipeline.workspace.files import write_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """List all files of a folder."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    write_json(folder / MANIFEST, {"files": {name: _sha256(path) for name, path in files.items() if name != MANIFEST}})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
