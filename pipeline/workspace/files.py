"""Small output files with stable bytes, replaced at once, and locks on what several commands may write.

What is read back by this project carries a checksum: ``write_record`` and ``read_record``.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from filelock import FileLock, Timeout

from pipeline.workspace.errors import UserError, line_of
from pipeline.workspace.faults import writing
from pipeline.workspace.finite import require_finite
from pipeline.workspace.ours import require_removable
from pipeline.workspace.seals import BLANK, MARK, name_of, require_sealed, sealed
from pipeline.workspace.stopping import asked, stop_if_asked

CHECKSUM = "checksum"
"""Key of a record's seal."""


def write_json(path: Path, value: Any) -> None:
    """Sorted keys, one trailing newline; an existing file is replaced at once, or left as it was by a NumericsError."""
    _refuse_non_finite(str(path), value)
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file; one that is missing or not JSON is a UserError, and so is one with NaN or Infinity in it."""
    return _parsed(read_bytes(path), path)


def write_record(path: Path, values: Mapping[str, Any], later: Path | None = None) -> None:
    """As ``write_json``, with a checksum that ``read_record`` asks for; no key of ``values`` may be ``CHECKSUM``.

    ``later`` is where the file will be when it is read, if that is elsewhere.
    """
    _refuse_non_finite(str(path), values)
    text = json.dumps({**values, CHECKSUM: BLANK.decode()}, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_bytes(path, sealed(text.encode(), name_of(later or path)))


def read_record(path: Path) -> Any:
    """What ``write_record`` wrote there; of earlier versions' files, which have no checksum, whatever they hold.

    Raises:
        UserError: the file is missing; a DamagedError if it is not as it was written.
    """
    content = read_bytes(path)
    if never_sealed(content):
        return _parsed(content, path)
    require_sealed(content, path)
    found = _parsed(content, path)
    del found[CHECKSUM]
    return found


def never_sealed(content: bytes) -> bool:
    """Whether a record or table is of before there were checksums: two places that one damage cannot both have hit."""
    return CHECKSUM.encode() not in content and MARK not in content


def read_bytes(path: Path) -> bytes:
    """A file's content; one that is missing or cannot be read is a UserError."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_text(path: Path) -> str:
    """A text in UTF-8; a file that is missing or something else is a UserError."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: byte {error.start}") from None


def write_text(path: Path, text: str) -> None:
    """Write UTF-8; an existing file is replaced at once."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; an existing one is replaced at once."""
    with replacing(path) as partial:
        partial.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path for a new file or folder, which takes the place of what is at ``path`` once it is written, to the disk.

    Interrupted, what was there stays. A folder that has what was not made here stays, too, with a UserError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    old = path.with_name(path.name + ".old.partial")
    with writing(path):
        remove(partial)  # not what a link leads to
        yield partial
        for written in [partial, *(partial.rglob("*") if partial.is_dir() else ())]:
            flush(written)
        if path.is_symlink() or (path.is_file() and partial.is_dir()):
            path.unlink()
        elif path.is_dir():  # it goes at once, not file by file
            require_removable(path)
            shutil.rmtree(old, ignore_errors=True)
            path.replace(old)
        partial.replace(path)
        flush(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file or a folder."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _parsed(content: bytes, path: Path) -> Any:
    try:
        return json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {line_of(error)}") from None


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
