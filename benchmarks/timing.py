"""Timing work again and again, within the time that there is."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from pipeline.trajectories.trajectory import TrajectoryError
from pipeline.workspace.errors import UserError

REPEATS = 5


class Unmeasured(Exception):
    """A section cannot be measured here; the text says why."""


def say(text: str) -> None:
    """Where the benchmark is, also when its output is a file."""
    print(f"bench {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Stop what runs longer, with its worker processes.

    Raises:
        Unmeasured: it did, or there was no time to begin with.
    """

    def stop(*_: Any) -> None:
        for child in multiprocessing.active_children():
            child.terminate()
        raise Unmeasured(f"not done in the {seconds:.0f} seconds that were left")

    if seconds <= 0:
        raise Unmeasured("no time was left")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def repeated(work: Callable[[], Any], repeats: int = REPEATS, warm: int = 1) -> list[float]:
    """Seconds of each repetition, after ``warm`` that do not count."""
    seconds = []
    for _ in range(warm + repeats):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[warm:]


def spread(values: list[float]) -> dict[str, Any]:
    """Median and extremes."""
    return {"median": float(np.median(values)), "least": min(values), "most": max(values), "n": len(values)}


def rates(amount: float, seconds: list[float]) -> dict[str, Any]:
    """``amount`` per second."""
    return spread([amount / s for s in seconds])


def run_sections(
    found: dict[str, Any], sections: Mapping[str, Callable[[], Any]], seconds: float, keep: Callable[[], None]
) -> None:
    """Measure one section after another into ``found``; what cannot be measured is left out with a word in ``skipped``.

    Args:
        found: sections by name, ``seconds`` that each took, ``skipped`` ones with the reason.
        sections: by name.
        seconds: for all of them.
        keep: called after each.

    Raises:
        UserError: there is nothing to measure on.
        TrajectoryError: likewise.
    """
    deadline = time.monotonic() + seconds
    for number, (name, section) in enumerate(sections.items(), 1):
        at, began = f"{number}/{len(sections)} {name}", time.monotonic()
        say(at)
        found.pop(name, None)
        found["skipped"].pop(name, None)
        try:
            with limited(deadline - began):
                found[name] = section()
        except (UserError, TrajectoryError):
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, Unmeasured) else f"{type(error).__name__}: {error}"
            found["skipped"][name] = reason.split("\n")[0]
            say(f"{at}: skipped, {found['skipped'][name]}")
        found["seconds"][name] = time.monotonic() - began
        keep()
