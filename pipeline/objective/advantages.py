"""Slot S3: the advantage A_t of each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.objective.batch import State, TokenBatch
from pipeline.objective.trees import segments, through


def group_advantage(
    returns: Float[Tensor, " e"], group: Int[Tensor, " e"], *, std: bool, ddof: int, eps: float
) -> Float[Tensor, " e"]:
    """GRPO: ``A = (R - mean_g) / (std_g + eps)`` (arXiv 2402.03300); ``std=False`` only centres.

    A group of equal returns, a single trajectory among them, has advantage exactly 0: their float mean may differ from
    them by a rounding error, which dividing by a standard deviation of the same size would turn into an advantage.

    Args:
        returns: one per trajectory.
        group: index of its group.
        std: divide by the group's standard deviation.
        ddof: its delta degrees of freedom, 0 or 1.
        eps: added to it.
    """
    groups = int(group.max()) + 1
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


def gae(
    reward: Float[Tensor, " n"],
    values: Float[Tensor, " n"],
    trainable: Bool[Tensor, " n"],
    trajectory: Int[Tensor, " n"],
    *,
    gamma: float | Float[Tensor, " n"],
    lam: float,
    behind: Float[Tensor, " e"] | None = None,
) -> Float[Tensor, " n"]:
    """Token-level generalised advantage estimation (arXiv 1506.02438, eq. 16) over trainable tokens only.

    Prompt and observation tokens are skipped, never discounted through: the successor of a turn's last token is the next
    turn's first. ``delta_t = r_t + gamma * V_{t+1} - V_t`` with ``V = behind`` after the last one.

    Args:
        reward: stands on trainable tokens.
        values: V of the state in which each token is chosen.
        trainable: the policy chose this token.
        trajectory: index of its trajectory, non-decreasing.
        gamma: discount after each trainable token; one for all, or one per token.
        lam: lambda.
        behind: V of the state behind each trajectory's last trainable token, 0 at a true end; None: 0 for all.

    Returns:
        Advantages, 0 where not trainable.

    Raises:
        ValueError: a reward stands on a token that is not trainable.
    """
    if bool((reward[~trainable] != 0).any()):
        raise ValueError("a reward stands on a token that the policy did not choose")
    index = torch.nonzero(trainable).squeeze(-1)
    own, r, v = trajectory[index].tolist(), reward[index].tolist(), values[index].tolist()
    g = gamma[index].tolist() if isinstance(gamma, Tensor) else [gamma] * len(r)
    after = None if behind is None else behind.tolist()
    result = [0.0] * len(r)
    following_advantage = following_value = 0.0
    following_trajectory = -1
    for t in range(len(r) - 1, -1, -1):
        if own[t] != following_trajectory:
            following_advantage, following_value = 0.0, 0.0 if after is None else after[own[t]]
        following_advantage = r[t] + g[t] * following_value - v[t] + g[t] * lam * following_advantage
        result[t], following_value, following_trajectory = following_advantage, v[t], own[t]
    advantages = torch.zeros_like(values)
    advantages[index] = torch.tensor(result, dtype=values.dtype)
    return advantages


def whiten(advantages: Float[Tensor, " n"], trainable: Bool[Tensor, " n"], eps: float = 1e-8) -> Float[Tensor, " n"]:
    """Zero mean and unit (population) standard deviation over trainable tokens; 0 elsewhere."""
    chosen = advantages[trainable]
    if len(chosen) == 0:
        return advantages
    centred = (advantages - chosen.mean()) / (chosen.var(unbiased=False) + eps).sqrt()
    return torch.where(trainable, centred, 0.0)


class AdvantageEstimate(NamedTuple):
    """What S3 gives."""

    advantage: Float[Tensor, " n"]
    """0 where not trainable."""
    targets: dict[str, HeadTarget]
    """By name of the head that shall learn it."""
    state: dict[str, float]
    """What the next iteration is to know; empty for most."""
    times: Float[Tensor, " n"] | None = None
    """How many times each token's weight counts; None: once. A trajectory of zeros is not trained on."""


