"""The schema of a method: one section per choice in a slot, with every setting, its range, its default and its source.

What a section's numbers do is a function of the same settings in pipeline/objective; ``pipeline/objective/methods.py``
has the tables that join them, and pipeline/rollout/growths.py that of S1.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Union

from pydantic import Field, model_validator

from pipeline.settings.section import (
    MOST,
    Count,
    Epsilon,
    Float,
    Int,
    LearningRate,
    NonNegative,
    Number,
    Positive,
    Probability,
    Section,
    Share,
    Temperature,
    refuse_ignored,
)

# ------------------------------------------------------------------------------------------------------- heads


class Critic(Section):
    """A value function beside the policy."""

    kind: Literal["trunk", "model"] = "trunk"
    """``trunk``: a linear head on the policy's last hidden state; ``model``: a copy of the reference policy's trunk."""
    learning_rate: LearningRate = 1e-3
    """Learning rate of the head (trunk) or of the whole critic (model)."""
    coefficient: Positive = 0.5
    """Weight of the value loss beside the policy loss."""
    warmup_iterations: Annotated[Int, Field(ge=0, le=1_000_000)] = 0
    """First iterations in which only the critic is updated."""
    clip: Positive | None = None
    """Value clipping: largest change of a value per iteration; null for none."""


class QFunction(Section):
    """Q over the vocabulary, with a target network."""

    kind: Literal["trunk", "model"] = "trunk"
    """``trunk``: a linear head on the policy's last hidden state; ``model``: with a copy of the reference policy's trunk."""
    learning_rate: LearningRate = 1e-3
    """Learning rate of the head (trunk) or of the whole Q network (model)."""
    coefficient: Positive = 0.5
    """Weight of the Q loss beside the policy loss."""
    warmup_iterations: Annotated[Int, Field(ge=0, le=1_000_000)] = 0
    """First iterations in which only Q is updated."""
    kl_weight: Positive = 0.01
    """b: weight of the KL to the reference policy, in the targets and in the policy's loss."""
    huber_delta: Positive = 10.0
    """Error beyond which the Q loss grows linearly."""
    polyak: Probability = 0.995
    """Share of the target network that stays at each update."""


Head = Critic | QFunction

# ---------------------------------------------------------------------------------------------------- S1: branching


class BranchingSection(Section):
    """What every choice of S1 has. The budget, ``rollout.group_size`` episodes per initial state, is the same for all."""

    scored: ClassVar[bool] = False
    """Episodes are annotated, and their tokens scored, before others branch from them."""

    @property
    def moved(self) -> bool:
        """Whether branches are placed by how the policy has moved: it is updated once before there are any."""
        return False


class Independent(BranchingSection):
    """S1: every episode begins at the initial state."""

    kind: Literal["none"] = "none"


