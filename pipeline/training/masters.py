"""Weights that an optimizer trains: in float32, whatever computes with them, so that no step is lost in rounding."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.model.policy import Policy
from pipeline.model.shards import own_part, whole
from pipeline.workspace.errors import UserError

ADAM_EPS = 1e-8
"""What Adam adds to its denominator: where a gradient is smaller, a step is smaller than the learning rate."""
WATCHED, LEAST_MOVED = 4096, 0.5
"""Numbers of each tensor, evenly spaced, that are watched in a first step, and the share of them that it must move."""


def with_masters(policy: Policy) -> Policy:
    """The same policy, what is trained of its weights in float32, in place.

    A bfloat16 weight of 0.02 moves by 6e-5 or not at all, and a step of Adam is about the learning rate. A policy that was
    bfloat16 goes on computing in it, by autocast. In float16 gradients would leave its range: such a one computes in float32.
    """
    dtype = policy.model.dtype
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return replace(policy, computing=dtype if dtype == torch.bfloat16 else None)


class Rate(NamedTuple):
    """A learning rate: its key in params.yaml, its value."""

    key: str
    value: float


@dataclass
class Masters:
    """What an optimizer trains at one learning rate."""

    weights: Sequence[nn.Parameter]
    rate: Rate
    tried: bool = False
    """A step has been seen to move them."""

    def clip(self, norm: float) -> float:
        """Scale gradients down to a norm over all of them, unless theirs is not finite; returns the norm before."""
        moving = [weight for weight in self.weights if weight.grad is not None]
        total = nn.utils.get_total_norm([weight.grad for weight in moving if weight.grad is not None])
        if math.isfinite(found := float(whole(total))):
            nn.utils.clip_grads_with_norm_(moving, norm, total)
        return found

    def stand_still(self) -> None:
        """Drop the gradients, so that the next step changes nothing here."""
        for weight in self.weights:
            weight.grad = None

    def watch(self) -> Callable[[], Tensor]:
        """What to call before a step and after it: it gives some of the numbers that should move.

        They have a gradient, and are not 0, from where the smallest step leads to another number. Of weights that are shared
        out, this process's part is watched.
        """
        places = []
        for weight in self.weights:
            if weight.grad is not None:
                own, grad = own_part(weight.detach()).flatten(), own_part(weight.grad).flatten()
                some = torch.arange(0, own.numel(), max(1, own.numel() // WATCHED), device=own.device)
                moving = (grad[some].abs() >= ADAM_EPS) & (own[some] != 0)
                places.append((weight, some[moving]))

        def now() -> Tensor:
            return torch.cat([torch.zeros(0), *(own_part(w.detach()).flatten()[some].cpu() for w, some in places)])

        return now


def take_step(step: Callable[..., object], trained: Sequence[Masters]) -> list[float | None]:
    """Step, and tell of each what share of its numbers the first step has moved for which there is a gradient.

    Returns:
        None where that step is over, or still to come.

    Raises:
        UserError: it has moved less than half of those that it should have: steps below the rounding of the weights would
            all be lost, and the training would be none.
    """
    watched = [None if masters.tried else (now := masters.watch(), now()) for masters in trained]
    step()
    return [
        None if before is None else _share_moved(masters, *before)
        for masters, before in zip(trained, watched, strict=True)
    ]


def _share_moved(masters: Masters, now: Callable[[], Tensor], before: Tensor) -> float | None:
    if not len(before):
        return None
    masters.tried = True
    share, precision = float((now() != before).float().mean()), masters.weights[0].dtype
    if not share >= LEAST_MOVED:
        least = float(before.abs().median()) * torch.finfo(precision).eps
        raise UserError(
            f"{masters.rate.key}: a step of {masters.rate.value:g} moves {100 * share:.2g} % of the weights and is lost in "
            f"the rounding of the others to {str(precision).removeprefix('torch.')}; allowed: {least:.0e} or more"
        )
    return share
