"""Phases: every second is counted once, under the innermost name; and the table that shows where it went."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import pytest

from pipeline.progress.timing import Phases
from pipeline.report.timings import environment_shares, phase_seconds, time_table


class Clock:
    """Seconds that pass when they are told to: a machine that stands still for a while decides nothing here."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("pipeline.progress.timing.time", SimpleNamespace(perf_counter=lambda: made.now))
    return made


def test_seconds_are_those_of_the_wall() -> None:
    phases = Phases()
    with phases.phase("collect"):
        time.sleep(0.05)
    assert phases.take()["collect"] >= 0.05


def test_a_phase_inside_another_is_not_counted_twice(clock: Clock) -> None:
    phases = Phases()
    with phases.phase("prepare"):
        clock.sleep(1)
        for _ in range(2):
            with phases.phase("collect"):
                clock.sleep(10)
                with phases.phase("annotate"):
                    clock.sleep(100)
    assert phases.take() == {"prepare": 1, "collect": 20, "annotate": 200}


def test_what_was_taken_is_gone_and_an_error_is_timed_too() -> None:
    phases = Phases()
    with pytest.raises(KeyError), phases.phase("update"):
        raise KeyError
    assert list(phases.take()) == ["update"]
    assert phases.take() == {}


FIRST = {"seconds": 9.0, "seconds_collect": 9.0, "seconds_step": 9.0}
"""An iteration whose episodes another stage has sampled."""


def row(**seconds: float) -> dict[str, float]:
    return {"seconds": 100.0, "tokens_per_second": 7.0} | {
        f"seconds_{phase}": spent for phase, spent in seconds.items()
    }


def test_seconds_by_phase_are_means_over_seeds_and_iterations_but_the_first() -> None:
    curves = {
        "0": [FIRST, row(collect=1.0, step=0.5), row(collect=3.0, step=0.5)],
        "1": [FIRST, row(collect=5.0, reset=2.0)],
    }
    assert phase_seconds(curves) == pytest.approx({"collect": 3.0, "reset": 2 / 3, "step": 1 / 3})
    assert environment_shares(curves) == pytest.approx({"reset": 1 / 6, "step": 1 / 12})


def test_without_a_rollout_there_is_no_share_of_it() -> None:
    assert all(math.isnan(share) for share in environment_shares({"0": [FIRST]}).values())
    assert time_table("lake", {("lake", "grpo"): {"0": [FIRST]}}).rows == []


def test_the_table_has_a_row_per_method_of_its_environment_and_the_longest_phase_first() -> None:
    timings = {
        ("lake", "grpo"): {"0": [FIRST, row(collect=1.8, reset=0.1, step=0.1, update=2.0)]},
        ("lake", "ppo"): {"0": [FIRST, row(collect=1.0, values=1.0, update=2.0)]},
        ("arms", "grpo"): {"0": [FIRST, row(collect=1.0)]},
    }
    table = time_table("lake", timings)
    assert table.header == [
        *("method", "seconds", "update", "collect", "values", "reset", "step"),
        *("resets in rollouts", "steps in rollouts"),
    ]
    assert table.rows == [
        ["grpo", "4.00", "50.0%", "45.0%", "0.0%", "2.5%", "2.5%", "5.0%", "5.0%"],
        ["ppo", "4.00", "50.0%", "25.0%", "25.0%", "0.0%", "0.0%", "0.0%", "0.0%"],
    ]
