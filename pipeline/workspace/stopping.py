"""Being asked to stop: work that can be gone on with ends at its next save, all other work at once.

SIGTERM and Ctrl-C ask. What is asked of a process is known to all that it has forked: nobody has to pass signals on, and a
signal to a whole process group asks once.
"""

import mmap
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ASKS = (signal.SIGINT, signal.SIGTERM)
"""Signals of people and of schedulers. A second one, while the next save is awaited, ends the work at once."""
TOGETHER = 2.0
"""Seconds within which SIGTERM counts once: sent to a process group, it is passed on by some that have it, make for one."""
PARENT_ENDED = signal.SIGUSR1
"""What a command is sent when the process that runs it has ended, or passes on that it was asked itself; however often, it
asks once."""

_asked = mmap.mmap(-1, 1)
"""The number of the signal that has asked, 0 if none has; processes that are forked from this one share it."""
_heard = float("-inf")
"""When this process was last told by something that counted."""


class Stopped(KeyboardInterrupt):
    """A signal has ended the work."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.number = number
        """Of the signal; SIGTERM also stands for ``PARENT_ENDED``."""


def asked() -> bool:
    """Whether this process, or the one that has forked it, is to end at its next save; see ``until_saved``."""
    return _asked[0] != 0


def stop_if_asked() -> None:
    """To be called where everything is saved.

    Raises:
        Stopped: this process is to end.
    """
    if asked():
        raise Stopped(_asked[0])


def stop(number: int, _: Any = None) -> None:
    """A handler of signals where nothing is to be saved: it ends the work with ``Stopped``."""
    if _counts(number):
        raise Stopped(signal.SIGTERM if number == PARENT_ENDED else number)


@contextmanager
def until_saved() -> Iterator[None]:
    """Inside, a signal that asks for the end is noted until ``stop_if_asked``; a second one raises ``Stopped`` at once.

    Signals are the main thread's: in another one nothing changes.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = {number: signal.getsignal(number) for number in (*ASKS, PARENT_ENDED)}
    before = {
        number: handler
        for number, handler in handled.items()
        if handler is not None and handler != signal.SIG_IGN and (number in ASKS or handler == stop)
    }
    outside, _asked = _asked, mmap.mmap(-1, 1)
    for number in before:
        signal.signal(number, _note)
    try:
        yield
    finally:
        _asked = outside
        for number, handler in before.items():
            signal.signal(number, handler)


def say_that_it_stops(unit: str) -> None:
    """Tell a terminal, where people wait, what goes on until the end; elsewhere the last line is to be the only one."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"stopping after the {unit}; once more to stop at once", file=sys.stderr, flush=True)


def _note(number: int, _: Any) -> None:
    counts = _counts(number)
    if not asked():
        _asked[0] = signal.SIGTERM if number == PARENT_ENDED else number
    elif counts and number in ASKS:
        raise Stopped(number)


def _counts(number: int) -> bool:
    """Whether a signal is one of its own; Ctrl-C always is."""
    global _heard
    before, now = _heard, time.monotonic()
    if number != signal.SIGINT and now - before < TOGETHER:
        return False
    _heard = now
    return True
