"""How long the phases of an iteration take."""

from __future__ import annotations

import time
from collections import defaultdict


class Phases:
    """Adds up seconds by phase; a phase inside another is not counted twice."""

    def __init__(self) -> None:
        self.seconds = defaultdict[str, float](float)
        self.inner = 0.0
        """Seconds of phases that have ended inside the one that is open."""

    def phase(self, name: str) -> Stopwatch:
        """Count what happens inside under ``name``."""
        return Stopwatch(self, name)

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        taken = dict(self.seconds)
        self.seconds.clear()
        return taken


class Stopwatch:
    """A stretch of time; a class, not a generator, because environments are timed step by step."""

    __slots__ = ("around", "began", "name", "phases")

    def __init__(self, phases: Phases, name: str) -> None:
        self.phases, self.name = phases, name

    def __enter__(self) -> None:
        self.around, self.phases.inner = self.phases.inner, 0.0
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self.began
        self.phases.seconds[self.name] += spent - self.phases.inner
        self.phases.inner = self.around + spent