class HeadTarget(NamedTuple):
    """What a head shall predict, and where."""

    value: Float[Tensor, " n"]
    mask: Bool[Tensor, " n"]


Estimates = Mapping[str, Tensor]
"""What the heads say of each token, before the update: a critic its ``value`` and so on; where episodes that were cut off
are bootstrapped, also ``<name>_behind`` (e): of the state behind a trajectory's last token, 0 if it is a true end."""


def from_group(
    batch: TokenBatch, estimates: Estimates, state: State, *, std: bool, ddof: int, eps: float
) -> AdvantageEstimate:
    """GRPO: ``group_advantage`` of the returns, on every trainable token."""
    own = group_advantage(batch.returns, batch.group, std=std, ddof=ddof, eps=eps)
    return AdvantageEstimate(to_tokens(own, batch.trajectory, batch.trainable), {}, {})


def from_token_group(
    batch: TokenBatch, estimates: Estimates, state: State, *, ddof: int, eps: float
) -> AdvantageEstimate:
    """GTPO (arXiv 2508.04349): ``group_advantage`` of the tokens' rewards, over all trainable tokens of a group."""
    advantage = torch.zeros_like(batch.reward)
    chosen = batch.trainable
    if bool(chosen.any()):
        group = batch.group[batch.trajectory[chosen]]
        advantage[chosen] = group_advantage(batch.reward[chosen], group, std=True, ddof=ddof, eps=eps)
    return AdvantageEstimate(advantage, {}, {})


def from_step_group(
    batch: TokenBatch,
    estimates: Estimates,
    state: State,
    *,
    step_weight: float,
    gamma: float,
    std: bool,
    episodes_by: str = "trajectory",
) -> AdvantageEstimate:
    """GiGPO (arXiv 2505.10978): ``A_episode + step_weight * A_step``.

    ``A_episode`` is ``group_advantage`` of the returns, of an episode once, or (``episodes_by`` "turn") once per turn.

    A turn is scored by the discounted return from it on, ``R_k = sum_j gamma^(j-k) r_j``, and compared with all turns of
    its group that began in the same state; alone in its state it has ``A_step = 0``.
    """
    if episodes_by == "trajectory":
        episode = group_advantage(batch.returns, batch.group, std=std, ddof=1, eps=1e-6)
        advantage = to_tokens(episode, batch.trajectory, batch.trainable)
    elif len(batch.turn_trajectory):
        owner = batch.turn_trajectory
        episode = group_advantage(batch.returns[owner], batch.group[owner], std=std, ddof=1, eps=1e-6)
        advantage = torch.where(batch.trainable, episode[batch.turn.clamp_min(0)], 0.0)
    else:
        advantage = torch.zeros_like(batch.reward)
    if len(batch.turn_state):
        score = discounted_returns(turn_rewards(batch), batch.turn_trajectory, gamma)
        step = group_advantage(score, batch.turn_state, std=std, ddof=1, eps=1e-6)
        advantage = advantage + step_weight * torch.where(batch.trainable, step[batch.turn.clamp_min(0)], 0.0)
    return AdvantageEstimate(advantage, {}, {})


def from_gae(
    batch: TokenBatch, estimates: Estimates, state: State, *, gamma: float, discount: str, lam: float, whiten: bool
) -> AdvantageEstimate:
    """Token-level GAE; with ``discount`` "turn" gamma applies after a response's last token only (POAD)."""
    factor: float | Tensor = gamma
    if discount == "turn":
        factor = torch.where(last_of_turn(batch), gamma, 1.0).to(batch.reward.dtype)
    values = estimates["value"]
    behind = estimates.get("value_behind")
    raw = gae(batch.reward, values, batch.trainable, batch.trajectory, gamma=factor, lam=lam, behind=behind)
    target = HeadTarget(torch.where(batch.trainable, raw + values, 0.0), batch.trainable)
    return AdvantageEstimate(_whitened(raw, batch, whiten), {"value": target}, {})


