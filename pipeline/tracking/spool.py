"""A run's records on disk, in order, until a tracking store has them: nothing is lost while the store is away.

A record is a line with a ``kind``; ``remote.py`` says which there are and what becomes of them. Timestamps are in the
records, so that a record that is sent twice is the same one to the store. What of a spool cannot be read is set aside: the
file is kept under another name, and all records that are whole go on in a new one.
"""

import itertools
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout

from pipeline.tracking.records import DamagedError, Record, lines_of, record_of, whole_but_its_end
from pipeline.workspace.errors import UserError
from pipeline.workspace.faults import writing
from pipeline.workspace.files import drop_unfinished_line, lock, replacing, write_json
from pipeline.workspace.layout import Cache


class SpoolError(UserError):
    """A spool cannot be read or written, nor set aside; ``str()`` is one line with its path."""


@dataclass(frozen=True)
class Sent:
    """How far a store is with a spool."""

    offset: int = 0
    """Bytes of the records that it has."""
    run_id: str | None = None
    """The run there."""

    @property
    def checksum(self) -> str:
        """Of both."""
        return f"{zlib.crc32(f'{self.offset} {self.run_id}'.encode()):08x}"


class Spool:
    """The records of one run, in a folder of its own. One process writes; others may send (``locked``).

    Args:
        folder: holds ``records.jsonl`` and ``sent.json``; need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records, self._sent = folder / "records.jsonl", folder / "sent.json"

    def append(self, *records: Record) -> None:
        """Add records at the end, after whatever a killed process has left there in one piece."""
        with self._writing(), writing(self._records), open(self._records, "ab+") as file:
            drop_unfinished_line(file)
            file.write(lines_of(records))

    def replace(self, records: Sequence[Record]) -> None:
        """Hold these records in place of all others, and none of them as sent; the run stays the same one."""
        with self.locked(), self._writing():
            self._hold(records)

    def read(self, offset: int = 0) -> list[tuple[int, Record]]:
        """Records from a byte on, each with the byte at which it ends; a line that was cut off by a kill is not one.

        Of a spool that is damaged, all whole records, none of which counts as sent any more.

        Raises:
            SpoolError: it cannot be read, and not be set aside.
        """
        try:
            return self._read(offset)
        except DamagedError:
            self.mend()
        return self._read(0)

    @property
    def records(self) -> list[Record]:
        """All records; the first says which run this is."""
        return [record for _, record in self.read()]

    @property
    def sent(self) -> Sent:
        """What the store has; nothing, if that cannot be read: to send it again changes nothing."""
        try:
            noted = json.loads(self._sent.read_text(encoding="utf-8"))
            found = Sent(noted["offset"], noted["run_id"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return Sent()
        known = type(found.offset) is int and found.offset >= 0 and isinstance(found.run_id, str | None)
        return found if known and noted.get("crc32", found.checksum) == found.checksum else Sent()

    def mark(self, offset: int, run_id: str | None) -> None:
        """Note what the store has."""
        sent = Sent(offset, run_id)
        with self._own():
            write_json(self._sent, {"offset": offset, "run_id": run_id, "crc32": sent.checksum})

    @property
    def waiting(self) -> bool:
        """Whether something has not been sent."""
        return bool(self.read(self.sent.offset))

    @property
    def cut_off(self) -> bool:
        """Whether the last line has no end: somebody is writing it, has been killed meanwhile, or the file is damaged."""
        try:
            with open(self._records, "rb") as file:
                return file.seek(0, os.SEEK_END) > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
        except OSError:  # which ``read`` finds, too
            return False

    def locked(self, wait: bool = True) -> AbstractContextManager[None]:
        """Keep other processes from sending these records at the same time.

        Raises:
            filelock.Timeout: another process has the lock, and ``wait`` is off.
            SpoolError: there can be no lock.
        """
        return self._lock("lock", wait)

    def mend(self) -> None:
        """Set a spool aside that is damaged, keep its whole records in a new one, and say so in a line on standard error.

        A line that was cut off at the end is damage, too, when nobody is writing it.

        Raises:
            SpoolError: it cannot be.
        """
        with self._writing():
            whole, damage = self._look()
            if damage is None:  # another process was faster
                return
            aside = next(name for name in _asides(self._records) if not name.exists() and not name.is_symlink())
            if whole:
                shutil.copy2(self._records, aside)
                self._hold(whole)
            else:
                self._records.rename(aside)
                if self._sent.is_dir():
                    shutil.rmtree(self._sent)
                self._sent.unlink(missing_ok=True)
        kept = f"{len(whole)} whole records are kept" if whole else "nothing of it can be sent"
        told(f"{self._records}: {damage}; set aside as {aside.name}, {kept}")

    def _hold(self, records: Sequence[Record]) -> None:
        with replacing(self._records) as partial:
            partial.write_bytes(lines_of(records))
            self.mark(0, self.sent.run_id)

    def _read(self, offset: int) -> list[tuple[int, Record]]:
        """See ``read``; raises DamagedError."""
        found = []
        for end, line in self._lines(offset):
            if line.endswith(b"\n"):
                found.append((end, record_of(line)))
            elif whole_but_its_end(line):
                raise DamagedError("its last line has no end")
        if not offset and found and found[0][1]["kind"] != "run":
            raise DamagedError("it does not begin with a run")
        return found

    def _look(self) -> tuple[list[Record], str | None]:
        """All records that are whole, if it can be told whose they are, and the first damage in words."""
        whole: list[Record] = []
        damage, number = None, 0
        try:
            for number, (_, line) in enumerate(self._lines(0), 1):
                try:
                    if not line.endswith(b"\n"):
                        raise DamagedError("cut off")
                    whole.append(record_of(line))
                except DamagedError as error:
                    damage = damage or f"line {number}: {error}"
            list(self._lines(self.sent.offset))
        except DamagedError as error:
            damage = damage or str(error)
        if whole and whole[0]["kind"] == "run":
            return whole, damage
        return [], damage or ("it does not begin with a run" if whole else None)

    def _lines(self, offset: int) -> Iterator[tuple[int, bytes]]:
        """Lines from a byte on, each with the byte at which it ends.

        Raises:
            DamagedError: it is no file, cannot be read, or no line begins there.
        """
        try:
            if not self._records.is_file():
                if self._records.exists() or self._records.is_symlink():
                    raise DamagedError("not a file")
                return
            with open(self._records, "rb") as file:
                file.seek(max(0, offset - 1))
                if offset and file.read(1) != b"\n":
                    raise DamagedError(f"shorter than the {offset} bytes of it that were sent, or another file")
                for line in file:
                    offset += len(line)
                    yield offset, line
        except OSError as error:
            raise DamagedError(f"cannot be read ({error.strerror})") from None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Keep other processes from writing; short, which sending is not."""
        with self._own():
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock("writing"), self._own():
            yield

    @contextmanager
    def _lock(self, name: str, wait: bool = True) -> Iterator[None]:
        with ExitStack() as held:
            with self._own():
                held.enter_context(lock(self.folder / name, wait))
            yield

    @contextmanager
    def _own(self) -> Iterator[None]:
        """Have what fails be told from what the store says."""
        try:
            yield
        except Timeout:
            raise
        except OSError as error:
            raise SpoolError(f"{error.filename or self.folder}: {error.strerror or error}") from None


