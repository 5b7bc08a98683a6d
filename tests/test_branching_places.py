"""Where tree search, positions and temperature begin episodes: on made-up episodes, against slow searches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.rollout.branching import (
    expandable,
    first_error,
    others,
    positions,
    ranked_positions,
    temperature_shift,
    turn_path,
)
from pipeline.rollout.candidates import Likeliest
from pipeline.rollout.tree import ROOT, Origin, Tree
from pipeline.settings.branching import Positions, TemperatureShift, TreeSearch
from pipeline.trajectories.trajectory import Role
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


def searched(tree: Tree, width: int, exploration: float, discount: float) -> list[Origin] | None:
    """``expandable`` with nodes that are grown episode by episode, and a list of those to try."""
    root, trails = Node(), list[list[int]]()
    for episode in range(len(tree.episodes)):
        parent, split = tree.origins[episode][:2]
        turns = tree.turns(episode)
        shared = 0 if parent is None else [turn["start"] for turn in turns].index(split)
        trail = [*([] if parent is None else trails[parent][:shared]), *[episode] * (len(turns) - shared)]
        trails.append(trail)
        node = root
        for depth, name in enumerate([*trail, None]):
            # Of the turn that led here: what it earned, and what came after it, less for every turn that it is away.
            node.values.append(
                sum(discount ** (j - depth + 1) * turns[j]["reward"] for j in range(max(0, depth - 1), len(turns)))
            )
            if name is not None:
                if not node.children:
                    node.first = episode
                node.children.setdefault(name, Node())
                node = node.children[name]
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
            bounds.append(mean + exploration * math.sqrt(math.log(len(node.values)) / (1 + len(child.values))))
        order = sorted(range(len(bounds)), key=lambda i: (-round(bounds[i], 12), i))
        stack += [(list(node.children.values())[i], depth + 1) for i in reversed(order)]
    return None


@properties
@given(st.integers(0, 10_000), st.integers(2, 3), st.floats(0, 2), st.sampled_from([0.5, 0.99, 1.0]))
def test_tree_search_goes_where_a_slow_search_goes(seed: int, width: int, exploration: float, discount: float) -> None:
    tree = random_tree(np.random.default_rng(seed), at_turns=True)
    asked_for = section(TreeSearch, width=width, exploration=exploration, discount=discount)
    assert expandable(tree, asked_for) == searched(tree, width, exploration, discount)


def test_tree_search_by_hand() -> None:
    """Two roots of returns 0 and 1: with little exploration the better one is gone into, with much the less known one."""
    little, much = (section(TreeSearch, width=2, exploration=c, discount=0.5) for c in (0.1, 9.0))
    tree = plant(9)
    add(tree, ROOT, [[1.0]] * 3, value=0.0)
    add(tree, ROOT, [[1.0]] * 3, value=1.0)
    assert expandable(tree, little) == [Origin(1, 6)]
    add(tree, Origin(1, 6), [[1.0]] * 2, value=1.0)
    assert expandable(tree, little) == [Origin(1, 9)]
    assert expandable(tree, much) == [Origin(0, 6)]  # one episode beneath it, against two


def test_values_of_the_search_are_raw_and_discounted() -> None:
    """Returns of 1 and 0.8 a turn later are worth 0.5 and 0.4. Scaled to [0, 1] they would be 1 and 0, and the first one's
    bound the higher one: 1 + sqrt(ln 3 / 3) with its two of three visits against sqrt(ln 3 / 2)."""
    asked_for = section(TreeSearch, width=2, exploration=1.0, discount=0.5)
    tree = plant(9)
    add(tree, ROOT, [[1.0]] * 2, value=1.0)
    add(tree, ROOT, [[1.0]] * 2, value=0.8)
    add(tree, Origin(0, 6), [[1.0]], value=1.0)
    assert 0.5 + math.sqrt(math.log(3) / 3) < 0.4 + math.sqrt(math.log(3) / 2)
    assert expandable(tree, asked_for) == [Origin(1, 6)]


@properties
@given(st.integers(0, 10_000))
def test_equal_beginnings_of_turn_paths_are_shared_turns(seed: int) -> None:
    """A turn is whose last token it is: a branch within a response makes that turn its own."""
    tree = random_tree(np.random.default_rng(seed), at_turns=False)

    def sampler(episode: int, token: int) -> int:
        parent, split = tree.origins[episode][:2]
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


@pytest.mark.parametrize(
    ("target", "before", "expected"), [(0.5, 0.4, 1.1), (0.5, 0.75, 0.8), (0.5, 0.0, 1.2), (0.0, 0.1, 0.9)]
)
def test_the_temperature_is_one_and_what_entropy_lacks(target: float, before: float, expected: float) -> None:
    tree = plant(5)
    tree.entropy_before = before
    growth = temperature_shift(tree, section(TemperatureShift, share=0.4, target=target, low=0.8, high=1.2))
    (places,) = asked(tree, growth, lambda origin: [[1.0]])
    assert places[:3] == [ROOT] * 3
    assert [origin.temperature for origin in places[3:]] == pytest.approx([expected] * 2)


def test_a_share_below_one_episode_is_met_over_many_initial_states() -> None:
    """1/64 of 16 is a quarter of an episode; and one episode is always left at the usual temperature."""
    few, most = (section(TemperatureShift, share=share, target=0.5, low=0.8, high=1.2) for share in (1 / 64, 0.999))
    drawn = [sum(origin != ROOT for origin in next(temperature_shift(plant(16, seed), few))) for seed in range(400)]
    assert set(drawn) == {0, 1}
    assert abs(sum(drawn) / 400 - 0.25) < 0.06
    assert [sum(origin == ROOT for origin in next(temperature_shift(plant(2, seed), most))) for seed in range(9)] == [
        1
    ] * 9


def faulty(tree: Tree, episode: int, turn: int, roles: Sequence[Role], valid: bool = False) -> None:
    """Give a turn's tokens these roles."""
    builder = tree.episodes[episode].builder
    span = builder.turns[turn]
    builder.tokens["role"][span["start"] : span["end"]] = [int(role) for role in roles]
    builder.turns[turn]["valid"] = valid


