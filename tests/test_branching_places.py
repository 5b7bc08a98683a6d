"""Where tree search, positions and temperature begin episodes: on made-up episodes, against slow searches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.rollout.branching import (
    expandable,
    positions,
    ranked_positions,
    temperature_switch,
    turn_path,
)
from pipeline.rollout.tree import ROOT, Origin, Tree
from pipeline.settings.branching import Positions, TemperatureSwitch
from tests.batches import properties, section
from tests.made_up_trees import add, asked, at, plant


def random_tree(draws: np.random.Generator, at_turns: bool) -> Tree:
    """Roots, and branches at places of any of them."""
    tree = plant(int(draws.integers(2, 14)))
    while tree.room:
        origin = ROOT
        if tree.episodes and draws.random() < 0.7:
            parent = int(draws.integers(len(tree.episodes)))
            turns = range(len(tree.turns(parent)))
            starts = (
                [int(tree.sampled(parent, turn)[0]) for turn in turns][1:] if at_turns else tree.sampled(parent)[1:]
            )
            if len(starts):
                origin = Origin(parent, int(draws.choice(starts)))
        turns = [[1.0] * int(draws.integers(1, 4)) for _ in range(draws.integers(1, 5))]
        add(tree, origin, turns, float(draws.integers(-1, 3)), bool(draws.integers(2)))
    return tree


class Node:
    """A state of the search: the episodes through it, and the states that they went on to."""

    def __init__(self) -> None:
        self.values, self.children, self.first = list[float](), dict[int, Node](), -1


def searched(tree: Tree, width: int, exploration: float) -> list[Origin] | None:
    """``expandable`` with nodes that are grown episode by episode, and a list of those to try."""
    returns = [episode.builder.outcome["return"] for episode in tree.episodes]
    low, high = min(returns), max(returns)
    root, trails = Node(), list[list[int]]()
    for episode, value in enumerate(returns):
        parent, split, _ = tree.origins[episode]
        turns = tree.turns(episode)
        shared = 0 if parent is None else [turn["start"] for turn in turns].index(split)
        trail = [*([] if parent is None else trails[parent][:shared]), *[episode] * (len(turns) - shared)]
        trails.append(trail)
        node = root
        for depth, name in enumerate([*trail, None]):
            node.values.append((value - low) / (high - low) if high > low else 0.0)
            if name is not None:
                if not node.children:
                    node.first = episode
                node.children.setdefault(name, Node())
                node = node.children[name]
                node.depth = depth + 1  # type: ignore[attr-defined]
    stack = [(root, 0)]
    while stack:
        node, depth = stack.pop()
        if not node.children:
            continue
        if len(node.children) < width:
            wanted = width - len(node.children)
            if not depth:
                return [ROOT] * wanted
            return [Origin(node.first, tree.turns(node.first)[depth]["start"])] * wanted
        bounds = []
        for child in node.children.values():
            mean = sum(child.values) / len(child.values)
            bounds.append(mean + exploration * math.sqrt(math.log(len(node.values)) / len(child.values)))
        order = sorted(range(len(bounds)), key=lambda i: (-round(bounds[i], 12), i))
        stack += [(list(node.children.values())[i], depth + 1) for i in reversed(order)]
    return None


@properties
@given(st.integers(0, 10_000), st.integers(2, 3), st.floats(0, 2))
def test_tree_search_goes_where_a_slow_search_goes(seed: int, width: int, exploration: float) -> None:
    tree = random_tree(np.random.default_rng(seed), at_turns=True)
    assert expandable(tree, width, exploration) == searched(tree, width, exploration)


def test_tree_search_by_hand() -> None:
    """Two roots of returns 0 and 1: with little exploration the better one is gone into, with much the less known one."""
    tree = plant(9)
    add(tree, ROOT, [[1.0]] * 3, value=0.0)
    add(tree, ROOT, [[1.0]] * 3, value=1.0)
    assert expandable(tree, 2, 0.1) == [Origin(1, 6)]
    add(tree, Origin(1, 6), [[1.0]] * 2, value=1.0)
    assert expandable(tree, 2, 0.1) == [Origin(1, 9)]
    assert expandable(tree, 2, 9.0) == [Origin(0, 6)]  # one episode beneath it, against two


@properties
@given(st.integers(0, 10_000))
def test_equal_beginnings_of_turn_paths_are_shared_turns(seed: int) -> None:
    """A turn is whose last token it is: a branch within a response makes that turn its own."""
    tree = random_tree(np.random.default_rng(seed), at_turns=False)

    def sampler(episode: int, token: int) -> int:
        parent, split, _ = tree.origins[episode]
        return episode if parent is None or token >= split else sampler(parent, token)

    for episode in range(len(tree.episodes)):
        ends = [turn["end"] - 1 for turn in tree.turns(episode)]
        assert turn_path(tree, episode) == tuple(sampler(episode, end) for end in ends)


@properties
@given(st.integers(0, 10_000))
def test_a_place_belongs_to_the_oldest_episode_that_has_sampled_the_token_before_it(seed: int) -> None:
    tree = random_tree(np.random.default_rng(seed), at_turns=False)
    for episode in range(len(tree.episodes)):
        for split in tree.sampled(episode).tolist()[1:]:
            owned = tree.owner(Origin(episode, split))
            assert owned.split == split
            beginnings = [other.builder.ids[:split] for other in tree.episodes]
            assert owned.parent is not None
            assert beginnings[owned.parent] == beginnings[episode]
            assert tree.origins[owned.parent].split < split
            holders = [e for e, ids in enumerate(beginnings) if ids == beginnings[episode]]
            assert owned.parent == min(holders)


@pytest.mark.parametrize(("target", "chosen"), [(0.51, 1.5), (0.5, 0.7), (0.49, 0.7)])
def test_temperature_rises_where_the_initial_episodes_are_below_the_target(target: float, chosen: float) -> None:
    """Their sampled tokens' mean entropy is 0.5 (of each episode: 0.2 over 3 tokens, 0.8 over 3)."""
    tree = plant(5)
    growth = temperature_switch(tree, section(TemperatureSwitch, initial=2, target=target, high=1.5, low=0.7))
    entropies = itertools.count()
    places = asked(tree, growth, lambda origin: [[(0.25, 0.75)[next(entropies) % 2]] * 4])
    assert places == [[ROOT, ROOT], [Origin(temperature=chosen)] * 3]


