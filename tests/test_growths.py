"""What a growth asks for, seeing a tree of made-up episodes alone, and the scores by which positions are chosen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.rollout.branch_scores import action_starts, blank_tokens, branch_scores, omega, standardised
from pipeline.rollout.branching import (
    entropy_rise,
    expandable,
    monitored_budget,
    positions,
    ranked_positions,
    rises,
    temperature_switch,
    turn_path,
)
from pipeline.rollout.specs import iteration_specs
from pipeline.rollout.tree import ROOT, Origin, Tree
from pipeline.settings.branching import Independent
from pipeline.trajectories.builder import EpisodeBuilder, build
from pipeline.trajectories.trajectory import Role, Trajectories
from tests.batches import properties
from tests.forests import lake, planted, rows
from tests.test_collector import NAME, TOKENIZER

# -------------------------------------------------------------------------------------------------- made-up episodes

fresh = itertools.count(100)


def plant(budget: int, seed: int = 0) -> Tree:
    return Tree(specs=[None] * budget, draws=np.random.default_rng(seed))  # type: ignore[list-item]


def say(builder: EpisodeBuilder, turns: Sequence[Sequence[float]], start: int | None = None) -> None:
    """Turns with tokens of these entropies, two tokens of observation between them; the first may have begun."""
    for number, entropies in enumerate(turns):
        if number:
            builder.append_text([next(fresh), next(fresh)], Role.OBSERVATION)
        begun = len(builder) if start is None or number else start
        ids, size = [next(fresh) for _ in entropies], len(entropies)
        builder.append_sampled(ids, [Role.REASONING] * size, [-1.0] * size, list(entropies))
        builder.close_turn(begun, 0.0, "", False, "s")


def add(
    tree: Tree, origin: Origin, turns: Sequence[Sequence[float]], value: float = 0.0, success: bool = False
) -> None:
    """An episode that was played from there."""
    origin, name = tree.owner(origin), str(len(tree.episodes))
    if origin.parent is None:
        builder, start = EpisodeBuilder(episode_id=name), None
        builder.append_text([1, 2, 3], Role.PROMPT)
    else:
        parent = tree.episodes[origin.parent].builder
        builder = parent.before(origin.split, episode_id=name)
        start = parent.turns[len(builder.turns)]["start"]
    say(builder, turns, start)
    builder.finish(success, "turns")
    builder.outcome["return"] = value
    tree.episodes.append(SimpleNamespace(builder=builder))  # type: ignore[arg-type]
    tree.origins.append(origin)


def asked(tree: Tree, growth: Iterator[list[Origin]], turns: Callable[[Origin], Any]) -> list[list[Origin]]:
    """What a growth asks for, answered with episodes of these turns until there is no room."""
    places = []
    while tree.room and (origins := next(growth, None)) is not None:
        places.append(origins)
        for origin in origins[: tree.room]:
            add(tree, origin, turns(origin))
    return places


def at(*places: tuple[int, int]) -> list[Origin]:
    return [Origin(parent, split) for parent, split in places]


def turns_left(openings: Sequence[float]) -> Callable[[Origin], list[list[float]]]:
    """Turns of three tokens that all begin at 3, 8, 13, ...; the entropy of the last is far off."""
    return lambda origin: [[h, h, 99.0] for h in openings[max(0, origin.split - 3) // 5 :]]


FLAT = turns_left([1.0] * 4)
PLAIN = {"monitor_slope": 0.5, "slope": 0.0, "tokens": 2, "width": 1, "threshold": 0.5, "base": 0.55, "penalty": 0.1}


def test_a_penalty_counts_the_branchings_in_a_row_of_a_path() -> None:
    """At 0.55 against 0.5 a penalty of 0.1 forbids two in a row: 0.55 * 0.9 < 0.5."""
    tree = plant(20)
    places = asked(tree, entropy_rise(tree, initial=2, penalty_per="path", **PLAIN), FLAT)
    assert places == [[ROOT, ROOT], at((0, 8), (1, 8)), [], at((0, 18), (1, 18), (2, 18), (3, 18))]


def test_a_penalty_counts_the_rounds_in_a_row_in_which_a_prompt_branches() -> None:
    """All decisions of a round go by the same count: both paths branch, then none of four may, then all of them again."""
    tree = plant(20)
    places = asked(tree, entropy_rise(tree, initial=2, penalty_per="prompt", **PLAIN), FLAT)
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
    section = {**PLAIN, "base": None, "penalty": penalty, "slope": slope, "width": width}
    places = asked(tree, entropy_rise(tree, initial=initial, penalty_per="prompt", **section), turns_left(openings))
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
    growth = entropy_rise(tree, initial=1, penalty_per="path", **{**PLAIN, "base": 0.6})
    assert asked(tree, growth, FLAT) == [[ROOT], at((0, 8)), at((0, 13), (1, 13)), []]


def test_episodes_branch_where_the_first_tokens_are_more_uncertain_than_the_first_responses() -> None:
    """At slope 1 from 0 the threshold of 0.5 asks for half a nat; the third token of a response does not count."""
    tree = plant(9)
    rising = {**PLAIN, "base": 0.0, "slope": 1.0, "penalty": 0.0, "width": 2}
    growth = entropy_rise(tree, initial=1, penalty_per="path", **rising)
    places = asked(tree, growth, turns_left([1.0, 1.5, 1.25, 2.0]))
    assert places == [[ROOT], at((0, 8), (0, 8)), [], at((0, 18), (0, 18), (1, 18), (1, 18), (2, 18), (2, 18))]


@pytest.mark.parametrize("seed", range(5))
def test_without_a_base_every_decision_has_a_draw_of_its_own(seed: int) -> None:
    tree, draws = plant(40, seed), np.random.default_rng(seed)
    growth = entropy_rise(tree, initial=3, penalty_per="path", **{**PLAIN, "base": None, "penalty": 0.0})
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
    growth = entropy_rise(tree, initial="monitored", penalty_per="path", **monitored)
    places = asked(tree, growth, turns_left([1.0, 2.0, 4.0]))
    assert places == [[ROOT], [ROOT] * 4, [], []]


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
    growth = temperature_switch(tree, initial=2, target=target, high=1.5, low=0.7)
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
        "discount": 0,
        "bounds": (),
    }
    growth = positions(tree, **{**given_settings, **changes})  # type: ignore[arg-type]
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
        "discount": 0,
        "bounds": (),
    }
    growth = positions(few, **settings_of)  # type: ignore[arg-type]
    next(growth)
    assert next(growth) == at((0, 7), (0, 4), (0, 7), (0, 4), (0, 7))
    none = scored_tree([[-inf] * 4], [False], 6)
    growth = positions(none, **settings_of)  # type: ignore[arg-type]
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


# ------------------------------------------------------------------------------------------------------------ signals


def independent_table(seed: int = 0) -> Trajectories:
    changed = lake()
    return planted(changed, Independent(), specs=iteration_specs(changed, NAME, seed, 0))


@settings(max_examples=20)
@given(st.integers(0, 500), st.sampled_from([0.0, 0.9, 0.99, 1.0]), st.sampled_from([(0.8, 1.2), (0.1, 4.0)]))
def test_appos_score_is_that_of_loops(seed: int, discount: float, bounds: tuple[float, float]) -> None:
    table = independent_table(seed % 7)
    moved = np.random.default_rng(seed).normal(0, 0.3, len(table.input_ids))
    leads = np.ones(len(moved))
    for episode in range(len(table)):
        chosen = [t for t in range(table.offsets[episode], table.offsets[episode + 1]) if table.sampled[t]]
        for i, t in enumerate(chosen):
            total = sum(discount**k * moved[later] for k, later in enumerate(chosen[i:]))
            leads[t] = min(max(math.exp(total), bounds[0]), bounds[1])
    np.testing.assert_allclose(omega(table, moved, discount, bounds), leads, rtol=1e-9)

    blank = np.random.default_rng(seed).random(len(moved)) < 0.2
    scores = branch_scores("branching_score", table, np.random.default_rng(0), moved, discount, bounds, blank)
    strict: dict[int, float] = {}
    rest: dict[int, float] = {}
    for episode in range(len(table)):
        chosen = [t for t in range(table.offsets[episode], table.offsets[episode + 1]) if table.sampled[t]]
        z = {}
        for name, values in (("entropy", table.entropy.astype(float)), ("omega", leads)):
            own = [values[t] for t in chosen]
            mean = sum(own) / len(own)
            spread = math.sqrt(sum((value - mean) ** 2 for value in own) / len(own))
            alike = len(set(own)) == 1  # their float mean may differ from them
            z[name] = {t: 0.0 if alike else (values[t] - mean) / (spread + 1e-6) for t in chosen}
        for t in chosen:
            if not blank[t]:
                both = z["entropy"][t] > 0 and z["omega"][t] > 0
                (strict if both else rest)[t] = z["entropy"][t] * z["omega"][t]
    assert np.flatnonzero(np.isfinite(scores)).tolist() == sorted([*strict, *rest])
    for t, product in strict.items():
        assert scores[t] == pytest.approx(product)
    behind = {round(scores[t] - product, 9) for t, product in rest.items()}
    assert len(behind) == 1  # the order of their products
    assert max(scores[t] for t in rest) < min((scores[t] for t in strict), default=0)


def test_where_too_few_tokens_qualify_the_next_best_products_follow() -> None:
    """Only the last is high in both; the first has a larger product, of two low ones, and comes behind it."""
    made = build([lone_episode([0.0, 1.0, 3.0, 4.0])])
    shift = np.array([0, 0, 0, -0.19, 0.02, -0.04, 0.05])
    scores = branch_scores("branching_score", made, np.random.default_rng(0), shift, 0.0)
    product = standardised(np.array([0.0, 1.0, 3.0, 4.0])) * standardised(np.exp(shift[3:]))
    assert product[0] > product[3] > 0 > product[1]
    assert scores[6] == pytest.approx(product[3])
    assert np.argsort(-scores, kind="stable")[:4].tolist() == [6, 3, 5, 4]
    still = branch_scores("branching_score", made, np.random.default_rng(0), np.zeros(7))
    assert np.isfinite(still).sum() == 4
    assert len(set(still[3:])) == 1


def test_scores_are_each_episodes_own() -> None:
    """An episode of tenfold entropies, and one whose policy has moved ten times as far, change no score of another's."""
    one, other = [0.0, 1.0, 3.0, 4.0], [40.0, 10.0, 30.0, 20.0]
    shift = np.array([0, 0, 0, -0.1, 0.02, -0.04, 0.1])
    both = branch_scores(
        "branching_score",
        build([lone_episode(one), lone_episode(other)]),
        np.random.default_rng(0),
        np.r_[shift, shift],
        0.0,
    )
    alone = branch_scores("branching_score", build([lone_episode(one)]), np.random.default_rng(0), shift, 0.0)
    assert both[6] == alone[6]


