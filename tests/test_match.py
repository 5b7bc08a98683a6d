"""The search for a learning rate that moves the policy as far as another method does."""

from __future__ import annotations

import pytest

from pipeline.analysis.matching import CLOSE, STEPS, Match, nearest, search


def test_where_the_kl_goes_with_the_square_of_the_rate_the_second_try_is_close() -> None:
    tried: list[float] = []

    def moved(rate: float) -> float:
        tried.append(rate)
        return 100 * rate**2

    found = nearest(search(moved, 0.04, 0.001), 0.04)
    assert tried == [0.001, 0.02]
    assert found == Match(0.02, pytest.approx(0.04))
    assert found.off(0.04) < CLOSE


def test_a_search_that_does_not_come_close_gives_the_nearest_that_it_has_measured() -> None:
    """The KL stays too low whatever the rate; a rate that nobody tried would be a claim without a measurement."""
    measured = [0.01, 0.0139, 0.012, 0.0134, 0.011]
    tried: list[float] = []

    def moved(rate: float) -> float:
        tried.append(rate)
        return measured[len(tried) - 1]

    found = nearest(search(moved, 0.04, 1e-3), 0.04)
    assert len(tried) == STEPS
    assert found == Match(tried[1], 0.0139)
    assert found.off(0.04) > CLOSE
