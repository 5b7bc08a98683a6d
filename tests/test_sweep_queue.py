"""Searches on toy objectives: whoever is killed whenever, as many trials are finished as were asked for."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import sqlalchemy
from optuna.trial import FrozenTrial, Trial, TrialState

from pipeline.sweep import workers
from pipeline.sweep.plan import SearchPlan
from pipeline.sweep.queue import KILLED, SILENT_BEATS, Queue, open_storage
from pipeline.sweep.trial import Outcome
from pipeline.sweep.workers import SearchRun, run_search
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import lock
from pipeline.workspace.layout import Cache
from pipeline.workspace.processes import in_own_process
from pipeline.workspace.stopping import asked, stop_if_asked
from tests.queue_cases import TRIALS, Toy, check, database, ended, latest_begun, toy_plan
from tests.searches import (
    ALPHA,
    awaited,
    begin,
    end,
    kill_all,
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


# ----------------------------------------------------------------------------------------------------------- the kill test


def test_others_go_on_with_the_trial_of_a_killed_worker(tmp_path: Path, storage: str | None) -> None:
    plan, toy = toy_plan(tmp_path, storage), Toy(tmp_path / "log", pause=0.05)
    process = begin(plan, toy, 3)
    awaited(lambda: len(ended(toy.log)) >= 4)
    number, worker = latest_begun(toy.log)
    os.kill(int(worker), signal.SIGKILL)
    end(process)
    trials = check(plan, toy.log)
    assert [t.number for t in trials if t.state == TrialState.FAIL] == [int(number)]
    assert f"was killed (signal {signal.SIGKILL})" in Path("session.txt").read_text()


def test_a_search_killed_whole_ends_with_the_trials_asked_for(tmp_path: Path, storage: str | None) -> None:
    plan, toy = toy_plan(tmp_path, storage), Toy(tmp_path / "log")
    process = begin(plan, toy)
    awaited(lambda: len(ended(toy.log)) >= 4)
    kill_all(process)
    before = trials_of(plan)
    assert any(t.state == TrialState.RUNNING for t in before)
    run(plan, toy)
    trials = check(plan, toy.log)
    assert 1 <= sum(t.state == TrialState.FAIL for t in trials) <= 2
    kept = {t.number: t.params for t in before if t.state in (TrialState.COMPLETE, TrialState.PRUNED)}
    assert kept.items() <= {t.number: t.params for t in trials}.items()

    begun = written(toy.log)
    run(plan, toy)
    assert written(toy.log) == begun, "a finished search ran a trial"
    more = toy_plan(tmp_path, storage, trials=TRIALS + 3)
    run(more, toy)
    assert [t.number for t in check(more, toy.log)][: len(trials)] == [t.number for t in trials]


def test_workers_end_when_the_process_that_started_them_is_killed(tmp_path: Path) -> None:
    plan, toy = toy_plan(tmp_path), Toy(tmp_path / "log", pause=0.05)
    process = begin(plan, toy)
    awaited(lambda: len(ended(toy.log)) >= 2)
    started = {int(pid) for _, _, pid in written(toy.log)}
    process.kill()
    process.join()
    awaited(lambda: not any(alive(pid) for pid in started))
    assert len(ended(toy.log)) < TRIALS
    run(plan, toy)
    check(plan, toy.log)


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Together(Toy):
    """A trial waits for one of every worker of two machines: a quick machine cannot run the other's trials too."""

    def work(self, trial: Trial, values: dict[str, Any]) -> None:
        awaited(lambda: len({pid for _, _, pid in written(self.log)}) == 4)


def test_two_machines_share_a_search(tmp_path: Path, storage: str | None) -> None:
    plan, toy = toy_plan(tmp_path, storage), Together(tmp_path / "log")
    for process in [begin(plan, toy), begin(plan, toy)]:
        end(process)
    assert len(check(plan, toy.log)) == TRIALS


@pytest.mark.parametrize("seed", range(2))
def test_kills_at_any_moment_lose_nothing(tmp_path: Path, storage: str | None, seed: int) -> None:
    plan, toy = toy_plan(tmp_path, storage, retries=5), Toy(tmp_path / "log", pause=0.01)
    draws = random.Random(seed)
    for _ in range(4):
        process = begin(plan, toy)
        time.sleep(draws.uniform(0.05, 0.6))
        kill_all(process)
    run(plan, toy)
    check(plan, toy.log)


@pytest.mark.parametrize("written", [1, 60, -1])
def test_a_record_that_a_kill_has_cut_short_costs_no_other(tmp_path: Path, written: int) -> None:
    """Its last byte is the newline; a record that lacks it is none."""
    journal = tmp_path / "journal.log"
    names = [f"study {number}" for number in range(4)]
    first, cut, *later = names
    for name in (first, cut):
        optuna.create_study(storage=open_storage(None, journal), study_name=name)
    whole = journal.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    journal.write_bytes(whole[:last] + whole[last:][:written])
    watching = open_storage(None, journal)
    for name in later:
        optuna.create_study(storage=open_storage(None, journal), study_name=name)
    for storage in (watching, open_storage(None, journal)):
        assert [study.study_name for study in storage.get_all_studies()] == [first, *later]


def test_a_lock_that_a_killed_worker_held_delays_nobody(tmp_path: Path) -> None:
    plan, toy = toy_plan(tmp_path, trials=4), Toy(tmp_path / "log")
    Cache().sweep.mkdir(parents=True)
    holder = multiprocessing.get_context("fork").Process(target=_die_holding_the_lock)
    holder.start()
    holder.join()
    began = time.monotonic()
    run(plan, toy)
    assert time.monotonic() - began < 10
    check(plan, toy.log)


