"""Advantages of episodes that branch from one another."""

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.objective.batch import SlotMemory, TokenBatch
from pipeline.objective.estimates import AdvantageEstimate, Estimates
from pipeline.objective.group_advantages import standardised
from pipeline.objective.trees import returns_through, segments, through, turn_ahead
from pipeline.settings.advantage import (
    CandidateAdvantage,
    PrefixCreditAdvantage,
    ReinforcedAdvantage,
    SharedPrefixAdvantage,
    SiblingAdvantage,
)
from pipeline.trajectories.trajectory import Role


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
    """SEEA-R1 (arXiv 2506.21669): ``group_advantage`` of the segments that begin at one place.

    A segment is worth Q, the mean discounted return from its first turn on of the trajectories through it, and the score of
    that turn's format.
    """
    cut, turn = segments(batch), turn_ahead(batch)
    begins = turn[cut.first]
    answered = torch.zeros(len(batch.turn_trajectory) + 1, dtype=torch.bool)
    answered[batch.turn[(batch.role == Role.ACTION) & (batch.turn >= 0)]] = True
    worth = returns_through(batch, section.discount)[cut.first]
    worth = worth + worth.new_tensor(section.format)[(~answered[begins]).long()]
    own = standardised(worth, cut.place, section).to(batch.reward.dtype)
    segment = cut.token.clamp_min(0)
    advantage = torch.where(batch.trainable, own[segment], 0.0)
    if section.scope == "segment" and not section.least:
        return AdvantageEstimate(advantage, {}, {})
    trained = batch.trainable & (advantage.abs() > section.least)
    if section.scope == "turn":
        trained &= batch.turn == begins[segment]
    return AdvantageEstimate(torch.where(trained, advantage, 0.0), {}, {}, trained.to(advantage.dtype))


def from_candidates(
    batch: TokenBatch, estimates: Estimates, state: SlotMemory, section: CandidateAdvantage
) -> AdvantageEstimate:
    """TLPO (arXiv 2604.26553): ``A_i = w_i / sum |w|``, ``w_i = p_i (R_i - mu)``, ``mu = sum p R / sum p``.

    Over the tokens that begin a segment at one branching, p their probabilities under the behaviour policy and R the mean
    return of the trajectories through each. Only these are trained; where all are worth the same they have advantage 0.
    """
    cut = segments(batch)
    first, place = cut.first[cut.branching], cut.place[cut.branching]
    worth, chance = returns_through(batch, 1.0)[first], batch.logprob[first].double().exp()

    def over(values: Float[Tensor, " c"], reduce: str = "sum") -> Float[Tensor, " c"]:
        found = values.new_zeros(int(cut.place.max()) + 1)
        return found.scatter_reduce(0, place, values, reduce, include_self=False)[place]

    pull = chance * (worth - over(chance * worth) / over(chance))
    pull = torch.where(over(worth, "amin") == over(worth, "amax"), 0.0, pull)
    advantage, trained = torch.zeros_like(batch.reward), torch.zeros_like(batch.reward)
    size = over(pull.abs())
    advantage[first] = (pull / torch.where(size > 0, size, 1.0)).to(advantage.dtype)
    trained[first] = 1.0
    return AdvantageEstimate(advantage, {}, {}, trained)


def from_reinforced(
    batch: TokenBatch, estimates: Estimates, state: SlotMemory, section: ReinforcedAdvantage
) -> AdvantageEstimate:
    """SCOPE-RL (arXiv 2510.08141): ``group_advantage`` of what was sampled at the policy's own temperature.

    Of the others those that succeeded have one advantage, with which they weigh ``coefficient`` times their own mean at
    A = 1 beside the mean over the tokens of the first; the rest is not trained on.
    """
    own = standardised(batch.returns, 2 * batch.group + (~batch.regular).long(), section)
    positive = ~batch.regular & batch.success
    tokens = batch.per_trajectory(torch.ones_like(batch.reward))
    pull = section.coefficient * tokens[batch.regular].sum() / tokens[positive].sum().clamp_min(1)
    own = torch.where(batch.regular, own, pull)
    trained = (batch.regular | positive)[batch.trajectory] & batch.trainable
    return AdvantageEstimate(torch.where(trained, own[batch.trajectory], 0.0), {}, {}, trained.to(own.dtype))
