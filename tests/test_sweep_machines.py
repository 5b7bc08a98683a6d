"""Searches on several machines, and their storage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.trial import FrozenTrial, Trial, TrialState

from pipeline.sweep import workers
from pipeline.sweep.plan import SearchPlan
from pipeline.sweep.queue import KILLED, SILENT_BEATS, Queue
from pipeline.sweep.trial import Outcome
from pipeline.sweep.workers import SearchRun, run_search
from pipeline.workspace.errors import UserError
from pipeline.workspace.layout import Cache
from pipeline.workspace.processes import in_own_process
from tests.queue_cases import TRIALS, Toy, check, database, latest_begun, toy_plan
from tests.searches import (
    ALPHA,
    awaited,
    begin,
    end,
    postgresql,
    run,
    trials_of,
    written,
)

pytestmark = pytest.mark.xdist_group("sweep")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Idle workers look again soon, and the journal is in the test's own folder."""
    monkeypatch.setattr(workers, "IDLE_SECONDS", 0.05)
    monkeypatch.delenv("SWEEP_STORAGE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgresql() as url:
        # What each forked process would otherwise import anew.
        optuna.storages.RDBStorage("sqlite://")
        sqlalchemy.create_engine(url)
        yield url


@pytest.fixture(params=["journal", "postgresql"])
def storage(request: pytest.FixtureRequest) -> str | None:
    """A storage without any study: None for a journal file, or the URL of a database."""
    return None if request.param == "journal" else database(request)


# ----------------------------------------------------------------------------------------------- workers on other machines


def queue_on(plan: SearchPlan) -> tuple[optuna.Study, Queue]:
    """What a worker of its own has in hand."""
    return workers._open(plan)


def elsewhere(queue: Queue, number: int) -> None:
    """Let a trial's worker be on another machine."""
    trial = queue._all()[number]
    queue._storage.set_trial_user_attr(trial._trial_id, "worker", {"host": "elsewhere", "pid": 1, "created": 0.0})


def test_a_silent_worker_elsewhere_is_taken_for_dead_and_one_that_beats_is_not(tmp_path: Path) -> None:
    plan = toy_plan(tmp_path)
    own, other = queue_on(plan)[1], queue_on(plan)[1]
    own.fill()
    trial = own.claim()
    assert trial is not None
    elsewhere(own, trial.number)
    silent = SILENT_BEATS * plan.config.sweep.heartbeat
    with own.alive(trial):
        until = time.monotonic() + 2 * silent
        while time.monotonic() < until:
            assert other.revive() == []
            time.sleep(0.02)
    began = time.monotonic()
    assert awaited(other.revive) == [trial.number]
    assert time.monotonic() - began > silent / 2
    assert other.revive() == []
    again = other._all()[-1]
    assert (again.state, again.user_attrs["retry_of"], again.user_attrs["baseline"]) == (
        TrialState.WAITING,
        trial.number,
        "uniform",
    )


def test_a_baseline_killed_while_it_was_drawn_is_tried_again_whole(tmp_path: Path) -> None:
    plan = toy_plan(tmp_path, heartbeat=0.01)
    study, queue = queue_on(plan)
    queue.fill()
    trial = queue.claim()
    assert trial is not None
    trial.suggest_float(ALPHA, 0.0, 1.0)
    elsewhere(queue, 0)
    assert awaited(queue.revive) == [0]
    again = study.get_trials()[-1]
    assert again.system_attrs["fixed_params"] == plan.draws()["uniform"]


def test_who_is_killed_between_marking_a_trial_and_filling_its_slot_loses_nothing(tmp_path: Path) -> None:
    plan = toy_plan(tmp_path)
    study, queue = queue_on(plan)
    queue.fill()
    trial = queue.claim()
    assert trial is not None
    assert queue.fail(trial._trial_id, KILLED)
    assert not queue.fail(trial._trial_id, KILLED)
    queue_on(plan)[1].fill()
    queue.fill()
    added = study.get_trials()[TRIALS:]
    assert [(t.user_attrs["retry_of"], t.user_attrs["baseline"], t.user_attrs["slot"]) for t in added] == [
        (0, "uniform", 0)
    ]


@dataclass(frozen=True)
class Late(Toy):
    """The first trial of all waits until it is let go."""

    def work(self, trial: Trial, values: dict[str, Any]) -> None:
        if trial.number == 0:
            awaited(self.log.with_name("go").exists)


def noted(log: Path, trial: FrozenTrial, outcome: Outcome | None) -> None:
    with open(log, "a", encoding="utf-8") as stream:
        stream.write(f"{trial.number} {trial.state.name} {outcome is not None}\n")


def test_a_worker_taken_for_dead_that_ends_late_counts_for_nothing(tmp_path: Path, storage: str | None) -> None:
    slow, plan = toy_plan(tmp_path, storage, heartbeat=60), toy_plan(tmp_path / "other", storage)
    assert slow.name == plan.name
    toy, told = Late(tmp_path / "log"), tmp_path / "told"
    process = begin(slow, toy, 1, partial(noted, told))
    awaited(lambda: latest_begun(toy.log))
    assert in_own_process(_taken_for_dead, plan) == [0]
    run(plan, Toy(toy.log), 1, partial(noted, told))
    (tmp_path / "go").touch()
    end(process)
    trials = check(plan, toy.log)
    assert trials[0].state == TrialState.FAIL
    finished = {(t.number, t.state.name) for t in trials if t.state != TrialState.FAIL}
    lines = written(told)
    assert {(int(number), state) for number, state, _ in lines} == finished
    assert len(lines) == TRIALS
    assert all((state == "COMPLETE") == (found == "True") for _, state, found in lines)


def _taken_for_dead(plan: SearchPlan) -> list[int]:
    queue = queue_on(plan)[1]
    elsewhere(queue, 0)
    found: list[int] = awaited(queue.revive)
    return found


# ------------------------------------------------------------------------------------------------------------------ storage


def test_a_storage_that_cannot_be_used_is_one_line_without_the_password(tmp_path: Path) -> None:
    plan = toy_plan(tmp_path, "postgresql+psycopg://me:secret@127.0.0.1:1/sweeps")
    with pytest.raises(UserError) as error:
        run_search(SearchRun(plan, Toy(tmp_path / "log")), 1)
    text = str(error.value)
    assert text.startswith("sweep.storage: postgresql+psycopg://…@127.0.0.1:1/sweeps: cannot be used: ")
    assert "secret" not in text
    assert "\n" not in text


def test_the_environment_names_a_storage_that_params_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    plan, url = toy_plan(tmp_path, trials=2), database(request)
    monkeypatch.setenv("SWEEP_STORAGE", url)
    run_search(SearchRun(plan, Toy(tmp_path / "log")), 1)
    assert not Cache().sweep.exists()
    assert replace(plan, study=plan.study).storage == url
    assert len(trials_of(plan)) == 2
