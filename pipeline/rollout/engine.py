"""The contract between whatever samples tokens and everything that uses them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from pipeline.model.policy import Policy


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float
    """Divides the logits; greater than 0."""
    stop: str
    """A response ends with the token that completes this text."""


@dataclass(frozen=True)
class Request:
    """Continue a stored prefix."""

    ids: Sequence[int]
    """The whole prefix: prompt and everything since, forced tokens included."""
    uniforms: np.ndarray
    """float64 (m,) in [0, 1): one named draw per token to come; m is the longest allowed continuation."""
    forced: int = 0
    """How many tokens at the prefix's end open this response (they count towards the stop text)."""
    episode: str = ""
    """Whose response it is, for errors."""


@dataclass(frozen=True)
class Continuation:
    """What was sampled after a prefix."""

    ids: list[int]
    """Token ids, an end-of-sequence token included."""
    logprob: list[float]
    """Under the behaviour policy at the sampling temperature."""
    entropy: list[float]
    """Of that distribution, in nats; NaN from an engine that is not told the whole of it."""
    finish: str
    """``stop``: the stop text; ``eos``: an end-of-sequence token; ``length``: no draws left."""
    policy_version: int
    """Version of the weights that sampled it."""


Follow = Callable[[int, Continuation], Request | None]
"""Given a request's number and what was sampled for it, how the same episode goes on; None: it does not."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples continuations of prefixes with named randomness.

    The same request under the same weights gives the same tokens up to float rounding, whatever else is in the batch: from
    an engine that can be given noise, which vLLM cannot.
    """

    policy_version: int
    """Of the weights that sample; every continuation carries it."""

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, follow: Follow | None = None
    ) -> list[Continuation]:
        """Continue every request, and every request that follows from it, until there is none.

        Requests are taken one by one, whenever there is room for another. ``follow`` is called as soon as a continuation is
        complete, while the others go on; without it one continuation each is sampled.

        Returns:
            The last continuation of each request, in order. What was computed for a prefix is not computed again for
            what begins with it, in this call or a later one.
        """

    def sync(self, policy: Policy, version: int) -> None:
        """Sample from a policy's weights from now on; must be called whenever they have changed.

        Everything computed with those before is dropped, and then only the version becomes ``version``: one whose weights
        did not arrive never has it.
        """

    def forget(self) -> None:
        """Drop everything computed, so that what follows does not depend on what was sampled before."""
