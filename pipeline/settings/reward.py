"""How rewards are reshaped. What each choice does is in pipeline/objective/rewards.py."""

from typing import Annotated, Literal, Union

from pydantic import Field

from pipeline.settings.custom import Custom
from pipeline.settings.section import NonNegative, Positive, Section


class PlainReward(Section):
    """The environment's reward."""

    kind: Literal["none"]


class TokenEntropyReward(Section):
    """Successful trajectories share reward by token entropy (GTPO, arXiv 2508.04349)."""

    kind: Literal["token_entropy"]
    base: NonNegative = 1.0
    """Factor of the return on every token of a successful trajectory."""
    bonus: NonNegative = 0.1
    """Factor of the entropy share, whose mean over the successful trajectories alive at a position is 1."""


class SequenceEntropyReward(Section):
    """Successful trajectories share reward by their mean entropy (GRPO-S, arXiv 2508.04349)."""

    kind: Literal["sequence_entropy"]
    base: NonNegative = 1.0
    """Factor of the return of a successful trajectory."""
    bonus: NonNegative = 0.1
    """Factor of the entropy share, whose mean over a group's successful trajectories is 1."""


class EntropyRateReward(Section):
    """The trajectory's entropy rate is taken from its reward (after PARL)."""

    kind: Literal["entropy_rate"]
    coefficient: Positive = 0.1
    """Reward lost per nat of mean token entropy. Ours."""


class ReferenceKLReward(Section):
    """A penalty on each token's log-probability ratio to the reference policy (k1 in the reward, arXiv 2203.02155)."""

    kind: Literal["reference_kl"]
    coefficient: Positive = 0.001
    """Reward lost per nat."""


class CustomReward(Custom, slot="reward"):
    """A function of one's own."""


Reward = Annotated[
    Union[PlainReward, TokenEntropyReward, SequenceEntropyReward, EntropyRateReward, ReferenceKLReward, CustomReward],
    Field(discriminator="kind"),
]
