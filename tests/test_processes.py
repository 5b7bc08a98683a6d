"""The pool of processes: order of results, exceptions, progress, and how many run at once."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch

from pipeline.config import ConfigError
from pipeline.processes import Report, run_in_processes


def slower_first(task: int, report: Report) -> int:
    time.sleep(0.2 / (1 + task))
    return task * task


def process_and_threads(task: int, report: Report) -> tuple[int, int]:
    time.sleep(0.05)
    return os.getpid(), torch.get_num_threads()


def fail_at_two(task: tuple[int, Path], report: Report) -> None:
    number, folder = task
    (folder / str(number)).touch()
    if number == 2:
        raise ConfigError("params.yaml: two is not allowed")
    time.sleep(0.1)


def count_to_three(task: str, report: Report) -> str:
    for done in (1, 2, 3):
        report(done, 3, f"{task} success 0.5")
    time.sleep(0.6)  # the report travels through a thread of its own
    return task


def test_results_come_in_the_order_of_the_tasks() -> None:
    tasks = {f"task {n}": n for n in (3, 0, 2, 1)}
    results = run_in_processes(slower_first, tasks, 4, "square")
    assert list(results.items()) == [("task 3", 9), ("task 0", 0), ("task 2", 4), ("task 1", 1)]


def test_no_tasks_give_no_results() -> None:
    assert run_in_processes(slower_first, {}, 2, "square") == {}


@pytest.mark.parametrize("workers", [1, 2])
def test_at_most_so_many_processes_each_with_one_thread_and_none_left_over(workers: int) -> None:
    results = run_in_processes(process_and_threads, {str(n): n for n in range(8)}, workers, "count")
    processes = {process for process, _ in results.values()}
    assert len(processes) <= workers
    assert os.getpid() not in processes
    assert {threads for _, threads in results.values()} == {1}
    assert not multiprocessing.active_children()


def test_a_tasks_exception_arrives_and_stops_what_has_not_begun(tmp_path: Path) -> None:
    tasks = {str(n): (n, tmp_path) for n in (0, 2, *range(10, 30))}
    with pytest.raises(ConfigError, match=r"^params\.yaml: two is not allowed$"):
        run_in_processes(fail_at_two, tasks, 1, "fail")
    assert {"0", "2"} <= {path.name for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) < len(tasks) / 2


def test_each_task_reports_how_far_it_came(capfd: pytest.CaptureFixture[str]) -> None:
    run_in_processes(count_to_three, {"one": "a", "two": "b"}, 2, "count")
    lines = capfd.readouterr().err.splitlines()
    assert sorted(lines) == ["count one: 3/3 a success 0.5 - done", "count two: 3/3 b success 0.5 - done"]
