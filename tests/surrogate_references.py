"""Surrogates written out over lists, for their tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.objective.batch import TokenBatch
from pipeline.objective.methods import (
    entropy_terms,
    surrogate_loss,
    surrogate_plan,
)
from pipeline.objective.surrogates import (
    UpdateTokens,
)
from pipeline.settings.method import Method
from tests.batches import method, noise

SURROGATE_ROWS: dict[str, dict[str, Any]] = {
    "ppo_clip": {"kind": "ppo_clip", "low": 0.2, "high": 0.28},
    "ppo_clip_dual": {"kind": "ppo_clip", "low": 0.2, "high": 0.28, "dual": 1.4},
    "sequence_clip": {"kind": "sequence_clip", "low": 0.05, "high": 0.1},
    "detached_clip": {"kind": "detached_clip", "low": 0.3, "high": 0.28},
    "straight_through_clip": {"kind": "straight_through_clip", "low": 0.2, "high": 0.25},
    "straight_through_clip_dual": {"kind": "straight_through_clip", "low": 0.2, "high": 0.25, "dual": 1.4},
    "covariance_clip": {"kind": "covariance_clip", "low": 0.2, "high": 0.3, "share": 0.3, "band": (0.05, 2.0)},
    "covariance_kl": {"kind": "covariance_kl", "share": 0.4, "coefficient": 0.7},
    "balanced_clip": {"kind": "balanced_clip", "high_step": 0.07},
    "balanced_clip_code": {
        "kind": "balanced_clip",
        "low": (0.8, 0.95),
        "high": (1.2, 2.0),
        "high_step": 0.1,
        "positive_share": 0.5,
        "share_of": "negative",
        "first": "low",
        "by_probability": False,
        "dual": 1.4,
    },
    "procedure_clip": {
        "kind": "procedure_clip",
        "dual": 1.6,
        "strength": 0.7,
        "half_life": 2.0,
        "largest_shift": 0.6,
        "safety": 1.4,
    },
    "soft_q": {"kind": "soft_q"},
}


REGULARISER_ROWS: dict[str, dict[str, Any]] = {
    "fixed": {"kind": "fixed", "entropy": 0.03, "kl": 0.2, "kl_estimator": "k2"},
    "band": {"kind": "entropy_band", "entropy": 0.8, "alpha": 0.5, "low": 0.5, "kl": 0.1, "kl_estimator": "k3"},
}


EARLIER = {"entropies": 1.5, "iterations": 2.0}


def row_of(surrogate: str, regulariser: str = "fixed") -> Method:
    advantage = {"kind": "soft_q" if surrogate == "soft_q" else "group"}
    return method(advantage=advantage, surrogate=SURROGATE_ROWS[surrogate], regulariser=REGULARISER_ROWS[regulariser])


def in_update(row: Method, batch: TokenBatch, spread: float = 0.5) -> UpdateTokens:
    """The batch's trainable tokens under a policy that has moved; logprob, entropy and soft are leaves."""
    keep = batch.trainable

    def leaf(values: torch.Tensor) -> torch.Tensor:
        return values[keep].clone().requires_grad_(True)

    return UpdateTokens(
        logprob=leaf(batch.logprob + spread * noise(batch, 1)),
        entropy=leaf(noise(batch, 2).abs()),
        logprob_old=batch.logprob[keep],
        ref_logprob=batch.ref_logprob[keep],
        advantage=noise(batch, 3)[keep],
        coefficient=noise(batch, 4)[keep].abs(),
        entropy_terms=torch.stack(entropy_terms(row, batch, EARLIER)[0], dim=-1)[keep],
        noise=batch.noise[keep],
        trajectory=batch.trajectory[keep],
        soft=leaf(noise(batch, 5)) if row.surrogate.kind == "soft_q" else None,
    )


def planned(row: Method, tokens: UpdateTokens) -> torch.Tensor | None:
    make = surrogate_plan(row)
    with torch.no_grad():
        return None if make is None else make(tokens)


def few(
    ratios: Sequence[float],
    advantages: Sequence[float],
    trajectory: Sequence[int] | None = None,
    draws: Sequence[float] | None = None,
) -> UpdateTokens:
    """Tokens of old log-probability 0, coefficient 1."""
    n = len(ratios)
    zeros = torch.zeros(n, dtype=torch.float64)
    return UpdateTokens(
        logprob=torch.tensor([math.log(r) for r in ratios], dtype=torch.float64, requires_grad=True),
        entropy=zeros,
        logprob_old=zeros,
        ref_logprob=zeros,
        advantage=torch.tensor(advantages, dtype=torch.float64),
        coefficient=torch.ones(n, dtype=torch.float64),
        entropy_terms=torch.zeros(n, 4, dtype=torch.float64),
        noise=torch.tensor(draws or [0.5] * n, dtype=torch.float64),
        trajectory=torch.tensor(trajectory or [0] * n, dtype=torch.long),
    )


