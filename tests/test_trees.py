"""Trees of trajectories: what passes through a token, where stretches compete, and the advantages made of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.objective.batch import TokenBatch, token_batch
from pipeline.objective.group_advantages import group_advantage, to_tokens
from pipeline.objective.methods import coefficients, entropy_terms, policy_loss, token_advantages, token_weights
from pipeline.objective.surrogates import UpdateTokens
from pipeline.objective.trees import first_tokens, segments, through
from pipeline.settings.method import Method
from pipeline.trajectories.builder import EpisodeBuilder, build
from pipeline.trajectories.trajectory import RESPONSE_ROLES, Role, Trajectories
from tests.batches import BRANCHES, CLOSE, method, population, properties

ADVANTAGES: dict[str, dict[str, Any]] = {
    "shared_prefix": {"kind": "shared_prefix", "credit": "soft"},
    "shared_prefix_hard": {"kind": "shared_prefix", "credit": "hard"},
    "prefix_credit": {"kind": "prefix_credit", "credit": 0.7},
    "siblings": {"kind": "siblings", "scope": "segment"},
    "siblings_token": {"kind": "siblings", "scope": "token"},
    "reinforced": {"kind": "reinforced", "coefficient": 0.5},
}
FLOATS = ("returns", "reward", "logprob", "entropy", "energy", "ref_logprob", "ref_entropy", "noise")
ACTFOCUS = {"kind": "actfocus", "reasoning_downweight": 0.1, "redistribution_strength": 0.5}


def row(advantage: dict[str, Any], **slots: Any) -> Method:
    return method(advantage=advantage, branching=BRANCHES[advantage["kind"]], **slots)


# ---------------------------------------------------------------------------------------------------- random forests


@dataclass
class Playing:
    """Plays random episodes."""

    draw: st.DrawFn
    numbers: np.random.Generator

    def response(self, episode: EpisodeBuilder, start: int, least: int) -> None:
        """The rest of the response that began at ``start``, and its turn's end."""
        roles = self.draw(st.lists(st.sampled_from(RESPONSE_ROLES), min_size=least, max_size=4))
        n = len(roles)
        episode.append_sampled(
            self.numbers.integers(0, 50, n).tolist(),
            [int(role) for role in roles],
            (-self.numbers.random(n)).tolist(),
            self.numbers.random(n).tolist(),
        )
        answered = any(episode.tokens["sampled"][start:])
        reward = self.draw(st.sampled_from([0.0, 1.0, -0.1])) if answered else 0.0
        episode.close_turn(start, reward, "a", True, f"state {self.draw(st.integers(0, 2))}")

    def turns(self, episode: EpisodeBuilder, most: int) -> None:
        """More turns, then the episode's end."""
        for _ in range(self.draw(st.integers(0, most))):
            episode.append_text([7], Role.OBSERVATION)
            start = len(episode)
            if self.draw(st.booleans()):
                episode.append_text([9], Role.THINK_TAG)
            self.response(episode, start, least=0)
        episode.finish(self.draw(st.booleans()), "turns")


@st.composite
def forests(draw: st.DrawFn, deep: bool = True) -> Trajectories:
    """Annotated trees of one to three groups, their rows in any order that has a parent before its branches.

    Some branches are siblings, some share a place with none; ``deep``: branches may have branches. Some episodes were
    sampled at another temperature than 1.
    """
    playing = Playing(draw, np.random.default_rng(draw(st.integers(0, 2**32 - 1))))
    grown: list[EpisodeBuilder] = []
    for number in range(draw(st.integers(1, 9))):
        identity: dict[str, Any] = {"episode_id": f"e{number}", "group_id": f"g{draw(st.integers(0, 2))}"}
        identity |= {"environment": "toy", "state_key": identity["group_id"], "seed": 0, "iteration": 1}
        identity |= {"policy_version": 1, "temperature": draw(st.sampled_from([1.0, 1.0, 1.2]))}
        places = [
            (parent, split)
            for parent in grown
            if parent.identity["group_id"] == identity["group_id"] and (deep or parent.identity.get("parent") is None)
            for split in own_tokens(parent)
        ]
        if places and draw(st.integers(0, 3)):
            parent, split = draw(st.sampled_from(places))
            episode = parent.before(split, **identity)
            (start,) = [turn["start"] for turn in parent.turns if turn["start"] <= split < turn["end"]]
            playing.response(episode, start, least=1)
        else:
            episode = EpisodeBuilder(**identity)
            episode.append_text([1, 2], Role.PROMPT)
            playing.response(episode, len(episode), least=0)
        playing.turns(episode, 2)
        grown.append(episode)
    trajectories = build(grown)
    columns = [playing.numbers.standard_normal(len(trajectories.input_ids)).astype(np.float32) for _ in range(3)]
    named = zip(("energy", "ref_logprob", "ref_entropy"), columns, strict=True)
    return replace(trajectories, **{name: np.where(trajectories.sampled, c, 0) for name, c in named})


