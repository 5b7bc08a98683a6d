"""Advantages, losses and gradients against verl's on the same numbers; tests/golden/make_golden.py wrote them.

Where the definitions differ, a test says by what: whitening (verl takes the unbiased variance), a group of one (verl keeps
its reward as advantage), dual clip (verl bounds the loss of a negative advantage), and what counts as clipped. verl also holds log-ratios within 20 and k3 below 10, far from any number here.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.model.scoring import score_tokens
from pipeline.objective import aggregation
from pipeline.objective.batch import TokenBatch
from pipeline.objective.gae import gae
from pipeline.objective.group_advantages import group_advantage
from pipeline.objective.methods import (
    coefficients,
    policy_loss,
    shape_rewards,
    surrogate_plan,
    token_advantages,
    token_weights,
)
from pipeline.objective.regularisers import kl_penalty, value_loss
from pipeline.objective.standardise import z_score
from pipeline.objective.surrogates import UpdateTokens, dual_clip, ppo_clip
from pipeline.settings.aggregation import ConstantNormaliser, SequenceMean, TokenMean, WeightSum
from pipeline.settings.method import Method
from pipeline.trajectories.trajectory import Role
from tests.batches import method, section, unbranched

CLOSE = {"rtol": 1e-7, "atol": 1e-9}
"""Both sides are float64. verl adds 1e-8 to the token counts that it divides by, a relative error of up to 1e-8."""
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}
"""Our scores of tokens are float32: 6e-8 per operation, some ten operations."""

MODES: dict[str, dict[str, Any]] = {
    "token-mean": {"kind": "token_mean"},
    "seq-mean-token-mean": {"kind": "sequence_mean"},
}
PROMPT = 2
"""Prompt tokens put before each trajectory: verl's rows have none."""


@cache
def golden() -> dict[str, Any]:
    file = Path(__file__).parent / "golden" / "golden.json"
    return dict(json.loads(file.read_text(encoding="utf-8")))


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mask() -> Tensor:
    return torch.tensor(golden()["batch"]["mask"]) > 0


def at(values: Any) -> Tensor:
    """The peer's numbers at sampled tokens, row after row: the order of our trainable tokens."""
    return tensor(values)[mask()]


def flat(values: Any, before: float = 9.0) -> Tensor:
    """The peer's padded rows as our flat tokens: behind a prompt, without the padding."""
    rows = []
    for row, chosen in zip(tensor(values), mask(), strict=True):
        end = int(chosen.nonzero().max()) + 1
        rows.append(torch.cat([torch.full((PROMPT,), before, dtype=row.dtype), row[:end]]))
    return torch.cat(rows)


def batch() -> TokenBatch:
    """The golden batch as ours; numbers on tokens that the policy did not sample are not 0."""
    given = golden()["batch"]
    trainable = flat(given["mask"], before=0.0) > 0
    lengths = [PROMPT + int(chosen.nonzero().max()) + 1 for chosen in mask()]
    trajectory = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    begins = trainable & ~torch.cat([torch.tensor([False]), trainable[:-1]])
    turn = torch.where(trainable, begins.long().cumsum(0) - 1, -1)
    entropy = golden()["whole_loss"][0]["entropy"]
    returns = tensor(given["reward"]).sum(-1)
    return TokenBatch(
        role=torch.where(trainable, int(Role.REASONING), int(Role.OBSERVATION)),
        trainable=trainable,
        trajectory=trajectory,
        turn=turn,
        turn_trajectory=trajectory[begins],
        turn_state=torch.arange(int(begins.sum())),
        group=torch.tensor(given["group"]),
        success=returns > 0,
        returns=returns,
        reward=flat(given["reward"], before=0.0),
        logprob=flat(given["old_logprob"]),
        entropy=flat(entropy),
        energy=flat(entropy),
        ref_logprob=flat(given["ref_logprob"]),
        ref_entropy=flat(entropy),
        noise=flat(entropy),
        **unbranched(len(lengths)),
    )