class EntropyRise(BranchingSection):
    """S1: branch where an observation has raised the entropy (ARPO, arXiv 2507.19849; AEPO, arXiv 2510.14545).

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

    @model_validator(mode="after")
    def _effective(self) -> EntropyRise:
        if self.initial != "monitored":
            refuse_ignored(self, "initial is a number", "monitor_slope")
        if self.penalty == 0:
            refuse_ignored(self, "penalty is 0", "penalty_per")
            if self.base == self.threshold:
                refuse_ignored(self, "base is the threshold and there is no penalty", "slope")
        return self


class Positions(BranchingSection):
    """S1: branch at the tokens of highest score (APPO, arXiv 2606.12384; after TLPO, arXiv 2604.26553).

    The budget beyond ``initial`` goes to branches, ``width`` at each position, best first.
    """

    scored: ClassVar[bool] = True
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
    among: Literal["all", "failed"] = "all"
    """Whether the episodes that succeeded are branched from too, where others failed."""
    width: Count = 1
    """Branches at a position."""
    discount: Probability = 1.0
    """gamma of ``Omega_t = exp(sum_{k >= t} gamma^(k-t) (log pi - log pi_old))``."""
    bounds: tuple[Positive, Positive] = (0.8, 1.2)
    """Omega is clipped to these."""

    @property
    def moved(self) -> bool:
        """See ``BranchingSection.moved``."""
        return self.signal == "branching_score"

    @model_validator(mode="after")
    def _effective(self) -> Positions:
        if not self.moved:
            refuse_ignored(self, f"signal is {self.signal}", "discount", "bounds")
        if not self.bounds[0] < 1 < self.bounds[1]:
            raise ValueError("bounds must be two numbers, low < 1 < high")
        return self


class TreeSearch(BranchingSection):
    """S1: Monte-Carlo tree search over turns, with whole episodes as simulations (after SEEA-R1, arXiv 2506.21669)."""

    kind: Literal["tree_search"]
    width: Annotated[Int, Field(ge=2, le=1_000_000)] = 4
    """Children of a state that is expanded. Ours."""
    exploration: NonNegative = 1.0
    """c of ``Q + c * sqrt(ln N / n)``, with Q in [0, 1]. Ours."""


class TemperatureSwitch(BranchingSection):
    """S1: episodes at another temperature, switched on entropy (Arbitrary Entropy PO, arXiv 2510.08141)."""

    kind: Literal["temperature_switch"]
    initial: Count = 8
    """Episodes at ``rollout.temperature``; the budget beyond them is sampled at one of the other two."""
    target: Positive = 1.0
    """Nats per token: mean entropy that the initial episodes are held against. Ours."""
    high: Temperature = 1.2
    """Temperature where entropy is below the target."""
    low: Temperature = 0.8
    """Temperature where it is not."""


Branching = Annotated[
    Union[Independent, EntropyRise, Positions, TreeSearch, TemperatureSwitch], Field(discriminator="kind")
]

# ---------------------------------------------------------------------------------------------------- S7: reward


class PlainReward(Section):
    """S7: the environment's reward."""

    kind: Literal["none"]


class TokenEntropyReward(Section):
    """S7: successful trajectories share reward by token entropy (GTPO, arXiv 2508.04349)."""

    kind: Literal["token_entropy"]
    base: NonNegative = 1.0
    """Factor of the return on every token of a successful trajectory."""
    bonus: NonNegative = 0.1
    """Factor of the entropy share, whose mean over the successful trajectories alive at a position is 1."""


class SequenceEntropyReward(Section):
    """S7: successful trajectories share reward by their mean entropy (GRPO-S, arXiv 2508.04349)."""

    kind: Literal["sequence_entropy"]
    base: NonNegative = 1.0
    """Factor of the return of a successful trajectory."""
    bonus: NonNegative = 0.1
    """Factor of the entropy share, whose mean over a group's successful trajectories is 1."""


class EntropyRateReward(Section):
    """S7: the trajectory's entropy rate is taken from its reward (after PARL)."""

    kind: Literal["entropy_rate"]
    coefficient: Positive = 0.1
    """Reward lost per nat of mean token entropy. Ours."""


class ReferenceKLReward(Section):
    """S7: a penalty on each token's log-probability ratio to the reference policy (k1 in the reward, arXiv 2203.02155)."""

    kind: Literal["reference_kl"]
    coefficient: Positive = 0.001
    """Reward lost per nat."""


Reward = Annotated[
    Union[PlainReward, TokenEntropyReward, SequenceEntropyReward, EntropyRateReward, ReferenceKLReward],
    Field(discriminator="kind"),
]

# ---------------------------------------------------------------------------------------------------- S2: filter


class AllGroups(Section):
    """S2: train on every group."""

    kind: Literal["all"]


class RewardVariance(Section):
    """S2: keep the groups whose returns vary most; groups of equal returns are always dropped (StarPO-S, DAPO)."""

    kind: Literal["reward_variance"]
    keep: Share = 1.0
    """Share of the iteration's groups that is kept, by standard deviation of their returns."""


Filter = Annotated[Union[AllGroups, RewardVariance], Field(discriminator="kind")]

# ------------------------------------------------------------------------------------------------- S3: advantage


class AdvantageSection(Section):
    """What every choice of S3 has."""

    entropy_scale: NonNegative = 0.0
    """``A_t * (1 + entropy_scale * z(H_t))`` with the behaviour policy's entropy, z-scored over the batch's trainable
    tokens (AEPO, arXiv 2510.14545: 0.2); 0 for none."""

    def heads(self) -> dict[str, Head]:
        """Networks beside the policy that this advantage needs, by name."""
        return {}

    def estimates(self) -> tuple[str, ...]:
        """What these networks must say of every token before the update."""
        return tuple(self.heads())

    def behind(self) -> tuple[str, ...]:
        """Which of these are also asked of the state behind the last token of episodes that were cut off."""
        return ()


