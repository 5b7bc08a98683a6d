"""The schema of a sweep: which settings are searched over which ranges, for which methods, and what counts as good."""

from typing import Annotated, Any, Literal, Union

from pydantic import Field

from pipeline.settings.section import Count, Int, Name, NonNegative, Number, Positive, Section, Seed, at_least

Whole = Annotated[Int, Field(ge=-(10**12), le=10**12)]


class Range(Section):
    """What every space between two ends has."""

    kind: str
    low: float
    high: float

    def check(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")


class Uniform(Range):
    """Any number of a range, each as likely as another."""

    kind: Literal["uniform"]
    low: Number
    high: Number


class Logarithmic(Range):
    """Any number of a range, each order of magnitude as likely as another."""

    kind: Literal["log"]
    low: Positive
    high: Positive


class LogarithmicFromZero(Section):
    """Numbers from zero: linear below ``scale``, logarithmic above.

    A draw is ``scale * ((1 + high / scale)**u - 1)`` of a uniform u in [0, 1].
    """

    kind: Literal["log_from_zero"]
    high: Positive
    scale: Annotated[Positive, at_least(1e-9)] = 0.01
    """Where linear goes over into logarithmic."""


class Integer(Range):
    """Any whole number of a range, both ends included."""

    kind: Literal["integer"]
    low: Whole
    high: Whole


class Choice(Section):
    """One of a list."""

    kind: Literal["choice"]
    values: list[str | int | float | bool] = Field(min_length=2)

    def check(self) -> None:
        self.refuse_repeated("values")


Space = Annotated[Union[Uniform, Logarithmic, LogarithmicFromZero, Integer, Choice], Field(discriminator="kind")]
Value = str | int | float | bool | None


class Study(Section):
    """One search, run for each of its methods with the same number of trials."""

    environment: Name | None = None
    """Key in ``environments``; null is the first one."""
    methods: Annotated[list[Name], Field(min_length=1)] | Literal["all"]
    """Keys in ``methods``; each has a search of its own."""
    trials: Count | None = None
    """Finished trials of each method; null is ``sweep.trials``."""
    space: dict[str, Space] = Field(min_length=1)
    """Dotted key of params.yaml -> what is drawn for it. ``method.`` stands for the searched method's own section; other
    keys are of ``train`` or ``rollout``."""
    baselines: dict[Name, dict[str, Any]] = Field(min_length=1)
    """Tried first: points of the space, by name. A key that is not named keeps the value it has in params.yaml."""

    def check(self) -> None:
        if self.methods != "all":
            self.refuse_repeated("methods")


class MedianPruner(Section):
    """Stop a trial whose best result so far is below the median of the other trials' results at the same iteration."""

    kind: Literal["median"]
    after_trials: Count = 8
    """Finished trials before any is stopped."""
    after_iterations: Annotated[Int, Field(ge=0, le=1_000_000)] = 10
    """Iterations that every trial is given."""


class NoPruner(Section):
    """Every trial runs to its end."""

    kind: Literal["none"]


class Constraints(Section):
    """What a trial must keep to be called best; the sampler avoids what breaks it."""

    kl: Positive | None = 0.5
    """Largest KL to the reference policy at the last iteration, mean over seeds, nats per token; null for none."""
    loss: NonNegative | None = 0.1
    """Largest loss of validation success of any seed, from before training to the end: a collapse; null for none."""


class Sweep(Section):
    """How searches are run. A sweep sees validation states only, and none of the comparison's seeds."""

    trials: Count = 32
    """Finished trials (complete or stopped early) of each method."""
    seeds: list[Seed] = Field(default=[100, 101], min_length=1)
    """A trial is a training per seed; they are stopped or kept together."""
    confirm_seeds: list[Seed] = Field(default=[200, 201, 202, 203, 204, 205, 206, 207], min_length=1)
    """Fresh seeds on which the best and the baselines are compared afterwards; two comparisons need seven for verdicts."""
    score: Literal["final", "area"] = "final"
    """Mean over seeds of validation success: at the end, or averaged over training (area under the curve)."""
    fewer_tokens: bool = False
    """A second objective, tokens per episode at the end, to be small; the sweep then leaves a front of trials."""
    constraints: Constraints = Constraints()
    pruner: Annotated[Union[MedianPruner, NoPruner], Field(discriminator="kind")] = MedianPruner(kind="median")
    startup_trials: Count = 10
    """Trials drawn at random before the sampler (TPE) makes use of what it has seen."""
    seed: Seed = 0
    """Of the sampler's draws."""
    retries: Annotated[Int, Field(ge=0, le=1_000_000)] = 2
    """How often a trial whose worker was killed is tried again with the same settings."""
    heartbeat: Positive = 15.0
    """Seconds between a worker's signs of life; after six without one it is taken for dead by workers elsewhere."""
    storage: str | None = None
    """URL without a password, e.g. postgresql+psycopg://user@host/database, for workers on several machines; null is
    SWEEP_STORAGE or else a journal file in .cache/sweep."""
    studies: dict[Name, Study] = Field(default={})
    """Searches by name."""

    def check(self) -> None:
        if self.fewer_tokens and self.pruner.kind != "none":
            raise ValueError("fewer_tokens has two objectives, which no pruner can rank; set pruner: {kind: none}")
        self.refuse_repeated("seeds", "confirm_seeds")
        both = set(self.seeds) & set(self.confirm_seeds)
        if both:
            raise ValueError(f"confirm_seeds must be fresh, {sorted(both)} are among seeds too")
