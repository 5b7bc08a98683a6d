"""What a machine does not give: room on a disk, a folder that may be written to, more files or processes; in one line."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.workspace.errors import fitted

KINDS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room there"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "let this user write there"),
    errno.EFBIG: "the limit is that of `ulimit -f`",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "the limit is that of `ulimit -n`"),
    errno.EAGAIN: "the limit is that of `ulimit -u`",
    errno.ENOMEM: "lower workers, or give it more memory",
    **dict.fromkeys((errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE), "look after the disk"),
    errno.EPIPE: "somebody has stopped reading",
}
"""Faults that libraries wrap in errors of their own, and what helps."""
PLACES = {
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG), "move away what is there"
    ),
    **dict.fromkeys((errno.ENOTEMPTY, errno.EBUSY, errno.ETXTBSY), "end what uses it"),
}
"""Further ones, of a path; anything else is a mistake in the code."""
_CODE = re.compile(r"\b(?:os error|errno:?) (\d+)", re.IGNORECASE)
_WORDS = {
    "database or disk is full": errno.ENOSPC,
    "readonly database": errno.EROFS,
    "disk I/O error": errno.EIO,
    "unable to open database file": errno.EACCES,
    "can't start new thread": errno.EAGAIN,
    "PytorchStreamWriter failed writing": errno.EIO,
    "file write failed": errno.EIO,
    "not enough memory": errno.ENOMEM,
    "can't allocate memory": errno.ENOMEM,
} | {os.strerror(code): code for code in KINDS}
"""What libraries say that leave the number out."""
_NOTE = "while writing "


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Note on whatever is raised what was being written: libraries and the system often leave that out."""
    try:
        yield
    except Exception as error:
        if not any(note.startswith(_NOTE) for note in getattr(error, "__notes__", ())):
            error.add_note(f"{_NOTE}{path}")
        raise


def fault_line(error: BaseException) -> str | None:
    """A fault of the machine in a line: the path, what is the matter, the free space there and what helps.

    None of everything else. Also what a library has made of the fault, and what another process has reported, is looked at.
    """
    found = next(((code, one) for one in _chain(error) if (code := _code(one)) is not None), None)
    if found is None:
        return None
    code, raised = found
    named = getattr(raised, "filename", None)
    noted = [n.removeprefix(_NOTE) for e in _chain(error) for n in getattr(e, "__notes__", ()) if n.startswith(_NOTE)]
    named = os.fsdecode(named) if isinstance(named, str | bytes) else None
    path = named or next(iter(noted), None)
    where = f"{path or Path.cwd()}: "
    helps = (KINDS | PLACES)[code]
    return fitted(f"{where}{os.strerror(code)} ({_free(path)}); {helps}, and run the same command again to go on")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, what it was raised from, and what was handled when it was raised."""
    met: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop(0)
        if one is not None and id(one) not in met:
            met.add(id(one))
            yield one
            waiting += [one.__cause__, None if one.__suppress_context__ else one.__context__]


def _code(error: BaseException) -> int | None:
    """The kind of fault that an exception is, or that its words say it was."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in KINDS | PLACES else None
    said = str(error)
    numbers = [int(number) for number in _CODE.findall(said) if int(number) in KINDS]
    return next(iter(numbers), None) or next((code for words, code in _WORDS.items() if words in said), None)


def _free(path: str | None) -> str:
    """The free space of the disk that a path is on, or is to be on."""
    place = Path(path or ".").absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
        inodes = os.statvfs(place)
    except OSError:
        return "free space unknown"
    none = ", and no room for another file" if inodes.f_files and not inodes.f_favail else ""
    return f"{free / 1e6:,.1f} MB free{none}"
