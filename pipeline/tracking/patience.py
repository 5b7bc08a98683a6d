"""How long to wait for a store, and one that does not answer: one warning per command, and no further try for a while."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.trajectories.prompting import plain_text
from pipeline.workspace.addresses import redacted, shown
from pipeline.workspace.layout import Cache

RETRY_AFTER = 30.0
"""Seconds for which a training leaves a store alone that did not answer it or another process."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for a store that does not answer."""

    seconds: int
    """For one request."""
    retries: int


HURRIED = Patience(2, 0)
"""While a training waits."""
PATIENT = Patience(20, 1)
"""Between trainings."""


@contextmanager
def patient(patience: Patience) -> Iterator[None]:
    """Have MLflow's requests wait and try again as ``patience`` says; by default it does so for many minutes."""
    values = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(patience.seconds),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(patience.retries),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    }
    before = {name: os.environ[name] for name in values if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
        os.environ.update(before)


class Away:
    """What processes know of a store that does not answer: a file in the cache that is there as long as it does not."""

    def __init__(self, cache: Path, uri: str) -> None:
        self._file, self._uri = Cache(cache).tracking / "away", uri

    @property
    def recently(self) -> bool:
        """Whether the store was tried in vain within the last ``RETRY_AFTER`` seconds."""
        try:
            return self._file.is_file() and time.time() - self._file.stat().st_mtime < RETRY_AFTER
        except OSError:
            return False

    def note(self, reason: str) -> None:
        """Note that a try failed, and warn if no process of this command has."""
        known, command = False, str(os.getpgrp())
        with suppress(OSError):  # then other processes warn, too
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "a+", encoding="utf-8", errors="replace") as file:
                file.seek(0)
                known = file.read() == command
                file.truncate(0)
                file.write(command)
        if not known:
            warn(self._uri, reason)

    def over(self) -> None:
        """Note that a try succeeded."""
        with suppress(OSError):
            self._file.unlink()


def warn(uri: str, reason: str) -> None:
    """Say on standard error that a store did not take what it was sent, and where that is."""
    print(
        f"warning: tracking: {readable(shown(uri))} cannot be used now: {readable(reason, uri)}\n"
        "warning: tracking: runs are kept in .cache, and sent by a later stage or by `make sync`",
        file=sys.stderr,
        flush=True,
    )


def readable(text: str, uri: str = "") -> str:
    """One line of a store's words without control characters, and without what lets people in at its address."""
    return plain_text(" ".join(redacted(text, uri).split()))[:240]
