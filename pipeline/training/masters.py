"""Float32 masters of weights that compute in less, so that no step is lost in rounding."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.workspace.errors import UserError

ADAM_EPS = 1e-8
"""What Adam adds to its denominator: where a gradient is smaller, a step is smaller than the learning rate."""
WATCHED, LEAST_MOVED = 4096, 0.5
"""Numbers of each tensor, evenly spaced, that are watched in a first step, and the share of them that it must move."""


class Rate(NamedTuple):
    """A learning rate: its key in params.yaml, its value."""

    key: str
    value: float


class Masters(nn.Module):
    """What an optimizer trains in place of parameters.

    A bfloat16 weight of 0.02 moves by 6e-5 or not at all, and a step of Adam is about the learning rate. So weights below
    float32 are rounded from masters, which take the steps. Float32 parameters are masters themselves. Copies are in the
    state dict, and so in a checkpoint. There is a ``rate`` if an optimizer makes the steps.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rate: Rate | None = None) -> None:
        super().__init__()
        self.rate, self.tried = rate, False
        """``tried``: a step has been seen to move them."""
        self._rounded: list[tuple[nn.Parameter, nn.Parameter]] = []
        self.weights: list[nn.Parameter] = []
        """A master for each parameter, in order."""
        for parameter in parameters:
            master = parameter
            if parameter.dtype in (torch.bfloat16, torch.float16):
                master = nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)
                self._rounded.append((parameter, master))
            self.weights.append(master)
        self.copies = nn.ParameterList([master for _, master in self._rounded])

    def gather(self) -> None:
        """Add the gradients of one backward pass to the masters', in float32."""
        for rounded, master in self._rounded:
            if rounded.grad is not None:
                gradient = rounded.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                rounded.grad = None

    def clip(self, norm: float) -> float:
        """Scale gradients down to a norm over all of them; returns the norm before."""
        return float(nn.utils.clip_grad_norm_([w for w in self.weights if w.grad is not None], norm))

    def stand_still(self) -> None:
        """Drop the gradients, so that the next step changes nothing here."""
        for weight in self.weights:
            weight.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Round the masters into the parameters."""
        for rounded, master in self._rounded:
            rounded.copy_(master)

    def watch(self) -> Callable[[], Tensor]:
        """What to call before a step and after it: it gives some of the numbers that should move.

        They have a gradient, and are not 0, from where the smallest step leads to another number.
        """
        places = []
        for weight in self.weights:
            if weight.grad is not None:
                some = torch.arange(0, weight.numel(), max(1, weight.numel() // WATCHED), device=weight.device)
                moving = (weight.grad.flatten()[some].abs() >= ADAM_EPS) & (weight.detach().flatten()[some] != 0)
                places.append((weight, some[moving]))

        def now() -> Tensor:
            return torch.cat([torch.zeros(0), *(w.detach().flatten()[some].cpu() for w, some in places)])

        return now


def take_step(step: Callable[..., object], trained: Sequence[Masters]) -> None:
    """Step, and round what is trained into what computes.

    The first step for which there is a gradient must move the weights: steps below their rounding would all be lost, and
    the training would be none.

    Raises:
        UserError: less than half of the weights that should have moved did.
    """
    watched = [(masters, now := masters.watch(), now()) for masters in trained if not masters.tried]
    step()
    for masters in trained:
        masters.write()
    for masters, now, before in watched:
        if len(before):
            masters.tried = True
            share, least = float((now() != before).float().mean()), float(before.abs().median()) * 2**-23
            if masters.rate is not None and not share >= LEAST_MOVED:
                raise UserError(
                    f"{masters.rate.key}: a step of {masters.rate.value:g} moves {share:.0%} of the weights and is lost in "
                    f"the rounding of the others to float32; allowed: {least:.0e} or more"
                )