def waiting(cache: Path) -> list[Spool]:
    """The spools under a cache folder that hold something unsent; what is damaged is set aside, or passed over."""
    found = []
    for spool in every_spool(cache):
        try:
            if spool.cut_off:
                spool.mend()
            if spool.waiting:
                found.append(spool)
        except SpoolError as error:
            told(f"{error}; passed over")
    return found


def every_spool(cache: Path) -> list[Spool]:
    """The spools under a cache folder."""
    trainings = Cache(cache).training("*").parent.glob("*/tracking/records.jsonl")
    files = sorted([*trainings, *Cache(cache).tracking.glob("**/records.jsonl")])
    return [Spool(file.parent) for file in files]


def forget(cache: Path) -> None:
    """Have all records count as unsent: the store that had them is another one now."""
    for spool in every_spool(cache):
        try:
            spool.mark(0, spool.sent.run_id)
        except SpoolError as error:
            told(f"{error}; passed over")


def run_record(
    experiment: str, name: str, identity: Mapping[str, str], parent: Mapping[str, Any] | None, time: int
) -> Record:
    """The record with which a run begins; see ``remote.py``."""
    named = {"experiment": experiment, "name": name, "identity": dict(identity)}
    return {"kind": "run", **named, "parent": None if parent is None else dict(parent), "time": time}


def now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return time.time_ns() // 1_000_000


def told(text: str) -> None:
    """A line of warning on standard error."""
    print(f"warning: tracking: {text}", file=sys.stderr, flush=True)


def _asides(file: Path) -> Iterator[Path]:
    """Names for a file that is set aside."""
    yield file.with_name(f"{file.name}.damaged")
    for number in itertools.count(2):
        yield file.with_name(f"{file.name}.damaged-{number}")
