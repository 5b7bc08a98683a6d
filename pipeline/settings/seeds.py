"""Seeds that are added in batches until the comparison is decided, in place of a list."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from pipeline.settings.section import Int, Section, Seed

SeedCount = Annotated[Int, Field(ge=2, le=1000)]
MOST_LOOKS = 50


class SeedsUntil(Section):
    """Seeds in batches: after each of them the comparison is looked at, and ends where it is decided."""

    model_config = ConfigDict(serialize_by_alias=True)

    first: Seed = Field(default=0, alias="from")
    """The first seed; the others follow it, one by one."""
    at_least: SeedCount = 6
    """Seeds at the first look."""
    at_most: SeedCount = 30
    """Seeds at the last look, at which whatever is undecided stays so."""
    batch: Annotated[Int, Field(ge=1, le=1000)] = 4
    """Seeds that are added between two looks; the last batch may be smaller."""
    until: Literal["decided"]
    """``decided``: until every primary comparison (without any, every declared one) has a verdict other than undecided."""

    def check(self) -> None:
        if self.at_least > self.at_most:
            raise ValueError(f"at_least ({self.at_least}) exceeds at_most ({self.at_most})")
        if self.first + self.at_most > 2**32:
            raise ValueError(f"from ({self.first}) + at_most ({self.at_most}) exceeds 4294967296, and so would a seed")
        if len(self.counts) > MOST_LOOKS:
            raise ValueError(f"{len(self.counts)} looks; at most {MOST_LOOKS}: raise batch or at_least")

    @property
    def counts(self) -> tuple[int, ...]:
        """How many seeds there are at each look."""
        return (*range(self.at_least, self.at_most, self.batch), self.at_most)

    def seeds(self, count: int) -> list[int]:
        """The first ``count`` seeds."""
        return list(range(self.first, self.first + count))


def first_seeds(raw: Any) -> Any:
    """Of ``seeds`` as they are written, a list as it is; of a mapping the seeds of the first look.

    A wrong mapping is one seed here: its mistakes are told where it is read as ``SeedsUntil``.
    """
    if not isinstance(raw, dict):
        return raw
    try:
        rule = SeedsUntil.model_validate(raw)
    except ValidationError:
        return [0]
    return rule.seeds(rule.at_least)


def only_a_mapping(raw: Any) -> Any:
    """Of ``seeds`` as they are written, a mapping as it is; None of a list."""
    return raw if isinstance(raw, dict | SeedsUntil) else None