def in_update(row: Method, advantage: Any, noise: Tensor | None = None) -> UpdateTokens:
    """The batch's trainable tokens under the peer's current policy; logprob and entropy are leaves."""
    given, own = golden()["batch"], batch()
    chosen = own.trainable
    factors = coefficients(row, token_weights(row, own), chosen, own.trajectory)[chosen]
    terms = torch.zeros(len(factors), 4, dtype=torch.float64)
    terms[:, 0] = row.regulariser.entropy
    terms[:, 2], terms[:, 3] = -torch.inf, torch.inf
    return UpdateTokens(
        logprob=at(given["logprob"]).requires_grad_(True),
        entropy=at(golden()["whole_loss"][0]["entropy"]).requires_grad_(True),
        logprob_old=at(given["old_logprob"]),
        ref_logprob=at(given["ref_logprob"]),
        advantage=at(advantage),
        coefficient=factors,
        entropy_terms=terms,
        noise=torch.zeros_like(factors) if noise is None else noise,
        trajectory=own.trajectory[chosen],
    )


def losses(name: str) -> list[dict[str, Any]]:
    return [case for case in golden()["losses"] if case["name"] == name]


def advantage_of(case: dict[str, Any]) -> Any:
    name = case["advantage"]
    return golden()["advantages"][name]["whitened" if name == "gae" else "advantage"]


def row_of(case: dict[str, Any], surrogate: dict[str, Any], *settings: str) -> Method:
    constant = {"kind": "constant", "tokens": float(mask().shape[1])}  # verl's default is the padded width
    return method(
        aggregation=MODES.get(case["mode"], constant),
        surrogate=surrogate | {name: case["settings"][name] for name in settings},
    )


def planned(row: Method, tokens: UpdateTokens) -> Tensor | None:
    make = surrogate_plan(row)
    with torch.no_grad():
        return None if make is None else make(tokens)


def assert_same_loss(row: Method, case: dict[str, Any], tokens: UpdateTokens | None = None) -> float:
    """Loss and gradient are the peer's; returns the share of tokens that count as clipped."""
    tokens = tokens or in_update(row, advantage_of(case))
    loss = policy_loss(row, tokens, planned(row, tokens), count=len(tokens.logprob))
    loss.total.backward()
    torch.testing.assert_close(loss.total.detach(), tensor(case["loss"]), **CLOSE)
    torch.testing.assert_close(tokens.logprob.grad, at(case["gradient"]), **CLOSE)
    return float(loss.clipped)


def test_the_numbers_are_of_the_pinned_peer() -> None:
    pins = (Path(__file__).parent / "golden" / "requirements.txt").read_text(encoding="utf-8").split()
    peer = golden()["peer"]
    assert f"{peer['name']}=={peer['version']}" in pins
    assert peer["dtype"] == "float64"


# -------------------------------------------------------------------------------------------------- advantages


def test_gae_and_its_value_targets() -> None:
    own, given, peer = batch(), golden()["batch"], golden()["advantages"]["gae"]
    values = flat(given["value"])
    raw = gae(own.reward, values, own.trainable, own.trajectory, gamma=peer["gamma"], lam=peer["lam"])
    row = method(advantage={"kind": "gae", "gamma": peer["gamma"], "lam": peer["lam"], "whiten": False})
    estimate = token_advantages(row, own, {"value": values})
    returns = at(peer["returns"])
    torch.testing.assert_close(raw[own.trainable], returns - at(given["value"]), **CLOSE)
    torch.testing.assert_close(estimate.advantage, raw, **CLOSE)
    torch.testing.assert_close(estimate.targets["value"].value[own.trainable], returns, **CLOSE)


def test_whitening_differs_by_the_unbiased_variance() -> None:
    """verl divides by the sample's standard deviation, we by the population's: a factor of sqrt((n - 1) / n)."""
    own, given, peer = batch(), golden()["batch"], golden()["advantages"]["gae"]
    row = method(advantage={"kind": "gae", "gamma": peer["gamma"], "lam": peer["lam"], "whiten": True})
    ours = token_advantages(row, own, {"value": flat(given["value"])}).advantage[own.trainable]
    n = len(ours)
    torch.testing.assert_close(ours * ((n - 1) / n) ** 0.5, at(peer["whitened"]), **CLOSE)
    assert float((ours - at(peer["whitened"])).abs().max()) > 1e-3


def test_whitening_of_the_same_numbers() -> None:
    """The same, of verl's raw advantages: the numbers on tokens that were not sampled have no part in it."""
    own, peer = batch(), golden()["advantages"]["gae"]
    raw = flat(peer["returns"]) - flat(golden()["batch"]["value"])
    ours, n = z_score(raw, own.trainable), int(own.trainable.sum())
    torch.testing.assert_close(ours[own.trainable] * ((n - 1) / n) ** 0.5, at(peer["whitened"]), **CLOSE)


