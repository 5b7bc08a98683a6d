"""Advantages that compare within groups."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.objective.batch import SlotMemory, TokenBatch
from pipeline.objective.estimates import AdvantageEstimate, Estimates
from pipeline.objective.gae import discounted_returns
from pipeline.objective.turns import turn_rewards, turns_to_tokens
from pipeline.settings.advantage import GroupAdvantage, StandardisedAdvantage, StepGroupAdvantage, TokenGroupAdvantage


def group_advantage(
    returns: Float[Tensor, " e"], group: Int[Tensor, " e"], *, std: bool, ddof: int, eps: float
) -> Float[Tensor, " e"]:
    """GRPO: ``A = (R - mean_g) / (std_g + eps)`` (arXiv 2402.03300); ``std=False`` only centres.

    A group of equal returns, a single trajectory among them, has advantage exactly 0: their float mean may differ from
    them by a rounding error, which dividing by a standard deviation of the same size would turn into an advantage.
    ``ddof``, 0 or 1, is the standard deviation's delta degrees of freedom.
    """
    groups = int(group.max()) + 1 if len(group) else 0
    count = torch.zeros(groups, dtype=returns.dtype).index_add_(0, group, torch.ones_like(returns))
    mean = torch.zeros(groups, dtype=returns.dtype).index_add_(0, group, returns) / count.clamp_min(1)
    lowest = torch.full((groups,), torch.inf, dtype=returns.dtype).scatter_reduce(0, group, returns, "amin")
    highest = torch.full((groups,), -torch.inf, dtype=returns.dtype).scatter_reduce(0, group, returns, "amax")
    centred = torch.where((lowest == highest)[group], 0.0, returns - mean[group])
    if not std:
        return centred
    squares = torch.zeros(groups, dtype=returns.dtype).index_add_(0, group, centred**2)
    deviation = (squares / (count - ddof).clamp_min(1)).sqrt()
    return centred / (deviation[group] + eps)


def to_tokens(
    per_trajectory: Float[Tensor, " e"], trajectory: Int[Tensor, " n"], trainable: Bool[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Broadcast a trajectory's value to its trainable tokens; 0 elsewhere."""
    return torch.where(trainable, per_trajectory[trajectory], 0.0)


def standardised(
    values: Float[Tensor, " e"], group: Int[Tensor, " e"], section: StandardisedAdvantage
) -> Float[Tensor, " e"]:
    """``group_advantage`` as a section asks for it."""
    return group_advantage(values, group, std=section.std, ddof=section.ddof, eps=section.eps)


def from_group(
    batch: TokenBatch, estimates: Estimates, state: SlotMemory, section: GroupAdvantage
) -> AdvantageEstimate:
    """GRPO: ``group_advantage`` of the returns, on every trainable token."""
    own = standardised(batch.returns, batch.group, section)
    return AdvantageEstimate(to_tokens(own, batch.trajectory, batch.trainable), {}, {})


def from_token_group(
    batch: TokenBatch, estimates: Estimates, state: SlotMemory, section: TokenGroupAdvantage
) -> AdvantageEstimate:
    """GTPO (arXiv 2508.04349): ``group_advantage`` of the tokens' rewards, over all trainable tokens of a group."""
    advantage, chosen = torch.zeros_like(batch.reward), batch.trainable
    group = batch.group[batch.trajectory[chosen]]
    advantage[chosen] = group_advantage(batch.reward[chosen], group, std=True, ddof=section.ddof, eps=section.eps)
    return AdvantageEstimate(advantage, {}, {})


def from_step_group(
    batch: TokenBatch, estimates: Estimates, state: SlotMemory, section: StepGroupAdvantage
) -> AdvantageEstimate:
    """GiGPO (arXiv 2505.10978): ``A_episode + step_weight * A_step``.

    ``A_episode`` is ``group_advantage`` of the returns, of an episode once, or (``episodes_by`` "turn") once per turn.

    A turn is scored by the discounted return from it on, ``R_k = sum_j gamma^(j-k) r_j``, and compared with all turns of
    its group that began in the same state; alone in its state it has ``A_step = 0``.
    """

    def compared(values: Tensor, group: Tensor) -> Tensor:
        return group_advantage(values, group, std=section.std, ddof=1, eps=1e-6)

    owner = batch.turn_trajectory
    if section.episodes_by == "trajectory":
        episode = to_tokens(compared(batch.returns, batch.group), batch.trajectory, batch.trainable)
    else:
        episode = turns_to_tokens(batch, compared(batch.returns[owner], batch.group[owner]))
    score = discounted_returns(turn_rewards(batch), owner, section.gamma)
    step = turns_to_tokens(batch, compared(score, batch.turn_state))
    return AdvantageEstimate(episode + section.step_weight * step, {}, {})
