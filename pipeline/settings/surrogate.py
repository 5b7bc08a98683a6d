"""How ratio and advantage become a per-token loss. What each choice does is in pipeline/objective/surrogates.py."""

from typing import Annotated, Literal, Union

from pydantic import Field

from pipeline.settings.custom import Custom
from pipeline.settings.section import MOST, Float, Number, Positive, Probability, Section, Share, at_least

Low = Annotated[Float, Field(gt=0.0, lt=1.0)]
Dual = Annotated[Float, Field(gt=1.0, le=MOST)]
Step = Annotated[Float, Field(gt=0.0, le=MOST), at_least(1e-6)]


class PPOClip(Section):
    """The clipped surrogate with two bounds (arXiv 1707.06347, arXiv 2503.14476)."""

    kind: Literal["ppo_clip"]
    low: Low = 0.2
    """The ratio is not pushed below 1 - low."""
    high: Positive = 0.28
    """The ratio is not pushed above 1 + high."""
    dual: Dual | None = None
    """Where A < 0 a ratio above this counts as this, without a gradient (dual clip, arXiv 1912.09729): 3 in verl; null: no
    bound, as in PPO's paper and in TRL."""


class SequenceClip(Section):
    """The ratio of a trajectory is the geometric mean of its tokens' (GSPO, arXiv 2507.18071)."""

    kind: Literal["sequence_clip"]
    low: Low = 3e-4
    """The trajectory's ratio is not pushed below 1 - low."""
    high: Positive = 4e-4
    """The trajectory's ratio is not pushed above 1 + high."""


class DetachedClip(Section):
    """``-sg(clip(r)) A log pi``: no token loses its gradient (CISPO, arXiv 2506.13585)."""

    kind: Literal["detached_clip"]
    low: Annotated[Float, Field(gt=0.0, le=1.0)] = 1.0
    """The weight is at least 1 - low; 1 for no lower bound, as published."""
    high: Positive = 0.28
    """The weight is at most 1 + high. Ours: its source gives no value."""


class StraightThroughClip(Section):
    """Above the upper bound the value is clipped and the gradient kept (AEPO, arXiv 2510.14545)."""

    kind: Literal["straight_through_clip"]
    low: Low = 0.2
    """The ratio is not pushed below 1 - low where A < 0."""
    high: Positive = 0.2
    """Where A > 0 a ratio above 1 + high counts as 1 + high."""
    dual: Dual | None = None
    """Where A < 0 a ratio above this counts as this, without a gradient: 3 in the released code; null: no bound."""


class CovarianceClip(Section):
    """PPO's clip, and no loss on random tokens of high covariance (Clip-Cov, arXiv 2505.22617)."""

    kind: Literal["covariance_clip"]
    low: Annotated[Float, Field(gt=0.0, le=1.0)] = 1.0
    """The ratio is not pushed below 1 - low."""
    high: Positive = 1.0
    """The ratio is not pushed above 1 + high."""
    share: Share = 2e-4
    """Share of the minibatch's tokens that loses its loss; at least one token, if any is in the band."""
    band: tuple[Number, Number] = (1.0, 5.0)
    """Covariance of the tokens among which these are drawn."""

    def check(self) -> None:
        if not self.band[0] < self.band[1]:
            raise ValueError("band must be two numbers, low < high")


class CovarianceKL(Section):
    """The plain ratio, and a penalty on tokens of highest covariance (KL-Cov, arXiv 2505.22617)."""

    kind: Literal["covariance_kl"]
    share: Share = 2e-3
    """Share of the minibatch's tokens that is penalised, at least one: as published for 7 B parameters; 2e-4 for 32 B."""
    coefficient: Positive = 1.0
    """Of ``abs(log pi - log pi_old)`` on these tokens."""


class BalancedClip(Section):
    """Bounds of the ratio move until positive advantages carry their share of the loss (BAPO, arXiv 2510.18927)."""

    kind: Literal["balanced_clip"]
    low: tuple[Positive, Positive] = (0.6, 0.9)
    """Lower bound of the ratio: where it starts, and where it ends. Its steps (0.02 in the paper) decide nothing: a higher one
    never helps, so that it stays or goes to its end."""
    high: tuple[Positive, Positive] = (1.2, 3.0)
    """Upper bound of the ratio: where it starts, and where it ends."""
    high_step: Step = 0.05
    """By which the upper bound moves."""
    positive_share: Probability = 0.4
    """Share that tokens of positive advantage shall have."""
    share_of: Literal["total", "negative"] = "total"
    """What it is a share of: the whole loss (paper), or that of negative advantages (released code)."""
    first: Literal["high", "low"] = "high"
    """Which bound moves first, to its end: the upper one (paper), or the lower one (released code)."""
    by_probability: bool = True
    """Each token counts by its probability under the behaviour policy (paper), or all alike (released code)."""
    dual: Dual | None = None
    """Where A < 0 a ratio above this counts as this, without a gradient: 3 in the released code; null: no bound."""

    def check(self) -> None:
        if not (self.low[0] <= self.low[1] <= 1 <= self.high[0] <= self.high[1]):
            raise ValueError("low must be two numbers, start <= end <= 1, and high two numbers, 1 <= start <= end")


class ProcedureClip(Section):
    """PPO's clip with a dual bound, scaled by where each token leads (APPO, arXiv 2606.12384).

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


class SoftQSurrogate(Section):
    """``sum_v pi(v) (b log(pi(v) / ref(v)) - Q(v))`` over the vocabulary (ETPO, arXiv 2402.06700)."""

    kind: Literal["soft_q"]


class CustomSurrogate(Custom, slot="surrogate", given=("tokens",)):
    """A function of one's own. Whether it has a rule on the ratio is not known, so one update is allowed."""


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
        CustomSurrogate,
    ],
    Field(discriminator="kind"),
]
