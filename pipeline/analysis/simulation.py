"""Do intervals and verdicts hold what they promise? Comparisons made up from known variances, judged as real ones are.

An episode is won with a probability whose logit is a method's own level plus four normal parts: of the seed of a training,
of the initial state (both methods have it), of the state for that method alone, and of seed and state together. The level
is found by quadrature, such that the methods' true mean successes lie the wanted difference apart around one half.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import get_args

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats
from jaxtyping import Float

from pipeline.analysis.intervals import LEVEL, two_way
from pipeline.analysis.power import least_seeds
from pipeline.analysis.verdicts import Verdict, adjusted, difference_p, equivalence_p, words
from pipeline.workspace.randomness import generator

FLIPS = 2**10
"""Sign flips of a simulated test: all of ten seeds."""


@dataclass(frozen=True)
class Mix:
    """Standard deviations of the logit of success."""

    seed: float
    state: float
    """Of a state for both methods: pairing takes it away, nearly."""
    own_state: float
    """Of a state for one method."""
    interaction: float
    """Of a seed on a state."""

    @property
    def total(self) -> float:
        return math.hypot(self.seed, self.state, self.own_state, self.interaction)


MIXES: Mapping[str, Mix] = {
    "seeds": Mix(seed=1.0, state=1.0, own_state=0.0, interaction=0.0),
    "states": Mix(seed=0.05, state=1.0, own_state=1.2, interaction=0.0),
    "interaction": Mix(seed=0.1, state=1.0, own_state=0.1, interaction=1.5),
    "episodes": Mix(seed=0.0, state=0.3, own_state=0.0, interaction=0.0),
    "all": Mix(seed=0.5, state=1.0, own_state=0.6, interaction=0.6),
}
"""What varies most -> the parts."""
SEEDS, STATES = (5, 6, 10, 20, 50), (16, 32, 64)


@cache
def level(success: float, spread: float) -> float:
    """The mean logit at which the mean success is as given, when logits vary normally by ``spread`` around it."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    share = weights / weights.sum()
    return float(scipy.optimize.brentq(lambda x: share @ scipy.special.expit(x + spread * nodes) - success, -20, 20))


def made_up(
    mix: Mix, difference: float, trials: int, seeds: int, states: int, draws: np.random.Generator, methods: int = 2
) -> Float[np.ndarray, "trials pairs seeds states"]:
    """Paired differences of methods to the last of them, which is a control; each truly lies ``difference`` above it.

    Every seed has two episodes on a state.
    """
    logits = draws.standard_normal((trials, 1, 1, states), dtype=np.float32) * mix.state
    parts = ((mix.seed, (seeds, 1)), (mix.own_state, (1, states)), (mix.interaction, (seeds, states)))
    for spread, shape in parts:
        if spread:
            logits = logits + spread * draws.standard_normal((trials, methods, *shape), dtype=np.float32)
    above = [level(0.5 + difference / 2, mix.total)] * (methods - 1)
    logits = logits + np.array([*above, level(0.5 - difference / 2, mix.total)], dtype=np.float32)[:, None, None]
    chances = np.broadcast_to(scipy.special.expit(logits), (trials, methods, seeds, states))
    luck = draws.random(chances.shape, dtype=np.float32)
    won = (
        (luck < chances * (2 - chances)).astype(np.float32) + (luck < chances * chances)
    ) / 2  # one, and both, of two
    return np.asarray(won[:, :-1] - won[:, -1:], dtype=float)


def coverage(mix: str, seeds: int, states: int, trials: int, difference: float = 0.1) -> float:
    """Share of simulated comparisons whose 95 % interval holds the true difference."""
    draws = generator(0, "simulated coverage", mix, seeds, states)
    parts = two_way(made_up(MIXES[mix], difference, trials, seeds, states, draws)[:, 0])
    half = scipy.stats.t.ppf((1 + LEVEL) / 2, parts.freedom) * parts.error
    return float(np.mean(np.abs(parts.mean - difference) <= half))


def verdicts(
    mix: str, seeds: int, states: int, trials: int, difference: float, family: int = 1, smallest_effect: float = 0.05
) -> dict[str, float]:
    """How often a family has which verdict on at least one of its methods, all truly ``difference`` above one control.

    Empty where so few seeds can have none.
    """
    if seeds < least_seeds(family):
        return {}
    draws = generator(0, "simulated verdicts", mix, seeds, states, f"{difference:g}", family)
    grids = made_up(MIXES[mix], difference, trials, seeds, states, draws, family + 1)
    parts = two_way(grids)
    differing, equal = difference_p(parts, grids.mean(axis=-1), FLIPS), equivalence_p(parts, smallest_effect)
    said = words(parts.mean, adjusted(differing, "holm"), adjusted(equal, "holm"))
    names = get_args(Verdict)
    found = {name: float(np.mean((said == name).any(axis=1))) for name in names}
    return {**found, "different": float(np.mean(np.isin(said, names[:2]).any(axis=1)))}  # better or worse
