"""Where episodes come from. What each choice does is in pipeline/rollout/branching.py.

The budget, ``rollout.group_size`` episodes per initial state, is the same for all.
"""

from typing import Annotated, Literal, Union

from pydantic import Field

from pipeline.settings.section import (
    Count,
    Float,
    Int,
    NonNegative,
    Positive,
    Probability,
    Section,
    Temperature,
)


class Independent(Section):
    """Every episode begins at the initial state."""

    kind: Literal["none"] = "none"


class EntropyRise(Section):
    """Branch where an observation has raised the entropy (ARPO, arXiv 2507.19849; AEPO, arXiv 2510.14545).

    At the beginning of each response but the first, ``width`` more episodes begin if
    ``(draw + slope * dH) * max(0, 1 - penalty * l) >= threshold``. Budget that is left begins at the initial state.
    """

    kind: Literal["entropy_rise"]
    initial: Count | Literal["monitored"] = 8
    """Episodes that begin at the initial state; ``monitored``: from the entropies of a first episode (AEPO)."""
    monitor_slope: NonNegative = 0.5
    """b of AEPO's budget ``int(k * sigmoid(b * (H_root - mean H_tool))) + 1``."""
    base: Probability | None = None
    """The draw, if it is a constant (a of ARPO's paper); null: uniform in [0, 1) at each decision (AEPO's code)."""
    slope: NonNegative = 0.2
    """Of dH, nats: mean entropy at the beginning of this response less that of the episode's first."""
    threshold: Probability = 0.5
    """To be reached."""
    penalty: Probability = 0.05
    """Taken per consecutive branching l (AEPO); 0 for none (ARPO)."""
    penalty_per: Literal["path", "prompt"] = "path"
    """What counts as branching in a row: decisions of one path (paper), or rounds, a turn of all of the initial state's
    paths each, in which any of them branches (released code)."""
    tokens: Count = 10
    """First tokens of a response over which entropy is averaged. Ours."""
    width: Count = 1
    """Branches at a place, beside the episode that goes on."""

    def check(self) -> None:
        if self.initial != "monitored":
            self.refuse_ignored("initial is a number", "monitor_slope")
        if self.penalty == 0:
            self.refuse_ignored("penalty is 0", "penalty_per")
            if self.base == self.threshold:
                self.refuse_ignored("base is the threshold and there is no penalty", "slope")


class Positions(Section):
    """Branch at the tokens of highest score (APPO, arXiv 2606.12384), or of an error (TLPO, arXiv 2604.26553).

    The budget beyond ``initial`` goes to branches, ``width`` at each position, best first.
    """

    kind: Literal["positions"]
    initial: Count = 8
    """Episodes that begin at the initial state."""
    signal: Literal[
        "branching_score", "entropy", "reference_energy", "action_energy", "action_random", "action_start", "random"
    ] = "branching_score"
    """The score: APPO's ``z(H) * z(Omega)`` under the policy after the iteration's first updates, z over an episode's
    tokens, those first in which both are positive, and none on whitespace; the behaviour policy's entropy; the reference
    policy's energy, of all tokens or of action tokens; a draw for any action token, or for the
    first one of each response; a draw for any token."""
    side: Literal["before", "after"] = "after"
    """Sample the scored token again, or only what comes after it (APPO)."""
    among: Literal["all", "erroneous"] = "all"
    """Which episodes are branched from. ``erroneous``: those that failed, if any did, and before all other places at their first
    erroneous token: in the first response that could not be executed the first token of the action, or the one that left the
    format."""
    width: Count = 1
    """Branches at a position."""
    candidates: Literal["sampled", "likeliest"] = "sampled"
    """What the branches at a position begin with: what the policy samples there, or the tokens that are likeliest there, one
    each but for the one that stands there (TLPO), as long as the response goes on behind them."""
    discount: Probability = 1.0
    """gamma of ``Omega_t = exp(sum_{k >= t} gamma^(k-t) (log pi - log pi_old))``."""
    bounds: tuple[Positive, Positive] = (0.8, 1.2)
    """Omega is clipped to these."""

    def check(self) -> None:
        if self.among == "erroneous" and self.side == "after":
            raise ValueError("among erroneous needs side before: the erroneous token is what is to be another one")
        if self.candidates == "likeliest" and self.signal == "branching_score":
            raise ValueError(
                "candidates likeliest needs another signal: behind an update the budget must go to branches alone"
            )
        if self.signal != "branching_score":
            self.refuse_ignored(f"signal is {self.signal}", "discount", "bounds")
        if not self.bounds[0] < 1 < self.bounds[1]:
            raise ValueError("bounds must be two numbers, low < 1 < high")


class TreeSearch(Section):
    """Monte-Carlo tree search over turns, with whole episodes as simulations (SEEA-R1, arXiv 2506.21669)."""

    kind: Literal["tree_search"]
    width: Annotated[Int, Field(ge=2, le=1_000_000)] = 5
    """Children of a state that is expanded."""
    exploration: NonNegative = 1.0
    """c of ``Q + c * sqrt(ln N / (1 + n))``, Q as it is."""
    discount: Probability = 0.99
    """gamma of ``G = r + gamma * G'``, turn by turn, whose mean is Q."""


class TemperatureShift(Section):
    """Some episodes at a temperature that follows entropy (SCOPE-RL, once Arbitrary Entropy PO, arXiv 2510.08141)."""

    kind: Literal["temperature_shift"]
    share: Annotated[Float, Field(gt=0.0, lt=1.0)] = 1 / 64
    """Of the budget that is sampled at the other temperature; a draw per initial state decides on its fraction of an episode."""
    target: NonNegative = 0.5
    """H_0 of ``T = clip(1 + H_0 - H_prev, low, high)``, nats per token; H_prev is the mean of the iteration before."""
    low: Temperature = 0.8
    """Lowest temperature."""
    high: Temperature = 1.2
    """Highest temperature."""

    def check(self) -> None:
        if not self.low < self.high:
            raise ValueError("low must be below high")


Branching = Annotated[
    Union[Independent, EntropyRise, Positions, TreeSearch, TemperatureShift], Field(discriminator="kind")
]