@pytest.mark.parametrize("name", ["group", "group_centred"])
def test_group_advantages(name: str) -> None:
    """verl takes the sample's standard deviation and adds 1e-6: our defaults."""
    peer = golden()["advantages"][name]
    settings: dict[str, Any] = {"std": False}
    if name == "group":
        settings = {"std": True, "ddof": 1, "eps": peer["eps"]}
    own = batch()
    ours = token_advantages(method(advantage={"kind": "group"} | settings), own, {}).advantage
    torch.testing.assert_close(ours[own.trainable], at(peer["advantage"]), **CLOSE)
    assert not ours[~own.trainable].any()


def test_groups_of_equal_returns_agree_and_a_group_of_one_differs() -> None:
    """Nothing to compare with: ours has advantage 0; verl keeps the reward, as if its mean were 0 and its deviation 1."""
    peer = golden()["edge_groups"]
    returns, group = tensor(peer["returns"]), torch.tensor(peer["group"])
    ours, theirs = group_advantage(returns, group, std=True, ddof=1, eps=1e-6), tensor(peer["advantage"])
    alone = torch.bincount(group)[group] == 1
    torch.testing.assert_close(ours[~alone], theirs[~alone], **CLOSE)
    assert ours[alone].tolist() == [0.0]
    torch.testing.assert_close(theirs[alone], returns[alone] / (1 + 1e-6), **CLOSE)


def test_penalty_on_the_reward() -> None:
    peer, own = golden()["rewards"], batch()
    row = method(reward={"kind": "reference_kl", "coefficient": peer["coefficient"]})
    torch.testing.assert_close(shape_rewards(row, own).reward[own.trainable], at(peer["reward"]), **CLOSE)


# --------------------------------------------------------------------------------------------------- surrogates


@pytest.mark.parametrize("case", losses("vanilla"), ids=lambda case: case["mode"])
def test_ppo_grpo_and_dr_grpo(case: dict[str, Any]) -> None:
    """PPO: token mean of GAE; GRPO: mean of sequence means; Dr. GRPO: centred advantages over a constant."""
    clipped = assert_same_loss(row_of(case, {"kind": "ppo_clip"}, "low", "high"), case)
    assert clipped == pytest.approx(case["clip_fraction"], rel=1e-6)


def test_uniform_weights_make_a_weight_sum_the_token_mean() -> None:
    case = next(case for case in losses("vanilla") if case["mode"] == "token-mean")
    surrogate = {"kind": "ppo_clip"} | {name: case["settings"][name] for name in ("low", "high")}
    assert_same_loss(method(aggregation={"kind": "weight_sum"}, surrogate=surrogate), case)


@pytest.mark.parametrize("case", losses("gspo"), ids=lambda case: case["mode"])
def test_gspo(case: dict[str, Any]) -> None:
    """With a trajectory's one advantage, and with an advantage per token."""
    clipped = assert_same_loss(row_of(case, {"kind": "sequence_clip"}, "low", "high"), case)
    assert clipped == pytest.approx(case["clip_fraction"], rel=1e-6)


@pytest.mark.parametrize("case", losses("cispo"), ids=lambda case: f"low {case['settings']['low']}")
def test_cispo(case: dict[str, Any]) -> None:
    """verl calls a token clipped if its weight is; we, if it lost its gradient, which none does."""
    assert assert_same_loss(row_of(case, {"kind": "detached_clip"}, "low", "high"), case) == 0.0
    assert case["clip_fraction"] > 0


@pytest.mark.parametrize("case", losses("kl_cov"), ids=lambda case: f"share {case['settings']['share']}")
def test_kl_cov(case: dict[str, Any]) -> None:
    assert_same_loss(row_of(case, {"kind": "covariance_kl"}, "share", "coefficient"), case)


