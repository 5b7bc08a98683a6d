"""How an update corrects for tokens that were sampled by other probabilities than those that it begins with."""

from typing import Literal

from pipeline.settings.section import Positive, Probability, Section


class Correction(Section):
    """A factor on each token's surrogate, by the ratio r of the trained policy's probability to the sampler's."""

    kind: Literal["truncate", "mask"]
    """``truncate``: min(r, high). ``mask``: r within [low, high], 0 elsewhere."""
    level: Literal["token", "sequence"] = "token"
    """Whether r is a token's, or an episode's: the product over all its trainable tokens."""
    high: Positive = 2.0
    """Largest factor."""
    low: Probability = 0.0
    """Smallest ratio that is no reason for a mask."""

    def check(self) -> None:
        if self.kind == "truncate":
            self.refuse_ignored("kind is truncate", "low")
        if self.low > self.high:
            raise ValueError(f"low ({self.low:g}) exceeds high ({self.high:g})")
