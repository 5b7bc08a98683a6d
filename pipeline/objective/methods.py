"""Composing a method from its slots: a table each, from a choice's ``kind`` to its function. Nothing else dispatches on one.

Every function is given its section, and reads its settings there. To add a choice: its section in the slot's file in
pipeline/settings, its function in the slot's file in pipeline/objective, and one entry here.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.objective import (
    aggregation,
    critic_advantages,
    custom,
    filters,
    group_advantages,
    regularisers,
    rewards,
    surrogates,
    tree_advantages,
    weights,
)
from pipeline.objective.batch import SlotMemory, TokenBatch
from pipeline.objective.estimates import AdvantageEstimate, Estimates, needed_behind, needed_estimates
from pipeline.objective.regularisers import EntropyTerms
from pipeline.objective.standardise import z_score
from pipeline.objective.surrogates import MinibatchPlan, SurrogateLoss, UpdateTokens
from pipeline.settings.method import Method

REWARDS: dict[str, Callable[..., Tensor]] = {
    "none": rewards.plain,
    "token_entropy": rewards.token_entropy,
    "sequence_entropy": rewards.sequence_entropy,
    "entropy_rate": rewards.entropy_rate,
    "reference_kl": rewards.reference_kl,
    "custom": custom.reward,
}
FILTERS: dict[str, Callable[..., Tensor]] = {
    "all": filters.all_groups,
    "reward_variance": filters.reward_variance,
    "custom": custom.keep,
}
ADVANTAGES: dict[str, Callable[..., AdvantageEstimate]] = {
    "group": group_advantages.from_group,
    "token_group": group_advantages.from_token_group,
    "step_group": group_advantages.from_step_group,
    "gated_progress": group_advantages.from_gated_progress,
    "gae": critic_advantages.from_gae,
    "turn_gae": critic_advantages.from_turn_gae,
    "bilevel_gae": critic_advantages.from_bilevel_gae,
    "entropy_gae": critic_advantages.from_entropy_gae,
    "soft_q": critic_advantages.from_soft_q,
    "shared_prefix": tree_advantages.from_shared_prefix,
    "prefix_credit": tree_advantages.from_prefix_credit,
    "siblings": tree_advantages.from_siblings,
    "reinforced": tree_advantages.from_reinforced,
    "custom": custom.advantage,
}
WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "uniform": lambda batch, section: weights.uniform_weights(batch),
    "actfocus": weights.actfocus_weights,
    "role_ramp": weights.role_ramp,
    "top_entropy": weights.top_entropy,
    "spurious_mask": weights.spurious_mask,
    "attenuated": weights.attenuated,
    "custom": custom.weight,
}
AGGREGATIONS: dict[str, Callable[..., Tensor]] = {
    "weight_sum": aggregation.weight_sum,
    "token_mean": aggregation.token_mean,
    "sequence_mean": aggregation.sequence_mean,
    "constant": aggregation.constant,
    "custom": custom.aggregation,
}
SURROGATES: dict[str, Callable[..., SurrogateLoss]] = {
    "ppo_clip": surrogates.token_clip,
    "sequence_clip": surrogates.sequence_clip,
    "detached_clip": surrogates.detached_clip,
    "straight_through_clip": surrogates.straight_through_clip,
    "covariance_clip": surrogates.covariance_clip,
    "covariance_kl": surrogates.covariance_kl,
    "balanced_clip": surrogates.balanced_clip,
    "procedure_clip": surrogates.procedure_clip,
    "soft_q": surrogates.soft_q,
    "custom": custom.surrogate,
}
PLANS: dict[str, Callable[..., MinibatchPlan]] = {
    "covariance_clip": surrogates.plan_covariance_clip,
    "covariance_kl": surrogates.plan_covariance_kl,
    "balanced_clip": surrogates.plan_balanced_clip,
    "procedure_clip": surrogates.plan_procedure_clip,
}
"""Of the surrogates that must know their whole minibatch."""
REGULARISERS: dict[str, Callable[..., tuple[EntropyTerms, dict[str, float]]]] = {
    "fixed": regularisers.fixed,
    "entropy_band": regularisers.entropy_band,
    "entropy_target": regularisers.entropy_target,
    "custom": custom.regulariser,
}


def select_groups(method: Method, batch: TokenBatch) -> Bool[Tensor, " e"]:
    """Which trajectories the iteration trains on."""
    return FILTERS[method.filter.kind](batch, method.filter)


def shape_rewards(method: Method, batch: TokenBatch) -> TokenBatch:
    """The batch with reshaped rewards and their returns."""
    reward = REWARDS[method.reward.kind](batch, method.reward)
    return batch if reward is batch.reward else replace(batch, reward=reward, returns=batch.per_trajectory(reward))


def token_advantages(
    method: Method, batch: TokenBatch, estimates: Estimates, state: SlotMemory | None = None
) -> AdvantageEstimate:
    """Advantages of all tokens, the targets of the method's heads, and what an adaptive advantage will remember.

    With ``entropy_scale`` ``A_t * (1 + entropy_scale * z(H_t))`` over the batch's trainable tokens (AEPO, arXiv 2510.14545).

    The batch holds the trajectories that passed the filter, rewards reshaped; ``state`` is what the advantage remembers.

    Raises:
        ValueError: an estimate is missing, or a reward stands on a token that the policy did not choose.
    """
    section = method.advantage
    wanted = (*needed_estimates(section), *(f"{name}_behind" for name in needed_behind(section)))
    missing = [name for name in wanted if name not in estimates]
    if missing:
        raise ValueError(f"advantage {section.kind} needs the estimates of its heads: {', '.join(missing)}")
    if bool((batch.reward[~batch.trainable] != 0).any()):
        raise ValueError("a reward stands on a token that the policy did not choose")
    estimate = ADVANTAGES[section.kind](batch, estimates, state or {}, section)
    if not section.entropy_scale:
        return estimate
    factor = 1 + section.entropy_scale * z_score(batch.entropy, batch.trainable)
    return estimate._replace(advantage=estimate.advantage * factor)


def token_weights(method: Method, batch: TokenBatch) -> Float[Tensor, " n"]:
    """Weights of all tokens; the batch knows its advantages."""
    return WEIGHTS[method.weight.kind](batch, method.weight)


def coefficients(
    method: Method,
    weight: Float[Tensor, " n"],
    trainable: Bool[Tensor, " n"],
    trajectory: Int[Tensor, " n"],
    advantage: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, " n"]:
    """The factors c_t of a whole minibatch, whose token weights are 0 where not trainable.

    With ``count`` ``with_advantage`` tokens whose advantage is 0 have factor 0 and are not counted.

    Raises:
        ValueError: the advantages are needed for that and missing.
    """
    section = method.aggregation
    if section.count == "with_advantage":
        if advantage is None:
            raise ValueError("aggregation.count with_advantage needs the advantages")
        trainable = trainable & (advantage != 0)
        weight = torch.where(trainable, weight, 0.0)
    return AGGREGATIONS[section.kind](weight, trainable, trajectory, section)


def surrogate_plan(method: Method) -> Callable[[UpdateTokens], MinibatchPlan] | None:
    """What the surrogate must know of a whole minibatch before its loss; None if nothing."""
    section = method.surrogate
    plan = PLANS.get(section.kind)
    return None if plan is None else lambda tokens: plan(tokens, section)


def entropy_terms(
    method: Method, batch: TokenBatch, state: SlotMemory | None = None
) -> tuple[EntropyTerms, dict[str, float]]:
    """Entropy terms of all tokens, and what an adaptive regulariser will remember."""
    return REGULARISERS[method.regulariser.kind](batch, state or {}, method.regulariser)


def surrogate_loss(method: Method, tokens: UpdateTokens, plan: MinibatchPlan | None) -> SurrogateLoss:
    """The loss of each token; ``plan`` holds their rows of the surrogate's plan, if it has one."""
    return SURROGATES[method.surrogate.kind](tokens, plan, method.surrogate)