def loss_and_slope(row: Method, tokens: UpdateTokens) -> tuple[list[float], list[float], list[bool]]:
    """Loss of each token, derivative of their sum by log pi, and which were clipped."""
    loss, clipped = surrogate_loss(row, tokens, planned(row, tokens))
    (slope,) = torch.autograd.grad(loss.sum(), tokens.logprob)
    return loss.tolist(), slope.tolist(), clipped.tolist()


@dataclass
class Given:
    """What a reference is told: plain numbers."""

    now: list[float]
    old: list[float]
    advantage: list[float]
    coefficient: list[float]
    noise: list[float]
    trajectory: list[int]

    @classmethod
    def of(cls, tokens: UpdateTokens) -> Given:
        columns = (tokens.logprob, tokens.logprob_old, tokens.advantage, tokens.coefficient, tokens.noise)
        return cls(*(c.tolist() for c in columns), tokens.trajectory.tolist())


def clip_one(ratio: float, advantage: float, lowest: float, highest: float) -> tuple[float, float, bool]:
    """PPO's surrogate of one token, by cases, with bounds of the ratio."""
    if advantage > 0 and ratio > highest:
        return -highest * advantage, 0.0, True
    if advantage < 0 and ratio < lowest:
        return -lowest * advantage, 0.0, True
    return -ratio * advantage, -ratio * advantage, False


def covariances(g: Given) -> list[float]:
    mean_a, mean_n = math.fsum(g.advantage) / len(g.advantage), math.fsum(g.now) / len(g.now)
    return [(a - mean_a) * (n - mean_n) for a, n in zip(g.advantage, g.now, strict=True)]


def room(share: float, tokens: int) -> int:
    whole = 0
    while whole + 1 <= share * tokens + 1e-9:
        whole += 1
    return max(1, whole)


def held_by_ppo(g: Given, low: float, high: float) -> list[bool]:
    ratios = [math.exp(n - o) for n, o in zip(g.now, g.old, strict=True)]
    return [clip_one(r, a, low, high)[2] for r, a in zip(ratios, g.advantage, strict=True)]


def steps(ends: tuple[float, float], step: float) -> list[float]:
    """All places a bound may stand at."""
    places = [ends[0]]
    while places[-1] < ends[1] - 1e-9:
        places.append(min(ends[1], ends[0] + len(places) * step))
    return places


def carried(g: Given, low: float, high: float, by_probability: bool = True) -> tuple[float, float]:
    """Loss of positive and of negative advantages, a clipped token's at its bound."""
    gain = cost = 0.0
    for n, o, a, c in zip(g.now, g.old, g.advantage, g.coefficient, strict=True):
        ratio, often = math.exp(n - o), c * (math.exp(o) if by_probability else 1.0)
        if a > 0:
            gain += often * min(ratio, high) * a
        if a < 0:
            cost -= often * max(ratio, low) * a
    return gain, cost


def enough(g: Given, low: float, high: float, share: float, share_of: str, by_probability: bool = True) -> bool:
    gain, cost = carried(g, low, high, by_probability)
    whole = gain + cost if share_of == "total" else cost
    return gain >= share * whole


def expect_bounds(
    g: Given,
    low: tuple[float, float] = (0.6, 0.9),
    high: tuple[float, float] = (1.2, 3.0),
    step: tuple[float, float] = (0.03, 0.07),
    share: float = 0.4,
    share_of: str = "total",
    first: str = "high",
    by_probability: bool = True,
) -> tuple[float, float]:
    """The first of all pairs that is enough, in the order in which the bounds move; or the last pair."""
    lows, highs = steps(low, step[0]), steps(high, step[1])
    if first == "high":
        pairs = [(low[0], h) for h in highs] + [(bottom, high[1]) for bottom in lows]
    else:
        pairs = [(bottom, high[0]) for bottom in lows] + [(low[1], h) for h in highs]
    return next((pair for pair in pairs if enough(g, *pair, share, share_of, by_probability)), pairs[-1])


def expect_future(g: Given, half_life: float, largest: float) -> list[float]:
    """FutureKL: over the later tokens of the same trajectory, each half as much per half-life."""
    result = []
    for t in range(len(g.now)):
        total = 0.0
        for u in range(t, len(g.now)):
            shift = g.now[u] - g.old[u]
            if g.trajectory[u] == g.trajectory[t] and shift <= largest:
                total += 2 ** (-(u - t) / half_life) * shift
        result.append(total)
    return result