class CriticAdvantage(AdvantageSection):
    """What every choice has that learns values."""

    cut_off: Literal["end", "bootstrap"] = "end"
    """What is behind an episode that no turn or no room was left for (end_reason ``turns`` or ``context``): nothing, as
    behind one that the environment has ended; or what the networks say where the next response would have begun."""

    def behind(self) -> tuple[str, ...]:
        return self.estimates() if self.cut_off == "bootstrap" else ()


class StandardisedAdvantage(AdvantageSection):
    """What every choice has that standardises values within a group: of trajectories, or of what competes at one place."""

    std: bool = True
    """Divide by the group's standard deviation."""
    ddof: Literal[0, 1] = 1
    """Delta degrees of freedom of that standard deviation; libraries differ."""
    eps: Epsilon = 1e-6
    """Added to that standard deviation."""

    @model_validator(mode="after")
    def _effective(self) -> StandardisedAdvantage:
        if not self.std:
            refuse_ignored(self, "std is false", "ddof", "eps")
        return self


class GroupAdvantage(StandardisedAdvantage):
    """S3: GRPO, the return standardised within its group (arXiv 2402.03300)."""

    kind: Literal["group"]


class TokenGroupAdvantage(AdvantageSection):
    """S3: each token's own reward standardised over all tokens of its group (GTPO, arXiv 2508.04349)."""

    kind: Literal["token_group"]
    ddof: Literal[0, 1] = 1
    """Delta degrees of freedom of the standard deviation."""
    eps: Epsilon = 1e-6
    """Added to that standard deviation."""


class StepGroupAdvantage(AdvantageSection):
    """S3: the episode's advantage plus that of each turn among the group's visits of its state (GiGPO, arXiv 2505.10978)."""

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

    @model_validator(mode="after")
    def _effective(self) -> StepGroupAdvantage:
        if self.step_weight == 0:
            refuse_ignored(self, "step_weight is 0", "gamma")
        return self


class GAE(CriticAdvantage):
    """S3: token-level generalised advantage estimation over sampled tokens only (arXiv 1506.02438)."""

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

    @model_validator(mode="after")
    def _effective(self) -> GAE:
        if self.gamma == 1:
            refuse_ignored(self, "gamma is 1", "discount")
        return self

    def heads(self) -> dict[str, Head]:
        return {"value": self.critic}


class TurnGAE(CriticAdvantage):
    """S3: GAE over turns; a response's tokens share its advantage (turn-level PPO). The value is that of its first token."""

    kind: Literal["turn_gae"]
    gamma: Probability = 0.95
    """Discount per turn."""
    lam: Probability = 0.95
    """Lambda per turn."""
    whiten: bool = True
    """Standardise advantages over the iteration's sampled tokens."""
    critic: Critic = Critic()

    def heads(self) -> dict[str, Head]:
        return {"value": self.critic}


class BilevelGAE(CriticAdvantage):
    """S3: GAE over turns, then over the tokens within a turn (bi-level GAE, arXiv 2510.16907)."""

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

    def heads(self) -> dict[str, Head]:
        return {"value": self.critic}


class EntropyGAE(CriticAdvantage):
    """S3: separate values of reward and entropy; entropy counts while it is below its budget (after TECRL, 2511.11592)."""

    kind: Literal["entropy_gae"]
    gamma: Probability = 1.0
    """Discount of reward per sampled token."""
    lam: Probability = 1.0
    """Lambda of the reward's GAE."""
    entropy_gamma: Annotated[Float, Field(ge=0.0, lt=1.0)] = 0.95
    """Discount of entropy per sampled token. Ours."""
    entropy_lam: Probability = 0.95
    """Lambda of the entropy's GAE. Ours."""
    budget: Positive = 0.8
    """Mean token entropy to be kept, as a share of the first iteration's. Ours."""
    multiplier_rate: Positive = 0.5
    """Change of the entropy advantage's multiplier per iteration and relative shortfall of entropy. Ours."""
    whiten: bool = True
    """Standardise both advantages over the iteration's sampled tokens before they are added."""
    critic: Critic = Critic()
    """Value function of reward."""
    entropy_critic: Critic = Critic()
    """Value function of entropy."""

    def heads(self) -> dict[str, Head]:
        return {"value": self.critic, "entropy_value": self.entropy_critic}


