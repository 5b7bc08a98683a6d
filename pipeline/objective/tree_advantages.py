"""Advantages of episodes that branch from one another."""

import torch

from pipeline.objective.batch import SlotMemory, TokenBatch
from pipeline.objective.estimates import AdvantageEstimate, Estimates
from pipeline.objective.group_advantages import standardised
from pipeline.objective.trees import segments, through
from pipeline.settings.advantage import (
    PrefixCreditAdvantage,
    ReinforcedAdvantage,
    SharedPrefixAdvantage,
    SiblingAdvantage,
)


def from_shared_prefix(
    batch: TokenBatch, estimates: Estimates, state: SlotMemory, section: SharedPrefixAdvantage
) -> AdvantageEstimate:
    """ARPO (arXiv 2507.19849): ``group_advantage``; a token has the mean of the trajectories through it.

    ``soft``: it counts as often as there are such trajectories. As long as no ratio is clipped, that is the gradient of
    training each of them whole.
    """
    own = standardised(batch.returns, batch.group, section)
    total, count = through(batch, own)
    advantage = torch.where(batch.trainable, total / count, 0.0)
    return AdvantageEstimate(advantage, {}, {}, count if section.credit == "soft" else None)


def from_prefix_credit(
    batch: TokenBatch, estimates: Estimates, state: SlotMemory, section: PrefixCreditAdvantage
) -> AdvantageEstimate:
    """APPO (arXiv 2606.12384): ``group_advantage`` of the initial trajectories, and that of the branches apart.

    A token of an initial trajectory has its own advantage and ``credit`` times the mean over the branches that leave the
    trajectory behind it; branches are not trained on.
    """
    branch = batch.parent >= 0
    own = standardised(batch.returns, 2 * batch.group + branch.long(), section)
    everything, total = through(batch, torch.where(branch, own, 0.0))[0], through(batch, branch.to(own.dtype))[0]
    initial = ~branch[batch.trajectory] & batch.trainable
    advantage = own[batch.trajectory] + section.credit * everything / total.clamp_min(1)
    return AdvantageEstimate(torch.where(initial, advantage, 0.0), {}, {}, initial.to(own.dtype))


def from_siblings(
    batch: TokenBatch, estimates: Estimates, state: SlotMemory, section: SiblingAdvantage
) -> AdvantageEstimate:
    """After SEEA-R1 (arXiv 2506.21669): ``group_advantage`` of the segments that begin at one place.

    A segment is worth the mean return of the trajectories through it. With ``scope`` "token" only the first token behind
    each branching is trained: the candidates of TLPO (arXiv 2604.26553).
    """
    cut = segments(batch)
    total, count = through(batch, batch.returns.double())  # so that means of equal returns are equal
    own = standardised((total / count)[cut.first], cut.place, section).to(batch.reward.dtype)
    advantage = torch.where(batch.trainable, own[cut.token.clamp_min(0)], 0.0)
    if section.scope == "segment":
        return AdvantageEstimate(advantage, {}, {})
    candidate = torch.zeros_like(advantage)
    candidate[cut.first[cut.branching]] = 1.0
    return AdvantageEstimate(advantage * candidate, {}, {}, candidate)


def from_reinforced(
    batch: TokenBatch, estimates: Estimates, state: SlotMemory, section: ReinforcedAdvantage
) -> AdvantageEstimate:
    """Arbitrary Entropy PO (arXiv 2510.08141): ``group_advantage`` of what was sampled at the policy's own temperature.

    Of the others each one that succeeded has ``coefficient``; the rest is not trained on.
    """
    own = standardised(batch.returns, 2 * batch.group + (~batch.regular).long(), section)
    own = torch.where(batch.regular, own, section.coefficient * batch.success.to(own.dtype))
    trained = (batch.regular | batch.success)[batch.trajectory] & batch.trainable
    return AdvantageEstimate(torch.where(trained, own[batch.trajectory], 0.0), {}, {}, trained.to(own.dtype))
