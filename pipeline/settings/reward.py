"""How rewards are reshaped. What each choice does is in pipeline/objective/rewards.py."""

from typing import Annotated, Literal, Union

from pydantic import Field

from pipeline.settings.custom import Custom
from pipeline.settings.section import MOST, Float, NonNegative, Positive, Section


class PlainReward(Section):
    """The environment's reward."""

    kind: Literal["none"]


class OutcomeEntropyReward(Section):
    """What every choice has that shapes the rewards of successes and of failures by entropy."""

    base: NonNegative = 1.0
    """alpha_1: factor of the return of a successful trajectory, and of ``failure``."""
    bonus: NonNegative = 0.1
    """alpha_2: factor of the share by entropy, which successes earn and failures lose; its mean among them is 1."""
    failure: Annotated[Float, Field(ge=-MOST, le=0.0)] = -1.0
    """Return of every other trajectory, whatever the environment has given it."""

    def check(self) -> None:
        if self.base == 0:
            self.refuse_ignored("base is 0", "failure")


class TokenEntropyReward(OutcomeEntropyReward):
    """Each token earns or loses by its entropy beside others at its position (GTPO, arXiv 2508.04349)."""

    kind: Literal["token_entropy"]


class SequenceEntropyReward(OutcomeEntropyReward):
    """Each trajectory earns or loses by its mean entropy beside its group's others (GRPO-S, arXiv 2508.04349)."""

    kind: Literal["sequence_entropy"]


class EntropyRateReward(Section):
    """The trajectory's entropy rate is taken from its reward (after PARL, arXiv 2311.18703)."""

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