class SoftQ(CriticAdvantage):
    """S3: token-level soft Bellman targets of Q over the vocabulary (ETPO, arXiv 2402.06700); goes with surrogate soft_q."""

    kind: Literal["soft_q"]
    gamma: Probability = 0.99
    """Discount per turn; there is none inside a response."""
    q: QFunction = QFunction()

    @model_validator(mode="after")
    def _effective(self) -> SoftQ:
        refuse_ignored(self, "the policy learns from Q itself", "entropy_scale")
        return self

    def heads(self) -> dict[str, Head]:
        return {"q": self.q}

    def estimates(self) -> tuple[str, ...]:
        return ("soft_value", "taken")

    def behind(self) -> tuple[str, ...]:
        return ("soft_value",) if self.cut_off == "bootstrap" else ()


class SharedPrefixAdvantage(StandardisedAdvantage):
    """S3: the return standardised within its group; a token that branches share has their mean (ARPO, arXiv 2507.19849)."""

    kind: Literal["shared_prefix"]
    credit: Literal["hard", "soft"] = "soft"
    """``soft``: such a token counts as often as there are episodes through it, as if each were trained on whole, which
    is the published default; ``hard``: it counts once."""


class PrefixCreditAdvantage(StandardisedAdvantage):
    """S3: initial episodes and branches are groups of their own; branches only credit prefixes (APPO, arXiv 2606.12384).

    A token of an initial episode has its episode's advantage, and the mean advantage of the branches from behind it.
    """

    kind: Literal["prefix_credit"]
    ddof: Literal[0, 1] = 0
    """Delta degrees of freedom of that standard deviation."""
    credit: Positive = 1.0
    """Factor of that mean."""


class SiblingAdvantage(StandardisedAdvantage):
    """S3: each stretch between two branchings against those that begin at the same place (after SEEA-R1 and TLPO).

    A stretch is worth the mean return of the episodes through it.
    """

    kind: Literal["siblings"]
    scope: Literal["segment", "token"] = "segment"
    """What is trained: the whole stretch, or only its first token, the candidate at the branching (TLPO)."""


class ReinforcedAdvantage(StandardisedAdvantage):
    """S3: GRPO over the initial episodes, REINFORCE on the others that succeeded (Arbitrary Entropy PO, 2510.08141)."""

    kind: Literal["reinforced"]
    coefficient: Positive = 0.5
    """Advantage of their tokens. Ours."""


TREE_ADVANTAGES = (SharedPrefixAdvantage, PrefixCreditAdvantage, SiblingAdvantage, ReinforcedAdvantage)

Advantage = Annotated[
    Union[
        GroupAdvantage,
        TokenGroupAdvantage,
        StepGroupAdvantage,
        GAE,
        TurnGAE,
        BilevelGAE,
        EntropyGAE,
        SoftQ,
        SharedPrefixAdvantage,
        PrefixCreditAdvantage,
        SiblingAdvantage,
        ReinforcedAdvantage,
    ],
    Field(discriminator="kind"),
]

# ---------------------------------------------------------------------------------------------------- S4: weight


class UniformWeight(Section):
    """S4: every response token weighs 1."""

    kind: Literal["uniform"]


Signal = Literal["reference_energy", "reference_entropy", "behaviour_nll", "logprob_shift", "shuffled_energy"]


class ActFocusWeight(Section):
    """S4: ActFocus (arXiv 2605.14558)."""

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

    @model_validator(mode="after")
    def _effective(self) -> ActFocusWeight:
        if self.form == "softmax" and self.redistribution_strength > 1:
            raise ValueError("form softmax needs redistribution_strength <= 1")
        if self.redistribution_strength == 0:
            refuse_ignored(self, "redistribution_strength is 0", "redistribution_temperature", "signal", "form")
        return self


