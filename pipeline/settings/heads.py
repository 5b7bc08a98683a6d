"""Networks beside the policy: a value function, or Q over the vocabulary."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.settings.section import Int, LearningRate, Positive, Probability, Section


class Critic(Section):
    """A value function beside the policy."""

    kind: Literal["trunk", "model"] = "trunk"
    """``trunk``: a linear head on the policy's last hidden state; ``model``: a copy of the reference policy's trunk."""
    learning_rate: LearningRate = 1e-3
    """Learning rate of the head (trunk) or of the whole critic (model)."""
    coefficient: Positive = 0.5
    """Weight of the value loss beside the policy loss."""
    warmup_iterations: Annotated[Int, Field(ge=0, le=1_000_000)] = 0
    """First iterations in which only the critic is updated."""
    clip: Positive | None = None
    """Value clipping: largest change of a value per iteration; null for none."""


class QFunction(Section):
    """Q over the vocabulary, with a target network."""

    kind: Literal["trunk", "model"] = "trunk"
    """``trunk``: a linear head on the policy's last hidden state; ``model``: with a copy of the reference policy's trunk."""
    learning_rate: LearningRate = 1e-3
    """Learning rate of the head (trunk) or of the whole Q network (model)."""
    coefficient: Positive = 0.5
    """Weight of the Q loss beside the policy loss."""
    warmup_iterations: Annotated[Int, Field(ge=0, le=1_000_000)] = 0
    """First iterations in which only Q is updated."""
    kl_weight: Positive = 0.01
    """b: weight of the KL to the reference policy, in the targets and in the policy's loss."""
    huber_delta: Positive = 10.0
    """Error beyond which the Q loss grows linearly."""
    polyak: Probability = 0.995
    """Share of the target network that stays at each update."""