def clip_cov(share: float) -> tuple[dict[str, Any], Method, Tensor]:
    """verl's case, our row, and which tokens verl drew: those without a gradient that PPO's clip does not hold."""
    case = next(case for case in losses("clip_cov") if case["settings"]["share"] == share)
    row = row_of(case, {"kind": "covariance_clip"}, "low", "high", "share", "band")
    tokens = in_update(row, advantage_of(case))
    held = ppo_clip(
        tokens.logprob, tokens.logprob_old, tokens.advantage, low=case["settings"]["low"], high=case["settings"]["high"]
    ).clipped
    return case, row, (at(case["gradient"]) == 0) & ~held


def test_clip_cov_where_the_same_tokens_are_drawn() -> None:
    """Tokens are drawn at random: our noise is low on those that verl drew, and as many are to be dropped."""
    case, row, drawn = clip_cov(0.15)
    tokens = in_update(row, advantage_of(case), noise=torch.where(drawn, 0.1, 0.9).double())
    plan = planned(row, tokens)
    assert plan is not None
    assert int(drawn.sum()) == 5  # of 38 tokens
    torch.testing.assert_close(plan[:, 0] > 0, drawn)
    assert_same_loss(row, case, tokens)
    assert float(drawn.double().mean()) == pytest.approx(case["clip_fraction"], rel=1e-6)


def test_clip_cov_spares_tokens_that_ppo_already_clips() -> None:
    """Every other token in the band is dropped."""
    case, row, drawn = clip_cov(1.0)
    tokens = in_update(row, advantage_of(case))
    plan = planned(row, tokens)
    assert plan is not None
    torch.testing.assert_close(plan[:, 0] > 0, drawn)
    assert_same_loss(row, case, tokens)


def test_dual_clip_is_verls() -> None:
    """Where A < 0 verl's loss is at most -3 A, without a gradient there; without the setting it is PPO's -r A."""
    peer = golden()["dual_clip"]
    advantage, old = tensor(peer["advantage"]), torch.zeros(3, dtype=torch.float64)
    logprob = tensor(peer["ratio"]).log().requires_grad_(True)
    loss = ppo_clip(logprob, old, advantage, low=peer["low"], high=peer["high"])
    bounded = dual_clip(loss, advantage, peer["bound"])
    assert bounded.clipped.tolist() == [True, *loss.clipped.tolist()[1:]]
    torch.testing.assert_close(bounded.loss.mean().detach(), tensor(peer["loss"]), **CLOSE)
    for given, gradient in ((bounded, tensor(peer["gradient"])), (loss, [4.0 * 1.5 / 3, *peer["gradient"][1:]])):
        (own,) = torch.autograd.grad(given.loss.mean(), logprob, retain_graph=True)
        torch.testing.assert_close(own, torch.as_tensor(gradient, dtype=torch.float64), **CLOSE)


# ----------------------------------------------------------------------------- aggregation, regularisers, critic


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_aggregation_with_a_trajectory_without_sampled_tokens(mode: str) -> None:
    """verl leaves it out of the mean of sequences, and so do we."""
    peer = golden()["aggregation"]
    trainable = torch.tensor(peer["mask"]) > 0
    rows, width = trainable.shape
    owner = torch.arange(rows).repeat_interleave(width)
    arguments = (trainable.flatten().double(), trainable.flatten(), owner)
    loss, expected = tensor(peer["loss"]).flatten(), tensor(peer["modes"][mode])

    def total(factors: Tensor) -> Tensor:
        return (factors * loss).sum()

    if mode == "token-mean":
        torch.testing.assert_close(total(aggregation.weight_sum(*arguments, section(WeightSum))), expected, **CLOSE)
        torch.testing.assert_close(total(aggregation.token_mean(*arguments, section(TokenMean))), expected, **CLOSE)
    elif mode == "seq-mean-token-mean":
        torch.testing.assert_close(
            total(aggregation.sequence_mean(*arguments, section(SequenceMean))), expected, **CLOSE
        )
    else:
        scaled = peer["scaled"]
        by_width, by_factor = (section(ConstantNormaliser, tokens=n) for n in (width, scaled["loss_scale_factor"]))
        torch.testing.assert_close(total(aggregation.constant(*arguments, by_width)), expected, **CLOSE)
        ours = total(aggregation.constant(*arguments, by_factor))
        torch.testing.assert_close(ours, tensor(scaled["total"]), **CLOSE)