class RoleRampWeight(Section):
    """S4: weights by role, reasoning's growing over training, then mean 1 per trajectory (ResT, arXiv 2509.21826).

    Our roles do not tell an action's name from its arguments: action tokens weigh as the published tool name.
    """

    kind: Literal["role_ramp"]
    tag: NonNegative = 1.0
    """Weight of tags."""
    action: NonNegative = 1.2
    """Weight of action tokens."""
    reasoning_start: NonNegative = 0.6
    """Weight of reasoning tokens, and of text that has left the format, in the first iteration."""
    reasoning_growth: NonNegative = 0.002
    """What it gains per iteration."""
    reasoning_end: NonNegative = 1.0
    """Where it stops."""


class TopEntropyWeight(Section):
    """S4: only the tokens of highest entropy are trained on (80/20, arXiv 2506.01939)."""

    kind: Literal["top_entropy"]
    share: Share = 0.2
    """rho: share of the batch's trainable tokens that is kept, by the behaviour policy's entropy."""


class SpuriousMaskWeight(Section):
    """S4: rewarded tokens that were unlikely though the policy was sure are left out (STAPO, arXiv 2602.15620)."""

    kind: Literal["spurious_mask"]
    probability: Share = 0.002
    """A token below this probability under the behaviour policy is unlikely."""
    quantile: Probability = 0.75
    """The policy was sure if the entropy is below this quantile over unlikely tokens of successful trajectories."""


class AttenuatedWeight(Section):
    """S4: tokens of low entropy are attenuated (EGSPO, arXiv 2602.03309)."""

    kind: Literal["attenuated"]
    quantile: Probability = 0.5
    """Tokens below this quantile of the behaviour policy's entropy over the batch are attenuated. Ours."""
    low_entropy_weight: NonNegative = 0.3
    """Their weight; the others weigh 1. Ours."""

    @model_validator(mode="after")
    def _effective(self) -> AttenuatedWeight:
        if self.low_entropy_weight == 1:
            refuse_ignored(self, "low_entropy_weight is 1", "quantile")
        return self


class PivotWeight(Section):
    """S4: more weight on tokens whose entropy stands out within their part of the trajectory (after ERPO, 2603.28204)."""

    kind: Literal["pivots"]
    buckets: Annotated[Int, Field(ge=1, le=1000)] = 4
    """Equal parts into which each trajectory's sampled tokens are cut by progress. Ours."""
    quantile: Probability = 0.8
    """A pivot's entropy is at least this quantile over the batch's tokens of the same part. Ours."""
    strength: NonNegative = 1.0
    """What a pivot weighs beyond 1. Ours."""

    @model_validator(mode="after")
    def _effective(self) -> PivotWeight:
        if self.strength == 0:
            refuse_ignored(self, "strength is 0", "buckets", "quantile")
        return self


Weight = Annotated[
    Union[
        UniformWeight,
        ActFocusWeight,
        RoleRampWeight,
        TopEntropyWeight,
        SpuriousMaskWeight,
        AttenuatedWeight,
        PivotWeight,
    ],
    Field(discriminator="kind"),
]

# ----------------------------------------------------------------------------------------- S4, second half: divisor


class AggregationSection(Section):
    """What every choice of the divisor has."""

    count: Literal["all", "with_advantage"] = "all"
    """Tokens that the surrogate's divisor counts: all trainable ones, or only those whose advantage is not 0. A group of
    equal returns has none: counted, it makes the surrogate smaller beside the entropy and KL terms."""


class WeightSum(AggregationSection):
    """S4: divide by the minibatch's total weight (ActFocus; with uniform weights the token mean)."""

    kind: Literal["weight_sum"]


class TokenMean(AggregationSection):
    """S4: divide by the minibatch's number of trainable tokens."""

    kind: Literal["token_mean"]


class SequenceMean(AggregationSection):
    """S4: each trajectory's weighted mean, then the mean over trajectories (GRPO, arXiv 2402.03300)."""

    kind: Literal["sequence_mean"]


class ConstantNormaliser(AggregationSection):
    """S4: divide by a constant per trajectory (Dr. GRPO, arXiv 2503.20783)."""

    kind: Literal["constant"]
    tokens: Positive
    """That constant: published as the longest response; for a whole episode max_turns * response_tokens."""


Aggregation = Annotated[Union[WeightSum, TokenMean, SequenceMean, ConstantNormaliser], Field(discriminator="kind")]

