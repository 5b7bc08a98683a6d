"""Sending spools to a store: in order, from where the last try ended, and never at a training's expense."""

from collections.abc import Iterator
from pathlib import Path

from alembic.util import CommandError
from filelock import Timeout
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipeline.tracking.patience import PATIENT, Away, Patience, patient, warn
from pipeline.tracking.records import Record
from pipeline.tracking.remote import METRICS_AT_ONCE, RemoteRun, remote_run
from pipeline.tracking.spool import Spool, SpoolError, told, waiting

AWAY = (MlflowException, SQLAlchemyError, CommandError, NotImplementedError, OSError)
"""What is raised by a store that is away or busy, or that refuses; anything else is wrong with what it was sent."""


class Sender:
    """Sends one run's spool whenever it is asked to; what fails stays in the spool.

    Args:
        spool: the records.
        uri: tracking URI of the store.
        cache: folder in which processes tell each other that the store is away.
    """

    def __init__(self, spool: Spool, uri: str, cache: Path) -> None:
        self._spool, self._uri, self._cache = spool, uri, cache
        self._away = Away(cache, uri)
        self._run: RemoteRun | None = None
        self._refused = False

    @property
    def run_id(self) -> str | None:
        """The run in the store, once it is known."""
        return self._spool.sent.run_id

    @property
    def away(self) -> bool:
        """Whether the store did not answer just now."""
        return self._away.recently

    def send(self, patience: Patience, insist: bool = False) -> bool:
        """Send what is unsent; whether the store has all of it now. Never raises because of the store.

        Args:
            patience: how long to wait for an answer.
            insist: try even if the store did not answer just now; send everything again to one that lacks the run.
        """
        if not insist and (self._refused or self.away):
            return False
        try:
            with self._spool.locked(wait=False), patient(patience):
                self._send(insist)
        except Timeout:  # another process sends these very records
            return False
        except SpoolError as error:
            told(f"{error}; not sent now")
            return False
        except Exception as error:  # of MLflow, and of libraries that it hands things on to
            self._run = None
            self._refused = not isinstance(error, AWAY) or refusal(error)
            if self._refused:
                self._away.over()
                said = str(error) if isinstance(error, AWAY) else f"{type(error).__name__}: {error}"
                warn(self._uri, f"{self._spool.folder}: {said}")
            else:
                self._away.note(str(error))
            return False
        self._away.over()
        return True

    def _send(self, check: bool) -> None:
        sent = self._spool.sent
        unsent = self._spool.read(sent.offset)
        if not unsent and (not check or not self._spool.records):
            return
        if self._run is None or self._run.id != sent.run_id:
            self._run = remote_run(self._uri, self._cache, sent.run_id, self._spool.records[0])
            if self._run.id != sent.run_id:  # a new run is sent everything, also if an earlier one was deleted
                self._spool.mark(0, self._run.id)
                unsent = self._spool.read()
        for end, records in _together(unsent):
            if records[0]["kind"] == "metrics":
                self._run.metrics(records)
            else:
                self._run.write(records[0])
            self._spool.mark(end, self._run.id)


def send_waiting(uri: str, cache: Path) -> tuple[int, int]:
    """Send what earlier trainings, comparisons and sweeps have left; how many runs were sent, and how many were not."""
    spools = waiting(cache)
    sent = 0
    for spool in spools:
        sender = Sender(spool, uri, cache)
        if sender.send(PATIENT, insist=True):
            sent += 1
        elif sender.away:  # else it was this one run that was not taken, or another process is sending it
            break
    return sent, len(spools) - sent


def refusal(error: Exception) -> bool:
    """Whether an error is the store's answer, which would be the same again, and not a store that is away or busy."""
    if not isinstance(error, MlflowException):
        return False
    code: int = error.get_http_status_code()
    return 400 <= code < 500 and code != 429


def _together(unsent: list[tuple[int, Record]]) -> Iterator[tuple[int, list[Record]]]:
    """Records to be sent in one call, and where they end: metrics that follow each other, everything else by itself."""
    group: list[Record] = []
    size = last = 0
    for end, record in unsent:
        count = len(record["values"]) if record["kind"] == "metrics" else METRICS_AT_ONCE
        if group and size + count > METRICS_AT_ONCE:
            yield last, group
            group, size = [], 0
        group.append(record)
        size, last = size + count, end
    if group:
        yield last, group
