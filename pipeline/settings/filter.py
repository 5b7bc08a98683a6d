"""Which groups are trained on. What each choice does is in pipeline/objective/filters.py."""

from typing import Annotated, Literal, Union

from pydantic import Field

from pipeline.settings.custom import Custom
from pipeline.settings.section import Section, Share


class AllGroups(Section):
    """Train on every group."""

    kind: Literal["all"]


class RewardVariance(Section):
    """Keep the groups whose returns vary most; groups of equal returns are always dropped (StarPO-S, DAPO)."""

    kind: Literal["reward_variance"]
    keep: Share = 1.0
    """Share of the iteration's groups that is kept, by standard deviation of their returns."""


class CustomFilter(Custom, slot="filter"):
    """A function of one's own; it may also drop single trajectories."""


Filter = Annotated[Union[AllGroups, RewardVariance, CustomFilter], Field(discriminator="kind")]