class PolicyLoss(NamedTuple):
    """Scalars to minimise and to look at: sums over the given tokens, to be added up over the pieces of a minibatch."""

    total: Float[Tensor, ""]
    surrogate: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    clipped: Float[Tensor, ""]
    moved: Float[Tensor, ""]
    """KL of the policy from the behaviour policy (k3)."""


def policy_loss(method: Method, tokens: UpdateTokens, plan: MinibatchPlan | None, count: int) -> PolicyLoss:
    """``sum_t c_t * surrogate_t + mean entropy loss + c_KL * mean KL``.

    The means are over tokens whatever the token weights are, as ActFocus's paper leaves these terms untouched: over the
    ``count`` trainable tokens of the whole minibatch, of which ``tokens`` may be a piece, and ``plan`` their rows.
    """
    regulariser = method.regulariser
    loss, clipped = surrogate_loss(method, tokens, plan)
    surrogate = (tokens.coefficient * loss).sum()
    total = surrogate
    terms = EntropyTerms(*tokens.entropy_terms.unbind(-1))
    if bool((terms.bonus != 0).any() | (terms.penalty != 0).any()):
        total = total + regularisers.entropy_loss(tokens.entropy, terms).sum() / count
    kl = regularisers.kl_penalty(tokens.logprob, tokens.ref_logprob, regulariser.kl_estimator).sum() / count
    if regulariser.kl:
        total = total + regulariser.kl * kl
    moved = regularisers.kl_penalty(tokens.logprob_old, tokens.logprob.detach(), "k3").sum() / count
    return PolicyLoss(total, surrogate, tokens.entropy.sum() / count, kl, clipped.float().sum() / count, moved)
