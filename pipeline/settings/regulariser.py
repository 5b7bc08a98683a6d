"""Entropy and KL terms of the loss. What each choice does is in pipeline/objective/regularisers.py."""

from typing import Annotated, Literal, Union

from pydantic import Field

from pipeline.settings.custom import Custom
from pipeline.settings.section import Int, NonNegative, Positive, Section


class RegulariserSection(Section):
    """What every regulariser has: terms added to the loss as plain token means, whatever the token weights are."""

    entropy: NonNegative = 0.0
    """Coefficient of the entropy bonus."""
    kl: NonNegative = 0.0
    """Coefficient of the KL to the reference policy."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How the KL is estimated from sampled tokens, and so which KL the loss pulls by: its expected gradient on-policy is that
    of KL(pi || ref) with k2, that of KL(ref || pi) with k3, and zero with k1."""
    skip_above_kl: Positive | None = None
    """The policy's step is skipped while its KL from the behaviour policy is above this (POAD: 0.02); null for never."""

    def check(self) -> None:
        if self.kl == 0:
            self.refuse_ignored("kl is 0", "kl_estimator")


class FixedRegulariser(RegulariserSection):
    """Fixed coefficients."""

    kind: Literal["fixed"]


class EntropyBand(RegulariserSection):
    """A penalty where a token's entropy leaves a band around that of all earlier iterations (EPO, arXiv 2509.22576).

    The penalty is the distance from the band, a share of the bonus that falls from twice ``alpha`` to ``alpha``.
    """

    kind: Literal["entropy_band"]
    entropy: Positive = 0.001
    """Coefficient of the entropy bonus; of the penalty it is one too."""
    alpha: Positive = 0.1
    """Of the distance beside the entropy: 0.1 on ALFWorld, 0.05 on ScienceWorld."""
    steps: Annotated[Int, Field(ge=2, le=1_000_000)] = 150
    """K of ``1 + exp(-3 k / floor(K / 2))`` in iteration k: how many iterations there are (ALFWorld 150, ScienceWorld 125)."""
    low: NonNegative = 0.0
    """Lower end of the band, as a factor of the mean over all earlier iterations; at 0 only the upper side acts."""
    high: NonNegative = 2.0
    """Upper end of the band."""

    def check(self) -> None:
        super().check()
        if self.low > self.high:
            raise ValueError("low must not exceed high")


class EntropyTarget(RegulariserSection):
    """The entropy bonus adapts to a target below the initial entropy, larger on hard groups (AER, arXiv 2510.10959).

    ``entropy`` is the coefficient of the first iteration.
    """

    kind: Literal["entropy_target"]
    target: Positive = 0.8
    """Mean token entropy to be kept, as a share of the first iteration's. Ours."""
    rate: Positive = 0.01
    """Change of the coefficient per iteration and nat of missing entropy. Ours."""
    largest: Positive = 0.05
    """The coefficient stays within 0 and this. Ours."""
    hardness: NonNegative = 1.0
    """A group's coefficient is larger by this times its failure rate. Ours."""


class CustomRegulariser(RegulariserSection, Custom, slot="regulariser"):
    """A function of one's own gives each token's entropy terms; the KL terms are as in every choice."""

    def check(self) -> None:
        super().check()
        self.refuse_ignored("the function gives the bonus", "entropy")


Regulariser = Annotated[
    Union[FixedRegulariser, EntropyBand, EntropyTarget, CustomRegulariser], Field(discriminator="kind")
]
