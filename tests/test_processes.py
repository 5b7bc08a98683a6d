"""The pool of processes: order of results, exceptions, how many run at once, and that none is left over."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.tracking.system import SystemMetrics
from pipeline.workspace.errors import UserError
from pipeline.workspace.processes import Tell, _watch, begin_worker, run_in_processes


def slower_first(task: int, report: Tell) -> int:
    time.sleep(0.2 / (1 + task))
    return task * task


def process_and_threads(task: int, report: Tell) -> tuple[int, int]:
    time.sleep(0.05)
    return os.getpid(), torch.get_num_threads()


def fail_at_two(task: tuple[int, Path], report: Tell) -> None:
    number, folder = task
    (folder / str(number)).touch()
    if number == 2:
        raise UserError("params.yaml: two is not allowed")
    time.sleep(0.1)


def test_results_come_in_the_order_of_the_tasks() -> None:
    tasks = {f"task {n}": n for n in (3, 0, 2, 1)}
    results = run_in_processes(slower_first, tasks, 4, "square")
    assert list(results.items()) == [("task 3", 9), ("task 0", 0), ("task 2", 4), ("task 1", 1)]


def test_no_tasks_give_no_results() -> None:
    assert run_in_processes(slower_first, {}, 2, "square") == {}


@pytest.mark.parametrize(("workers", "threads"), [(1, 2), (2, 1)])
def test_at_most_so_many_processes_each_with_its_threads_and_none_left_over(workers: int, threads: int) -> None:
    results = run_in_processes(process_and_threads, {str(n): n for n in range(8)}, workers, "count", threads)
    processes = {process for process, _ in results.values()}
    assert len(processes) <= workers
    assert os.getpid() not in processes
    assert {own for _, own in results.values()} == {threads}
    assert not multiprocessing.active_children()


def test_a_tasks_exception_arrives_and_stops_what_has_not_begun(tmp_path: Path) -> None:
    tasks = {str(n): (n, tmp_path) for n in (0, 2, *range(10, 30))}
    with pytest.raises(UserError, match=r"^params\.yaml: two is not allowed$"):
        run_in_processes(fail_at_two, tasks, 1, "fail")
    assert {"0", "2"} <= {path.name for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) < len(tasks) / 2


def sleep_at_one(task: int, report: Tell) -> None:
    if task == 1:
        time.sleep(60)
    raise UserError("params.yaml: zero is not allowed")


def test_a_tasks_exception_does_not_wait_for_those_that_have_begun() -> None:
    began, earlier = time.monotonic(), set(multiprocessing.active_children())
    with pytest.raises(UserError):
        run_in_processes(sleep_at_one, {"one": 1, "zero": 0}, 2, "fail")
    assert time.monotonic() - began < 50
    while set(multiprocessing.active_children()) - earlier:  # the pool's thread may be about to note that one has ended
        assert time.monotonic() - began < 50
        time.sleep(0.1)


def test_a_worker_whose_parent_was_gone_before_it_began_ends() -> None:
    worker = multiprocessing.get_context("fork").Process(target=begin_worker, args=(os.getpid() + 1,))
    worker.start()
    worker.join(20)
    assert worker.exitcode == -signal.SIGKILL


def test_where_the_kernel_does_not_tell_of_a_parents_end_a_worker_looks_itself() -> None:
    reading, writing = os.pipe()
    parent = os.fork()
    if not parent:
        os.close(reading)
        own = os.getpid()
        if not os.fork():
            os.write(writing, b"!")
            _watch(own, signal.SIGKILL)
        time.sleep(0.2)
        os._exit(0)
    os.close(writing)
    os.waitpid(parent, 0)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"!"  # to its end: nobody holds the other one any more


def test_what_a_machine_does_not_tell_of_its_load_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise PermissionError("/proc/meminfo")

    monkeypatch.setattr(psutil, "virtual_memory", refused)
    measured = SystemMetrics().measure()
    assert "system/process_memory_usage_megabytes" in measured
    assert "system/system_memory_usage_percentage" not in measured
