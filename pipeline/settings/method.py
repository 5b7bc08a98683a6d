"""A method: one choice per slot, and which of them go together."""

from typing import Literal

from pipeline.settings.advantage import GAE, Advantage, CriticAdvantage, CustomAdvantage, GroupAdvantage, TreeAdvantage
from pipeline.settings.aggregation import Aggregation
from pipeline.settings.branching import Branching, Independent
from pipeline.settings.filter import Filter
from pipeline.settings.regulariser import Regulariser
from pipeline.settings.reward import OutcomeEntropyReward, Reward
from pipeline.settings.section import LearningRate, Name, Section
from pipeline.settings.surrogate import Surrogate
from pipeline.settings.weight import Weight

Status = Literal["faithful", "after", "ours"]


class Method(Section):
    """One choice per slot, and the step size. In ``methods`` every key is optional; ``method_defaults`` fills the rest."""

    source: str = ""
    """Where the method comes from; decides nothing."""
    status: Status = "ours"
    """``faithful`` to its source, ``after`` it where only the idea is known, or ``ours``; decides nothing."""
    branching: Branching = Independent()
    """Where do episodes come from?"""
    reward: Reward
    """Is the reward reshaped?"""
    filter: Filter
    """Which groups are trained on."""
    advantage: Advantage
    """What is A_t."""
    weight: Weight
    """The token weight w_t."""
    aggregation: Aggregation
    """What divides the weighted sum."""
    surrogate: Surrogate
    """How ratio and advantage become a per-token loss."""
    regulariser: Regulariser
    """Entropy and KL terms."""
    learning_rate: LearningRate
    """Adam's learning rate of the policy; of a method that is matched, where the search for it starts."""
    matched_to: Name | None = None
    """Another method: the learning rate is found at which an update moves action tokens as far, in KL, as that one's do."""

    def check(self) -> None:
        if (self.advantage.kind == "soft_q") != (self.surrogate.kind == "soft_q"):
            raise ValueError("advantage soft_q and surrogate soft_q go together: one is of no use without the other")
        rewarded, compared = self.reward.kind == "token_entropy", self.advantage.kind == "token_group"
        if rewarded != compared and "custom" not in (self.reward.kind, self.advantage.kind):
            raise ValueError(
                "reward token_entropy and advantage token_group go together: such a reward stands on every token"
            )
        if (
            isinstance(self.reward, OutcomeEntropyReward)
            and self.reward.failure != OutcomeEntropyReward.model_fields["failure"].default
            and getattr(self.advantage, "apart", False)
        ):
            raise ValueError("reward.failure has no effect while advantage.apart is true: all failures have it alike")
        if self.aggregation.count == "with_advantage" and isinstance(self.advantage, CriticAdvantage):
            raise ValueError(
                f"aggregation.count with_advantage has no effect with advantage {self.advantage.kind}: one that comes "
                "from a critic is 0 nowhere; it needs one that compares within groups"
            )
        # What is defined on trees, and only there.
        branching, advantage = self.branching, self.advantage
        if (branching.kind == "temperature_switch") != (advantage.kind == "reinforced"):
            raise ValueError("branching temperature_switch and advantage reinforced go together")
        if branching.kind == "none":
            if isinstance(advantage, TreeAdvantage):
                raise ValueError(f"advantage {advantage.kind} needs branches, and branching is none")
            return
        if advantage.kind == "prefix_credit" and branching.kind != "positions":
            raise ValueError("advantage prefix_credit needs branching positions, whose initial episodes are one group")
        if not isinstance(advantage, TreeAdvantage | GroupAdvantage | GAE | CustomAdvantage):
            raise ValueError(f"advantage {advantage.kind} is not defined on branches")
        if self.reward.kind != "none":
            raise ValueError(f"reward {self.reward.kind} is not defined on branches")
