"""Advantages, losses and gradients against verl's on the same numbers; tests/golden/make_golden.py wrote them.

Where the definitions differ, a test says by what: whitening (verl takes the unbiased variance), a group of one (verl keeps
its reward as advantage), dual clip (verl bounds the loss of a negative advantage), and what counts as clipped. verl also holds log-ratios within 20 and k3 below 10, far from any number here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.objective.gae import gae
from pipeline.objective.group_advantages import group_advantage
from pipeline.objective.methods import (
    policy_loss,
    shape_rewards,
    surrogate_plan,
    token_advantages,
)
from pipeline.objective.standardise import z_score
from pipeline.objective.surrogates import UpdateTokens, dual_clip, ppo_clip
from pipeline.settings.method import Method
from tests.batches import method
from tests.golden_cases import CLOSE, at, batch, flat, golden, in_update, mask, tensor

MODES: dict[str, dict[str, Any]] = {
    "token-mean": {"kind": "token_mean"},
    "seq-mean-token-mean": {"kind": "sequence_mean"},
}


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
