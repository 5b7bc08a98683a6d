"""Advantages that compare within groups."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.objective.batch import SlotMemory, TokenBatch, positions
from pipeline.objective.estimates import AdvantageEstimate, Estimates
from pipeline.objective.gae import discounted_returns
from pipeline.objective.standardise import z_score_within
from pipeline.objective.turns import turn_rewards, turns_to_tokens
from pipeline.settings.advantage import (
    GatedProgressAdvantage,
    GroupAdvantage,
    StandardisedAdvantage,
    StepGroupAdvantage,
    TokenGroupAdvantage,
)


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
    """GRPO: ``group_advantage`` of the returns, on every trainable token.

    With ``apart`` the successes of a group are compared with one another, and its failures (GRPO-S, arXiv 2508.04349).
    """
    own = standardised(batch.returns, _compared(batch, section.apart), section)
    return AdvantageEstimate(to_tokens(own, batch.trajectory, batch.trainable), {}, {})


def from_token_group(
    batch: TokenBatch, estimates: Estimates, state: SlotMemory, section: TokenGroupAdvantage
) -> AdvantageEstimate:
    """GTPO (arXiv 2508.04349): ``group_advantage`` of the tokens' rewards, over all trainable tokens of a group.

    With ``apart`` over those of its successes, and over those of its failures. Then neither outcome has an advantage over
    the other: the mean of both is 0, and the outcome decides which tokens of an episode are favoured.
    """
    advantage, chosen = torch.zeros_like(batch.reward), batch.trainable
    group = _compared(batch, section.apart)[batch.trajectory[chosen]]
    advantage[chosen] = group_advantage(batch.reward[chosen], group, std=True, ddof=section.ddof, eps=section.eps)
    return AdvantageEstimate(advantage, {}, {})


def _compared(batch: TokenBatch, apart: bool) -> Int[Tensor, " e"]:
    """Index of what each trajectory is compared within: its group, or those of its group with the same outcome."""
    return 2 * batch.group + batch.success.long() if apart else batch.group


def from_gated_progress(
    batch: TokenBatch, estimates: Estimates, state: SlotMemory, section: GatedProgressAdvantage
) -> AdvantageEstimate:
    """ERPO (arXiv 2603.28204): ``W_t * A + progress * W_t * sign(A) * s_t``, A the advantage of GRPO.

    The gate is ``W_t = sigmoid(sharpness * z(H_t))``, z over the trainable tokens of the group. ``s_t`` is the z-score of
    ``log pi - log ref`` over those of the group in the same window: token i of a trajectory's n is in window
    ``floor(windows * i / n)``. It has both signs, so this is no token weight.
    """
    chosen = batch.trainable
    owner, advantage = batch.trajectory[chosen], torch.zeros_like(batch.reward)
    own = standardised(batch.returns, batch.group, section)[owner]
    gate = torch.sigmoid(section.sharpness * z_score_within(batch.entropy[chosen], batch.group[owner]))
    length = batch.per_trajectory(torch.ones_like(batch.entropy)).long()[owner]
    window = positions(batch)[chosen] * section.windows // length
    progress = z_score_within(
        (batch.logprob - batch.ref_logprob)[chosen], batch.group[owner] * section.windows + window
    )
    advantage[chosen] = gate * (own + section.progress * own.sign() * progress)
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
