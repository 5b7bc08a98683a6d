"""Advantages that are learned values' surprise: GAE over tokens or turns, and soft Q."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.objective.batch import SlotMemory, TokenBatch
from pipeline.objective.estimates import AdvantageEstimate, Estimates, HeadTarget
from pipeline.objective.gae import gae
from pipeline.objective.standardise import z_score
from pipeline.objective.turns import first_of_turn, last_of_turn, turn_rewards, turns_to_tokens
from pipeline.settings.advantage import GAE, BilevelGAE, EntropyGAE, SoftQ, TurnGAE

FARTHEST = 20.0
"""Size at which log alpha stops, so that no multiplier is 0 or infinite."""


def from_gae(batch: TokenBatch, estimates: Estimates, state: SlotMemory, section: GAE) -> AdvantageEstimate:
    """Token-level GAE; with ``discount`` "turn" gamma applies after a response's last token only (POAD)."""
    gamma: float | Tensor = section.gamma
    if section.discount == "turn":
        gamma = torch.where(last_of_turn(batch), section.gamma, 1.0).to(batch.reward.dtype)
    values, behind = estimates["value"], estimates.get("value_behind")
    raw = gae(batch.reward, values, batch.trainable, batch.trajectory, gamma=gamma, lam=section.lam, behind=behind)
    target = _target(raw, values, batch.trainable)
    return AdvantageEstimate(_whitened(raw, batch, section.whiten), {"value": target}, {})


def from_turn_gae(batch: TokenBatch, estimates: Estimates, state: SlotMemory, section: TurnGAE) -> AdvantageEstimate:
    """GAE over turns, V_k the value of turn k's first trainable token; its tokens share A_k.

    ``delta_k = r_k + gamma * V_{k+1} - V_k`` over a trajectory's turns that have a trainable token, with ``V_{k+1}`` of
    ``gae`` behind the last.
    """
    first, values, behind = first_of_turn(batch), estimates["value"], estimates.get("value_behind")
    earned = torch.where(first, turns_to_tokens(batch, turn_rewards(batch)), 0.0)
    own = gae(earned, values, first, batch.trajectory, gamma=section.gamma, lam=section.lam, behind=behind)
    by_turn = torch.zeros(len(batch.turn_trajectory), dtype=own.dtype).index_add_(0, batch.turn[first], own[first])
    whitened = _whitened(turns_to_tokens(batch, by_turn), batch, section.whiten)
    return AdvantageEstimate(whitened, {"value": _target(own, values, first)}, {})


def from_bilevel_gae(
    batch: TokenBatch, estimates: Estimates, state: SlotMemory, section: BilevelGAE
) -> AdvantageEstimate:
    """Bi-level GAE (arXiv 2510.16907): over turns, then backwards over the tokens within each.

    V_k is the value at turn k's last trainable token; the turn's advantage ``A_k = delta_k + turn_gamma * turn_lam *
    A_{k+1}``, ``delta_k = r_k + turn_gamma * V_{k+1} - V_k``, stands on that token, and the others follow from it by
    ``A_t = r_t + gamma * V_{t+1} - V_t + gamma * lam * A_{t+1}``. Turn ends come from the turns themselves, not from rewards;
    r_k is the reward on the last token, so that rewards inside a turn reach no earlier one.
    """
    last, values, behind = last_of_turn(batch), estimates["value"], estimates.get("value_behind")
    earned, gamma, lam = torch.where(last, batch.reward, 0.0), section.turn_gamma, section.turn_lam
    high = gae(earned, values, last, batch.trajectory, gamma=gamma, lam=lam, behind=behind)
    # Token GAE of one turn whose last delta is A_k: a "reward" of A_k + V_k, and nothing after it.
    closing = torch.where(last, high + values, batch.reward)
    raw = gae(closing, values, batch.trainable, batch.turn, gamma=section.gamma, lam=section.lam)
    target = _target(raw, values, batch.trainable)
    return AdvantageEstimate(_whitened(raw, batch, section.whiten), {"value": target}, {})


def from_entropy_gae(
    batch: TokenBatch, estimates: Estimates, state: SlotMemory, section: EntropyGAE
) -> AdvantageEstimate:
    """After TECRL (arXiv 2511.11592): ``A_reward + alpha * A_entropy``, each by GAE with a value function of its own.

    In the second the "reward" of a token is the entropy with which the next one is chosen, 0 behind the last: ``Q_e = H_{t+1}
    + gamma * Q_e'``, and ``V_e`` is its mean over what may be chosen now. log alpha moves by ``multiplier_rate * (budget - Q_e
    / Q_e0)`` an iteration, with the means over tokens of the estimates of Q_e in this and in the first iteration.
    """
    chosen, index = batch.trainable, torch.nonzero(batch.trainable).squeeze(-1)
    later, owner = torch.zeros_like(batch.entropy), batch.trajectory[index]
    later[index[:-1]] = torch.where(owner[1:] == owner[:-1], batch.entropy[index[1:]], 0.0)
    raw, targets = dict[str, Tensor](), dict[str, HeadTarget]()
    for name, earned in (("value", batch.reward), ("entropy_value", later)):
        values, behind = estimates[name], estimates.get(f"{name}_behind")
        raw[name] = gae(earned, values, chosen, batch.trajectory, gamma=section.gamma, lam=section.lam, behind=behind)
        targets[name] = _target(raw[name], values, chosen)
    cumulative = float(targets["entropy_value"].value[chosen].mean()) if bool(chosen.any()) else 0.0
    first = state.get("first_cumulative", cumulative)
    shortfall = section.budget - cumulative / first if first > 0 else 0.0
    moved = math.log(state.get("multiplier", section.multiplier)) + section.multiplier_rate * shortfall
    multiplier = math.exp(min(max(moved, -FARTHEST), FARTHEST))
    advantage = _whitened(raw["value"] + multiplier * raw["entropy_value"], batch, section.whiten)
    return AdvantageEstimate(advantage, targets, {"first_cumulative": first, "multiplier": multiplier})


def from_soft_q(batch: TokenBatch, estimates: Estimates, state: SlotMemory, section: SoftQ) -> AdvantageEstimate:
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
    factor = torch.where(last_of_turn(batch)[index], section.gamma, 1.0).to(soft.dtype)
    target = torch.zeros_like(soft)
    target[index] = batch.reward[index] + factor * following
    return AdvantageEstimate(torch.where(chosen, taken - soft, 0.0), {"q": HeadTarget(target, chosen)}, {})


def _target(raw: Float[Tensor, " n"], values: Float[Tensor, " n"], mask: Bool[Tensor, " n"]) -> HeadTarget:
    return HeadTarget(torch.where(mask, raw + values, 0.0), mask)


def _whitened(raw: Float[Tensor, " n"], batch: TokenBatch, wanted: bool) -> Float[Tensor, " n"]:
    return z_score(raw, batch.trainable) if wanted else raw
