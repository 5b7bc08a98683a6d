"""Trees of trajectories: what passes through a token, where stretches compete, and the advantages made of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.objective.methods import token_advantages, token_weights
from pipeline.objective.trees import first_tokens, segments, through
from pipeline.trajectories.trajectory import Role, Trajectories
from tests.batches import CLOSE, method, population, properties
from tests.tree_cases import ACTFOCUS, ADVANTAGES, Written, batch_of, forests, row, sapling


def standardised(values: list[float], std: bool = True, ddof: int = 1, eps: float = 1e-6) -> list[float]:
    if max(values) - min(values) < 1e-12:
        return [0.0] * len(values)
    mean, variance = population(values)
    deviation = math.sqrt(variance * len(values) / (len(values) - ddof))
    return [(value - mean) / (deviation + eps if std else 1.0) for value in values]


def over(rows: list[int], w: Written, **settings: Any) -> dict[int, float]:
    """The returns of some rows, standardised within each group of these."""
    result: dict[int, float] = {}
    for group in set(w.group):
        own = [e for e in rows if w.group[e] == group]
        if own:
            result |= dict(zip(own, standardised([w.returns[e] for e in own], **settings), strict=True))
    return result


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


Expected = tuple[list[float], list[float]]
"""Per token the advantage, and how often it counts."""


def expect_shared(w: Written, soft: bool, **settings: Any) -> Expected:
    own = over(list(w.rows), w, **settings)
    advantage, count = [0.0] * len(w.nodes), [0.0] * len(w.nodes)
    for t, node in w.chosen():
        rows = w.through(node)
        advantage[t], count[t] = mean([own[e] for e in rows]), len(rows) if soft else 1.0
    return advantage, count


def expect_credit(w: Written, **settings: Any) -> Expected:
    settings = {"ddof": 0, **settings}  # the source's default
    initial = over([e for e in w.rows if w.parent[e] < 0], w, **settings)
    branches = over([e for e in w.rows if w.parent[e] >= 0], w, **settings)
    advantage, count = [0.0] * len(w.nodes), [0.0] * len(w.nodes)
    for t, node in w.chosen():
        if node[0] in initial:
            leaving = [branches[e] for e in w.through(node) if e in branches]
            advantage[t] = initial[node[0]] + 0.7 * (mean(leaving) if leaving else 0.0)
            count[t] = 1.0
    return advantage, count


def ahead(w: Written, e: int, place: int) -> int | None:
    """The turn of a row that holds a place, or the next one."""
    turns = [int(w.batch.turn[w.first[e] + later]) for later in range(place, w.length[e])]
    return next((turn for turn in turns if turn >= 0), None)


def from_turn(w: Written, e: int, turn: int | None, discount: float) -> float:
    """Discounted return of a row from one of its turns on; a shared token's reward stands where it was sampled."""
    total = 0.0
    for later in range(w.length[e]):
        own = int(w.batch.turn[w.first[e] + later])
        if turn is not None and own >= turn:
            source, place = w.node(e, later)
            total += discount ** (own - turn) * float(w.batch.reward[w.first[source] + place])
    return total


def answered(w: Written, e: int, turn: int | None) -> bool:
    tokens = [t for t in range(w.first[e], w.first[e] + w.length[e]) if turn is not None and w.batch.turn[t] == turn]
    return any(w.batch.role[t] == Role.ACTION for t in tokens)


def expect_siblings(
    w: Written,
    first_turn: bool = False,
    discount: float = 1.0,
    score: tuple[float, float] = (0.0, 0.0),
    least: float | None = None,
    **settings: Any,
) -> Expected:
    advantage, count = [0.0] * len(w.nodes), [0.0] * len(w.nodes)
    # Competitors begin behind the same node; one that is not trained on anywhere, such as a prompt's, competes too.
    begins = {w.stretch(node)[0] for node in w.nodes if node in w.paths[node[0]]}

    def worth(start: tuple[int, int]) -> float:
        found = [from_turn(w, e, ahead(w, e, start[1]), discount) for e in w.through(start)]
        return mean(found) + score[0 if answered(w, start[0], ahead(w, *start)) else 1]

    for t, node in w.chosen():
        start = w.stretch(node)[0]
        rivals = sorted(own for own in begins if w.before(own) == w.before(start))
        own = standardised([worth(rival) for rival in rivals], **settings)[rivals.index(start)]
        inside = not first_turn or int(w.batch.turn[t]) == ahead(w, *start)
        if inside and (least is None or abs(own) > least):
            advantage[t], count[t] = own, 1.0
    return advantage, count


