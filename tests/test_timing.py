"""Phases: every second is counted once, under the innermost name."""

from __future__ import annotations

import time

import pytest

from pipeline.timing import Phases


def test_a_phase_inside_another_is_not_counted_twice() -> None:
    phases = Phases()
    began = time.perf_counter()
    with phases.phase("prepare"):
        time.sleep(0.01)
        for _ in range(2):
            with phases.phase("collect"):
                time.sleep(0.03)
                with phases.phase("annotate"):
                    time.sleep(0.02)
    spent = time.perf_counter() - began
    taken = phases.take()
    assert set(taken) == {"prepare", "collect", "annotate"}
    assert taken["collect"] >= 0.06
    assert taken["annotate"] >= 0.04
    assert 0.01 <= taken["prepare"] < 0.06  # were anything inside counted, it would be 0.11 or more
    assert sum(taken.values()) == pytest.approx(spent, abs=2e-3)


def test_what_was_taken_is_gone_and_an_error_is_timed_too() -> None:
    phases = Phases()
    with pytest.raises(KeyError), phases.phase("update"):
        raise KeyError
    assert list(phases.take()) == ["update"]
    assert phases.take() == {}