def scored_tree(values: Sequence[Sequence[float]], successes: Sequence[bool], budget: int) -> Tree:
    """Initial episodes of two turns of two tokens (at 3, 4 and 7, 8), with scores of these."""
    tree = plant(budget)
    for success, own in zip(successes, values, strict=True):
        add(tree, ROOT, [[1.0, 1.0]] * 2, success=success)
        scores = np.full(9, -np.inf)
        scores[[3, 4, 7, 8]] = own
        tree.scores.append(scores)
    return tree


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [(1, 4), (0, 7), (0, 4)]),
        ({"side": "before"}, [(1, 8), (1, 3), (0, 4)]),
        ({"among": "failed"}, [(0, 7), (0, 4), (0, 8)]),
        ({"width": 2}, [(1, 4), (1, 4), (0, 7), (0, 7)]),
        ({"width": 3}, [(1, 4), (1, 4), (1, 4)]),
    ],
)
def test_branches_begin_at_the_best_positions(changes: dict[str, Any], expected: list[tuple[int, int]]) -> None:
    """A score is its token's; ``after`` samples the next one, over an observation too, and has none after the last."""
    inf = math.inf
    tree = scored_tree([[2.0, 3.0, 1.0, -inf], [5.0, -inf, -inf, 9.0]], [False, True], 5)
    given_settings = {
        "initial": 2,
        "signal": "",
        "side": "after",
        "among": "all",
        "width": 1,
    }
    growth = positions(tree, section(Positions, **{**given_settings, **changes}))
    assert next(growth) == [ROOT, ROOT]
    assert next(growth) == at(*expected)


def test_few_positions_are_gone_through_again_and_none_gives_none() -> None:
    inf = math.inf
    few = scored_tree([[-inf, 1.0, 2.0, -inf]], [False], 6)
    settings_of = {
        "initial": 1,
        "signal": "",
        "side": "before",
        "among": "all",
        "width": 1,
    }
    growth = positions(few, section(Positions, **settings_of))
    next(growth)
    assert next(growth) == at((0, 7), (0, 4), (0, 7), (0, 4), (0, 7))
    none = scored_tree([[-inf] * 4], [False], 6)
    growth = positions(none, section(Positions, **settings_of))
    next(growth)
    assert next(growth, None) is None


@properties
@given(st.integers(0, 10_000), st.sampled_from(["before", "after"]))
def test_positions_are_ranked_by_score_then_in_order(seed: int, side: Any) -> None:
    draws = np.random.default_rng(seed)
    sampled = [np.flatnonzero(draws.random(12) < 0.6) for _ in range(3)]
    scores = [np.where(draws.random(12) < 0.3, -np.inf, draws.integers(0, 4, 12)) for _ in range(3)]
    found = []
    for row, places in enumerate(sampled):
        for number, token in enumerate(places.tolist()):
            target = number if side == "before" else number + 1
            if target < len(places) and np.isfinite(scores[row][token]):
                found.append((scores[row][token], row, int(places[target])))
    expected = [(row, split) for _, row, split in sorted(found, key=lambda item: (-item[0], item[1], item[2]))]
    assert ranked_positions(scores, sampled, side) == expected
