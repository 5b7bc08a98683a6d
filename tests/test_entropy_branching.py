"""Where episodes branch by entropy, and how many begin: on made-up episodes, against loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.rollout.branching import (
    entropy_rise,
    monitored_budget,
    rises,
)
from pipeline.rollout.tree import ROOT, Origin
from pipeline.settings.branching import EntropyRise
from tests.batches import section
from tests.made_up_trees import asked, at, plant


def turns_left(openings: Sequence[float]) -> Callable[[Origin], list[list[float]]]:
    """Turns of three tokens that all begin at 3, 8, 13, ...; the entropy of the last is far off."""
    return lambda origin: [[h, h, 99.0] for h in openings[max(0, origin.split - 3) // 5 :]]


FLAT = turns_left([1.0] * 4)


PLAIN = {"monitor_slope": 0.5, "slope": 0.0, "tokens": 2, "width": 1, "threshold": 0.5, "base": 0.55, "penalty": 0.1}


def test_a_penalty_counts_the_branchings_in_a_row_of_a_path() -> None:
    """At 0.55 against 0.5 a penalty of 0.1 forbids two in a row: 0.55 * 0.9 < 0.5."""
    tree = plant(20)
    places = asked(tree, entropy_rise(tree, section(EntropyRise, initial=2, penalty_per="path", **PLAIN)), FLAT)
    assert places == [[ROOT, ROOT], at((0, 8), (1, 8)), [], at((0, 18), (1, 18), (2, 18), (3, 18))]


def test_a_penalty_counts_the_rounds_in_a_row_in_which_a_prompt_branches() -> None:
    """All decisions of a round go by the same count: both paths branch, then none of four may, then all of them again."""
    tree = plant(20)
    places = asked(tree, entropy_rise(tree, section(EntropyRise, initial=2, penalty_per="prompt", **PLAIN)), FLAT)
    assert places == [[ROOT, ROOT], at((0, 8), (1, 8)), [], at((0, 18), (1, 18), (2, 18), (3, 18))]


@settings(max_examples=40)
@given(
    st.integers(0, 99),
    st.integers(1, 4),
    st.sampled_from([0.05, 0.1, 0.3]),
    st.sampled_from([0.0, 0.4]),
    st.integers(1, 2),
)
def test_a_prompts_rounds_are_those_of_a_loop(
    seed: int, initial: int, penalty: float, slope: float, width: int
) -> None:
    """AEPO's code: l stands still while a round is decided, path after path, and then moves once; 0.5 is to be reached."""
    openings = [1.0, 1.5, 0.5, 2.0, 1.2, 0.9]
    tree, draws = plant(60, seed), np.random.default_rng(seed)
    given = {**PLAIN, "base": None, "penalty": penalty, "slope": slope, "width": width}
    places = asked(
        tree,
        entropy_rise(tree, section(EntropyRise, initial=initial, penalty_per="prompt", **given)),
        turns_left(openings),
    )
    expected, paths, in_a_row = [[ROOT] * initial], initial, 0
    for turn in range(1, len(openings)):
        branching = [
            path
            for path in range(paths)
            if (draws.random() + slope * (openings[turn] - openings[0])) * max(0.0, 1 - penalty * in_a_row) >= 0.5
        ]
        expected.append(at(*((path, 3 + 5 * turn) for path in branching for _ in range(width))))
        in_a_row = in_a_row + 1 if branching else 0
        paths += len(expected[-1])
        if paths >= 60:
            break
    assert places == expected


def test_a_branch_takes_its_paths_branchings_along() -> None:
    """At 0.6 two in a row are allowed and a third is not: 0.6 * 0.8 < 0.5, for the branches of both too."""
    tree = plant(20)
    growth = entropy_rise(tree, section(EntropyRise, initial=1, penalty_per="path", **{**PLAIN, "base": 0.6}))
    assert asked(tree, growth, FLAT) == [[ROOT], at((0, 8)), at((0, 13), (1, 13)), []]


