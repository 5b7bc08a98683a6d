"""Composing a method from its slots: the tables in which settings meet functions. Nothing else dispatches on a choice.

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
from pipeline.objective.batch import State, TokenBatch
from pipeline.objective.estimates import AdvantageEstimate, Estimates, needed_behind, needed_estimates
from pipeline.objective.regularisers import EntropyTerms
from pipeline.objective.standardise import z_score
from pipeline.objective.surrogates import MinibatchPlan, SurrogateLoss, UpdateTokens
from pipeline.settings.advantage import (
    GAE,
    BilevelGAE,
    CustomAdvantage,
    EntropyGAE,
    GroupAdvantage,
    PrefixCreditAdvantage,
    ReinforcedAdvantage,
    SharedPrefixAdvantage,
    SiblingAdvantage,
    SoftQ,
    StepGroupAdvantage,
    TokenGroupAdvantage,
    TurnGAE,
)
from pipeline.settings.aggregation import ConstantNormaliser, CustomAggregation, SequenceMean, TokenMean, WeightSum
from pipeline.settings.filter import AllGroups, CustomFilter, RewardVariance
from pipeline.settings.method import Method
from pipeline.settings.regulariser import CustomRegulariser, EntropyBand, EntropyTarget, FixedRegulariser
from pipeline.settings.reward import (
    CustomReward,
    EntropyRateReward,
    PlainReward,
    ReferenceKLReward,
    SequenceEntropyReward,
    TokenEntropyReward,
)
from pipeline.settings.section import Section
from pipeline.settings.surrogate import (
    BalancedClip,
    CovarianceClip,
    CovarianceKL,
    CustomSurrogate,
    DetachedClip,
    PPOClip,
    ProcedureClip,
    SequenceClip,
    SoftQSurrogate,
    StraightThroughClip,
)
from pipeline.settings.weight import (
    ActFocusWeight,
    AttenuatedWeight,
    CustomWeight,
    PivotWeight,
    RoleRampWeight,
    SpuriousMaskWeight,
    TopEntropyWeight,
    UniformWeight,
)

REWARDS: dict[type[Section], Callable[..., Tensor]] = {
    PlainReward: rewards.plain,
    TokenEntropyReward: rewards.token_entropy,
    SequenceEntropyReward: rewards.sequence_entropy,
    EntropyRateReward: rewards.entropy_rate,
    ReferenceKLReward: rewards.reference_kl,
    CustomReward: custom.reward,
}
FILTERS: dict[type[Section], Callable[..., Tensor]] = {
    AllGroups: filters.all_groups,
    RewardVariance: filters.reward_variance,
    CustomFilter: custom.keep,
}
ADVANTAGES: dict[type[Section], Callable[..., AdvantageEstimate]] = {
    GroupAdvantage: group_advantages.from_group,
    TokenGroupAdvantage: group_advantages.from_token_group,
    StepGroupAdvantage: group_advantages.from_step_group,
    GAE: critic_advantages.from_gae,
    TurnGAE: critic_advantages.from_turn_gae,
    BilevelGAE: critic_advantages.from_bilevel_gae,
    EntropyGAE: critic_advantages.from_entropy_gae,
    SoftQ: critic_advantages.from_soft_q,
    SharedPrefixAdvantage: tree_advantages.from_shared_prefix,
    PrefixCreditAdvantage: tree_advantages.from_prefix_credit,
    SiblingAdvantage: tree_advantages.from_siblings,
    ReinforcedAdvantage: tree_advantages.from_reinforced,
    CustomAdvantage: custom.advantage,
}
WEIGHTS: dict[type[Section], Callable[..., Tensor]] = {
    UniformWeight: weights.uniform,
    ActFocusWeight: weights.actfocus_weights,
    RoleRampWeight: weights.role_ramp,
    TopEntropyWeight: weights.top_entropy,
    SpuriousMaskWeight: weights.spurious_mask,
    AttenuatedWeight: weights.attenuated,
    PivotWeight: weights.pivots,
    CustomWeight: custom.weight,
}
AGGREGATIONS: dict[type[Section], Callable[..., Tensor]] = {
    WeightSum: aggregation.weight_sum,
    TokenMean: aggregation.token_mean,
    SequenceMean: aggregation.sequence_mean,
    ConstantNormaliser: aggregation.constant,
    CustomAggregation: custom.aggregation,
}
SURROGATES: dict[type[Section], Callable[..., SurrogateLoss]] = {
    PPOClip: surrogates.token_clip,
    SequenceClip: surrogates.sequence_clip,
    DetachedClip: surrogates.detached_clip,
    StraightThroughClip: surrogates.straight_through_clip,
    CovarianceClip: surrogates.covariance_clip,
    CovarianceKL: surrogates.covariance_kl,
    BalancedClip: surrogates.balanced_clip,
    ProcedureClip: surrogates.procedure_clip,
    SoftQSurrogate: surrogates.soft_q,
    CustomSurrogate: custom.surrogate,
}
PLANS: dict[type[Section], Callable[..., MinibatchPlan]] = {
    CovarianceClip: surrogates.plan_covariance_clip,
    CovarianceKL: surrogates.plan_covariance_kl,
    BalancedClip: surrogates.plan_balanced_clip,
    ProcedureClip: surrogates.plan_procedure_clip,
}
"""Of the surrogates that must know their whole minibatch."""
REGULARISERS: dict[type[Section], Callable[..., tuple[EntropyTerms, dict[str, float]]]] = {
    FixedRegulariser: regularisers.fixed,
    EntropyBand: regularisers.entropy_band,
    EntropyTarget: regularisers.entropy_target,
    CustomRegulariser: custom.regulariser,
}


def select_groups(method: Method, batch: TokenBatch) -> Bool[Tensor, " e"]:
    """S2: which trajectories the iteration trains on."""
    return FILTERS[type(method.filter)](batch, method.filter)


def shape_rewards(method: Method, batch: TokenBatch) -> TokenBatch:
    """S7: the batch with reshaped rewards and their returns."""
    reward = REWARDS[type(method.reward)](batch, method.reward)
    return batch if reward is batch.reward else replace(batch, reward=reward, returns=batch.per_trajectory(reward))


def token_advantages(
    method: Method, batch: TokenBatch, estimates: Estimates, state: State | None = None
) -> AdvantageEstimate:
    """S3: advantages of all tokens, the targets of the method's heads, and what an adaptive advantage will remember.

    With ``entropy_scale`` ``A_t * (1 + entropy_scale * z(H_t))`` over the batch's trainable tokens (AEPO, arXiv 2510.14545).

    Args:
        method: the row of slots.
        batch: the trajectories that passed the filter, rewards reshaped.
        estimates: what the heads say of each token, and behind the last ones (see ``estimates.Estimates``).
        state: what the advantage remembers.

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
    estimate = ADVANTAGES[type(section)](batch, estimates, state or {}, section)
    if not section.entropy_scale:
        return estimate
    factor = 1 + section.entropy_scale * z_score(batch.entropy, batch.trainable)
    return estimate._replace(advantage=estimate.advantage * factor)


