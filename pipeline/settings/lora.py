"""Low-rank adapters (LoRA, arXiv 2106.09685) beside frozen weights: what is trained in place of these."""

from typing import Annotated

from pydantic import Field

from pipeline.settings.section import Count, Positive, Section


class Lora(Section):
    """Adapters: a projection W x becomes ``W x + alpha / rank B A x``; A and B are trained, W is not."""

    rank: Count = 16
    """Rows of A, columns of B."""
    alpha: Positive = 32.0
    """Scale of the product, times the rank."""
    targets: Annotated[list[str], Field(min_length=1)] | None = None
    """Projections that get adapters, by the last parts of their names, e.g. ``[q_proj, v_proj]``; null: all, but not the
    output head."""
    learning_rate_factor: Positive = 10.0
    """Adapters learn at so many times the learning rate that is given for weights. They want about ten times as much
    (Thinking Machines, "LoRA Without Regret", 2025), and methods keep their rates."""

    def check(self) -> None:
        if self.targets is not None:
            self.refuse_repeated("targets")
