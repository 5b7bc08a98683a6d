"""Ratio and advantage to a per-token loss.

A choice is a function of the update's tokens. Where it needs to know the whole minibatch (which tokens have the highest
covariance, how far bounds must move), a second function plans that before the minibatch is cut into pieces, from all its
tokens as the policy now scores them; the loss is then given its tokens' rows of the plan.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.objective.gae import discounted_returns
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


@dataclass(frozen=True)
class UpdateTokens:
    """The m trainable tokens of a minibatch, or of a piece of it that holds whole trajectories."""

    logprob: Float[Tensor, " m"]
    """Of the policy; with gradient in a loss, without in a plan."""
    entropy: Float[Tensor, " m"]
    """Of the policy, nats; likewise."""
    logprob_old: Float[Tensor, " m"]
    """Of the behaviour policy."""
    ref_logprob: Float[Tensor, " m"]
    """Of the reference policy."""
    advantage: Float[Tensor, " m"]
    """A_t."""
    coefficient: Float[Tensor, " m"]
    """c_t of the aggregation, computed on the whole minibatch."""
    entropy_terms: Float[Tensor, "m 4"]
    """Columns of ``regularisers.EntropyTerms``."""
    noise: Float[Tensor, " m"]
    """A named uniform draw from [0, 1)."""
    trajectory: Int[Tensor, " m"]
    """Index of the token's trajectory, from 0, non-decreasing."""
    soft: Float[Tensor, " m"] | None = None
    """``sum_v pi(v) (b log(pi(v) / ref(v)) - Q(v))``, for methods with a Q function."""


MinibatchPlan = Float[Tensor, "m k"]
"""What a surrogate has planned for each token of a minibatch."""


class SurrogateLoss(NamedTuple):
    """Loss per token, and which tokens lost their gradient to clipping."""

    loss: Float[Tensor, " m"]
    clipped: Bool[Tensor, " m"]


def ppo_clip(
    logprob: Float[Tensor, " m"],
    logprob_old: Float[Tensor, " m"],
    advantage: Float[Tensor, " m"],
    *,
    low: float | Tensor,
    high: float | Tensor,
) -> SurrogateLoss:
    """PPO's clipped surrogate with two bounds (arXiv 1707.06347, eq. 7; arXiv 2503.14476).

    ``-min(r A, clip(r, 1 - low, 1 + high) A)`` with ``r = exp(log pi - log pi_old)``.
    """
    ratio = torch.exp(logprob - logprob_old)
    plain = ratio * advantage
    bounded = ratio.clamp(1 - low, 1 + high) * advantage  # type: ignore[arg-type]
    return SurrogateLoss(-torch.minimum(plain, bounded), bounded < plain)


def token_clip(tokens: UpdateTokens, plan: MinibatchPlan | None, section: PPOClip) -> SurrogateLoss:
    """``ppo_clip`` token by token, bounded by ``dual_clip``."""
    return dual_clip(_clipped(tokens, section), tokens.advantage, section.dual)


def dual_clip(given: SurrogateLoss, advantage: Float[Tensor, " m"], dual: float | None) -> SurrogateLoss:
    """Dual clip (arXiv 1912.09729, eq. 5): where ``A < 0`` a loss is at most ``-dual * A``, without a gradient there."""
    if dual is None:
        return given
    largest = -dual * advantage
    beyond = (advantage < 0) & (given.loss > largest)
    return SurrogateLoss(torch.where(beyond, largest, given.loss), given.clipped | beyond)


def sequence_clip(tokens: UpdateTokens, plan: MinibatchPlan | None, section: SequenceClip) -> SurrogateLoss:
    """GSPO (arXiv 2507.18071): PPO's surrogate with one ratio per trajectory, ``s = exp(mean_t log r_t)``.

    In the token form ``s_t = sg(s) * pi / sg(pi)``, which for equal advantages within a trajectory has GSPO's value and
    gradient under a mean over tokens, and lets advantages differ.
    """
    shift = tokens.logprob - tokens.logprob_old
    trajectories = int(tokens.trajectory.max()) + 1 if len(shift) else 0
    nothing = torch.zeros(trajectories, dtype=shift.dtype, device=shift.device)
    total = nothing.index_add(0, tokens.trajectory, shift.detach())
    count = nothing.index_add(0, tokens.trajectory, torch.ones_like(shift)).clamp_min(1)
    of_sequence = (total / count)[tokens.trajectory] + tokens.logprob - tokens.logprob.detach()
    return ppo_clip(of_sequence, torch.zeros_like(shift), tokens.advantage, low=section.low, high=section.high)


