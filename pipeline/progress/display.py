"""How far long work is, said while it goes on: bars on a terminal, elsewhere a line now and then.

Whatever works says where it is, in whichever process it runs, as it would log: ``span`` names what is done now, ``within``
says how much of it is. A process that nobody listens to says nothing. ``Display`` shows what is heard, with the time that
is left at the pace so far, and how long nothing has been heard.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

FIRST, EVERY = 6.0, 20.0
"""Seconds until the first line of a process, and between two lines. A mistake that is found earlier is to be the only line;
to import what a stage needs may take longer."""
PAUSE = 1.0
"""Seconds between two words about the inside of a unit of work."""
SILENCE = 60.0
"""Seconds without a word after which a line says so."""


class Teller:
    """The report of the task that this process works on: how many units of it are done, and which part of the next.

    ``put`` takes units done (the last one may be a fraction), units in all, and a text.
    """

    def __init__(self, put: Callable[[float, float, str], None]) -> None:
        self._put, self._done, self._total, self._text = put, 0.0, 0.0, ""
        self._spans: list[tuple[str, float, float]] = []
        self._before = 0.0
        """Units done when the outermost span began."""
        self._said = float("-inf")

    def __call__(self, done: float, total: float, text: str = "") -> None:
        self._done, self._total, self._text, self._said = done, total, text, time.monotonic()
        self._put(done, total, text)

    @property
    def due(self) -> bool:
        """Whether it is time for another word about the present unit."""
        return time.monotonic() - self._said >= PAUSE

    def within(self, part: float, text: str) -> None:
        """Say which part of the innermost span is done, whether or not it is time."""
        for _, start, end in reversed(self._spans):
            part = start + (end - start) * part
        now = " ".join(filter(None, [*(label for label, _, _ in self._spans), text]))
        self._said = time.monotonic()
        done = max(self._done, (self._before if self._spans else self._done) + part)
        self._put(done, self._total, "; ".join(filter(None, [self._text, now])))

    @contextlib.contextmanager
    def span(self, label: str, start: float, end: float) -> Iterator[None]:
        """See the function ``span``."""
        if not self._spans:
            self._before = self._done
        self._spans.append((label, start, end))
        try:
            if self.due:
                self.within(0.0, "")
            yield
        finally:
            self._spans.pop()


_teller: Teller | None = None
_beats: list[Callable[[int], None]] = []


def tell(put: Callable[[float, float, str], None]) -> Teller:
    """Have ``put`` hear how far this process is from now on; see ``Teller``."""
    global _teller
    _teller = Teller(put)
    return _teller


def begin(done: float, total: float, text: str = "") -> None:
    """Say how many units of the task had been done before, unless units have been spoken of."""
    if _teller is not None and not _teller._total:
        _teller(done, total, text)


def doing(text: str) -> None:
    """Say what is done now, where there are no units to count."""
    if _teller is not None:
        _teller(0, 0, text)


def span(label: str, start: float = 0.0, end: float = 1.0) -> contextlib.AbstractContextManager[None]:
    """Say that what happens inside is ``label``, and which part it makes of the next unit, or of the span around it.

    An outermost span may also make several units (``end`` above 1).
    """
    return contextlib.nullcontext() if _teller is None else _teller.span(label, start, end)


def due() -> bool:
    """Whether somebody listens and has not heard anything for a second; costs nothing worth mentioning."""
    return _teller is not None and _teller.due


def within(part: float, text: str = "", insist: bool = False) -> None:
    """Say which part of the innermost span is done, in [0, 1]; left out if it is not due, unless ``insist``."""
    if _teller is not None and (insist or _teller.due):
        _teller.within(part, text)


@contextlib.contextmanager
def on_beat(said: Callable[[int], None]) -> Iterator[None]:
    """Inside, have ``said`` called from ``beat``: it knows what the tokens belong to, the engine does not."""
    _beats.append(said)
    try:
        yield
    finally:
        _beats.pop()


def beat(tokens: int) -> None:
    """An engine is at work: so many tokens of responses that are not complete yet."""
    if _beats and due():
        _beats[-1](tokens)


@dataclass
class _Task:
    """What has been heard of a task."""

    done: float = 0.0
    total: float = 0.0
    text: str = ""
    base: float | None = None
    """Share that had been done before, once it is known."""
    heard: float | None = None
    """Time of the last word; None before the first."""
    over: bool = False

    @property
    def share(self) -> float:
        return 1.0 if self.over else self.done / self.total if self.total else 0.0


_shown: list["Display"] = []
"""Displays that are open, the innermost last: that one speaks."""
_next = 0.0
"""Time from which a line may be printed."""


class Display:
    """Shows how far some tasks are: a bar each on a terminal, and elsewhere one line for all of them every 20 seconds.

    An empty label stands for the title alone; without ``bars`` a terminal shows none; the work has been going on for
    ``age`` seconds.
    """

    def __init__(self, title: str, labels: Sequence[str], bars: bool = True, age: float = 0.0) -> None:
        self._age, self._title, self._tasks = age, title, {label: _Task() for label in labels}
        self._whole: tuple[float, float] | None = None
        self._whole_before = 0.0
        shown: tuple[Any, dict[str, Any]] = _bars(title, labels) if bars and _terminal() else (None, {})
        self._bars, self._ids = shown
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        global _next
        self._began = time.monotonic() - self._age
        if _shown:
            _shown[-1]._rest()
        else:
            _next = max(_next, self._began + FIRST)
        _shown.append(self)
        if self._bars is not None:
            self._bars.start()
        self._wake()
        return self

    def __exit__(self, *_: Any) -> None:
        self._rest()
        if self._bars is not None:
            self._bars.stop()
        _shown.remove(self)
        if _shown:
            _shown[-1]._wake()

    def update(self, label: str, done: float, total: float, text: str) -> None:
        """Units done of a task, units in all (0: not known), and what else there is to say."""
        task = self._tasks[label]
        task.done, task.total, task.text, task.heard = done, total, text, time.monotonic()
        if task.base is None and total:
            task.base = task.share
        if self._bars is not None:
            seconds = None if task.over else self._left()
            left = "" if seconds is None else f"about {duration(seconds)} left"
            self._bars.start_task(self._ids[label])
            self._bars.update(self._ids[label], completed=done, total=total or None, text=text, left=left)

    def whole(self, done: float, total: float) -> None:
        """How much of all there is to do has ended, where each label has one piece of it after another."""
        if self._whole is None:
            self._whole_before = done / total
        self._whole = done, total

    def finish(self, label: str) -> None:
        """A task has ended."""
        task = self._tasks[label]
        task.over = True
        if task.total:
            self.update(label, task.total, task.total, task.text)

    def report(self, label: str) -> Teller:
        """What this process does from now on is this task."""
        return tell(lambda done, total, text: self.update(label, done, total, text))

    def line(self) -> str:
        """All that is known now."""
        now = time.monotonic()
        running = [(label, task) for label, task in self._tasks.items() if task.heard is not None and not task.over]
        parts = [_told(label, task, now) for label, task in running]
        if self._whole is not None:
            parts.insert(0, f"{self._whole[0]:.0f} of {self._whole[1]:.0f} done")
        elif len(self._tasks) > 1:
            parts.insert(0, f"{sum(task.over for task in self._tasks.values())} of {len(self._tasks)} done")
        left = self._left()
        rest = "" if left is None else f", about {duration(left)} left"
        spent = duration(now - (_shown or [self])[0]._began)
        return "; ".join([f"{self._title}: {next(iter(parts), 'starting')}", *parts[1:], f"{spent} so far{rest}"])

    def _left(self) -> float | None:
        """Seconds, at the pace since the display was opened; None before there is one."""
        if self._whole is not None:
            at_hand = sum(task.share for task in self._tasks.values() if not task.over)
            work, done = 1 - self._whole_before, (self._whole[0] + at_hand) / self._whole[1] - self._whole_before
        else:
            work = sum(1 - (task.base or 0.0) for task in self._tasks.values())
            done = sum(task.share - (task.base or 0.0) for task in self._tasks.values())
        return (time.monotonic() - self._began) * max(0.0, work - done) / done if done > 0 else None

    def _wake(self) -> None:
        if self._bars is None and not _terminal():
            self._ended.clear()
            self._thread = threading.Thread(target=self._speak, daemon=True)
            self._thread.start()

    def _rest(self) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None

    def _speak(self) -> None:
        while not self._ended.wait(max(0.05, min(1.0, _next - time.monotonic()))):
            self.look()

    def look(self) -> None:
        """Print a line if it is time."""
        global _next
        if time.monotonic() >= _next:
            _next = time.monotonic() + EVERY
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                print(self.line(), file=sys.stderr, flush=True)


@contextlib.contextmanager
def still() -> Iterator[None]:
    """No thread of a display runs inside: processes may be forked there."""
    top = _shown[-1] if _shown and _shown[-1]._thread is not None else None
    if top is not None:
        top._rest()
    try:
        yield
    finally:
        if top is not None:
            top._wake()


def duration(seconds: float) -> str:
    """A stretch of time in its natural unit."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _told(label: str, task: _Task, now: float) -> str:
    count = f"{int(task.done)}/{int(task.total)}" if task.total else ""
    silent = now - (now if task.heard is None else task.heard)
    word = f"(last word {duration(silent)} ago)" if label and silent >= SILENCE else ""
    said = " ".join(filter(None, [count, task.text, word]))
    return f"{label}: {said}" if label else said


def _terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _bars(title: str, labels: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    texts = (TextColumn("{task.fields[left]}"), TextColumn("{task.fields[text]}"))
    bars = Progress(*columns, *texts, console=Console(stderr=True))
    return bars, {
        label: bars.add_task(f"{title} {label}".rstrip(), total=None, text="", left="", start=False) for label in labels
    }