@pytest.mark.parametrize("case", golden()["kl_penalty"], ids=lambda case: case["kind"])
def test_kl_penalties(case: dict[str, Any]) -> None:
    given = golden()["batch"]
    logprob = tensor(given["logprob"]).flatten().requires_grad_(True)
    penalty = kl_penalty(logprob, tensor(given["ref_logprob"]).flatten(), case["kind"])
    penalty.sum().backward()
    torch.testing.assert_close(penalty.detach(), tensor(case["penalty"]).flatten(), **CLOSE)
    torch.testing.assert_close(logprob.grad, tensor(case["gradient"]).flatten(), **CLOSE)


@pytest.mark.parametrize("case", golden()["value_loss"], ids=lambda case: f"clip {case['clip']:g}")
def test_value_losses(case: dict[str, Any]) -> None:
    """A clip as wide as 1e9 is none; both halve the square, and verl takes the token mean."""
    values = at(case["value"]).requires_grad_(True)
    clip = case["clip"] if case["clip"] < 1e9 else None
    loss = value_loss(values, at(golden()["batch"]["value"]), at(case["returns"]), clip).mean()
    loss.backward()
    torch.testing.assert_close(loss.detach(), tensor(case["loss"]), **CLOSE)
    torch.testing.assert_close(values.grad, at(case["gradient"]), **CLOSE)
    assert (case["clip_fraction"] > 0) == (clip is not None)


# ------------------------------------------------------------------------------------------------ the whole loss


def whole_row(case: dict[str, Any]) -> Method:
    settings = case["settings"]
    return method(
        aggregation={"kind": "token_mean"},
        surrogate={"kind": "ppo_clip", "low": settings["low"], "high": settings["high"]},
        regulariser={"kind": "fixed"} | {name: settings[name] for name in ("entropy", "kl", "kl_estimator")},
    )


@pytest.mark.parametrize("case", golden()["whole_loss"], ids=lambda case: case["settings"]["kl_estimator"])
def test_the_whole_loss_and_its_parts(case: dict[str, Any]) -> None:
    """verl takes entropy and KL by the surrogate's aggregation, we by the token mean: compared where that is the same."""
    row = whole_row(case)
    tokens = in_update(row, golden()["advantages"]["gae"]["whitened"])
    loss = policy_loss(row, tokens, None, count=len(tokens.logprob))
    loss.total.backward()
    for ours, theirs in (
        (loss.total, "total"),
        (loss.surrogate, "surrogate"),
        (loss.entropy, "entropy_mean"),
        (loss.kl, "kl_mean"),
    ):
        torch.testing.assert_close(ours.detach(), tensor(case[theirs]), **CLOSE)
    torch.testing.assert_close(tokens.logprob.grad, at(case["gradient"]["logprob"]), **CLOSE)
    torch.testing.assert_close(tokens.entropy.grad, at(case["gradient"]["entropy"]), **CLOSE)


@pytest.mark.parametrize("case", golden()["whole_loss"], ids=lambda case: case["settings"]["kl_estimator"])
def test_the_whole_loss_from_logits(case: dict[str, Any]) -> None:
    """Through ``score_tokens``, whose head is the identity here, down to the gradient by logits; in its float32."""
    row, given = whole_row(case), golden()["batch"]
    logits = at(given["logits"]).float().requires_grad_(True)
    head = torch.nn.Linear(logits.shape[1], logits.shape[1], bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(logits.shape[1]))
    wanted = torch.tensor(given["token"])[mask()]
    scores = score_tokens(logits, wanted, head, temperature=1.0)
    known = in_update(row, golden()["advantages"]["gae"]["whitened"])
    fields = {name: getattr(known, name) for name in UpdateTokens.__dataclass_fields__}
    tokens = UpdateTokens(**fields | {"logprob": scores.logprob, "entropy": scores.entropy})
    loss = policy_loss(row, tokens, None, count=len(wanted))
    loss.total.backward()
    torch.testing.assert_close(scores.logprob.detach().double(), at(given["logprob"]), **FLOAT32)
    torch.testing.assert_close(scores.entropy.detach().double(), at(case["entropy"]), **FLOAT32)
    torch.testing.assert_close(loss.total.detach().double(), tensor(case["total"]), **FLOAT32)
    torch.testing.assert_close(loss.entropy.detach().double(), tensor(case["entropy_mean_of_logits"]), **FLOAT32)
    torch.testing.assert_close(logits.grad.double(), at(case["gradient"]["logits"]), **FLOAT32)