def own_tokens(episode: EpisodeBuilder) -> list[int]:
    """Where a branch may begin: tokens that the episode has sampled itself, but for the first of these.

    At that one it would be a sibling of the episode, a branch of the episode's own parent.
    """
    split = episode.identity.get("split") or 0
    return [t for t, chosen in enumerate(episode.tokens["sampled"]) if chosen and t > split]


def batch_of(trajectories: Trajectories) -> TokenBatch:
    """In float64."""
    batch = token_batch(trajectories, np.random.default_rng(0), 1, temperature=1.0)
    return replace(batch, **{name: getattr(batch, name).double() for name in FLOATS})


# ----------------------------------------------------------------------------------------------- the tree, written out


class Written:
    """A forest as sets: each token of each row is a node, named by the row that sampled it and its place there."""

    def __init__(self, batch: TokenBatch) -> None:
        self.batch = batch
        self.parent, self.split = batch.parent.tolist(), batch.split.tolist()
        self.group, self.returns = batch.group.tolist(), batch.returns.tolist()
        self.success, self.regular = batch.success.tolist(), batch.regular.tolist()
        owner = batch.trajectory.tolist()
        self.rows = range(batch.trajectories)
        self.first = [owner.index(e) for e in self.rows]
        self.length = [owner.count(e) for e in self.rows]
        self.nodes = [(e, t - self.first[e]) for t, e in enumerate(owner)]
        self.trainable = batch.trainable.tolist()
        self.paths = [[self.node(e, place) for place in range(self.length[e])] for e in self.rows]
        self._rows: dict[tuple[int, int], list[int]] = {}
        for e, path in enumerate(self.paths):
            for node in path:
                self._rows.setdefault(node, []).append(e)

    def node(self, e: int, place: int) -> tuple[int, int]:
        return self.node(self.parent[e], place) if place < self.split[e] else (e, place)

    def through(self, node: tuple[int, int]) -> list[int]:
        """All rows whose path holds the node."""
        return self._rows[node]

    def chosen(self) -> list[tuple[int, tuple[int, int]]]:
        """Token and node of all that is trained on."""
        return [(t, node) for t, node in enumerate(self.nodes) if self.trainable[t]]

    def stretch(self, node: tuple[int, int]) -> list[tuple[int, int]]:
        """The nodes of the same row through which the same rows pass, in order."""
        e, rows = node[0], self.through(node)
        return [own for own in self.paths[e] if own[0] == e and self.through(own) == rows]

    def before(self, node: tuple[int, int]) -> tuple[Any, ...]:
        """What comes before a node: the node before, or the group's initial state."""
        e, place = node
        return self.node(e, place - 1) if place else ("initial", self.group[e])


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


def expect_siblings(w: Written, first_only: bool, **settings: Any) -> Expected:
    advantage, count = [0.0] * len(w.nodes), [0.0] * len(w.nodes)
    starts = {node: w.stretch(node)[0] for _, node in w.chosen()}
    # Competitors begin behind the same node; one that is not trained on anywhere, such as a prompt's, competes too.
    begins = {w.stretch(node)[0] for node in w.nodes if node in w.paths[node[0]]}
    for t, node in w.chosen():
        start = starts[node]
        rivals = sorted(own for own in begins if w.before(own) == w.before(start))
        worth = [mean([w.returns[e] for e in w.through(own)]) for own in rivals]
        branching = w.before(start)[0] != "initial"
        if not first_only or (branching and node == start):
            advantage[t] = standardised(worth, **settings)[rivals.index(start)]
            count[t] = 1.0
    return advantage, count


def expect_reinforced(w: Written, **settings: Any) -> Expected:
    own = over([e for e in w.rows if w.regular[e]], w, **settings)
    advantage, count = [0.0] * len(w.nodes), [0.0] * len(w.nodes)
    for t, (e, _) in w.chosen():
        if w.regular[e] or w.success[e]:
            advantage[t], count[t] = own[e] if w.regular[e] else 0.5, 1.0
    return advantage, count


