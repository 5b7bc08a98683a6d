"""Optuna's journal of operations in a file whose lines have checksums.

A line is an operation as JSON, a tab, and 16 hex digits of a SHA-256: of the digits before it (before the first line, the
file's name) and its own JSON. So a line that was changed, lost, doubled or moved is noticed, with its number.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from pipeline.workspace.errors import UserError
from pipeline.workspace.files import drop_unfinished_line, lock
from pipeline.workspace.seals import DamagedError, name_of

DIGITS = 16


class Journal(BaseJournalBackend):
    """Operations in their order, in a file that any number of processes append to; it need not exist.

    The lock on it ends with its holder; of Optuna's own, a killed worker's stops all others for 30 s.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ends: list[tuple[int, bytes]] = [(0, name_of(path).encode())]
        """Where each line read so far ends, and its digits; before the first one stands the file's name."""

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Operations from a number on; a last line that is being written is none yet.

        Raises:
            DamagedError: a line is not as it was written; its number is named.
            UserError: the file cannot be read.
        """
        number = min(log_number_from, len(self._ends) - 1)
        place, digits = self._ends[number]
        for line in self._lines(place):
            number, place = number + 1, place + len(line)
            operation, tab, own = line.removesuffix(b"\n").rpartition(b"\t")
            if not line.endswith(b"\n") and (not tab or len(own) <= DIGITS):
                return  # it is being written, or was when its writer was killed
            if not line.endswith(b"\n") or own != _digits(digits, operation):
                raise DamagedError(
                    f"{self._path}: line {number}: damaged, or written by another version of the code; delete the file to begin "
                    "its searches again: trainings that are finished are not repeated"
                )
            digits = own
            if number == len(self._ends):
                self._ends.append((place, digits))
            if number > log_number_from:
                yield json.loads(operation)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add operations at the end, to the disk; what a killed process has left there in part is removed first.

        Raises:
            DamagedError: a line before is not as it was written.
        """
        with lock(self._path.with_suffix(".lock")):
            with self._opened("r+b") as file:
                drop_unfinished_line(file)
            for _ in self.read_logs(len(self._ends) - 1):  # what others have added
                pass
            digits, lines = self._ends[-1][1], []
            for log in logs:
                operation = json.dumps(log, separators=(",", ":")).encode()
                digits = _digits(digits, operation)
                lines.append(operation + b"\t" + digits + b"\n")
            with self._opened("ab") as file:
                file.write(b"".join(lines))
                file.flush()
                os.fsync(file.fileno())

    def _lines(self, place: int) -> Iterator[bytes]:
        with self._opened("rb") as file:
            file.seek(place)
            yield from file

    def _opened(self, mode: str) -> Any:
        try:
            if not self._path.exists():
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.touch()
            return self._path.open(mode)
        except OSError as error:
            raise UserError(f"{self._path}: cannot be used: {error.strerror}") from None


def _digits(before: bytes, operation: bytes) -> bytes:
    return hashlib.sha256(before + operation).hexdigest()[:DIGITS].encode()
