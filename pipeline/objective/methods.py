"""Composing a method from its slots: the tables in which settings meet functions. Nothing else dispatches on a choice.

A function's keyword arguments are its section's settings. To add a choice: its section in the slot's file in pipeline/settings, its
function in the slot's file, and one entry here. ``python -m pipeline.objective.methods`` prints a params file's methods.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.objective import advantages, aggregation, filters, regularisers, rewards, surrogates, weights
from pipeline.objective.advantages import AdvantageEstimate, Estimates
from pipeline.objective.batch import State, TokenBatch
from pipeline.objective.regularisers import EntropyTerms
from pipeline.objective.surrogates import Plan, Surrogate, SurrogateLoss, UpdateTokens
from pipeline.settings.advantage import (
    GAE,
    BilevelGAE,
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
from pipeline.settings.aggregation import ConstantNormaliser, SequenceMean, TokenMean, WeightSum
from pipeline.settings.filter import AllGroups, RewardVariance
from pipeline.settings.heads import Critic, QFunction
from pipeline.settings.method import Method
from pipeline.settings.params import load
from pipeline.settings.regulariser import EntropyBand, EntropyTarget, FixedRegulariser
from pipeline.settings.reward import (
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
}
FILTERS: dict[type[Section], Callable[..., Tensor]] = {
    AllGroups: filters.all_groups,
    RewardVariance: filters.reward_variance,
}
ADVANTAGES: dict[type[Section], Callable[..., AdvantageEstimate]] = {
    GroupAdvantage: advantages.from_group,
    TokenGroupAdvantage: advantages.from_token_group,
    StepGroupAdvantage: advantages.from_step_group,
    GAE: advantages.from_gae,
    TurnGAE: advantages.from_turn_gae,
    BilevelGAE: advantages.from_bilevel_gae,
    EntropyGAE: advantages.from_entropy_gae,
    SoftQ: advantages.from_soft_q,
    SharedPrefixAdvantage: advantages.from_shared_prefix,
    PrefixCreditAdvantage: advantages.from_prefix_credit,
    SiblingAdvantage: advantages.from_siblings,
    ReinforcedAdvantage: advantages.from_reinforced,
}
WEIGHTS: dict[type[Section], Callable[..., Tensor]] = {
    UniformWeight: weights.uniform_weights,
    ActFocusWeight: weights.actfocus_weights,
    RoleRampWeight: weights.role_ramp,
    TopEntropyWeight: weights.top_entropy,
    SpuriousMaskWeight: weights.spurious_mask,
    AttenuatedWeight: weights.attenuated,
    PivotWeight: weights.pivots,
}
AGGREGATIONS: dict[type[Section], Callable[..., Tensor]] = {
    WeightSum: aggregation.weight_sum,
    TokenMean: aggregation.token_mean,
    SequenceMean: aggregation.sequence_mean,
    ConstantNormaliser: aggregation.constant,
}
SURROGATES: dict[type[Section], Surrogate] = {
    PPOClip: Surrogate(surrogates.token_clip),
    SequenceClip: Surrogate(surrogates.sequence_clip),
    DetachedClip: Surrogate(surrogates.detached_clip),
    StraightThroughClip: Surrogate(surrogates.straight_through_clip),
    CovarianceClip: Surrogate(surrogates.covariance_clip, surrogates.plan_covariance_clip),
    CovarianceKL: Surrogate(surrogates.covariance_kl, surrogates.plan_covariance_kl),
    BalancedClip: Surrogate(surrogates.balanced_clip, surrogates.plan_balanced_clip),
    ProcedureClip: Surrogate(surrogates.procedure_clip, surrogates.plan_procedure_clip),
    SoftQSurrogate: Surrogate(surrogates.soft_q),
}
REGULARISERS: dict[type[Section], Callable[..., tuple[EntropyTerms, dict[str, float]]]] = {
    FixedRegulariser: regularisers.fixed,
    EntropyBand: regularisers.entropy_band,
    EntropyTarget: regularisers.entropy_target,
}


def settings(section: Section, *elsewhere: str) -> dict[str, Any]:
    """A section's settings as keyword arguments, but for its ``kind`` and those that are used elsewhere."""
    return {name: getattr(section, name) for name in type(section).model_fields if name not in ("kind", *elsewhere)}


def select_groups(method: Method, returns: Float[Tensor, " e"], group: Int[Tensor, " e"]) -> Bool[Tensor, " e"]:
    """S2: which trajectories the iteration trains on."""
    return FILTERS[type(method.filter)](returns, group, **settings(method.filter))


def shape_rewards(method: Method, batch: TokenBatch) -> TokenBatch:
    """S7: the batch with reshaped rewards and their returns."""
    reward = REWARDS[type(method.reward)](batch, **settings(method.reward))
    return batch if reward is batch.reward else replace(batch, reward=reward, returns=batch.per_trajectory(reward))