def test_whitespace_is_no_place_to_branch() -> None:
    texts = [" ", "so", "\n", "a b"]
    ids = [i for text in texts for i in TOKENIZER(text, add_special_tokens=False)["input_ids"]]
    found = blank_tokens(TOKENIZER, np.array([*ids, TOKENIZER.eos_token_id]))
    assert found.tolist() == [not TOKENIZER.decode([i]).strip() for i in ids] + [False]
    assert {True, False} == set(found[: len(ids)].tolist())
    made = build([lone_episode([4.0, 1.0, 3.0, 0.0])])
    shift = np.array([0, 0, 0, 0.1, -0.02, 0.04, -0.1])
    blank = np.array([False, False, False, True, False, False, False])
    scores = branch_scores("branching_score", made, np.random.default_rng(0), shift, 0.0, blank=blank)
    plain = branch_scores("branching_score", made, np.random.default_rng(0), shift, 0.0)
    assert int(np.argmax(plain)) == 3
    assert int(np.argmax(scores)) == 5
    assert not np.isfinite(scores[3])


def lone_episode(entropies: Sequence[float]) -> EpisodeBuilder:
    names = ("episode_id", "group_id", "environment", "state_key")
    builder = EpisodeBuilder(**dict.fromkeys(names, "e"), seed=0, iteration=0, policy_version=0)
    builder.append_text([1, 2, 3], Role.PROMPT)
    say(builder, [entropies])
    builder.finish(False, "turns")
    return builder