def detached_clip(tokens: UpdateTokens, plan: MinibatchPlan | None, section: DetachedClip) -> SurrogateLoss:
    """CISPO (arXiv 2506.13585): ``-sg(clip(r, 1 - low, 1 + high)) * A * log pi``; no token loses its gradient."""
    ratio = torch.exp(tokens.logprob.detach() - tokens.logprob_old)
    loss = -ratio.clamp(1 - section.low, 1 + section.high) * tokens.advantage * tokens.logprob
    return SurrogateLoss(loss, torch.zeros_like(ratio, dtype=torch.bool))


def straight_through_clip(
    tokens: UpdateTokens, plan: MinibatchPlan | None, section: StraightThroughClip
) -> SurrogateLoss:
    """AEPO (arXiv 2510.14545): where ``A > 0`` and ``r > 1 + high`` the ratio is ``(1 + high) / sg(r) * r``.

    Its value is clipped, its gradient kept; where ``A < 0`` PPO's lower bound holds, and ``dual_clip``.
    """
    ratio = torch.exp(tokens.logprob - tokens.logprob_old)
    above = (tokens.advantage > 0) & (ratio.detach() > 1 + section.high)
    below = (tokens.advantage < 0) & (ratio.detach() < 1 - section.low)
    kept = (1 + section.high) / ratio.detach() * ratio
    held = torch.where(above, kept, torch.where(below, 1 - section.low, ratio))
    return dual_clip(SurrogateLoss(-held * tokens.advantage, below), tokens.advantage, section.dual)


def covariance(tokens: UpdateTokens) -> Float[Tensor, " m"]:
    """``(A - mean A) * (log pi - mean log pi)`` over the given tokens (arXiv 2505.22617)."""
    advantage, logprob = tokens.advantage, tokens.logprob
    return (advantage - advantage.mean()) * (logprob - logprob.mean())


def plan_covariance_clip(tokens: UpdateTokens, section: CovarianceClip) -> MinibatchPlan:
    """1 on the tokens whose loss is dropped: ``max(1, floor(share * m))`` random ones with covariance in the band.

    None is spent on tokens that PPO's clip has already taken, as in the released code.
    """
    cov = covariance(tokens)
    already = _clipped(tokens, section).clipped
    candidates = torch.nonzero((cov > section.band[0]) & (cov < section.band[1]) & ~already).squeeze(-1)
    room = max(1, math.floor(round(section.share * len(cov), 9)))
    dropped = torch.zeros_like(cov)
    dropped[candidates[torch.argsort(tokens.noise[candidates], stable=True)[:room]]] = 1.0
    return dropped.unsqueeze(-1)


def covariance_clip(tokens: UpdateTokens, plan: MinibatchPlan, section: CovarianceClip) -> SurrogateLoss:
    """Clip-Cov (arXiv 2505.22617): PPO's surrogate, and nothing on the dropped tokens."""
    dropped = plan[:, 0] > 0
    loss, clipped = _clipped(tokens, section)
    return SurrogateLoss(torch.where(dropped, 0.0, loss), clipped | dropped)


def plan_covariance_kl(tokens: UpdateTokens, section: CovarianceKL) -> MinibatchPlan:
    """1 on the ``max(1, floor(share * m))`` tokens of highest covariance."""
    cov = covariance(tokens)
    chosen = torch.zeros_like(cov)
    room = max(1, math.floor(round(section.share * len(cov), 9)))
    chosen[torch.sort(cov, descending=True, stable=True).indices[:room]] = 1.0
    return chosen.unsqueeze(-1)


def covariance_kl(tokens: UpdateTokens, plan: MinibatchPlan, section: CovarianceKL) -> SurrogateLoss:
    """KL-Cov (arXiv 2505.22617): ``-r A``, and ``+ coefficient * abs(log pi - log pi_old)`` on the chosen tokens."""
    shift = tokens.logprob - tokens.logprob_old
    loss = -torch.exp(shift) * tokens.advantage + section.coefficient * plan[:, 0] * shift.abs()
    return SurrogateLoss(loss, torch.zeros_like(plan[:, 0], dtype=torch.bool))


def plan_balanced_clip(tokens: UpdateTokens, section: BalancedClip) -> MinibatchPlan:
    """The two bounds of the ratio, on every token.

    From their starts one bound and then the other moves by its step until tokens of positive advantage carry
    ``positive_share`` of the loss's size (of all of it, or of that of negative advantages), or both are at their ends. A
    token carries ``c pi_old min(r, high) A`` where A > 0 and ``c pi_old max(r, low) |A|`` where A < 0: one that is clipped
    counts as much as its bound, so that a higher lower bound never helps, in the paper and in its code.
    """
    ratio = torch.exp(tokens.logprob - tokens.logprob_old)
    size = tokens.coefficient * tokens.advantage.abs()
    if section.by_probability:
        size = size * tokens.logprob_old.exp()
    positive, negative = tokens.advantage > 0, tokens.advantage < 0
    bounds = {"low": section.low[0], "high": section.high[0]}

    def reached() -> bool:
        gain = float((size * ratio.clamp(max=bounds["high"]))[positive].sum())
        cost = float((size * ratio.clamp(min=bounds["low"]))[negative].sum())
        return gain >= section.positive_share * (cost + (gain if section.share_of == "total" else 0.0))

    def reached_at(moves: int) -> bool:
        bounds["high"] = min(section.high[1], section.high[0] + moves * section.high_step)
        return reached()

    for bound in (section.first, "low" if section.first == "high" else "high"):
        if reached():
            break
        if bound == "low":  # on its way it can only get worse
            bounds["low"] = section.low[1]
        else:  # on its way it can only get better, so that not every move need be tried
            most = math.ceil((section.high[1] - section.high[0]) / section.high_step)
            reached_at(bisect_left(range(most), True, key=reached_at))
    return torch.tensor([bounds["low"], bounds["high"]], dtype=ratio.dtype).expand(len(ratio), 2)


