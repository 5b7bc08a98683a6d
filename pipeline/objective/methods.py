"""Composing a method from its slots: the one place where settings meet functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.config import GAE, ActFocusWeight, GroupAdvantage, Method, RewardVariance
from pipeline.objective import advantages, filters, regularisers, surrogates, weights
from pipeline.objective.batch import TokenBatch


def select_groups(method: Method, returns: Float[Tensor, " e"], group: Tensor) -> Bool[Tensor, " e"]:
    """S2: which trajectories the iteration trains on."""
    if isinstance(method.filter, RewardVariance):
        return filters.reward_variance(returns, group, method.filter.keep)
    return torch.ones_like(returns, dtype=torch.bool)


def token_advantages(method: Method, batch: TokenBatch, values: Float[Tensor, " n"] | None) -> AdvantageEstimate:
    """S3: advantages of all tokens, and the targets of the critic if the method has one.

    Args:
        method: the row of slots.
        batch: the trajectories that passed the filter.
        values: the critic's, needed by GAE.
    """
    slot = method.advantage
    if isinstance(slot, GroupAdvantage):
        per_trajectory = advantages.group_advantage(
            batch.returns, batch.group, std=slot.std, ddof=slot.ddof, eps=slot.eps
        )
        return AdvantageEstimate(advantages.to_tokens(per_trajectory, batch.trajectory, batch.trainable), None)
    assert isinstance(slot, GAE)
    if values is None:
        raise ValueError("GAE needs a critic's values")
    estimate = advantages.gae(batch.reward, values, batch.trainable, batch.trajectory, gamma=slot.gamma, lam=slot.lam)
    targets = torch.where(batch.trainable, estimate + values, 0.0)
    return AdvantageEstimate(advantages.whiten(estimate, batch.trainable) if slot.whiten else estimate, targets)


class AdvantageEstimate(NamedTuple):
    """Advantages, and what the critic shall predict (None without a critic)."""

    advantage: Float[Tensor, " n"]
    value_target: Float[Tensor, " n"] | None


def token_weights(method: Method, batch: TokenBatch) -> Float[Tensor, " n"]:
    """S4: weights of all tokens."""
    slot = method.weight
    if isinstance(slot, ActFocusWeight):
        return weights.actfocus_weights(
            batch,
            alpha=slot.reasoning_downweight,
            beta=slot.redistribution_strength,
            tau=slot.redistribution_temperature,
            form=slot.form,
            signal=slot.signal,
            think_tag=slot.think_tag_weight,
            answer_tag=slot.answer_tag_weight,
            malformed=slot.malformed_weight,
        )
    return weights.uniform_weights(batch)


class PolicyLoss(NamedTuple):
    """Scalars to minimise and to look at."""

    total: Float[Tensor, ""]
    surrogate: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    clipped: Float[Tensor, ""]
    """Weighted sums over the given tokens, to be added up over the pieces of a minibatch."""


def policy_loss(
    method: Method,
    *,
    logprob: Float[Tensor, " n"],
    entropy: Float[Tensor, " n"],
    logprob_old: Float[Tensor, " n"],
    ref_logprob: Float[Tensor, " n"],
    advantage: Float[Tensor, " n"],
    coefficient: Float[Tensor, " n"],
    tokens: int,
) -> PolicyLoss:
    """S5 and S6 on trainable tokens: ``sum_t c_t * surrogate_t - c_H * mean H + c_KL * mean KL``.

    The two means are over tokens whatever the token weights are, as the paper leaves these terms untouched.

    Args:
        method: the row of slots.
        logprob: of the policy, with gradient.
        entropy: of the policy, with gradient.
        logprob_old: of the behaviour policy.
        ref_logprob: of the reference policy.
        advantage: A_t.
        coefficient: c_t of ``aggregation.coefficients``, computed on the whole minibatch.
        tokens: trainable tokens of the whole minibatch.
    """
    loss, clipped = surrogates.ppo_clip(
        logprob, logprob_old, advantage, low=method.surrogate.low, high=method.surrogate.high
    )
    surrogate = (coefficient * loss).sum()
    mean_entropy = entropy.sum() / tokens
    kl = regularisers.kl_penalty(logprob, ref_logprob, method.regulariser.kl_estimator).sum() / tokens
    total = surrogate
    if method.regulariser.entropy:
        total = total - method.regulariser.entropy * mean_entropy
    if method.regulariser.kl:
        total = total + method.regulariser.kl * kl
    return PolicyLoss(total, surrogate, mean_entropy, kl, clipped.float().sum() / tokens)
