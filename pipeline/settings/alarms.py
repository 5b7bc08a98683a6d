"""When an iteration of a training looks wrong: thresholds, and what is said."""

from typing import Annotated

from pydantic import Field

from pipeline.settings.section import Float, Positive, Probability, Section

Fraction = Annotated[Float, Field(gt=0.0, lt=1.0)]
Factor = Annotated[Float, Field(gt=1.0, le=1e6)]


class Alarms(Section):
    """Thresholds of the alarms, each of which warns and stops nothing; null switches one off."""

    success: Fraction | None = 0.25
    """Success, a mean over three iterations or that of a validation, is below this share of its highest before."""
    valid_actions: Fraction | None = 0.5
    """The same of the share of turns with a valid action."""
    kl: Positive | None = 2.0
    """KL to the reference policy, or of one update, in nats per token, is above it."""
    entropy: tuple[Fraction, Factor] | None = (0.02, 5.0)
    """Entropy of the sampled tokens is below or above these multiples of the first iteration's."""
    repetition: Fraction | None = 0.3
    """This share of the runs of four tokens in a response have stood in it before, and twice that of the first iteration."""
    length: tuple[Fraction, Factor] | None = (0.2, 5.0)
    """Tokens of a response are below or above these multiples of the first iteration's."""
    cut: Fraction | None = 0.5
    """This share of the responses are cut by response_tokens or context_tokens, and twice that of the first iteration."""
    steps: Fraction | None = 1e-4
    """In three iterations in a row the gradient's norm is below this share of its largest, or no step was taken."""
    skipped: Probability | None = 0.1
    """A larger share of an iteration's updates was left out because a number was not finite."""
    sampler: Positive | None = 0.2
    """Log-probabilities of sampling and of the update differ by more, in nats, mean over tokens; where they can differ."""
    heads: Factor | None = 1000.0
    """The error of a critic or Q function has more than so many times the variance of what it should foresee, in each of
    the last iterations, up to three."""


PREFIX = "alarm_"
"""Before an alarm's name: its key in the rows of a learning curve, whose value is what was measured."""

SAID = {
    "success": "success fell to {:.3g}",
    "valid_actions": "valid actions fell to {:.3g} of the turns",
    "kl": "KL rose to {:.3g} nats per token",
    "entropy": "entropy of the sampled tokens came to {:.3g} nats",
    "repetition": "{:.3g} of a response repeats what stands in it",
    "length": "a response came to {:.3g} tokens",
    "cut": "{:.3g} of the responses are cut",
    "steps": "steps vanish, the gradient's norm is {:.3g}",
    "skipped": "{:.3g} of the updates were left out, not finite",
    "sampler": "sampler and trainer are {:.3g} nats apart",
    "heads": "the error of a critic or Q function is {:.3g} times what varies",
}
"""What an alarm says of a training, by its name, with the worst that was measured."""