# ------------------------------------------------------------------------------------------------- S5: surrogate

Low = Annotated[Float, Field(gt=0.0, lt=1.0)]
Dual = Annotated[Float, Field(gt=1.0, le=MOST)]


class SurrogateSection(Section):
    """What every choice of S5 has."""

    needs_two_updates: ClassVar[bool] = True
    """Its rules on the ratio do nothing in the first update after a rollout."""


class PPOClip(SurrogateSection):
    """S5: the clipped surrogate with two bounds (arXiv 1707.06347, arXiv 2503.14476)."""

    kind: Literal["ppo_clip"]
    low: Low = 0.2
    """The ratio is not pushed below 1 - low."""
    high: Positive = 0.28
    """The ratio is not pushed above 1 + high."""
    dual: Dual | None = None
    """Where A < 0 a ratio above this counts as this, without a gradient (dual clip, arXiv 1912.09729): 3 in verl; null: no
    bound, as in PPO's paper and in TRL."""


class SequenceClip(SurrogateSection):
    """S5: the ratio of a trajectory is the geometric mean of its tokens' (GSPO, arXiv 2507.18071)."""

    kind: Literal["sequence_clip"]
    low: Low = 3e-4
    """The trajectory's ratio is not pushed below 1 - low."""
    high: Positive = 4e-4
    """The trajectory's ratio is not pushed above 1 + high."""


class DetachedClip(SurrogateSection):
    """S5: ``-sg(clip(r)) A log pi``: no token loses its gradient (CISPO, arXiv 2506.13585)."""

    kind: Literal["detached_clip"]
    low: Annotated[Float, Field(gt=0.0, le=1.0)] = 1.0
    """The weight is at least 1 - low; 1 for no lower bound, as published."""
    high: Positive = 0.28
    """The weight is at most 1 + high. Ours: the published value is not known to us."""


class StraightThroughClip(SurrogateSection):
    """S5: above the upper bound the value is clipped and the gradient kept (AEPO, arXiv 2510.14545)."""

    kind: Literal["straight_through_clip"]
    low: Low = 0.2
    """The ratio is not pushed below 1 - low where A < 0."""
    high: Positive = 0.2
    """Where A > 0 a ratio above 1 + high counts as 1 + high."""
    dual: Dual | None = None
    """Where A < 0 a ratio above this counts as this, without a gradient: 3 in the released code; null: no bound."""


class CovarianceClip(SurrogateSection):
    """S5: PPO's clip, and no loss on random tokens of high covariance (Clip-Cov, arXiv 2505.22617)."""

    kind: Literal["covariance_clip"]
    low: Annotated[Float, Field(gt=0.0, le=1.0)] = 1.0
    """The ratio is not pushed below 1 - low."""
    high: Positive = 1.0
    """The ratio is not pushed above 1 + high."""
    share: Share = 2e-4
    """Share of the minibatch's tokens that loses its loss; at least one token, if any is in the band."""
    band: tuple[Number, Number] = (1.0, 5.0)
    """Covariance of the tokens among which these are drawn."""

    @model_validator(mode="after")
    def _ordered(self) -> CovarianceClip:
        if not self.band[0] < self.band[1]:
            raise ValueError("band must be two numbers, low < high")
        return self


class CovarianceKL(SurrogateSection):
    """S5: the plain ratio, and a penalty on tokens of highest covariance (KL-Cov, arXiv 2505.22617)."""

    kind: Literal["covariance_kl"]
    share: Share = 2e-4
    """Share of the minibatch's tokens that is penalised; at least one token."""
    coefficient: Positive = 1.0
    """Of ``abs(log pi - log pi_old)`` on these tokens."""


