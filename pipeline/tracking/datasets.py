"""What a training is made from, named by DVC's hashes."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def dataset_inputs(paths: Mapping[str, Path], root: Path) -> list[dict[str, Any]]:
    """A record per file or folder that a run was made from; its source is relative to the project's root.

    Args:
        paths: context (``training`` or the like) -> file or folder; what is not there is left out.
        root: the project's root.
    """
    return [
        {"name": path.name, "digest": dvc_digest(path), "source": os.path.relpath(path, root), "context": context}
        for context, path in paths.items()
        if path.exists()
    ]


def dvc_digest(path: Path) -> str:
    """The hash by which DVC knows a file or folder: 32 characters, 36 for a folder (MLflow's limit).

    Computed as DVC does rather than read from dvc.lock, which is behind when stages are run by hand.
    """
    if path.is_file():
        return _md5(path)
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    listed = [{"md5": _md5(file), "relpath": name} for name, file in sorted(files.items())]
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