def balanced_clip(tokens: UpdateTokens, plan: MinibatchPlan, section: BalancedClip) -> SurrogateLoss:
    """BAPO (arXiv 2510.18927): PPO's surrogate with the planned bounds of the ratio, bounded by ``dual_clip``."""
    low, high = 1 - plan[:, 0], plan[:, 1] - 1
    loss = ppo_clip(tokens.logprob, tokens.logprob_old, tokens.advantage, low=low, high=high)
    return dual_clip(loss, tokens.advantage, section.dual)


def future_kl(tokens: UpdateTokens, *, half_life: float, largest_shift: float) -> Float[Tensor, " m"]:
    """APPO (arXiv 2606.12384): ``sum_{k >= t} 2^(-(k-t)/half_life) (log pi_k - log pi_old_k)`` within each trajectory.

    Tokens whose difference is above ``largest_shift`` are left out. Without gradient.
    """
    shift = (tokens.logprob - tokens.logprob_old).detach().double()
    kept = torch.where(shift > largest_shift, 0.0, shift)
    return discounted_returns(kept, tokens.trajectory, 0.5 ** (1 / half_life))


def plan_procedure_clip(tokens: UpdateTokens, section: ProcedureClip) -> MinibatchPlan:
    """Each token's factor: APPO's scaling, times 0 or the rest's share for trajectories that leave the mean.

    ``f_t = clip(exp(FutureKL_t), 1, bound)``, and 1 where A < 0 and ``r > safety``: the released code then clips f_t, within
    [1, bound] by now, to [0.8, 1]. A trajectory with more than one token of A < 0 and ``r > dual`` leaves the mean: the
    others' coefficients then add up to what all had.
    """
    ratio = torch.exp(tokens.logprob - tokens.logprob_old)
    ahead = future_kl(tokens, half_life=section.half_life, largest_shift=section.largest_shift)
    leads = torch.exp(ahead).to(ratio.dtype)
    f = torch.where((tokens.advantage < 0) & (ratio > section.safety), 1.0, leads.clamp(1.0, section.bound))
    scale = 1 + section.strength * (f if section.form == "raw" else f - 1)
    dual_clipped = ((tokens.advantage < 0) & (ratio > section.dual)).to(ratio.dtype)
    trajectories = int(tokens.trajectory.max()) + 1 if len(ratio) else 0
    often = torch.zeros(trajectories, dtype=ratio.dtype, device=ratio.device)
    left = (often.index_add(0, tokens.trajectory, dual_clipped) > 1)[tokens.trajectory]
    rest = tokens.coefficient[~left].sum()
    share = tokens.coefficient.sum() / rest if bool(rest > 0) else torch.ones_like(rest)
    return torch.where(left, 0.0, scale * share).unsqueeze(-1)


def procedure_clip(tokens: UpdateTokens, plan: MinibatchPlan, section: ProcedureClip) -> SurrogateLoss:
    """APPO (arXiv 2606.12384): PPO's surrogate, ``-dual * A`` at most where A < 0, times the planned factor."""
    loss, clipped = dual_clip(_clipped(tokens, section), tokens.advantage, section.dual)
    return SurrogateLoss(loss * plan[:, 0], clipped | (plan[:, 0] == 0))


def soft_q(tokens: UpdateTokens, plan: MinibatchPlan | None, section: SoftQSurrogate) -> SurrogateLoss:
    """ETPO (arXiv 2402.06700): the expected soft value that is to be lost; see ``soft.soft_policy_loss``."""
    if tokens.soft is None:
        raise ValueError("surrogate soft_q needs a Q function")
    return SurrogateLoss(tokens.soft, torch.zeros_like(tokens.soft, dtype=torch.bool))


def _clipped(tokens: UpdateTokens, section: PPOClip | CovarianceClip | ProcedureClip) -> SurrogateLoss:
    return ppo_clip(tokens.logprob, tokens.logprob_old, tokens.advantage, low=section.low, high=section.high)