class BalancedClip(SurrogateSection):
    """S5: bounds of the ratio move until positive advantages carry their share of the loss (BAPO, arXiv 2510.18927)."""

    kind: Literal["balanced_clip"]
    low: tuple[Positive, Positive] = (0.6, 0.9)
    """Lower bound of the ratio: where it starts, and where it ends."""
    high: tuple[Positive, Positive] = (1.2, 3.0)
    """Upper bound of the ratio: where it starts, and where it ends."""
    step: Positive = 0.05
    """By which a bound moves."""
    positive_share: Probability = 0.5
    """Share that tokens of positive advantage shall have."""
    share_of: Literal["total", "negative"] = "total"
    """What it is a share of: the whole loss (paper), or that of negative advantages (released code)."""
    first: Literal["high", "low"] = "high"
    """Which bound moves first, to its end."""

    @model_validator(mode="after")
    def _ordered(self) -> BalancedClip:
        if not (self.low[0] <= self.low[1] <= 1 <= self.high[0] <= self.high[1]):
            raise ValueError("low must be two numbers, start <= end <= 1, and high two numbers, 1 <= start <= end")
        return self


class ProcedureClip(SurrogateSection):
    """S5: PPO's clip with a dual bound, scaled by where each token leads (APPO, arXiv 2606.12384).

    The loss of a token is multiplied by ``1 + strength * f_t`` (raw) or ``1 + strength * (f_t - 1)`` (centred), with
    ``f_t = clip(exp(FutureKL_t), ...)`` under a stop-gradient.
    """

    kind: Literal["procedure_clip"]
    low: Low = 0.2
    """The ratio is not pushed below 1 - low."""
    high: Positive = 0.28
    """The ratio is not pushed above 1 + high."""
    dual: Dual = 3.0
    """Where A < 0 a ratio above this counts as this; a trajectory with more than one such token leaves the mean."""
    strength: Positive = 1.0
    """b of the scaling."""
    form: Literal["raw", "centred"] = "raw"
    """As published, where every loss is at least doubled at b = 1; or around 1."""
    half_life: Positive = 64.0
    """Tokens after which a later token counts half in FutureKL."""
    largest_shift: Positive = 1.0986
    """Tokens whose ``log pi - log pi_old`` is above this (log 3) are left out of FutureKL."""
    bound: Annotated[Float, Field(gt=1.0, le=MOST)] = 1.2
    """f_t is clipped to [1, this]."""
    safety: Annotated[Float, Field(gt=1.0, le=MOST)] = 6.0
    """Where A < 0 and the ratio is above this f_t is 1. From ``dual`` on it changes the loss's value alone, as with the
    source's 6 beside 3: such a token has no gradient by then."""


class SoftQSurrogate(SurrogateSection):
    """S5: ``sum_v pi(v) (b log(pi(v) / ref(v)) - Q(v))`` over the vocabulary (ETPO, arXiv 2402.06700)."""

    needs_two_updates: ClassVar[bool] = False
    kind: Literal["soft_q"]


Surrogate = Annotated[
    Union[
        PPOClip,
        SequenceClip,
        DetachedClip,
        StraightThroughClip,
        CovarianceClip,
        CovarianceKL,
        BalancedClip,
        ProcedureClip,
        SoftQSurrogate,
    ],
    Field(discriminator="kind"),
]

# ----------------------------------------------------------------------------------------------- S6: regulariser


class RegulariserSection(Section):
    """What every choice of S6 has: terms added to the loss as plain token means, whatever the token weights are."""

    entropy: NonNegative = 0.0
    """Coefficient of the entropy bonus."""
    kl: NonNegative = 0.0
    """Coefficient of the KL to the reference policy."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How the KL is estimated from sampled tokens, and so which KL the loss pulls by: its expected gradient on-policy is that
    of KL(pi || ref) with k2, that of KL(ref || pi) with k3, and zero with k1."""
    skip_above_kl: Positive | None = None
    """The policy's step is skipped while its KL from the behaviour policy is above this (POAD: 0.02); null for never."""

    @model_validator(mode="after")
    def _kl_effective(self) -> RegulariserSection:
        if self.kl == 0:
            refuse_ignored(self, "kl is 0", "kl_estimator")
        return self


class FixedRegulariser(RegulariserSection):
    """S6: fixed coefficients."""

    kind: Literal["fixed"]


class EntropyBand(RegulariserSection):
    """S6: a penalty where a token's entropy leaves a band around its turn's history (EPO, arXiv 2509.22576).

    The penalty is the distance from the band, so that it has a gradient; the released one is constant and has none.
    """

    kind: Literal["entropy_band"]
    penalty: Positive = 0.001
    """Loss per nat outside the band."""
    low: NonNegative = 0.8
    """Lower end of the band, as a factor of the mean entropy of the same turn over all earlier iterations."""
    high: NonNegative = 1.2
    """Upper end of the band."""

    @model_validator(mode="after")
    def _ordered(self) -> EntropyBand:
        if self.low > self.high:
            raise ValueError("low must not exceed high")
        return self