def token_advantages(
    method: Method, batch: TokenBatch, estimates: Estimates, state: State | None = None
) -> AdvantageEstimate:
    """S3: advantages of all tokens, the targets of the method's heads, and what an adaptive advantage will remember.

    Args:
        method: the row of slots.
        batch: the trajectories that passed the filter, rewards reshaped.
        estimates: what the heads say of each token, and behind the last ones (see ``advantages.Estimates``).
        state: what the advantage remembers.

    Raises:
        ValueError: an estimate is missing, or a reward stands on a token that the policy did not choose.
    """
    section = method.advantage
    wanted = (*section.estimates(), *(f"{name}_behind" for name in section.behind()))
    missing = [name for name in wanted if name not in estimates]
    if missing:
        raise ValueError(f"advantage {section.kind} needs the estimates of its heads: {', '.join(missing)}")
    if bool((batch.reward[~batch.trainable] != 0).any()):
        raise ValueError("a reward stands on a token that the policy did not choose")
    elsewhere = (
        *(name for name, field in section if isinstance(field, Critic | QFunction)),
        "entropy_scale",
        "cut_off",
    )
    estimate = ADVANTAGES[type(section)](batch, estimates, state or {}, **settings(section, *elsewhere))
    return estimate._replace(advantage=advantages.scaled_by_entropy(batch, estimate.advantage, section.entropy_scale))


def token_weights(method: Method, batch: TokenBatch) -> Float[Tensor, " n"]:
    """S4: weights of all tokens; the batch knows its advantages."""
    return WEIGHTS[type(method.weight)](batch, **settings(method.weight))


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
    return AGGREGATIONS[type(section)](weight, trainable, trajectory, **settings(section, "count"))


def surrogate_plan(method: Method) -> Callable[[UpdateTokens], Plan] | None:
    """S5: what the surrogate must know of a whole minibatch before its loss; None if nothing."""
    section = method.surrogate
    function = SURROGATES[type(section)].plan
    return None if function is None else lambda tokens: function(tokens, **settings(section))


def entropy_terms(
    method: Method, batch: TokenBatch, state: State | None = None
) -> tuple[EntropyTerms, dict[str, float]]:
    """S6: entropy terms of all tokens, and what an adaptive regulariser will remember."""
    section = method.regulariser
    elsewhere = ("kl", "kl_estimator", "skip_above_kl")
    return REGULARISERS[type(section)](batch, state or {}, **settings(section, *elsewhere))


def surrogate_loss(method: Method, tokens: UpdateTokens, plan: Plan | None) -> SurrogateLoss:
    """S5: the loss of each token; ``plan`` holds their rows of the surrogate's plan, if it has one."""
    section = method.surrogate
    return SURROGATES[type(section)].loss(tokens, plan, **settings(section))


class PolicyLoss(NamedTuple):
    """Scalars to minimise and to look at: sums over the given tokens, to be added up over the pieces of a minibatch."""

    total: Float[Tensor, ""]
    surrogate: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    clipped: Float[Tensor, ""]
    moved: Float[Tensor, ""]
    """KL of the policy from the behaviour policy (k3)."""


def policy_loss(method: Method, tokens: UpdateTokens, plan: Plan | None, count: int) -> PolicyLoss:
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


SLOTS = ("branching", "reward", "filter", "advantage", "weight", "aggregation", "surrogate", "regulariser")


def described(method: Method) -> dict[str, str]:
    """Each slot's choice with its settings, as in params.yaml."""
    return {slot: _written(getattr(method, slot)) for slot in SLOTS}


def method_table(methods: Mapping[str, Method], defaults: Method) -> str:
    """One paragraph per method: name, status, source, and the slots in which it differs from the defaults."""
    usual, lines = described(defaults), []
    for name, method in methods.items():
        lines.append(f"{name}  [{method.status}]  {method.source}".rstrip())
        own = {slot: text for slot, text in described(method).items() if text != usual[slot]}
        lines += [f"    {slot:<12}{text}" for slot, text in own.items()] or ["    the defaults"]
        lines.append(f"    {'step':<12}learning_rate {method.learning_rate:g}")
    lines += ["defaults", *(f"    {slot:<12}{text}" for slot, text in usual.items())]
    return "\n".join(lines)


def _written(section: Section) -> str:
    parts = []
    for name, value in section:
        if name == "kind":
            continue
        if isinstance(value, Section):
            parts.append(f"{name} ({_written(value)})")
        else:
            parts.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    kind = getattr(section, "kind", "")
    return f"{kind}: {', '.join(parts)}" if parts else str(kind)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the methods of a params file: slots, settings, source, status.")
    parser.add_argument("--params", default="presets/methods/params.yaml")
    config = load(parser.parse_args().params)
    print(method_table(config.methods, config.method_defaults))
