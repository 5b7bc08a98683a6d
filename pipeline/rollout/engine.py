"""The contract between whatever samples tokens and everything that uses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


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

    key: str
    """Names the episode from turn to turn, so that an engine can keep what it computed for it."""
    ids: Sequence[int]
    """The whole prefix: prompt and everything since, forced tokens included."""
    uniforms: np.ndarray
    """float64 (m,) in [0, 1): one named draw per token to come; m is the longest allowed continuation."""
    forced: int = 0
    """How many tokens at the prefix's end open this response (they count towards the stop text)."""


@dataclass(frozen=True)
class Continuation:
    """What was sampled after a prefix."""

    ids: list[int]
    """Token ids, an end-of-sequence token included."""
    logprob: list[float]
    """Under the behaviour policy at the sampling temperature."""
    entropy: list[float]
    """Of that distribution, in nats."""
    finish: str
    """``stop``: the stop text; ``eos``: an end-of-sequence token; ``length``: no draws left."""
    policy_version: int
    """Version of the weights that sampled it."""


class RolloutEngine(Protocol):
    """Samples continuations of prefixes with named randomness.

    The same request under the same weights gives the same tokens up to float rounding, whatever else is in the batch.
    """

    policy_version: int

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Continuation]:
        """One continuation per request, in order. Computations for earlier requests of the same keys are reused."""

    def forget(self) -> None:
        """Drop everything computed; must be called whenever the weights have changed."""
