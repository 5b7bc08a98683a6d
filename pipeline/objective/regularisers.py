"""Terms added to the loss.

A choice gives every token its entropy terms, once per iteration and from what it has kept of earlier ones; the loss of these
terms is the same for all.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.objective.batch import SlotMemory, TokenBatch
from pipeline.settings.regulariser import EntropyBand, EntropyTarget, FixedRegulariser


class EntropyTerms(NamedTuple):
    """Per token: the bonus's coefficient, and a penalty per nat outside a band."""

    bonus: Float[Tensor, " n"]
    penalty: Float[Tensor, " n"]
    low: Float[Tensor, " n"]
    high: Float[Tensor, " n"]


def entropy_loss(entropy: Float[Tensor, " n"], terms: EntropyTerms) -> Float[Tensor, " n"]:
    """``-bonus * H + penalty * (max(0, low - H) + max(0, H - high))``."""
    outside = (terms.low - entropy).clamp_min(0) + (entropy - terms.high).clamp_min(0)
    return terms.penalty * outside - terms.bonus * entropy


def fixed(batch: TokenBatch, state: SlotMemory, section: FixedRegulariser) -> tuple[EntropyTerms, dict[str, float]]:
    """The same bonus on every token."""
    return without_band(torch.full_like(batch.entropy, section.entropy)), {}


def entropy_band(batch: TokenBatch, state: SlotMemory, section: EntropyBand) -> tuple[EntropyTerms, dict[str, float]]:
    """EPO (arXiv 2509.22576): ``-entropy * (H - beta_k * alpha * distance of H from the band)``.

    The band is ``low`` to ``high`` times the mean, over all earlier iterations, of their mean token entropies; the first one
    has none. ``beta_k = 1 + exp(-3 k / floor(K / 2))`` in iteration k of K.
    """
    terms = without_band(torch.full_like(batch.entropy, section.entropy))
    total, count = state.get("entropies", 0.0), state.get("iterations", 0.0)
    if count:
        usual, own = total / count, batch.trainable
        share = section.alpha * (1 + math.exp(-3 * batch.iteration / (section.steps // 2)))
        terms.penalty[own] = section.entropy * share
        terms.low[own], terms.high[own] = section.low * usual, section.high * usual
    chosen = batch.entropy[batch.trainable].double()
    if len(chosen):
        total, count = total + float(chosen.mean()), count + 1
    return terms, {"entropies": total, "iterations": count}


def entropy_target(
    batch: TokenBatch, state: SlotMemory, section: EntropyTarget
) -> tuple[EntropyTerms, dict[str, float]]:
    """After the idea of AER (arXiv 2510.10959); its exact form is not known to us.

    The coefficient starts at ``entropy`` and moves by ``rate * (target * H_0 - H)`` an iteration, within 0 and
    ``largest``; H is the mean token entropy, H_0 the first iteration's. A token's is larger by ``hardness`` times the
    failure rate of its group.
    """
    chosen = batch.entropy[batch.trainable]
    mean = float(chosen.mean()) if len(chosen) else 0.0
    first = state.get("first_entropy", mean)
    coefficient = section.entropy
    if "coefficient" in state:
        moved = state["coefficient"] + section.rate * (section.target * first - mean)
        coefficient = min(section.largest, max(0.0, moved))
    nothing = torch.zeros(int(batch.group.max()) + 1, dtype=batch.entropy.dtype)
    members = nothing.index_add(0, batch.group, torch.ones_like(batch.group, dtype=nothing.dtype)).clamp_min(1)
    failed = nothing.index_add(0, batch.group, (~batch.success).to(nothing.dtype)) / members
    bonus = coefficient * (1 + section.hardness * failed[batch.group][batch.trajectory])
    return without_band(bonus), {"first_entropy": first, "coefficient": coefficient}


def without_band(bonus: Float[Tensor, " n"]) -> EntropyTerms:
    """A bonus alone, no penalty anywhere."""
    nothing = torch.zeros_like(bonus)
    return EntropyTerms(bonus, nothing.clone(), nothing - torch.inf, nothing + torch.inf)


def kl_penalty(logprob: Float[Tensor, " n"], ref_logprob: Float[Tensor, " n"], estimator: str) -> Float[Tensor, " n"]:
    """Estimators of KL(pi || ref) from tokens sampled by pi, with ``d = log pi - log ref``.

    * ``k1``: ``d``, unbiased; as a loss its expected gradient on-policy is zero.
    * ``k2``: ``d^2 / 2``, biased; as a loss its expected gradient on-policy is that of KL(pi || ref).
    * ``k3``: ``exp(-d) - 1 + d``, unbiased and never negative; as a loss it has the gradient of KL(ref || pi).

    Source: J. Schulman, "Approximating KL divergence", 2020; arXiv 2402.03300, eq. 4 (k3).
    """
    difference = logprob - ref_logprob
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference**2
    return torch.exp(-difference) - 1 + difference


def value_loss(
    values: Float[Tensor, " n"], old_values: Float[Tensor, " n"], returns: Float[Tensor, " n"], clip: float | None
) -> Float[Tensor, " n"]:
    """``0.5 (V - R)^2``; with ``clip``, the larger of that and the loss at V held within ``clip`` of its old value.

    Source: arXiv 1707.06347, section 5, as in OpenAI's baselines.
    """
    loss = 0.5 * (values - returns) ** 2
    if clip is None:
        return loss
    held = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum(loss, 0.5 * (held - returns) ** 2)