def test_signals_score_sampled_tokens_alone() -> None:
    table = independent_table()
    draws = lambda: np.random.default_rng(5)  # noqa: E731
    entropy = branch_scores("entropy", table, draws())
    np.testing.assert_array_equal(entropy, np.where(table.sampled, table.entropy.astype(np.float64), -np.inf))
    anywhere = branch_scores("random", table, draws())
    np.testing.assert_array_equal(np.isfinite(anywhere), table.sampled)
    acting = branch_scores("action_random", table, draws())
    action = table.sampled & (table.role == Role.ACTION)
    np.testing.assert_array_equal(acting, np.where(action, draws().random(len(action)), -np.inf))
    starts = branch_scores("action_start", table, draws())
    np.testing.assert_array_equal(np.isfinite(starts), action_starts(table))
    expected = []
    for row, base in zip(rows(table), table.offsets, strict=False):
        for turn in row["turns"]:
            own = [t for t in range(turn["start"], turn["end"]) if row["role"][t] == Role.ACTION and row["sampled"][t]]
            expected += [int(base) + t for t in own[:1]]
    assert np.flatnonzero(action_starts(table)).tolist() == expected
    assert expected
    with pytest.raises(ValueError, match="not annotated"):
        branch_scores("reference_energy", table, draws())
    with pytest.raises(ValueError, match="policy that has moved"):
        branch_scores("branching_score", table, draws())