def test_episodes_branch_where_the_first_tokens_are_more_uncertain_than_the_first_responses() -> None:
    """At slope 1 from 0 the threshold of 0.5 asks for half a nat; the third token of a response does not count."""
    tree = plant(9)
    rising = {**PLAIN, "base": 0.0, "slope": 1.0, "penalty": 0.0, "width": 2}
    growth = entropy_rise(tree, section(EntropyRise, initial=1, penalty_per="path", **rising))
    places = asked(tree, growth, turns_left([1.0, 1.5, 1.25, 2.0]))
    assert places == [[ROOT], at((0, 8), (0, 8)), [], at((0, 18), (0, 18), (1, 18), (1, 18), (2, 18), (2, 18))]


@pytest.mark.parametrize("seed", range(5))
def test_without_a_base_every_decision_has_a_draw_of_its_own(seed: int) -> None:
    tree, draws = plant(40, seed), np.random.default_rng(seed)
    growth = entropy_rise(
        tree, section(EntropyRise, initial=3, penalty_per="path", **{**PLAIN, "base": None, "penalty": 0.0})
    )
    places = asked(tree, growth, FLAT)
    paths = 3
    for turn, origins in enumerate(places[1:], start=1):
        decided = [path for path in range(paths) if draws.random() >= 0.5]
        assert origins == at(*((path, 3 + 5 * turn) for path in decided))
        paths += len(origins)
    assert len(places) == 4


CHANCES = [(0, 0.5), (5, 0.33), (9, 0.09)]


@pytest.mark.parametrize(("streak", "published"), [*CHANCES, (10, 0.0), (30, 0.0)])
def test_aepos_chance_falls_with_the_branchings_in_a_row(streak: int, published: float) -> None:
    """At dH = 0: 1 - 0.5 / (1 - 0.05 l), counted over an even grid of draws."""
    grid = 20_000
    draws = (np.arange(grid) + 0.5) / grid
    share = sum(rises(0.0, streak, draw, 0.2, 0.5, 0.05) for draw in draws) / grid
    exact = max(0.0, 1 - 0.5 / max(1 - 0.05 * streak, 1e-9))
    assert abs(share - exact) <= 1 / grid
    assert round(share, 2) == published


@given(st.floats(-20, 20), st.integers(0, 50))
def test_arpo_is_aepo_with_a_constant_draw_and_no_penalty(rise: float, streak: int) -> None:
    assert rises(rise, streak, 0.5, 0.2, 0.5, 0.0) == (0.5 + 0.2 * rise >= 0.5)


@pytest.mark.parametrize(
    ("root", "tools", "expected"),
    [
        (1.0, [1.0], 9),  # 16 * 0.5 + 1
        (3.0, [1.0], 12),  # 16 * 0.7311 = 11.7
        (1.0, [2.0, 4.0], 5),  # 16 * 0.2689 = 4.3
        (1.0, [], 9),
        (500.0, [0.0], 16),  # 17 of 16
        (0.0, [500.0], 1),
        (0.0, [5000.0], 1),
    ],
)
def test_aepos_budget_of_known_entropies(root: float, tools: list[float], expected: int) -> None:
    assert monitored_budget(root, tools, 16, 0.5) == expected


@given(st.floats(0, 20), st.lists(st.floats(0, 20), max_size=4), st.integers(2, 64), st.floats(0, 100))
def test_aepos_budget_is_between_one_and_all(root: float, tools: list[float], budget: int, slope: float) -> None:
    assert 1 <= monitored_budget(root, tools, budget, slope) <= budget


def test_a_monitored_tree_begins_with_as_many_episodes_as_its_first_ones_entropies_say() -> None:
    """Of 16: the root's 1 nat against 3 over the later turns."""
    tree = plant(16)
    monitored = {**PLAIN, "base": 0.0, "slope": 0.0}
    growth = entropy_rise(tree, section(EntropyRise, initial="monitored", penalty_per="path", **monitored))
    places = asked(tree, growth, turns_left([1.0, 2.0, 4.0]))
    assert places == [[ROOT], [ROOT] * 4, [], []]
