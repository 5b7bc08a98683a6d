"""What is made stays in the project's root, and nothing is deleted there that was not made here."""

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.workspace.errors import UserError

LISTED = "manifest.json"
"""A folder's list of what was put there."""
CACHE = Path(".cache")
"""In the root; all that is in there was made here, and may be deleted."""
ALLOW = "overwrite_outside_root"


def require_inside(root: Path, places: Iterable[Path], folders: Iterable[Path], params: str) -> None:
    """Refuse places and folders that are not in the root, and folders from which a link to another one leads out of it.

    Raises:
        UserError: a line names the folder or link, where it leads, and the setting that allows it.
    """
    inside = Path(os.path.realpath(root))
    met: set[str] = set()
    for place in itertools.chain(places, *((folder, *_links(folder, met)) for folder in folders)):
        target = Path(os.path.realpath(place))
        if not target.is_relative_to(inside):
            raise UserError(
                f"{place}: leads out of the root, to {target}, where things would be overwritten and deleted; allowed: a "
                f"folder in the root, or {ALLOW}: true in {params}"
            )


def require_ours(folder: Path) -> None:
    """Refuse to delete a folder that holds a file which no list in it has, with its name.

    Of a folder that is there all at once when it is complete (``replacing``), the list is in it or in folders in it.

    Raises:
        UserError: there is such a file.
    """
    for strange in _unlisted(folder):
        raise UserError(
            f"{strange}: was not made here, and {folder} would be replaced with it; move it to another place"
        )


def require_removable(folder: Path) -> None:
    """As ``require_ours``; but in the cache everything was made here, listed or not.

    Raises:
        UserError: it holds something else.
    """
    if not folder.absolute().is_relative_to(CACHE.absolute()):
        require_ours(folder)


def _links(folder: Path, met: set[str]) -> Iterator[Path]:
    """Links to folders, or to nothing, at any depth; a link to a file is replaced by a file, and leads nobody."""
    here = os.path.realpath(folder)
    if here in met or not os.path.isdir(here):
        return
    met.add(here)
    with os.scandir(folder) as entries:
        for entry in entries:
            leads = entry.is_symlink() and not entry.is_file()
            if leads:
                yield Path(entry.path)
            if leads or entry.is_dir():
                yield from _links(Path(entry.path), met)


def _unlisted(folder: Path) -> Iterator[Path]:
    """Files, and links to folders, that neither a folder's own list nor one further up has."""
    listed: dict[Path, set[str]] = {}
    for place, folders, files in os.walk(folder):
        here = Path(place)
        listed[here] = {str(here / name) for name in _names(here / LISTED)} | listed.get(here.parent, set())
        for name in sorted([*files, *(name for name in folders if (here / name).is_symlink())]):
            if str(here / name) not in listed[here] and not (name == LISTED and listed[here]):
                yield here / name


def _names(file: Path) -> list[str]:
    """What a list has; of what is none, nothing."""
    try:
        found = json.loads(file.read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [str(name) for name in found] if isinstance(found, dict) else []
