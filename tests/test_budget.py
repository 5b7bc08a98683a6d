"""A budget of sampled tokens: when a training is over, and that a real one ends there, killed or not."""

from __future__ import annotations

import multiprocessing
import os
import signal
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.settings.train import Train
from pipeline.training.budget import progress, training_over
from pipeline.training.run import TrainingJob, train_one, train_until
from pipeline.training.seed_key import TrainingTask, training_task
from pipeline.workspace.files import read_json
from tests.trainings import LAKE, configured, left, quiet


def rows(tokens: list[int]) -> list[dict[str, float]]:
    return [{"iteration": float(i), "tokens": float(count)} for i, count in enumerate(tokens)]


def length(tokens: list[int], train: Train) -> int:
    """Iterations that a training makes which samples so many tokens in each."""
    done = 0
    while not training_over(rows(tokens[:done]), train):
        done += 1
    return done


sizes = st.lists(st.integers(1, 100), min_size=1, max_size=30)


@given(sizes, st.integers(1, 2000))
def test_a_training_goes_on_while_another_iteration_like_its_last_leads_nearer_to_the_budget(
    tokens: list[int], budget: int
) -> None:
    expected = next(
        (
            done
            for done, spent in enumerate(accumulate(tokens), start=1)
            if abs(spent - budget) <= abs(spent + tokens[done - 1] - budget)
        ),
        len(tokens),
    )
    assert length(tokens, Train(iterations=len(tokens), tokens=budget)) == expected
    assert length(tokens, Train(iterations=len(tokens))) == len(tokens)


@given(st.integers(50, 500), st.integers(500, 5000))
def test_equal_iterations_end_within_half_of_one_of_the_budget(size: int, budget: int) -> None:
    done = length([size] * 200, Train(iterations=200, tokens=budget))
    assert abs(done * size - budget) <= size / 2


def test_progress_counts_what_is_budgeted() -> None:
    curve = rows([10, 30])
    assert progress(curve, Train(iterations=5)) == (2, 5)
    assert progress(curve, Train(iterations=5, tokens=90)) == (40, 90)


# ------------------------------------------------------------------------------------------------------- real trainings


def task_in(cache: Path, directory: Path, **train: Any) -> TrainingTask:
    return training_task(configured({"train": train}), LAKE, "grpo", 0, directory, cache)


def begun(task: TrainingTask) -> list[str]:
    return (task.cache / "begun.log").read_text().split()


@pytest.fixture(scope="module")
def budget(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Tokens of the first three iterations of a training without a budget."""
    task = task_in(tmp_path_factory.mktemp("plain"), directory, iterations=5)
    train_one(TrainingJob(task, None, None), quiet)
    curve = read_json(task.result / "curves.json")
    assert len(curve) == 5
    return int(sum(row["tokens"] for row in curve[:3]))


def killed_in_its_second_iteration(task: TrainingTask) -> None:
    calls = []

    def report(done: int, total: int, text: str = "") -> None:
        calls.append(done)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    train_one(TrainingJob(task, None, None), report)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_training_ends_nearest_to_its_budget_with_the_same_bytes_if_it_was_killed(
    schedule: str, directory: Path, budget: int, tmp_path: Path
) -> None:
    train = {"iterations": 5, "tokens": budget, "schedule": schedule, "validate_every": 100}
    straight, killed = (task_in(tmp_path / name, directory, **train) for name in ("straight", "killed"))
    told: list[tuple[int, int]] = []
    train_one(TrainingJob(straight, None, None), lambda done, total, text="": told.append((done, total)))
    curve = read_json(straight.result / "curves.json")
    assert training_over(curve, straight.config.train)
    assert not training_over(curve[:-1], straight.config.train)
    assert told == [(int(spent), budget) for spent in accumulate(row["tokens"] for row in curve)]
    assert ["validation_success" in row for row in curve] == [False] * (len(curve) - 1) + [True]
    assert (straight.result / "episodes.parquet").exists()
    if schedule == "constant":
        assert len(curve) == 3

    process = multiprocessing.get_context("fork").Process(target=killed_in_its_second_iteration, args=(killed,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not killed.finished
    train_one(TrainingJob(killed, None, None), quiet)
    assert begun(killed) == ["0", "1", *map(str, range(1, len(curve)))]
    assert left(killed.result) == left(straight.result)


def test_a_training_that_has_spent_its_tokens_and_has_no_result_yet_makes_no_further_iteration(
    directory: Path, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, stopped = (
        task_in(tmp_path / name, directory, iterations=5, tokens=budget) for name in ("straight", "stopped")
    )
    train_one(TrainingJob(straight, None, None), quiet)

    def full(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.run.save_trained", full)
        with pytest.raises(OSError, match="no space left"):
            train_one(TrainingJob(stopped, None, None), quiet)
    assert len(train_until(TrainingJob(stopped, None, None), 1, quiet)) == 1
    assert begun(stopped) == ["0", "1", "2"]
    assert left(stopped.result) == left(straight.result)


def test_with_a_budget_the_learning_rate_falls_with_the_tokens_spent(
    directory: Path, budget: int, tmp_path: Path
) -> None:
    for done in (1, 2):
        task = task_in(tmp_path, directory, iterations=5, tokens=budget, schedule="linear")
        curve = train_until(TrainingJob(task, None, None), done, quiet)
        saved = torch.load(task.cache / "checkpoint.ckpt", weights_only=True)
        share = sum(row["tokens"] for row in curve) / budget
        rate = task.config.methods["grpo"].learning_rate
        assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(rate * (1 - share))