def expect_candidates(w: Written) -> Expected:
    advantage, count = [0.0] * len(w.nodes), [0.0] * len(w.nodes)
    chances = {node: math.exp(float(w.batch.logprob[t])) for t, node in w.chosen()}
    starts = {node for _, node in w.chosen() if w.stretch(node)[0] == node and w.before(node)[0] != "initial"}
    for t, node in w.chosen():
        if node in starts:
            rivals = [own for own in starts if w.before(own) == w.before(node)]
            worth = {own: mean([w.returns[e] for e in w.through(own)]) for own in rivals}
            usual = math.fsum(chances[own] * worth[own] for own in rivals) / math.fsum(chances[own] for own in rivals)
            pulls = {own: chances[own] * (worth[own] - usual) for own in rivals}
            alike = max(worth.values()) - min(worth.values()) < 1e-12
            advantage[t] = 0.0 if alike else pulls[node] / math.fsum(map(abs, pulls.values()))
            count[t] = 1.0
    return advantage, count


def expect_reinforced(w: Written, **settings: Any) -> Expected:
    own = over([e for e in w.rows if w.regular[e]], w, **settings)
    advantage, count = [0.0] * len(w.nodes), [0.0] * len(w.nodes)
    usual = [t for t, (e, _) in w.chosen() if w.regular[e]]
    positive = [t for t, (e, _) in w.chosen() if not w.regular[e] and w.success[e]]
    for t in (*usual, *positive):
        count[t] = 1.0
        advantage[t] = own[w.nodes[t][0]] if t in usual else 0.5 * len(usual) / len(positive)
    return advantage, count


EXPECTED: dict[str, Callable[..., Expected]] = {
    "shared_prefix": lambda w, **settings: expect_shared(w, True, **settings),
    "shared_prefix_hard": lambda w, **settings: expect_shared(w, False, **settings),
    "prefix_credit": expect_credit,
    "siblings": expect_siblings,
    "siblings_turn": lambda w, **settings: expect_siblings(w, True, 0.9, (0.1, -0.05), 1e-4, **settings),
    "candidates": expect_candidates,
    "reinforced": expect_reinforced,
}


# -------------------------------------------------------------------------------------------------------- the tree


@properties
@given(forests())
def test_a_token_is_trained_on_in_the_row_that_sampled_it(trajectories: Trajectories) -> None:
    """And every token that was sampled is, exactly once."""
    batch = batch_of(trajectories)
    w = Written(batch)
    assert w.first == first_tokens(batch).tolist()
    sampled = {w.node(*w.nodes[t]) for t in np.flatnonzero(trajectories.sampled)}
    trained = [node for _, node in w.chosen()]
    assert len(trained) == len(set(trained))
    assert set(trained) == sampled
    for t, (e, place) in enumerate(w.nodes):
        source, origin = w.node(e, place)
        assert trajectories.input_ids[t] == trajectories.input_ids[w.first[source] + origin]


@properties
@given(forests())
def test_shared_and_observed_tokens_have_no_reward(trajectories: Trajectories) -> None:
    """A shared token's reward stands where it was sampled: the rewards of a path add up to its return."""
    batch = batch_of(trajectories)
    w = Written(batch)
    assert not bool(batch.reward[~batch.trainable].any())
    for e, path in enumerate(w.paths):
        total = math.fsum(float(batch.reward[w.first[source] + place]) for source, place in path)
        assert total == pytest.approx(w.returns[e], abs=1e-6)


@properties
@given(forests(), st.integers(0, 2**32 - 1))
def test_through_equals_a_loop_over_all_rows(trajectories: Trajectories, seed: int) -> None:
    batch = batch_of(trajectories)
    w = Written(batch)
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal(batch.trajectories))
    sums, counts = through(batch, values)
    for t, node in w.chosen():
        rows = w.through(node)
        assert float(counts[t]) == len(rows)
        assert float(sums[t]) == pytest.approx(math.fsum(values[rows].tolist()), abs=1e-9)


