"""Soft values over the vocabulary: what ETPO needs of the policy's, the reference policy's and Q's distributions."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class SoftState(NamedTuple):
    """Of the prefix in which a token is chosen."""

    value: Float[Tensor, " n"]
    """``sum_v pi(v) Q(v)``."""
    kl: Float[Tensor, " n"]
    """``sum_v pi(v) log(pi(v) / ref(v))``, nats."""


def soft_state(
    logits: Float[Tensor, "n v"], ref_logits: Float[Tensor, "n v"], q: Float[Tensor, "n v"], temperature: float
) -> SoftState:
    """Expected Q and KL to the reference policy under the tempered policy (ETPO, arXiv 2402.06700).

    ``temperature`` divides both logits.
    """
    log_pi, log_ref = (
        # Never below float32, whatever the models compute in.
        torch.log_softmax(x.to(torch.promote_types(x.dtype, torch.float32)) / temperature, dim=-1)
        for x in (logits, ref_logits)
    )
    pi = log_pi.exp()
    # A token that the policy cannot choose adds nothing, even where the reference cannot either.
    ratio = torch.where(pi > 0, log_pi - log_ref, 0.0)
    return SoftState((pi * q).sum(-1), (pi * ratio).sum(-1))


def soft_policy_loss(
    logits: Float[Tensor, "n v"],
    ref_logits: Float[Tensor, "n v"],
    q: Float[Tensor, "n v"],
    temperature: float,
    kl_weight: float,
) -> Float[Tensor, " n"]:
    """``sum_v pi(v) (b log(pi(v) / ref(v)) - Q(v))`` with Q held fixed (ETPO, arXiv 2402.06700)."""
    state = soft_state(logits, ref_logits, q.detach(), temperature)
    return kl_weight * state.kl - state.value
