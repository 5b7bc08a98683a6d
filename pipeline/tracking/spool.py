"""A run's records on disk, in order, until a tracking store has them: nothing is lost while the store is away.

A record is one line of JSON with a ``kind``; ``remote.py`` says which there are and what becomes of them. Timestamps are
in the records, so that a record that is sent twice is the same one to the store.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.workspace.faults import writing
from pipeline.workspace.files import drop_unfinished_line, lock, replacing, write_json
from pipeline.workspace.layout import Cache

Record = dict[str, Any]


@dataclass(frozen=True)
class Sent:
    """How far a store is with a spool."""

    offset: int = 0
    """Bytes of the records that it has."""
    run_id: str | None = None
    """The run there."""


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
        self.folder.mkdir(parents=True, exist_ok=True)
        with writing(self._records), open(self._records, "ab+") as file:
            drop_unfinished_line(file)
            file.write(_lines(records))

    def replace(self, records: Sequence[Record]) -> None:
        """Hold these records in place of all others, and none of them as sent; the run stays the same one."""
        with self.locked(), replacing(self._records) as partial:
            partial.write_bytes(_lines(records))
            self.mark(0, self.sent.run_id)

    def read(self, offset: int = 0) -> list[tuple[int, Record]]:
        """Records from a byte on, each with the byte at which it ends; a line that was cut off by a kill is not one."""
        if not self._records.exists():
            return []
        found = []
        with open(self._records, "rb") as file:
            file.seek(offset)
            for line in file:
                offset += len(line)
                if line.endswith(b"\n"):
                    found.append((offset, json.loads(line)))
        return found

    @property
    def records(self) -> list[Record]:
        """All records; the first says which run this is."""
        return [record for _, record in self.read()]

    @property
    def sent(self) -> Sent:
        """What the store has."""
        return Sent(**json.loads(self._sent.read_text(encoding="utf-8"))) if self._sent.exists() else Sent()

    def mark(self, offset: int, run_id: str | None) -> None:
        """Note what the store has."""
        write_json(self._sent, asdict(Sent(offset, run_id)))

    @property
    def waiting(self) -> bool:
        """Whether something has not been sent."""
        return bool(self.read(self.sent.offset))

    def locked(self, wait: bool = True) -> AbstractContextManager[None]:
        """Keep other processes from sending these records at the same time.

        Raises:
            filelock.Timeout: another process has the lock, and ``wait`` is off.
        """
        return lock(self.folder / "lock", wait)


def waiting(cache: Path) -> list[Spool]:
    """The spools under a cache folder that hold something unsent."""
    trainings = Cache(cache).training("*").parent.glob("*/tracking/records.jsonl")
    files = sorted([*trainings, *Cache(cache).tracking.glob("**/records.jsonl")])
    return [spool for spool in (Spool(file.parent) for file in files) if spool.waiting]


def run_record(
    experiment: str, name: str, identity: Mapping[str, str], parent: Mapping[str, Any] | None, time: int
) -> Record:
    """The record with which a run begins; see ``remote.py``."""
    named = {"experiment": experiment, "name": name, "identity": dict(identity)}
    return {"kind": "run", **named, "parent": None if parent is None else dict(parent), "time": time}


def now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return time.time_ns() // 1_000_000


def _lines(records: Sequence[Record]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()