EXPECTED: dict[str, Callable[..., Expected]] = {
    "shared_prefix": lambda w, **settings: expect_shared(w, True, **settings),
    "shared_prefix_hard": lambda w, **settings: expect_shared(w, False, **settings),
    "prefix_credit": expect_credit,
    "siblings": lambda w, **settings: expect_siblings(w, False, **settings),
    "siblings_token": lambda w, **settings: expect_siblings(w, True, **settings),
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


# --------------------------------------------------------------------------------------- training each row whole


def gradient(
    chosen: Method,
    batch: TokenBatch,
    tokens: list[int],
    places: list[int],
    advantage: torch.Tensor,
    weight: list[float],
) -> torch.Tensor:
    """Of the policy's loss at ratio 1, by the log-probability at each of the given places of one flat parameter.

    Args:
        chosen: aggregation and surrogate.
        batch: where old log-probabilities come from.
        tokens: of the batch that are trained on, possibly more than once.
        places: of the parameter that says each one's log-probability.
        advantage: of each.
        weight: of each.
    """
    parameter = torch.zeros(len(batch.role), dtype=torch.float64, requires_grad=True)
    m = len(tokens)
    weights, everything = torch.tensor(weight, dtype=torch.float64), torch.ones(m, dtype=torch.bool)
    old = batch.logprob[places]
    update = UpdateTokens(
        logprob=old + parameter[places],
        entropy=batch.entropy[places],
        logprob_old=old,
        ref_logprob=batch.ref_logprob[places],
        advantage=advantage,
        coefficient=coefficients(chosen, weights, everything, torch.zeros(m, dtype=torch.long)),
        entropy_terms=torch.stack(entropy_terms(chosen, batch)[0], dim=-1)[places],
        noise=batch.noise[places],
        trajectory=batch.trajectory[tokens],
    )
    (result,) = torch.autograd.grad(policy_loss(chosen, update, None, m).surrogate, parameter)
    return result


@pytest.mark.parametrize("weight", [{"kind": "uniform"}, ACTFOCUS], ids=lambda weight: weight["kind"])
@given(forests())
@properties
def test_soft_credit_is_the_gradient_of_training_every_row_whole(
    weight: dict[str, Any], trajectories: Trajectories
) -> None:
    """Shared tokens included, each with its own row's advantage, before any ratio is clipped."""
    batch = batch_of(trajectories)
    w = Written(batch)
    assume(bool(batch.trainable.any()))
    chosen = row(ADVANTAGES["shared_prefix"], weight=weight)
    estimate = token_advantages(chosen, batch, {})
    assert estimate.times is not None
    weights = token_weights(chosen, replace(batch, advantage=estimate.advantage))

    once = [t for t, _ in w.chosen()]
    actual = gradient(chosen, batch, once, once, estimate.advantage[once], (weights * estimate.times)[once].tolist())

    own = group_advantage(batch.returns, batch.group, std=True, ddof=1, eps=1e-6)
    tokens = np.flatnonzero(trajectories.sampled).tolist()
    nodes = [w.node(*w.nodes[t]) for t in tokens]
    places = [w.first[e] + place for e, place in nodes]
    expected = gradient(
        chosen, batch, tokens, places, own[batch.trajectory[tokens]], [float(weights[p]) for p in places]
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------------------- by hand


def sapling(rewards: tuple[float, float] = (1.0, 0.0)) -> Trajectories:
    """A root of four sampled tokens, and a branch that goes on with two others after the first."""
    root = EpisodeBuilder(
        episode_id="root", group_id="g", environment="toy", state_key="s", seed=0, iteration=0, policy_version=0
    )
    root.append_text([1], Role.PROMPT)
    root.append_sampled([2, 3, 4, 5], [Role.ACTION] * 4, [-1.0] * 4, [0.5] * 4)
    branch = root.before(2, **{**root.identity, "episode_id": "branch"})
    root.close_turn(1, rewards[0], "a", True, "s")
    root.finish(rewards[0] > 0, "goal")
    branch.append_sampled([6, 7], [Role.ACTION] * 2, [-1.0] * 2, [0.5] * 2)
    branch.close_turn(1, rewards[1], "a", True, "s")
    branch.finish(rewards[1] > 0, "goal")
    trajectories = build([root, branch])
    nothing = np.zeros(len(trajectories.input_ids), dtype=np.float32)
    return replace(trajectories, energy=nothing, ref_logprob=nothing, ref_entropy=nothing)


HALF = 0.5**0.5
"""Advantage of 1 against 0: half a unit over a sample deviation of 1 / sqrt(2)."""


@pytest.mark.parametrize(
    ("name", "root", "branch", "count"),
    [
        ("shared_prefix", [0, HALF, HALF, HALF], [-HALF, -HALF], [2, 1, 1, 1, 1, 1]),
        ("shared_prefix_hard", [0, HALF, HALF, HALF], [-HALF, -HALF], None),
        ("prefix_credit", [0, 0, 0, 0], [0, 0], [1, 1, 1, 1, 0, 0]),
        ("siblings", [0, HALF, HALF, HALF], [-HALF, -HALF], None),
        ("siblings_token", [0, HALF, 0, 0], [-HALF, 0], [0, 1, 0, 0, 1, 0]),
    ],
)
def test_one_branch_by_hand(name: str, root: list[float], branch: list[float], count: list[int] | None) -> None:
    batch = batch_of(sapling())
    assert batch.trainable.tolist() == [False, *[True] * 4, False, False, True, True]
    estimate = token_advantages(row(ADVANTAGES[name]), batch, {})
    assert estimate.advantage.tolist() == pytest.approx([0, *root, 0, 0, *branch], abs=1e-5)
    assert (None if estimate.times is None else estimate.times[batch.trainable].tolist()) == count


def test_prefix_credit_by_hand() -> None:
    """Two initial rows of returns 0 and 0; from the first one a branch of 1 after two tokens and one of 0 after three."""
    root = EpisodeBuilder(
        episode_id="root", group_id="g", environment="toy", state_key="s", seed=0, iteration=0, policy_version=0
    )
    root.append_text([1], Role.PROMPT)
    root.append_sampled([2, 3, 4, 5], [Role.ACTION] * 4, [-1.0] * 4, [0.5] * 4)
    other = EpisodeBuilder(**{**root.identity, "episode_id": "other"})
    other.append_text([1], Role.PROMPT)
    other.append_sampled([8], [Role.ACTION], [-1.0], [0.5])
    grown = [root, other]
    for split in (3, 4):
        branch = root.before(split, **{**root.identity, "episode_id": f"branch {split}"})
        branch.append_sampled([9], [Role.ACTION], [-1.0], [0.5])
        grown.append(branch)
    for episode, reward in zip(grown, (0.0, 0.0, 1.0, 0.0), strict=True):
        episode.close_turn(1, reward, "a", True, "s")
        episode.finish(reward > 0, "turns")
    trajectories = build(grown)
    nothing = np.zeros(len(trajectories.input_ids), dtype=np.float32)
    batch = batch_of(replace(trajectories, energy=nothing, ref_logprob=nothing, ref_entropy=nothing))
    advantage = token_advantages(row(ADVANTAGES["prefix_credit"]), batch, {}).advantage
    # Both branches leave the first two tokens behind them, of +1 and -1 by the population's deviation; only the failed one
    # the third.
    assert advantage[:5].tolist() == pytest.approx([0, 0, 0, -0.7, 0], abs=1e-5)
    assert not bool(advantage[5:].any())


@pytest.mark.parametrize("scope", ["segment", "token"])
def test_equal_returns_in_trees_have_advantage_exactly_zero_in_float32(scope: str) -> None:
    """Eight rows of -0.1 through one stretch: their float32 mean may not be that of the one row beside them."""
    for value in (-0.1, -0.8, 0.7, 1 / 3):
        for leaves in range(1, 12):
            grown = sapling((value, value)).select([0, 1, *[1] * leaves])
            tree = grown.episodes | {
                "episode_id": ["root", "branch", *(f"leaf {number}" for number in range(leaves))],
                "parent": [None, "root", *["branch"] * leaves],
                "split": [None, 2, *[3] * leaves],
            }
            batch = token_batch(replace(grown, episodes=tree), np.random.default_rng(0))
            estimate = token_advantages(row({"kind": "siblings", "scope": scope}), batch, {})
            assert batch.reward.dtype == estimate.advantage.dtype == torch.float32
            assert not bool(estimate.advantage.any()), (value, leaves)


def test_what_is_reinforced() -> None:
    """Regular rows compete with each other; of the others the one that succeeded is pulled up, the other left out."""
    trajectories = sapling()
    alone = {name: [*column, *column] for name, column in trajectories.episodes.items()}
    alone |= {
        "episode_id": ["a", "b", "c", "d"],
        "parent": [None] * 4,
        "split": [None] * 4,
        "temperature": [1.0, 1.0, 1.2, 1.2],
    }
    batch = batch_of(replace(trajectories.select([0, 1, 0, 1]), episodes=alone))
    estimate = token_advantages(row(ADVANTAGES["reinforced"]), batch, {})
    of_rows = to_tokens(torch.tensor([HALF, -HALF, 0.5, 0.0]).double(), batch.trajectory, batch.trainable)
    torch.testing.assert_close(estimate.advantage, of_rows, atol=1e-5, rtol=0)
    assert estimate.times is not None
    assert (batch.per_trajectory(estimate.times) > 0).tolist() == [True, True, True, False]
