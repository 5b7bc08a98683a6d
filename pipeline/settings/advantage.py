"""The advantage A_t."""

from typing import Annotated, Literal, Union

from pydantic import Field

from pipeline.settings.custom import Custom
from pipeline.settings.heads import Critic, QFunction
from pipeline.settings.section import Epsilon, Int, NonNegative, Positive, Probability, Section


class AdvantageSection(Section):
    """What every advantage has."""

    entropy_scale: NonNegative = 0.0
    """``A_t * (1 + entropy_scale * z(H_t))`` with the behaviour policy's entropy, z-scored over the batch's trainable
    tokens (AEPO, arXiv 2510.14545: 0.2); 0 for none."""


class CriticAdvantage(AdvantageSection):
    """What every choice has that learns values."""

    cut_off: Literal["end", "bootstrap"] = "end"
    """What is behind an episode that no turn or no room was left for (end_reason ``turns`` or ``context``): nothing, as
    behind one that the environment has ended; or what the networks say where the next response would have begun."""


class StandardisedAdvantage(AdvantageSection):
    """What every choice has that standardises values within a group: of trajectories, or of what competes at one place."""

    std: bool = True
    """Divide by the group's standard deviation."""
    ddof: Literal[0, 1] = 1
    """Delta degrees of freedom of that standard deviation; libraries differ."""
    eps: Epsilon = 1e-6
    """Added to that standard deviation."""

    def check(self) -> None:
        if not self.std:
            self.refuse_ignored("std is false", "ddof", "eps")


class GroupAdvantage(StandardisedAdvantage):
    """GRPO, the return standardised within its group (arXiv 2402.03300)."""

    kind: Literal["group"]
    apart: bool = False
    """Successes and failures are groups of their own (GRPO-S, arXiv 2508.04349)."""


class TokenGroupAdvantage(AdvantageSection):
    """Each token's own reward standardised over the tokens of its group (GTPO, arXiv 2508.04349)."""

    kind: Literal["token_group"]
    apart: bool = True
    """Over those of its group's successes, or of its failures."""
    ddof: Literal[0, 1] = 1
    """Delta degrees of freedom of the standard deviation."""
    eps: Epsilon = 1e-6
    """Added to that standard deviation."""


class StepGroupAdvantage(AdvantageSection):
    """The episode's advantage plus that of each turn among the group's visits of its state (GiGPO, arXiv 2505.10978)."""

    kind: Literal["step_group"]
    step_weight: NonNegative = 1.0
    """Weight of the turn's advantage beside the episode's."""
    episodes_by: Literal["trajectory", "turn"] = "trajectory"
    """How often an episode counts in the mean (and standard deviation) of its group: once, as in the authors' DrMAS, or once
    per turn, as in verl-agent by default, where longer episodes weigh more."""
    gamma: Probability = 0.95
    """Discount per turn of the return that scores a turn."""
    std: bool = False
    """Divide both advantages by their group's standard deviation; the authors' scripts only centre."""

    def check(self) -> None:
        if self.step_weight == 0:
            self.refuse_ignored("step_weight is 0", "gamma")


class GatedProgressAdvantage(StandardisedAdvantage):
    """GRPO's advantage behind a gate of entropy, with the token's progress in its direction (ERPO, arXiv 2603.28204)."""

    kind: Literal["gated_progress"]
    sharpness: NonNegative = 5.0
    """The gate is sigmoid(this * z(H_t)); 0 halves every advantage."""
    progress: NonNegative = 0.2
    """Factor of the z-score of ``log pi - log ref``."""
    windows: Annotated[Int, Field(ge=1, le=1000)] = 4
    """Equal parts, by relative position in the trajectory, within which that z-score is taken. Ours."""

    def check(self) -> None:
        super().check()
        if self.progress == 0:
            self.refuse_ignored("progress is 0", "windows")


class GAE(CriticAdvantage):
    """Token-level generalised advantage estimation over sampled tokens only (arXiv 1506.02438)."""

    kind: Literal["gae"]
    gamma: Probability = 1.0
    """Discount."""
    discount: Literal["token", "turn"] = "token"
    """Where gamma applies: after every sampled token, or after a response's last one only (POAD, arXiv 2405.15821)."""
    lam: Probability = 1.0
    """Lambda of GAE, per sampled token."""
    whiten: bool = True
    """Standardise advantages over the iteration's sampled tokens."""
    critic: Critic = Critic()

    def check(self) -> None:
        if self.gamma == 1:
            self.refuse_ignored("gamma is 1", "discount")


