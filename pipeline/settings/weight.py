"""The token weight w_t. What each choice does is in pipeline/objective/weights.py."""

from typing import Annotated, Literal, Union

from pydantic import Field

from pipeline.settings.custom import Custom
from pipeline.settings.section import NonNegative, Positive, Probability, Section, Share, Temperature


class UniformWeight(Section):
    """Every response token weighs 1."""

    kind: Literal["uniform"]


Signal = Literal["reference_energy", "reference_entropy", "behaviour_nll", "logprob_shift", "shuffled_energy"]


class ActFocusWeight(Section):
    """ActFocus (arXiv 2605.14558)."""

    kind: Literal["actfocus"]
    reasoning_downweight: NonNegative = 0.1
    """alpha: weight of reasoning tokens."""
    redistribution_strength: NonNegative = 0.5
    """beta: how much weight the signal adds to action tokens."""
    redistribution_temperature: Temperature = 1.0
    """tau: 1 is the paper; large is flat, small is a threshold at the mean."""
    form: Literal["sigmoid", "softmax"] = "sigmoid"
    """``sigmoid`` is the paper's; ``softmax`` keeps the total weight of a trajectory's action tokens (needs beta <= 1)."""
    signal: Signal = "reference_energy"
    """What is z-scored over the action tokens of the update batch; ``shuffled_energy`` is a control."""
    focus: Literal["action", "reasoning"] = "action"
    """Which tokens the signal raises; ``reasoning`` is a control, the mirror image: action tokens weigh alpha."""
    think_tag_weight: NonNegative | None = None
    """Weight of think tags; null is reasoning_downweight. The paper does not say."""
    answer_tag_weight: NonNegative = 1.0
    """Weight of answer tags. The paper does not say."""
    malformed_weight: NonNegative | None = None
    """Weight of text that has left the format; null is reasoning_downweight. The paper does not say. A small one hardly
    blames a response for breaking the format where a wrong action is blamed in full."""

    def check(self) -> None:
        if self.form == "softmax" and self.redistribution_strength > 1:
            raise ValueError("form softmax needs redistribution_strength <= 1")
        if self.redistribution_strength == 0:
            self.refuse_ignored("redistribution_strength is 0", "redistribution_temperature", "signal", "form")


class RoleRampWeight(Section):
    """Weights by role, which may grow over training, then mean 1 per trajectory (ResT, arXiv 2509.21826).

    Our roles do not tell an action's name from its arguments: action tokens weigh as the published tool name, unless
    ``action_start`` and ``action_growth`` give them the ramp of its arguments (0.6 and 0.002).
    """

    kind: Literal["role_ramp"]
    tag: NonNegative = 1.0
    """Weight of tags."""
    action_start: NonNegative = 1.2
    """Weight of action tokens in the first iteration."""
    action_growth: NonNegative = 0.0
    """What it gains per iteration."""
    action_end: NonNegative = 1.2
    """Where it stops."""
    reasoning_start: NonNegative = 0.6
    """Weight of reasoning tokens in the first iteration."""
    reasoning_growth: NonNegative = 0.002
    """What it gains per iteration."""
    reasoning_end: NonNegative = 1.0
    """Where it stops."""
    other: NonNegative = 0.0
    """Weight of text that has left the format: what is in no region of the source's."""
    bounds: tuple[Positive, Positive] = (0.001, 8.0)
    """Into which every weight that is not 0 is moved before the mean is taken."""

    def check(self) -> None:
        if self.bounds[0] > self.bounds[1]:
            raise ValueError("bounds must be two numbers, low <= high")
        for name in ("action", "reasoning"):
            growth = getattr(self, f"{name}_growth")
            if growth == 0:
                self.refuse_ignored(f"{name}_growth is 0", f"{name}_end")
            elif getattr(self, f"{name}_start") >= getattr(self, f"{name}_end"):
                raise ValueError(f"{name}_growth has no effect unless {name}_start is below {name}_end")


class TopEntropyWeight(Section):
    """Only the tokens of highest entropy are trained on (80/20, arXiv 2506.01939)."""

    kind: Literal["top_entropy"]
    share: Share = 0.2
    """rho: share of the batch's trainable tokens that is kept, by the behaviour policy's entropy."""


class SpuriousMaskWeight(Section):
    """Rewarded tokens that are unlikely though the policy is sure are left out (STAPO, arXiv 2602.15620).

    The policy is the one that the iteration's updates begin with.
    """

    kind: Literal["spurious_mask"]
    probability: Share = 0.002
    """A token below this probability is unlikely."""
    quantile: Probability = 0.8
    """The policy is sure if the entropy is below this quantile over unlikely tokens of successful trajectories. Unchecked:
    the source's set-up says 80 %, its ablation 20 %."""


class AttenuatedWeight(Section):
    """Tokens of low entropy weigh ``p * (1 - p)`` of their probability p (after EGSPO, arXiv 2602.03309)."""

    kind: Literal["attenuated"]
    quantile: Probability = 0.5
    """Tokens below this quantile of the behaviour policy's entropy over the batch are attenuated; the others weigh 1. Ours."""


class CustomWeight(Custom, slot="weight"):
    """A function of one's own."""

    shuffle: bool = False
    """A control: each role's tokens have the function's weights in a random order."""


Weight = Annotated[
    Union[
        UniformWeight,
        ActFocusWeight,
        RoleRampWeight,
        TopEntropyWeight,
        SpuriousMaskWeight,
        AttenuatedWeight,
        CustomWeight,
    ],
    Field(discriminator="kind"),
]