@properties
@given(forests())
def test_every_trainable_token_lies_in_one_segment(trajectories: Trajectories) -> None:
    """Segments are the stretches through which the same rows pass; those behind one token compete."""
    batch = batch_of(trajectories)
    w = Written(batch)
    cut = segments(batch)
    assert ((cut.token >= 0) == batch.trainable).all()
    starts = [w.nodes[t] for t in cut.first.tolist()]
    assert len(set(starts)) == len(starts)
    for t, node in w.chosen():
        assert starts[int(cut.token[t])] == w.stretch(node)[0]
    for i, one in enumerate(starts):
        assert bool(cut.branching[i]) == (w.before(one)[0] != "initial")
        for j, other in enumerate(starts):
            assert (cut.place[i] == cut.place[j]) == (w.before(one) == w.before(other))


def test_a_branch_before_its_parent_is_refused() -> None:
    batch = batch_of(sapling())
    turned = replace(batch, parent=torch.tensor([1, -1]), split=batch.split.flip(0))
    with pytest.raises(ValueError, match="a branch stands before the trajectory that it branches from"):
        through(turned, turned.returns)


# ------------------------------------------------------------------------------------------------------ advantages


@pytest.mark.parametrize(
    "settings", [{}, {"ddof": 0, "eps": 0.3}, {"std": False}], ids=["defaults", "ddof_eps", "centred"]
)
@pytest.mark.parametrize("name", ADVANTAGES)
@given(st.data())
@properties
def test_advantages_equal_reference(name: str, settings: dict[str, Any], data: st.DataObject) -> None:
    if name == "candidates":  # they are not standardised
        settings = {}
    batch = batch_of(data.draw(forests(deep=name != "prefix_credit")))
    estimate = token_advantages(row(ADVANTAGES[name] | settings), batch, {})
    advantage, count = EXPECTED[name](Written(batch), **settings)
    assert estimate.advantage.tolist() == pytest.approx(advantage, abs=1e-6)
    assert estimate.advantage.dtype == torch.float64
    assert (estimate.targets, estimate.state) == ({}, {})
    given_times = torch.ones_like(batch.reward) if estimate.times is None else estimate.times
    assert torch.where(batch.trainable, given_times, 0.0).tolist() == count


@pytest.mark.parametrize("weight", [{"kind": "uniform"}, ACTFOCUS], ids=lambda weight: weight["kind"])
@pytest.mark.parametrize("name", ADVANTAGES)
@given(forests(deep=False))
@properties
def test_shared_and_observed_tokens_have_no_advantage_and_no_weight(
    name: str, weight: dict[str, Any], trajectories: Trajectories
) -> None:
    batch, chosen = batch_of(trajectories), row(ADVANTAGES[name], weight=weight)
    estimate = token_advantages(chosen, batch, {})
    weights = token_weights(chosen, replace(batch, advantage=estimate.advantage))
    if estimate.times is not None:
        weights = weights * estimate.times
    assert not bool(estimate.advantage[~batch.trainable].any() | weights[~batch.trainable].any())


@properties
@given(forests())
def test_actfocus_weighs_every_sampled_token_once(trajectories: Trajectories) -> None:
    """The z-score is over the action tokens as they were sampled, however many episodes share one."""
    batch, chosen = batch_of(trajectories), row(ADVANTAGES["shared_prefix"], weight=ACTFOCUS)
    w, weights = Written(batch), token_weights(chosen, batch).tolist()
    energies = [float(batch.energy[t]) for t, _ in w.chosen() if batch.role[t] == Role.ACTION]
    for t, _ in w.chosen():
        if batch.role[t] == Role.ACTION:
            centre, variance = population(energies)
            z = (float(batch.energy[t]) - centre) / math.sqrt(variance + 1e-8)
            assert weights[t] == pytest.approx(1 + 0.5 / (1 + math.exp(-z)), abs=1e-5)
        elif batch.role[t] == Role.REASONING:
            assert weights[t] == pytest.approx(0.1)


@pytest.mark.parametrize("credit", ["soft", "hard"])
@given(forests())
@properties
def test_without_branches_a_shared_prefix_changes_nothing(credit: str, trajectories: Trajectories) -> None:
    nothing = dict.fromkeys(("parent", "split"), [None] * len(trajectories))
    batch = batch_of(replace(trajectories, episodes=trajectories.episodes | nothing))
    estimate = token_advantages(row({"kind": "shared_prefix", "credit": credit}), batch, {})
    plain = token_advantages(method(), batch, {})
    torch.testing.assert_close(estimate.advantage, plain.advantage, **CLOSE)
    assert estimate.times is None or bool((estimate.times[batch.trainable] == 1).all())
