"""Independent tasks in a pool of processes, none of which outlives the one that started it."""

import contextlib
import ctypes
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from typing import Any, Protocol, TypeVar, runtime_checkable

from pipeline.progress.display import Display, still, tell
from pipeline.workspace.stopping import ASKS, PARENT_ENDED, asked, say_that_it_stops, stop_if_asked, until_saved

Task = TypeVar("Task")
Result = TypeVar("Result")

_reports: Any = None
_failed: Exception | None = None
_together: Any = None


@runtime_checkable
class Tell(Protocol):
    """How a task says how far it is."""

    def __call__(self, done: int, total: int, text: str = "") -> None: ...


def _start(reports: Any, parent: int, threads: int) -> None:
    global _reports, _failed
    _reports = reports
    begin_worker(parent)
    try:
        import torch

        torch.set_num_threads(threads)
    except Exception as error:  # told as the task's: here it would be a traceback and a lost process
        _failed = error


def _run(function: Callable[[Any, Tell], Any], label: str, task: Any) -> Any:
    report = tell(lambda done, total, text: _reports.put((label, done, total, text)))
    report(0, 0, "starting")
    if _failed is not None:
        raise _failed
    stop_if_asked()
    return function(task, report)


def run_in_processes(
    function: Callable[[Task, Tell], Result],
    tasks: Mapping[str, Task],
    workers: int,
    title: str,
    threads: int = 1,
    saved: str = "",
) -> dict[str, Result]:
    """Run ``function(task, report)`` for every task, at most ``workers`` at once, each with so many ``threads``.

    Processes are forked, so what this one has imported is there already. It must not have computed in several threads
    before: a forked process with more than one thread would wait for them for ever. Results are pickled, and have the order
    of ``tasks``. A terminal shows a bar per task; elsewhere a line is printed every 20 seconds (``Display``).

    Tasks may save what they have after each unit of their work, which ``saved`` then is the name of. Where this process is
    asked to stop, they end with their units that are at work (``stop_if_asked``), and other tasks at once.

    Raises:
        Stopped: it was asked to stop.
        Exception: whatever a task raised. The others are cancelled, and those that have begun are killed, as they are
            when this process is asked a second time, or killed itself.
    """
    if not tasks:
        return {}
    context = multiprocessing.get_context("fork")
    reports = context.Queue()
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _start, (reports, os.getpid(), threads))
    with until_saved() if saved else contextlib.nullcontext(), _ending(pool):
        with still():
            futures: dict[Future[Result], str] = {
                pool.submit(_run, function, label, task): label for label, task in tasks.items()
            }
        with Display(title, list(tasks)) as display:
            pending, told = set(futures), False
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                with contextlib.suppress(queue.Empty):
                    while True:
                        display.update(*reports.get_nowait())
                if asked():  # all of them are waited for, however they end
                    if not told:
                        say_that_it_stops(saved)
                    told = True
                    continue
                for future in done:
                    future.result()
                    display.finish(futures[future])
        stop_if_asked()
        return {label: future.result() for future, label in futures.items()}


def in_own_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a process of its own, so that what it opens is not inherited by later ones."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("fork"), begin_worker, (os.getpid(),))
    with _ending(pool):
        with still():
            future = pool.submit(function, *arguments)
        return future.result()


def run_together(function: Callable[[int], Result], count: int) -> Result:
    """Call ``function(rank)`` in ``count`` processes at once, which may wait for one another; returns what the first one does.

    Processes are forked, so ``function`` may be any callable; see ``run_in_processes``. The first one reports as this one would.

    Raises:
        Exception: what the first one to fail has raised. The others are killed, as all are when this process is.
    """
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(count, context, _start_together, (function, os.getpid()))
    with _ending(pool):
        with still():
            futures: list[Future[Result]] = [pool.submit(_run_together, rank) for rank in range(count)]
        for future in as_completed(futures):
            future.result()
        return futures[0].result()


def _start_together(function: Callable[[int], Any], parent: int) -> None:
    global _together
    _together = function
    begin_worker(parent)


def _run_together(rank: int) -> Any:
    if rank:
        tell(lambda *_: None)
    return _together(rank)


@contextlib.contextmanager
def _ending(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Wait for a pool's processes at the end, or kill them where something was raised; all of them are idle or lost."""
    earlier = set(multiprocessing.active_children())
    with pool:
        try:
            yield
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            lost = set(multiprocessing.active_children()) - earlier
            for process in lost:
                process.kill()
            for process in lost:
                process.join()
            raise


def begin_worker(parent: int) -> None:
    """To be called first in a forked process: it ends with its parent, by its id, which alone is told to stop.

    Signals that ask for the end are blocked, not ignored: Lightning and Ray put handlers of their own in place, and what a
    worker starts is not to end before it either.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {*ASKS, PARENT_ENDED})
    end_with_parent(signal.SIGKILL, parent)


def start_with_parent(number: int) -> Callable[[], None]:
    """What a program that this process starts is to do first (``preexec_fn``): it is sent a signal when this one ends."""
    parent = os.getpid()

    def begin() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*ASKS, PARENT_ENDED})
        end_with_parent(number, parent)

    return begin


def end_with_parent(number: int, parent: int) -> None:
    """Have this process sent a signal when the one that has started it, by its id, ends or has ended, in whatever way."""
    if sys.platform != "linux" or ctypes.CDLL(None).prctl(1, int(number)) != 0:  # PR_SET_PDEATHSIG
        threading.Thread(target=_watch, args=(parent, number), daemon=True).start()
    if os.getppid() != parent:  # it had ended before this process asked to be told
        os.kill(os.getpid(), number)


def is_orphan() -> bool:
    """Whether the process that had started this one, in its own group, is gone: another one is the parent then."""
    try:
        return os.getpgid(os.getppid()) != os.getpgrp()
    except ProcessLookupError:
        return True


def _watch(parent: int, number: int) -> None:
    """Where the kernel does not tell: look once a second."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), number)