def from_turn_gae(
    batch: TokenBatch, estimates: Estimates, state: State, *, gamma: float, lam: float, whiten: bool
) -> AdvantageEstimate:
    """GAE over turns, V_k the value of turn k's first trainable token; its tokens share A_k.

    ``delta_k = r_k + gamma * V_{k+1} - V_k`` over a trajectory's turns that have a trainable token, with ``V_{k+1}`` of
    ``gae`` behind the last.
    """
    first = first_of_turn(batch)
    owner, turn = batch.trajectory[first], batch.turn[first]
    values = estimates["value"][first]
    everything = torch.ones_like(owner, dtype=torch.bool)
    behind = estimates.get("value_behind")
    own = gae(turn_rewards(batch)[turn], values, everything, owner, gamma=gamma, lam=lam, behind=behind)
    by_turn = torch.zeros(len(batch.turn_trajectory), dtype=own.dtype).index_add_(0, turn, own)
    target = torch.zeros_like(batch.reward)
    target[first] = own + values
    raw = torch.where(batch.trainable, by_turn[batch.turn.clamp_min(0)] if len(by_turn) else batch.reward, 0.0)
    return AdvantageEstimate(_whitened(raw, batch, whiten), {"value": HeadTarget(target, first)}, {})


def from_bilevel_gae(
    batch: TokenBatch,
    estimates: Estimates,
    state: State,
    *,
    turn_gamma: float,
    turn_lam: float,
    gamma: float,
    lam: float,
    whiten: bool,
) -> AdvantageEstimate:
    """Bi-level GAE (arXiv 2510.16907): over turns, then backwards over the tokens within each.

    V_k is the value at turn k's last trainable token; the turn's advantage ``A_k = delta_k + turn_gamma * turn_lam *
    A_{k+1}``, ``delta_k = r_k + turn_gamma * V_{k+1} - V_k``, stands on that token, and the others follow from it by
    ``A_t = r_t + gamma * V_{t+1} - V_t + gamma * lam * A_{t+1}``. Turn ends come from the turns themselves, not from rewards;
    r_k is the reward on the last token, so that rewards inside a turn reach no earlier one.
    """
    last, values = last_of_turn(batch), estimates["value"]
    high = torch.zeros_like(values)
    everything = torch.ones_like(batch.trajectory[last], dtype=torch.bool)
    high[last] = gae(
        batch.reward[last],
        values[last],
        everything,
        batch.trajectory[last],
        gamma=turn_gamma,
        lam=turn_lam,
        behind=estimates.get("value_behind"),
    )
    # Token GAE of one turn whose last delta is A_k: a "reward" of A_k + V_k, and nothing after it.
    closing = torch.where(last, high + values, batch.reward)
    raw = gae(closing, values, batch.trainable, batch.turn, gamma=gamma, lam=lam)
    target = HeadTarget(torch.where(batch.trainable, raw + values, 0.0), batch.trainable)
    return AdvantageEstimate(_whitened(raw, batch, whiten), {"value": target}, {})


def from_entropy_gae(
    batch: TokenBatch,
    estimates: Estimates,
    state: State,
    *,
    gamma: float,
    lam: float,
    entropy_gamma: float,
    entropy_lam: float,
    budget: float,
    multiplier_rate: float,
    whiten: bool,
) -> AdvantageEstimate:
    """After TECRL (arXiv 2511.11592): ``A_reward + c * A_entropy``, each by GAE with a value function of its own.

    In the second ``(1 - entropy_gamma) * H_t`` is a token's "reward", so that values are on the scale of H. c starts at 0
    and moves by ``multiplier_rate * (budget - H / H_0)`` an iteration, never below 0; H is the mean token entropy, H_0 the
    first iteration's.
    """
    entropy = float(batch.entropy[batch.trainable].mean()) if bool(batch.trainable.any()) else 0.0
    first = state.get("first_entropy", entropy)
    relative = entropy / first if first > 0 else 0.0
    multiplier = max(0.0, state.get("multiplier", 0.0) + multiplier_rate * (budget - relative))
    advantage, targets = torch.zeros_like(batch.reward), {}
    own = torch.where(batch.trainable, (1 - entropy_gamma) * batch.entropy, 0.0)
    parts = (
        ("value", batch.reward, gamma, lam, 1.0),
        ("entropy_value", own, entropy_gamma, entropy_lam, multiplier),
    )
    for name, earned, discount, trace, factor in parts:
        values, behind = estimates[name], estimates.get(f"{name}_behind")
        raw = gae(earned, values, batch.trainable, batch.trajectory, gamma=discount, lam=trace, behind=behind)
        targets[name] = HeadTarget(torch.where(batch.trainable, raw + values, 0.0), batch.trainable)
        advantage = advantage + factor * _whitened(raw, batch, whiten)
    return AdvantageEstimate(advantage, targets, {"first_entropy": first, "multiplier": multiplier})


