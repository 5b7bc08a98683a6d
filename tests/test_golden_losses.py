"""Aggregation, regularisers and whole losses against golden values of other projects' code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.model.scoring import score_tokens
from pipeline.objective import aggregation
from pipeline.objective.methods import (
    policy_loss,
)
from pipeline.objective.regularisers import kl_penalty, value_loss
from pipeline.objective.surrogates import UpdateTokens
from pipeline.settings.aggregation import ConstantNormaliser, SequenceMean, TokenMean, WeightSum
from pipeline.settings.method import Method
from tests.batches import method, section
from tests.golden_cases import CLOSE, at, golden, in_update, mask, tensor

FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}
"""Our scores of tokens are float32: 6e-8 per operation, some ten operations."""


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
