"""Trees of episodes worked out by hand, and each row trained whole."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given

from pipeline.objective.batch import TokenBatch, token_batch
from pipeline.objective.group_advantages import group_advantage, to_tokens
from pipeline.objective.methods import coefficients, entropy_terms, policy_loss, token_advantages, token_weights
from pipeline.objective.surrogates import UpdateTokens
from pipeline.settings.method import Method
from pipeline.trajectories.builder import EpisodeBuilder, build
from pipeline.trajectories.trajectory import Role, Trajectories
from tests.batches import properties
from tests.tree_cases import ACTFOCUS, ADVANTAGES, Written, batch_of, forests, row, sapling

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


HALF = 0.5**0.5
"""Advantage of 1 against 0: half a unit over a sample deviation of 1 / sqrt(2)."""


@pytest.mark.parametrize(
    ("name", "root", "branch", "count"),
    [
        ("shared_prefix", [0, HALF, HALF, HALF], [-HALF, -HALF], [2, 1, 1, 1, 1, 1]),
        ("shared_prefix_hard", [0, HALF, HALF, HALF], [-HALF, -HALF], None),
        ("prefix_credit", [0, 0, 0, 0], [0, 0], [1, 1, 1, 1, 0, 0]),
        ("siblings", [0, HALF, HALF, HALF], [-HALF, -HALF], None),
        ("siblings_turn", [0, HALF, HALF, HALF], [-HALF, -HALF], [0, 1, 1, 1, 1, 1]),
        ("candidates", [0, 0.5, 0, 0], [-0.5, 0], [0, 1, 0, 0, 1, 0]),
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


@pytest.mark.parametrize(
    "advantage",
    [{"kind": "siblings", "scope": "segment"}, {"kind": "siblings", "scope": "turn"}, {"kind": "candidates"}],
    ids=lambda advantage: advantage.get("scope", "candidates"),
)
def test_equal_returns_in_trees_have_advantage_exactly_zero_in_float32(advantage: dict[str, str]) -> None:
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
            estimate = token_advantages(row(advantage), batch, {})
            assert batch.reward.dtype == estimate.advantage.dtype == torch.float32
            assert not bool(estimate.advantage.any()), (value, leaves)


def siblings_of(rewards: list[float], logprobs: list[float]) -> Trajectories:
    """Rows that go their own ways at the second of two sampled tokens, the first of them without branching."""
    root = EpisodeBuilder(
        episode_id="0", group_id="g", environment="toy", state_key="s", seed=0, iteration=0, policy_version=0
    )
    root.append_text([1], Role.PROMPT)
    root.append_sampled([2, 3], [Role.ACTION] * 2, [-1.0, logprobs[0]], [0.5] * 2)
    grown = [root]
    for number, own in enumerate(logprobs[1:], start=1):
        branch = root.before(2, **{**root.identity, "episode_id": str(number)})
        branch.append_sampled([3 + number], [Role.ACTION], [own], [0.5])
        grown.append(branch)
    for episode, reward in zip(grown, rewards, strict=True):
        episode.close_turn(1, reward, "a", True, "s")
        episode.finish(reward > 0, "goal")
    trajectories = build(grown)
    nothing = np.zeros(len(trajectories.input_ids), dtype=np.float32)
    return replace(trajectories, energy=nothing, ref_logprob=nothing, ref_entropy=nothing)


def test_candidates_by_hand() -> None:
    """Chances 0.6, 0.3, 0.05 of R = 1, -1, -1: mu = 0.25 / 0.95; w = 0.442105, -0.378947, -0.063158; their sizes sum to 0.884211.

    R = 1 and 0 gives the same: only the order and the ratios of differences count.
    """
    chances = [0.6, 0.3, 0.05]
    for bad in (-1.0, 0.0):
        batch = batch_of(siblings_of([1.0, bad, bad], [math.log(p) for p in chances]))
        estimate = token_advantages(row(ADVANTAGES["candidates"]), batch, {})
        expected = [0, 0, 0.5, 0, 0, -0.428571, 0, 0, -0.071429]
        assert estimate.advantage.tolist() == pytest.approx(expected, abs=1e-6)
        assert estimate.times is not None
        assert estimate.times.tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 1]


def test_siblings_of_the_search_by_hand() -> None:
    """Two rows that part in their first turn and have a second one: Q = 0.99 * 1 and 0.99 * 0, the format good and bad.

    Worth 1.09 and -0.05: half of 1.14 on both sides, by the population's deviation. Only the first turn is trained on.
    """
    rows = []
    for name, role, reward in (("good", Role.ACTION, 1.0), ("bad", Role.OTHER, 0.0)):
        episode = EpisodeBuilder(
            episode_id=name, group_id="g", environment="toy", state_key="s", seed=0, iteration=0, policy_version=0
        )
        episode.append_text([1], Role.PROMPT)
        episode.append_sampled([2, 3], [Role.REASONING, role], [-1.0] * 2, [0.5] * 2)
        episode.close_turn(1, 0.0, "a", True, "s")
        episode.append_text([4], Role.OBSERVATION)
        episode.append_sampled([5], [Role.ACTION], [-1.0], [0.5])
        episode.close_turn(4, reward, "a", True, "s")
        episode.finish(reward > 0, "goal")
        rows.append(episode)
    trajectories = build(rows)
    nothing = np.zeros(len(trajectories.input_ids), dtype=np.float32)
    batch = batch_of(replace(trajectories, energy=nothing, ref_logprob=nothing, ref_entropy=nothing))
    settings = {"scope": "turn", "discount": 0.99, "format": (0.1, -0.05), "least": 1e-4, "ddof": 0, "eps": 1e-4}
    estimate = token_advantages(row({"kind": "siblings", **settings}), batch, {})
    own = 0.57 / (0.57 + 1e-4)
    assert estimate.advantage.tolist() == pytest.approx([0, own, own, 0, 0, 0, -own, -own, 0, 0], abs=1e-6)
    centred = token_advantages(row({"kind": "siblings", **settings, "std": False, "ddof": 1, "eps": 1e-6}), batch, {})
    assert centred.advantage.tolist() == pytest.approx([0, 0.57, 0.57, 0, 0, 0, -0.57, -0.57, 0, 0], abs=1e-6)
    assert estimate.times is not None
    assert estimate.times.tolist() == [0, 1, 1, 0, 0, 0, 1, 1, 0, 0]


def test_what_is_reinforced() -> None:
    """Regular rows compete with each other; of the others the one that succeeded is pulled up, the other left out.

    Its 4 tokens have half of 7 in all, as many as the regular rows have: half the mean at A = 1 beside theirs.
    """
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
    of_rows = to_tokens(torch.tensor([HALF, -HALF, 0.875, 0.0]).double(), batch.trajectory, batch.trainable)
    torch.testing.assert_close(estimate.advantage, of_rows, atol=1e-5, rtol=0)
    assert estimate.times is not None
    assert (batch.per_trajectory(estimate.times) > 0).tolist() == [True, True, True, False]