def from_soft_q(batch: TokenBatch, estimates: Estimates, state: State, *, gamma: float) -> AdvantageEstimate:
    """ETPO (arXiv 2402.06700): soft Bellman targets, token by token.

    With ``S(x) = V(x) - b KL(x)`` of the prefix x in which a token is chosen (``soft_value`` of the estimates):
    ``y_j = S(x_{j+1})`` inside a response, ``y_K = reward + gamma * S(s')`` at its end, and ``reward`` alone at the
    episode's (where it was cut off and is bootstrapped, with ``S`` behind its last token). The policy learns from Q itself;
    ``A_t = Q(x_t, w_t) - S(x_t)`` is there for weights that ask for it.
    """
    soft, taken = estimates["soft_value"], estimates["taken"]
    chosen = batch.trainable
    index = torch.nonzero(chosen).squeeze(-1)
    owner = batch.trajectory[index]
    following = estimates.get("soft_value_behind", torch.zeros(batch.trajectories, dtype=soft.dtype))[owner]
    following[:-1] = torch.where(owner[1:] == owner[:-1], soft[index][1:], following[:-1])
    factor = torch.where(last_of_turn(batch)[index], gamma, 1.0).to(soft.dtype)
    target = torch.zeros_like(soft)
    target[index] = batch.reward[index] + factor * following
    return AdvantageEstimate(torch.where(chosen, taken - soft, 0.0), {"q": HeadTarget(target, chosen)}, {})


def from_shared_prefix(
    batch: TokenBatch, estimates: Estimates, state: State, *, credit: str, std: bool, ddof: int, eps: float
) -> AdvantageEstimate:
    """ARPO (arXiv 2507.19849): ``group_advantage``; a token has the mean of the trajectories through it.

    ``soft``: it counts as often as there are such trajectories. As long as no ratio is clipped, that is the gradient of
    training each of them whole.
    """
    own = group_advantage(batch.returns, batch.group, std=std, ddof=ddof, eps=eps)
    total, count = through(batch, own)
    advantage = torch.where(batch.trainable, total / count, 0.0)
    return AdvantageEstimate(advantage, {}, {}, count if credit == "soft" else None)


def from_prefix_credit(
    batch: TokenBatch, estimates: Estimates, state: State, *, credit: float, std: bool, ddof: int, eps: float
) -> AdvantageEstimate:
    """APPO (arXiv 2606.12384): ``group_advantage`` of the initial trajectories, and that of the branches apart.

    A token of an initial trajectory has its own advantage and ``credit`` times the mean over the branches that leave the
    trajectory behind it; branches are not trained on.
    """
    branch = batch.parent >= 0
    own = group_advantage(batch.returns, 2 * batch.group + branch.long(), std=std, ddof=ddof, eps=eps)
    everything, total = through(batch, torch.where(branch, own, 0.0))[0], through(batch, branch.to(own.dtype))[0]
    initial = ~branch[batch.trajectory] & batch.trainable
    advantage = own[batch.trajectory] + credit * everything / total.clamp_min(1)
    return AdvantageEstimate(torch.where(initial, advantage, 0.0), {}, {}, initial.to(own.dtype))