class EntropyTarget(RegulariserSection):
    """S6: the entropy bonus adapts to a target below the initial entropy, larger on hard groups (AER, arXiv 2510.10959).

    ``entropy`` is the coefficient of the first iteration.
    """

    kind: Literal["entropy_target"]
    target: Positive = 0.8
    """Mean token entropy to be kept, as a share of the first iteration's. Ours."""
    rate: Positive = 0.01
    """Change of the coefficient per iteration and nat of missing entropy. Ours."""
    largest: Positive = 0.05
    """The coefficient stays within 0 and this. Ours."""
    hardness: NonNegative = 1.0
    """A group's coefficient is larger by this times its failure rate. Ours."""


Regulariser = Annotated[Union[FixedRegulariser, EntropyBand, EntropyTarget], Field(discriminator="kind")]

# ------------------------------------------------------------------------------------------------------- a method

Status = Literal["faithful", "after", "ours"]


class Method(Section):
    """One choice per slot, and the step size. In ``methods`` every key is optional; ``method_defaults`` fills the rest."""

    source: str = ""
    """Where the method comes from; decides nothing."""
    status: Status = "ours"
    """``faithful`` to its source, ``after`` it where only the idea is known, or ``ours``; decides nothing."""
    branching: Branching = Independent()
    """S1: where do episodes come from?"""
    reward: Reward
    """S7: is the reward reshaped?"""
    filter: Filter
    """S2: which groups are trained on."""
    advantage: Advantage
    """S3: what is A_t."""
    weight: Weight
    """S4: the token weight w_t."""
    aggregation: Aggregation
    """S4: what divides the weighted sum."""
    surrogate: Surrogate
    """S5: how ratio and advantage become a per-token loss."""
    regulariser: Regulariser
    """S6: entropy and KL terms."""
    learning_rate: LearningRate
    """Adam's learning rate of the policy."""

    @model_validator(mode="after")
    def _legal(self) -> Method:
        if (self.advantage.kind == "soft_q") != (self.surrogate.kind == "soft_q"):
            raise ValueError("advantage soft_q and surrogate soft_q go together: one is of no use without the other")
        if (self.reward.kind == "token_entropy") != (self.advantage.kind == "token_group"):
            raise ValueError(
                "reward token_entropy and advantage token_group go together: such a reward stands on every token"
            )
        if self.aggregation.count == "with_advantage" and self.advantage.heads():
            raise ValueError(
                f"aggregation.count with_advantage has no effect with advantage {self.advantage.kind}: one that comes "
                "from a critic is 0 nowhere; it needs one that compares within groups"
            )
        self._legal_trees()
        return self

    def _legal_trees(self) -> None:
        """What is defined on trees, and only there."""
        branching, advantage = self.branching, self.advantage
        if (branching.kind == "temperature_switch") != (advantage.kind == "reinforced"):
            raise ValueError("branching temperature_switch and advantage reinforced go together")
        if branching.kind == "none":
            if isinstance(advantage, TREE_ADVANTAGES):
                raise ValueError(f"advantage {advantage.kind} needs branches, and branching is none")
            return
        if advantage.kind == "prefix_credit" and branching.kind != "positions":
            raise ValueError("advantage prefix_credit needs branching positions, whose initial episodes are one group")
        if not isinstance(advantage, (*TREE_ADVANTAGES, GroupAdvantage, GAE)):
            raise ValueError(f"advantage {advantage.kind} is not defined on branches")
        if self.reward.kind != "none":
            raise ValueError(f"reward {self.reward.kind} is not defined on branches")
        if self.weight.kind == "pivots":
            raise ValueError("weight pivots is not defined on branches: it goes by progress in the whole trajectory")

    @property
    def ratio_rule(self) -> str | None:
        """The slot, if any, with a rule on the ratio: it does nothing in the first update after a rollout."""
        if self.surrogate.needs_two_updates:
            return "surrogate"
        return "regulariser.skip_above_kl" if self.regulariser.skip_above_kl is not None else None
