"""Small output files with stable bytes, replaced at once, and locks on what several commands may write."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from filelock import FileLock, Timeout

from pipeline.workspace.errors import UserError
from pipeline.workspace.faults import writing
from pipeline.workspace.finite import require_finite
from pipeline.workspace.ours import require_removable
from pipeline.workspace.stopping import asked, stop_if_asked


def write_json(path: Path, value: Any) -> None:
    """Sorted keys, one trailing newline; an existing file is replaced at once, or left as it was by a NumericsError."""
    _refuse_non_finite(str(path), value)
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file; one that is missing or not JSON is a UserError, and so is one with NaN or Infinity in it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Write UTF-8; an existing file is replaced at once."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path for a new file or folder, which takes the place of what is at ``path`` once it is written.

    Interrupted, what was there stays. A folder that has what was not made here stays, too, with a UserError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    old = path.with_name(path.name + ".old.partial")
    with writing(path):
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial)
        else:  # what is written must not go where a link leads
            partial.unlink(missing_ok=True)
        yield partial
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():  # it goes at once, not file by file
            require_removable(path)
            shutil.rmtree(old, ignore_errors=True)
            path.replace(old)
        partial.replace(path)
        shutil.rmtree(old, ignore_errors=True)


def drop_unfinished_line(file: BinaryIO) -> None:
    """Remove what a killed process has left of a last line; the file is open for reading and writing."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
    if file.read(1) not in (b"", b"\n"):
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")


def _refuse_non_finite(name: str, value: Any) -> None:
    if isinstance(value, float):
        require_finite(name, value)
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_non_finite(f"{name}: {key}", part)


@contextmanager
def lock(path: Path, wait: bool = True, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock that other processes see; it ends with the process at the latest, and those it forks do not have it.

    ``path`` is a file that is made for the lock, and stays; ``waiting`` is called once, if somebody has it.

    Raises:
        Stopped: this process was asked to stop while it waited.
        filelock.Timeout: another process has it, and ``wait`` is off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(path)
    try:
        held.acquire(blocking=False)
    except Timeout:
        if not wait:
            raise
        waiting()
        try:
            held.acquire(cancel_check=asked)
        except Timeout:
            stop_if_asked()
            raise
    try:
        yield
    finally:
        held.release()
