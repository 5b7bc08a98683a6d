"""What DVC keeps is what it was: DVC itself takes a read-only object of its cache as it is, even in a fresh result's place."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.sources.hashes import file_hash
from pipeline.workspace.errors import UserError, warn
from pipeline.workspace.files import remove
from pipeline.workspace.yaml_files import LARGEST_LOCK, read_yaml

OBJECTS = Path(".dvc/cache/files/md5")
"""Where they are unless DVC is told otherwise; elsewhere nothing is looked at."""


def drop_damaged(noted: Path) -> None:
    """Remove cached objects that a dvc.lock names and that are damaged, with a line for each; what they held is made again."""
    if not (noted.exists() and OBJECTS.is_dir()):
        return
    for name in dict.fromkeys(_named(_stages(noted))):
        held = OBJECTS / name[:2] / name[2:]
        if held.exists() and _md5(held) != name.partition(".")[0]:
            warn(f"{held}: damaged: removed from DVC's cache, and what it held is made again where it is needed")
            remove(held)


def _stages(noted: Path) -> dict[str, Any]:
    try:
        found = read_yaml(noted, LARGEST_LOCK)
    except UserError:
        return {}  # DVC says so itself
    stages = found.get("stages") if isinstance(found, dict) else None
    return stages if isinstance(stages, dict) else {}


def _named(stages: dict[str, Any]) -> Iterator[str]:
    """MD5 of every output and, of folders, of what is in them; a folder's own ends in ``.dir``."""
    for stage in stages.values():
        for out in stage.get("outs", ()):
            name = str(out.get("md5", ""))
            yield from [name] if name else []
            if name.endswith(".dir"):
                try:
                    listed = json.loads((OBJECTS / name[:2] / name[2:]).read_bytes())
                    yield from (str(entry["md5"]) for entry in listed)
                except (OSError, ValueError, KeyError, TypeError):
                    continue


def _md5(held: Path) -> str | None:
    try:
        return file_hash(held, "md5")
    except UserError:
        return None
