"""Networks beside the policy: a value function, or Q over the vocabulary."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.settings.section import Int, LearningRate, Positive, Probability, Section


class HeadSection(Section):
    """What every network beside the policy has."""

    kind: Literal["trunk", "model"] = "trunk"
    """``trunk``: a linear head on the policy's last hidden state; ``model``: with a copy of the reference policy's trunk,
    not with ``train.lora``."""
    learning_rate: LearningRate = 1e-3
    """Learning rate of the head (trunk) or of the whole network (model)."""
    coefficient: Positive = 0.5
    """Weight of the network's loss beside the policy loss."""
    warmup_iterations: Annotated[Int, Field(ge=0, le=1_000_000)] = 0
    """First iterations in which only the network is updated."""


class Critic(HeadSection):
    """A value function beside the policy."""

    clip: Positive | None = None
    """Value clipping: largest change of a value per iteration; null for none."""


class QFunction(HeadSection):
    """Q over the vocabulary, with a target network."""

    kl_weight: Positive = 0.01
    """b: weight of the KL to the reference policy, in the targets and in the policy's loss."""
    huber_delta: Positive = 10.0
    """Error beyond which the Q loss grows linearly."""
    polyak: Probability = 0.995
    """Share of the target network that stays at each update."""
