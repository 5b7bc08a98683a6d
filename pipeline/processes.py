"""Independent tasks in a pool of single-threaded processes, with a progress bar each."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

Task = TypeVar("Task")
Result = TypeVar("Result")

_reports: Any = None


class Report(Protocol):
    """How a task says how far it is."""

    def __call__(self, done: int, total: int, text: str = "") -> None: ...


def _start(reports: Any) -> None:
    global _reports
    _reports = reports
    import torch

    torch.set_num_threads(1)


def _run(function: Callable[[Any, Report], Any], label: str, task: Any) -> Any:
    return function(task, lambda done, total, text="": _reports.put((label, done, total, text)))


def run_in_processes(
    function: Callable[[Task, Report], Result], tasks: Mapping[str, Task], workers: int, title: str
) -> dict[str, Result]:
    """Run ``function(task, report)`` for every task, at most ``workers`` at once.

    Processes are forked, so what this one has imported is there already. A terminal shows a bar per task; elsewhere a
    line is printed when a task ends and every 20 seconds.

    Args:
        function: picklable; its result must be, too.
        tasks: by label.
        workers: processes.
        title: what the tasks are.

    Returns:
        Results by label, in the order of ``tasks``.

    Raises:
        Exception: whatever a task raised; the others are cancelled.
    """
    if not tasks:
        return {}
    context = multiprocessing.get_context("fork")
    reports = context.Queue()
    with ProcessPoolExecutor(min(workers, len(tasks)), context, _start, (reports,)) as pool:
        futures: dict[Future[Result], str] = {
            pool.submit(_run, function, label, task): label for label, task in tasks.items()
        }
        with Display(title, list(tasks)) as display:
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                with contextlib.suppress(queue.Empty):
                    while True:
                        display.update(*reports.get_nowait())
                for future in done:
                    if future.exception() is not None:
                        for other in pending:
                            other.cancel()
                        future.result()
                    display.finish(futures[future])
        return {label: future.result() for future, label in futures.items()}


def in_own_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a process of its own, so that what it opens is not inherited by later ones."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


class Display:
    """Bars on a terminal, occasional lines elsewhere."""

    def __init__(self, title: str, labels: list[str]) -> None:
        self._title, self._last, self._state = title, time.monotonic(), dict.fromkeys(labels, "waiting")
        self._bars: Progress | None = None
        self._ids: dict[str, TaskID] = {}
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
            self._bars = Progress(*columns, TextColumn("{task.fields[text]}"), console=Console(stderr=True))
            for label in labels:
                self._ids[label] = self._bars.add_task(f"{title} {label}", total=None, text="", start=False)

    def __enter__(self) -> Display:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bars is not None:
            self._bars.stop()

    def update(self, label: str, done: int, total: int, text: str) -> None:
        self._state[label] = f"{done}/{total} {text}".rstrip()
        if self._bars is not None:
            self._bars.start_task(self._ids[label])
            self._bars.update(self._ids[label], completed=done, total=total, text=text)
        elif time.monotonic() - self._last > 20:
            self._last = time.monotonic()
            running = "; ".join(f"{k}: {v}" for k, v in self._state.items() if v not in ("waiting", "done"))
            print(f"{self._title} {running}", file=sys.stderr, flush=True)

    def finish(self, label: str) -> None:
        if self._bars is None and self._state[label] != "done":
            last = "" if self._state[label] == "waiting" else f"{self._state[label]} - "
            print(f"{self._title} {label}: {last}done", file=sys.stderr, flush=True)
        self._state[label] = "done"