def test_the_first_erroneous_token_is_in_the_first_response_that_was_not_executed() -> None:
    """Of two turns of two tokens, at 3, 4 and 7, 8."""
    thought, acted, left = Role.REASONING, Role.ACTION, Role.OTHER
    for first, second, valid, expected in (
        ((thought, acted), (thought, acted), (True, True), None),
        ((thought, acted), (acted, acted), (True, False), 7),
        ((thought, acted), (thought, acted), (False, False), 4),
        ((thought, left), (acted, acted), (False, True), 4),
        ((left, acted), (acted, acted), (False, True), 4),  # the action comes before what left the format
        ((thought, thought), (acted, acted), (False, False), None),  # it was cut while it thought
    ):
        tree = scored_tree([[0.0] * 4], [False], 5)
        faulty(tree, 0, 0, first, valid[0])
        faulty(tree, 0, 1, second, valid[1])
        assert first_error(tree, 0) == expected


def test_errors_come_before_scores_and_successes_have_none() -> None:
    tree = scored_tree([[2.0, 3.0, 1.0, 0.0], [9.0, 9.0, 9.0, 9.0], [0.0, 0.0, 0.0, 4.0]], [False, True, False], 9)
    for episode in range(3):
        faulty(tree, episode, 0, [Role.REASONING, Role.ACTION], valid=True)
        faulty(tree, episode, 1, [Role.ACTION, Role.ACTION], valid=episode == 0)
    growth = positions(
        tree, section(Positions, initial=3, side="before", among="erroneous", width=2, candidates="sampled")
    )
    assert next(growth) == [ROOT] * 3
    assert next(growth) == at((2, 7), (2, 7), (2, 8), (2, 8), (0, 4), (0, 4))


def test_the_likeliest_others_begin_the_branches_of_a_place() -> None:
    tree = scored_tree([[2.0, 3.0, 1.0, 0.0]], [False], 6)
    there = tree.episodes[0].builder.ids
    tokens = np.array([[there[place], 70, 71, 72] for place in range(9)])
    tree.likeliest = [Likeliest(tokens, np.array([[-0.5, -1.0, -2.0, -3.0]] * 9))]
    found = others(tree, 0, 4)
    assert [origin.candidate for origin in found] == [(70, -1.0, 1.0), (71, -2.0, 1.0), (72, -3.0, 1.0)]
    growth = positions(tree, section(Positions, initial=1, side="before", among="all", width=2, candidates="likeliest"))
    next(growth)
    places = next(growth)
    assert [(o.parent, o.split, o.candidate[0]) for o in places if o.candidate] == [
        *((0, split, token) for split in (4, 3, 7) for token in (70, 71))
    ]


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
        ({"among": "erroneous", "side": "before"}, [(0, 4), (0, 3), (0, 7)]),
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
        "candidates": "sampled",
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
        "candidates": "sampled",
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