def from_siblings(
    batch: TokenBatch, estimates: Estimates, state: State, *, scope: str, std: bool, ddof: int, eps: float
) -> AdvantageEstimate:
    """After SEEA-R1 (arXiv 2506.21669): ``group_advantage`` of the segments that begin at one place.

    A segment is worth the mean return of the trajectories through it. With ``scope`` "token" only the first token behind
    each branching is trained: the candidates of TLPO (arXiv 2604.26553).
    """
    cut = segments(batch)
    total, count = through(batch, batch.returns.double())  # so that means of equal returns are equal
    own = group_advantage((total / count)[cut.first], cut.place, std=std, ddof=ddof, eps=eps).to(batch.reward.dtype)
    advantage = torch.where(batch.trainable, own[cut.token.clamp_min(0)], 0.0)
    if scope == "segment":
        return AdvantageEstimate(advantage, {}, {})
    candidate = torch.zeros_like(advantage)
    candidate[cut.first[cut.branching]] = 1.0
    return AdvantageEstimate(advantage * candidate, {}, {}, candidate)


def from_reinforced(
    batch: TokenBatch,
    estimates: Estimates,
    state: State,
    *,
    coefficient: float,
    std: bool,
    ddof: int,
    eps: float,
) -> AdvantageEstimate:
    """Arbitrary Entropy PO (arXiv 2510.08141): ``group_advantage`` of what was sampled at the policy's own temperature.

    Of the others each one that succeeded has ``coefficient``; the rest is not trained on.
    """
    own = group_advantage(batch.returns, 2 * batch.group + (~batch.regular).long(), std=std, ddof=ddof, eps=eps)
    own = torch.where(batch.regular, own, coefficient * batch.success.to(own.dtype))
    trained = (batch.regular | batch.success)[batch.trajectory] & batch.trainable
    return AdvantageEstimate(torch.where(trained, own[batch.trajectory], 0.0), {}, {}, trained.to(own.dtype))


def scaled_by_entropy(batch: TokenBatch, advantage: Float[Tensor, " n"], scale: float) -> Float[Tensor, " n"]:
    """AEPO (arXiv 2510.14545): ``A_t * (1 + scale * z(H_t))`` over the batch's trainable tokens."""
    return advantage * (1 + scale * whiten(batch.entropy, batch.trainable)) if scale else advantage


def turn_rewards(batch: TokenBatch) -> Float[Tensor, " t"]:
    """Sum of the rewards on each turn's tokens."""
    inside = batch.turn >= 0
    total = torch.zeros(len(batch.turn_trajectory), dtype=batch.reward.dtype)
    return total.index_add_(0, batch.turn[inside], batch.reward[inside])


def discounted_returns(reward: Float[Tensor, " t"], owner: Int[Tensor, " t"], gamma: float) -> Float[Tensor, " t"]:
    """``sum_{j >= k} gamma^(j-k) r_j`` over later entries of the same owner (non-decreasing)."""
    everything = torch.ones_like(owner, dtype=torch.bool)
    return gae(reward, torch.zeros_like(reward), everything, owner, gamma=gamma, lam=1.0)


def first_of_turn(batch: TokenBatch) -> Bool[Tensor, " n"]:
    """The first trainable token of each turn."""
    return _edge_of_turn(batch, slice(1, None), slice(None, -1))


def last_of_turn(batch: TokenBatch) -> Bool[Tensor, " n"]:
    """The last trainable token of each turn."""
    return _edge_of_turn(batch, slice(None, -1), slice(1, None))


def _edge_of_turn(batch: TokenBatch, here: slice, there: slice) -> Bool[Tensor, " n"]:
    index = torch.nonzero(batch.trainable).squeeze(-1)
    turn = batch.turn[index]
    edge = torch.ones_like(turn, dtype=torch.bool)
    edge[here] = turn[here] != turn[there]
    mask = torch.zeros_like(batch.trainable)
    mask[index[edge]] = True
    return mask


def _whitened(raw: Float[Tensor, " n"], batch: TokenBatch, wanted: bool) -> Float[Tensor, " n"]:
    return whiten(raw, batch.trainable) if wanted else raw
