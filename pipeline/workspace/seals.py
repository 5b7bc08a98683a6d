"""Checksums that files carry: what this project wrote is known to be whole, and to be what it says, when it is read.

A seal is ``seal:`` and 64 hex digits somewhere in a file: a SHA-256 of the file's name and of those of all its blocks, these
digits taken as zeros. The name counts so that a file that stands in another's place is noticed. It is the last two parts of the
path: results may be moved with the folder that they are in.
"""

import hashlib
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.workspace.errors import UserError

MARK = b"seal:"
_DIGITS = 64
_BLOCK = 2**26
"""Bytes that are hashed by themselves."""
BLANK = MARK + b"0" * _DIGITS
"""What a file must hold once to be sealed."""


class DamagedError(UserError):
    """A file that is not as it was written; ``str()`` is one line that names it."""


def name_of(path: Path) -> str:
    """The name that a file is sealed with; that of a file that is being written is the one that it will have."""
    return "/".join(part.removesuffix(".partial") for part in path.absolute().parts[-2:])


def sealed(content: bytes, name: str) -> bytes:
    """The same with its ``BLANK`` filled in, or with another name's seal renewed."""
    place = content.rfind(MARK) + len(MARK)
    return content[:place] + _digest(content, place, name) + content[place + _DIGITS :]


def require_sealed(content: bytes | mmap.mmap, path: Path, name: str | None = None) -> None:
    """Refuse the content of a file that is not as it was sealed; ``name`` is the path's own unless it was another one.

    Raises:
        DamagedError: it is not, or it has no seal.
    """
    name, end = name_of(path) if name is None else name, len(content)
    found = content.rfind(MARK, 0, end)
    if found < 0:
        raise DamagedError(f"{path}: holds no checksum: cut off, or not written by this version of the code")
    while found >= 0:  # the first ones may be part of what is held
        place = found + len(MARK)
        if content[place : place + _DIGITS] == _digest(content, place, name):
            return
        found = content.rfind(MARK, 0, found)
    raise DamagedError(f"{path}: damaged, or another file in its place: it is not what its checksum was made of")


def seal_file(path: Path, name: str) -> None:
    """Put a seal behind the end of a file of any size whose format does not mind (checkpoints, shared libraries)."""
    with path.open("ab") as file:
        file.write(b"\n" + BLANK)
    with path.open("r+b") as whole, mmap.mmap(whole.fileno(), 0) as content:
        place = len(content) - _DIGITS
        content[place:] = _digest(content, place, name)


def require_sealed_file(path: Path, name: str) -> None:
    """Refuse a file of any size that is not as ``seal_file`` left it.

    Raises:
        DamagedError: it is not, or it cannot be read.
    """
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise DamagedError(f"{path}: empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                place = len(content) - _DIGITS
                if content[max(0, place - len(MARK)) : max(0, place)] != MARK:
                    raise DamagedError(
                        f"{path}: holds no checksum: cut off, or not written by this version of the code"
                    )
                require_sealed(content, path, name)
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read: {error.strerror}") from None


def _digest(content: bytes | mmap.mmap, place: int, name: str) -> bytes:
    """64 hex digits; those at ``place`` count as zeros."""
    with memoryview(content) as view:
        blocks = range(0, len(view), _BLOCK)
        if len(blocks) == 1:
            found = [_block(view, 0, place)]
        else:  # of a large model, in as many threads as there are cores
            with ThreadPoolExecutor() as threads:
                found = [*threads.map(lambda start: _block(view, start, place), blocks)]
    return hashlib.sha256(b"\0".join([os.fsencode(name), *found])).hexdigest().encode()


def _block(view: memoryview, start: int, place: int) -> bytes:
    """SHA-256 of a block, in which the digits at ``place`` count as zeros."""
    end = min(start + _BLOCK, len(view))
    first, last = (min(max(start, at), end) for at in (place, place + _DIGITS))
    hashed = hashlib.sha256()
    with view[start:first] as before, view[last:end] as behind:  # else a mapping could not be closed
        hashed.update(before)
        hashed.update(b"0" * (last - first))
        hashed.update(behind)
    return hashed.digest()
