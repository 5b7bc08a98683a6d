"""What an advantage is told by networks beside the policy, and what it gives."""

from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.settings.advantage import AdvantageSection, CriticAdvantage, SoftQ
from pipeline.settings.heads import Critic, QFunction

Estimates = Mapping[str, Tensor]
"""What the heads say of each token, before the update: a critic its ``value`` and so on; where episodes that were cut off
are bootstrapped, also ``<name>_behind`` (e): of the state behind a trajectory's last token, 0 if it is a true end."""


class HeadTarget(NamedTuple):
    """What a head shall predict, and where."""

    value: Float[Tensor, " n"]
    mask: Bool[Tensor, " n"]


class AdvantageEstimate(NamedTuple):
    """What the advantage slot gives."""

    advantage: Float[Tensor, " n"]
    """0 where not trainable."""
    targets: dict[str, HeadTarget]
    """By name of the head that shall learn it."""
    state: dict[str, float]
    """What the next iteration is to know; empty for most."""
    times: Float[Tensor, " n"] | None = None
    """How many times each token's weight counts; None: once. A trajectory of zeros is not trained on."""


HEAD_NAMES = {"critic": "value", "entropy_critic": "entropy_value", "q": "q"}
"""Names of networks beside the policy, by the key of an advantage's section that declares one."""


def declared_heads(section: AdvantageSection) -> dict[str, Critic | QFunction]:
    """Networks beside the policy that an advantage needs, by name."""
    return {name: getattr(section, key) for key, name in HEAD_NAMES.items() if hasattr(section, key)}


def needed_estimates(section: AdvantageSection) -> tuple[str, ...]:
    """What these networks must say of every token before the update."""
    return ("soft_value", "taken") if isinstance(section, SoftQ) else tuple(declared_heads(section))


def needed_behind(section: AdvantageSection) -> tuple[str, ...]:
    """Which of these are also asked of the state behind the last token of episodes that were cut off."""
    if not isinstance(section, CriticAdvantage) or section.cut_off == "end":
        return ()
    return tuple(name for name in needed_estimates(section) if name != "taken")