class TurnGAE(CriticAdvantage):
    """GAE over turns; a response's tokens share its advantage (turn-level PPO). The value is that of its first token."""

    kind: Literal["turn_gae"]
    gamma: Probability = 0.95
    """Discount per turn."""
    lam: Probability = 0.95
    """Lambda per turn."""
    whiten: bool = True
    """Standardise advantages over the iteration's sampled tokens."""
    critic: Critic = Critic()


class BilevelGAE(CriticAdvantage):
    """GAE over turns, then over the tokens within a turn (bi-level GAE, arXiv 2510.16907)."""

    kind: Literal["bilevel_gae"]
    turn_gamma: Probability = 0.95
    """Discount per turn."""
    turn_lam: Probability = 1.0
    """Lambda per turn."""
    gamma: Probability = 1.0
    """Discount per token within a turn."""
    lam: Probability = 1.0
    """Lambda per token within a turn."""
    whiten: bool = True
    """Standardise advantages over the iteration's sampled tokens."""
    critic: Critic = Critic()


class EntropyGAE(CriticAdvantage):
    """Separate values of reward and entropy; cumulative entropy is held at a budget (after TECRL, arXiv 2511.11592)."""

    kind: Literal["entropy_gae"]
    gamma: Probability = 1.0
    """Discount per sampled token, of reward and of entropy. Ours."""
    lam: Probability = 1.0
    """Lambda of both. Ours."""
    budget: Positive = 0.8
    """Mean cumulative entropy to be kept, as a share of the first iteration's. Ours."""
    multiplier: Positive = 0.01
    """alpha before the first iteration: factor of the entropy's advantage. Ours."""
    multiplier_rate: Positive = 0.5
    """Change of log alpha per iteration and relative shortfall of cumulative entropy. Ours."""
    whiten: bool = True
    """Standardise the sum over the iteration's sampled tokens; its two parts never are. Ours."""
    critic: Critic = Critic()
    """Value function of reward."""
    entropy_critic: Critic = Critic()
    """Value function of entropy."""


class SoftQ(CriticAdvantage):
    """Token-level soft Bellman targets of Q over the vocabulary (ETPO, arXiv 2402.06700); goes with surrogate soft_q."""

    kind: Literal["soft_q"]
    gamma: Probability = 0.99
    """Discount per turn; there is none inside a response."""
    q: QFunction = QFunction()

    def check(self) -> None:
        self.refuse_ignored("the policy learns from Q itself", "entropy_scale")


class TreeAdvantage(StandardisedAdvantage):
    """What every choice has that is defined on branches alone."""


class SharedPrefixAdvantage(TreeAdvantage):
    """The return standardised within its group; a token that branches share has their mean (ARPO, arXiv 2507.19849)."""

    kind: Literal["shared_prefix"]
    credit: Literal["hard", "soft"] = "soft"
    """``soft``: such a token counts as often as there are episodes through it, as if each were trained on whole, which
    is the published default; ``hard``: it counts once."""


class PrefixCreditAdvantage(TreeAdvantage):
    """Initial episodes and branches are groups of their own; branches only credit prefixes (APPO, arXiv 2606.12384).

    A token of an initial episode has its episode's advantage, and the mean advantage of the branches from behind it.
    """

    kind: Literal["prefix_credit"]
    ddof: Literal[0, 1] = 0
    """Delta degrees of freedom of that standard deviation."""
    credit: Positive = 1.0
    """Factor of that mean."""


class SiblingAdvantage(TreeAdvantage):
    """Each stretch between two branchings against those that begin at the same place (after SEEA-R1 and TLPO).

    A stretch is worth the mean return of the episodes through it.
    """

    kind: Literal["siblings"]
    scope: Literal["segment", "token"] = "segment"
    """What is trained: the whole stretch, or only its first token, the candidate at the branching (TLPO)."""


class ReinforcedAdvantage(TreeAdvantage):
    """GRPO over the initial episodes, REINFORCE on the others that succeeded (Arbitrary Entropy PO, 2510.08141)."""

    kind: Literal["reinforced"]
    coefficient: Positive = 0.5
    """Advantage of their tokens. Ours."""


class CustomAdvantage(AdvantageSection, Custom, slot="advantage"):
    """A function of one's own, without a critic; it may go by branches (``parent`` and ``split`` of the batch)."""


Advantage = Annotated[
    Union[
        Union[GroupAdvantage, TokenGroupAdvantage, StepGroupAdvantage, GatedProgressAdvantage],
        Union[GAE, TurnGAE, BilevelGAE, EntropyGAE, SoftQ],
        Union[SharedPrefixAdvantage, PrefixCreditAdvantage, SiblingAdvantage, ReinforcedAdvantage],
        CustomAdvantage,
    ],
    Field(discriminator="kind"),
]
