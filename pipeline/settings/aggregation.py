"""Aggregation: what divides the weighted sum. What each choice does is in pipeline/objective/aggregation.py."""

from typing import Annotated, Literal, Union

from pydantic import Field

from pipeline.settings.custom import Custom
from pipeline.settings.section import Positive, Section


class AggregationSection(Section):
    """What every choice of the divisor has."""

    count: Literal["all", "with_advantage"] = "all"
    """Tokens that the surrogate's divisor counts: all trainable ones, or only those whose advantage is not 0. A group of
    equal returns has none: counted, it makes the surrogate smaller beside the entropy and KL terms."""


class WeightSum(AggregationSection):
    """Divide by the minibatch's total weight (ActFocus; with uniform weights the token mean)."""

    kind: Literal["weight_sum"]


class TokenMean(AggregationSection):
    """Divide by the minibatch's number of trainable tokens."""

    kind: Literal["token_mean"]


class SequenceMean(AggregationSection):
    """Each trajectory's weighted mean, then the mean over trajectories (GRPO, arXiv 2402.03300)."""

    kind: Literal["sequence_mean"]


class ConstantNormaliser(AggregationSection):
    """Divide by a constant per trajectory (Dr. GRPO, arXiv 2503.20783)."""

    kind: Literal["constant"]
    tokens: Positive
    """That constant: published as the longest response; for a whole episode max_turns * response_tokens."""


class CustomAggregation(AggregationSection, Custom, slot="aggregation", given=("weight", "trainable", "trajectory")):
    """A function of one's own."""


Aggregation = Annotated[
    Union[WeightSum, TokenMean, SequenceMean, ConstantNormaliser, CustomAggregation], Field(discriminator="kind")
]