def _die_holding_the_lock() -> None:
    with lock(Cache().sweep / "journal.lock"):
        os.kill(os.getpid(), signal.SIGKILL)


# ------------------------------------------------------------------------------------------------- objectives that go wrong


@dataclass(frozen=True)
class Deadly(Toy):
    """The first settings that a slot is tried at kill their worker each time."""

    slot: int = 0

    def work(self, trial: Trial, values: dict[str, Any]) -> None:
        poison = self.log.with_name("poison")
        if trial.user_attrs["slot"] == self.slot and not poison.exists():
            poison.write_text(repr(values))
        if poison.exists() and poison.read_text() == repr(values):
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Stoppable(Toy):
    """Trials last until the search is asked to stop, or for ever."""

    def work(self, trial: Trial, values: dict[str, Any]) -> None:
        if not self.log.with_name("go").exists():
            awaited(asked)
            stop_if_asked()


def test_a_search_that_is_asked_to_stop_goes_on_with_the_same_settings_and_as_many_tries(tmp_path: Path) -> None:
    plan, toy = toy_plan(tmp_path, trials=4, retries=0), Stoppable(tmp_path / "log")
    process = begin(plan, toy, 2)
    awaited(lambda: len(written(toy.log)) == 2)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGTERM)
    process.join()
    assert "Stopped" in Path("session.txt").read_text()
    stopped = trials_of(plan)
    assert [trial.state for trial in stopped] == [TrialState.FAIL] * 2
    (tmp_path / "go").touch()
    run(plan, toy)
    trials = check(plan, toy.log)
    for trial in stopped:
        (again,) = (t for t in trials if t.user_attrs.get("retry_of") == trial.number)
        assert again.params == trial.params
        assert again.user_attrs["attempt"] == 1


@pytest.mark.parametrize("slot", [1, 2])
def test_settings_that_kill_every_worker_are_given_up(tmp_path: Path, slot: int) -> None:
    plan = toy_plan(tmp_path, trials=4, retries=2)
    toy = Deadly(tmp_path / "log", slot=slot)
    for _ in range(3):
        with pytest.raises(BrokenProcessPool, match="every worker was killed"):
            run_search(SearchRun(plan, toy), 1)
    trials = run_search(SearchRun(plan, toy), 1)
    tried = [t for t in trials if t.user_attrs["slot"] == slot]
    assert [t.state for t in tried] == [TrialState.FAIL] * 3 + [TrialState.COMPLETE]
    assert [t.user_attrs.get("attempt", 1) for t in tried] == [1, 2, 3, 1]
    assert tried[0].params == tried[1].params == tried[2].params != tried[3].params
    assert [t.user_attrs.get("retry_of") for t in tried] == [None, tried[0].number, tried[1].number, None]
    assert "baseline" not in tried[3].user_attrs
    assert sum(t.state == TrialState.COMPLETE for t in trials) == 4


@dataclass(frozen=True)
class Broken(Toy):
    """One slot's trial raises."""

    def work(self, trial: Trial, values: dict[str, Any]) -> None:
        if trial.user_attrs["slot"] == 3:
            raise ArithmeticError("loss is nan")


def test_an_error_of_a_trial_reaches_the_caller_and_its_slot_is_filled_again(tmp_path: Path) -> None:
    plan, toy = toy_plan(tmp_path, trials=6), Broken(tmp_path / "log")
    with pytest.raises(ArithmeticError, match="loss is nan"):
        run_search(SearchRun(plan, toy), 2)
    failed = [t.user_attrs for t in trials_of(plan) if t.state == TrialState.FAIL]
    assert failed
    assert {(t["slot"], t["failure"]) for t in failed} == {(3, "ArithmeticError: loss is nan")}
    trials = run_search(SearchRun(plan, Toy(toy.log)), 2)
    finished = [t for t in trials if t.state != TrialState.FAIL]
    assert sorted(t.user_attrs["slot"] for t in finished) == list(range(6))


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


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://me:secret@127.0.0.1:1/sweeps", "postgresql+psycopg://…@127.0.0.1:1/sweeps"),
        ("postgresql+psycopg://me:s/ecret@127.0.0.1:1/sweeps", "postgresql+psycopg://…@127.0.0.1:1/sweeps"),
        ("postgresql+psycopg://me:secret@x@127.0.0.1:1/sweeps", "postgresql+psycopg://…@127.0.0.1:1/sweeps"),
        (
            "postgresql+psycopg://127.0.0.1:1/sweeps?user=me&password=secret",
            "postgresql+psycopg://127.0.0.1:1/sweeps?…",
        ),
        ("postgresql+psycopg:/me:secret@127.0.0.1:1/sweeps", "…@127.0.0.1:1/sweeps"),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_line_without_the_password(
    url: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = toy_plan(tmp_path)
    monkeypatch.setenv("SWEEP_STORAGE", url)
    with pytest.raises(UserError) as error:
        run_search(SearchRun(plan, Toy(tmp_path / "log")), 1)
    text = str(error.value)
    assert text.startswith(f"sweep.storage: {shown}: cannot be used: ")
    assert "ecret" not in text
    assert "\n" not in text


def test_a_password_in_the_params_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sweep\.storage: has a password.*SWEEP_STORAGE") as error:
        toy_plan(tmp_path, "postgresql+psycopg://me:secret@127.0.0.1:1/sweeps")
    assert "secret" not in str(error.value)


def test_the_environment_names_a_storage_that_params_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    plan, url = toy_plan(tmp_path, trials=2), database(request)
    monkeypatch.setenv("SWEEP_STORAGE", url)
    run_search(SearchRun(plan, Toy(tmp_path / "log")), 1)
    assert not Cache().sweep.exists()
    assert replace(plan, study=plan.study).storage == url
    assert len(trials_of(plan)) == 2
