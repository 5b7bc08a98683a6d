"""What a run could have seen, and seeds that would decide: against simulation."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.analysis.intervals import TwoWay, two_way
from pipeline.analysis.power import MOST_SEEDS, detectable, seeds_needed, states_needed
from pipeline.analysis.verdicts import difference_p, equivalence_p
from pipeline.workspace.randomness import generator


def grids(
    trials: int, seeds: int, states: int, mean: float = 0.0, seed: float = 0.1, state: float = 0.05
) -> np.ndarray:
    draws = generator(0, "power", seeds, states)
    parts = ((seed, (trials, seeds, 1)), (state, (trials, 1, states)), (0.3, (trials, seeds, states)))
    return np.asarray(mean + sum(spread * draws.standard_normal(shape) for spread, shape in parts))


def average(trials: int, seeds: int, states: int, **parts: float) -> TwoWay:
    """The parts of the variance as they truly are, about: means over many grids."""
    found = two_way(grids(trials, seeds, states, **parts))
    error = np.sqrt(np.mean(np.square(found.error)))
    return TwoWay(*(np.asarray(part.mean()) for part in found))._replace(error=np.asarray(error))


@pytest.mark.parametrize(("seeds", "alpha"), [(6, 0.05), (8, 0.05), (10, 0.05), (20, 0.05), (10, 0.05 / 4)])
def test_the_detectable_difference_is_detected_in_about_80_per_cent(seeds: int, alpha: float) -> None:
    size = detectable(average(2000, seeds, 32), seeds, alpha)
    assert size is not None
    many = grids(2000, seeds, 32, size)
    assert 0.7 < np.mean(difference_p(two_way(many), many.mean(axis=-1), 2**10) < alpha) < 0.9


def test_too_few_seeds_detect_nothing_and_more_detect_less() -> None:
    found = [detectable(average(200, seeds, 32), seeds, 0.05) for seeds in (5, 6, 10, 20)]
    assert found[0] is None
    assert sorted(found[1:], key=lambda size: -(size or 0)) == found[1:]
    assert detectable(two_way(np.ones((6, 4))), 6, 0.05) == 0.0


def test_the_seeds_needed_decide_either_way() -> None:
    parts = average(2000, 10, 64, seed=0.1, state=0.02)
    needed = seeds_needed(parts, 64, 0.05, 0.05)
    assert needed is not None
    assert 20 < needed < 100
    differing, equal = (grids(500, needed, 64, mean, 0.1, 0.02) for mean in (0.05, 0.0))
    assert np.mean(difference_p(two_way(differing), differing.mean(axis=-1), 2**10) < 0.05) > 0.7
    assert np.mean(equivalence_p(two_way(equal), 0.05) < 0.05) > 0.7
    fewer = grids(500, needed // 3, 64, 0.05, 0.1, 0.02)
    assert np.mean(difference_p(two_way(fewer), fewer.mean(axis=-1), 2**10) < 0.05) < 0.6


def test_where_states_are_the_limit_seeds_are_not_named_but_states_are() -> None:
    parts = average(500, 10, 16, state=0.3)
    assert seeds_needed(parts, 16, 0.05, 0.05) is None
    states = states_needed(parts, 16, 0.05, 0.05)
    assert states is not None
    assert 16 < states < 2000
    assert seeds_needed(parts, states, 0.05, 0.05) is not None
    assert states_needed(average(500, 10, 64, state=0.0), 64, 0.05, 0.05) is None


def test_the_seeds_needed_are_the_fewest_and_capped() -> None:
    parts = average(500, 10, 64, state=0.0)
    sizes = [seeds_needed(parts, 64, 0.05, effect) for effect in (0.5, 0.1, 0.05, 0.02)]
    assert sizes[0] == 6
    assert sizes == sorted(sizes, key=lambda size: size or 0)
    assert seeds_needed(parts, 64, 0.05, 0.001) is None
    assert all(size is not None and size <= MOST_SEEDS for size in sizes)