def token_weights(method: Method, batch: TokenBatch) -> Float[Tensor, " n"]:
    """S4: weights of all tokens; the batch knows its advantages."""
    return WEIGHTS[type(method.weight)](batch, method.weight)


def coefficients(
    method: Method,
    weight: Float[Tensor, " n"],
    trainable: Bool[Tensor, " n"],
    trajectory: Int[Tensor, " n"],
    advantage: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, " n"]:
    """S4: the factors c_t of a minibatch.

    Args:
        method: the row of slots.
        weight: token weights of the whole minibatch, 0 where not trainable.
        trainable: the policy chose this token.
        trajectory: index of its trajectory.
        advantage: A_t, if ``count`` is ``with_advantage``: tokens without one then have factor 0 and are not counted.

    Raises:
        ValueError: they are needed and missing.
    """
    section = method.aggregation
    if section.count == "with_advantage":
        if advantage is None:
            raise ValueError("aggregation.count with_advantage needs the advantages")
        trainable = trainable & (advantage != 0)
        weight = torch.where(trainable, weight, 0.0)
    return AGGREGATIONS[type(section)](weight, trainable, trajectory, section)


def surrogate_plan(method: Method) -> Callable[[UpdateTokens], MinibatchPlan] | None:
    """S5: what the surrogate must know of a whole minibatch before its loss; None if nothing."""
    section = method.surrogate
    plan = PLANS.get(type(section))
    return None if plan is None else lambda tokens: plan(tokens, section)


def entropy_terms(
    method: Method, batch: TokenBatch, state: State | None = None
) -> tuple[EntropyTerms, dict[str, float]]:
    """S6: entropy terms of all tokens, and what an adaptive regulariser will remember."""
    return REGULARISERS[type(method.regulariser)](batch, state or {}, method.regulariser)


def surrogate_loss(method: Method, tokens: UpdateTokens, plan: MinibatchPlan | None) -> SurrogateLoss:
    """S5: the loss of each token; ``plan`` holds their rows of the surrogate's plan, if it has one."""
    return SURROGATES[type(method.surrogate)](tokens, plan, method.surrogate)


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
    """S5 and S6: ``sum_t c_t * surrogate_t + mean entropy loss + c_KL * mean KL``.

    The means are over tokens whatever the token weights are, as ActFocus's paper leaves these terms untouched.

    Args:
        method: the row of slots.
        tokens: of a minibatch or a piece of it.
        plan: their rows of the surrogate's plan, if it has one.
        count: trainable tokens of the whole minibatch.
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
