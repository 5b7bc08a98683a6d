"""The reference policy: made from scratch on demonstrations, or a pretrained language model."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.settings.lora import Lora
from pipeline.settings.section import Count, Float, Int, LearningRate, Positive, Probability, Section, Seed

Words = Annotated[Int, Field(ge=0, le=1000)]
Reasoning = Literal["facts", "plan", "misleading"]


class Phase(Section):
    """One stage of supervision."""

    steps: Count
    """Optimizer steps."""
    reasoning_words: tuple[Words, Words]
    """Least and greatest number of words in a turn's reasoning, of facts alone: a plan comes behind them."""
    action_noise: Probability
    """Share of the expert's actions that are replaced by random ones (its ``random_action``)."""
    plan_noise: Probability = 0.0
    """Share of plans that are made for a random action, which then follows: what goes wrong does so in the reasoning. Only
    with ``reasoning: plan``."""

    def check(self) -> None:
        if not 0 <= self.reasoning_words[0] <= self.reasoning_words[1]:
            raise ValueError("reasoning_words must be two numbers, 0 <= least <= greatest")


class Demonstrations(Section):
    """Supervision that makes a from-scratch policy know the task, and play it badly."""

    reasoning: Reasoning = "facts"
    """What stands between the think tags. ``facts``: true words about the state that never decide the action. ``plan``: the
    expert's ``plan``, which ends in the action; a policy that learns from it decides there, and copies the action.
    ``misleading``: the plan of another action than the one that follows, which is to be ignored."""
    phases: list[Phase] = Field(min_length=1)
    """Stages of supervision, in order: a first one with short reasoning and little noise makes acting learnable."""
    action_weight: Positive = 12.0
    """Weight of an action token in the supervised loss; other response tokens weigh 1."""
    episodes: Count = 2000
    """Demonstrated episodes per phase."""
    batch_episodes: Count = 32
    """Episodes per supervised step."""
    learning_rate: LearningRate = 3e-3
    """Peak learning rate of the supervision (AdamW, linear warm-up then cosine to zero over all phases)."""

    def check(self) -> None:
        if self.reasoning != "plan":
            for index, phase in enumerate(self.phases):
                if phase.plan_noise:
                    raise ValueError(f"phases.{index}.plan_noise has no effect while reasoning is {self.reasoning}")


class WarmStart(Demonstrations):
    """Supervision that makes a pretrained policy keep the format and act, so that there is something to learn from."""

    action_weight: Positive = 4.0
    """Weight of an action token in the supervised loss; other response tokens weigh 1."""
    episodes: Count = 300
    """Demonstrated episodes per phase and environment; no more are made than its steps take."""
    batch_episodes: Count = 8
    """Episodes per supervised step."""
    learning_rate: LearningRate = 1e-4
    """Peak learning rate of the supervision (AdamW, warm-up over a tenth of all steps, then cosine to zero)."""
    seed: Seed = 0
    """Seed of demonstrations, their order, and of adapters."""
    lora: Lora | None = None
    """Adapters that are trained in place of the weights, and merged into them; null: all weights are trained."""


class ScratchPolicy(Section):
    """A small Qwen2-architecture model and tokenizer, made on the spot; needs no download."""

    kind: Literal["scratch"]
    hidden_size: Annotated[Int, Field(ge=2, le=16_384)] = 64
    """Width of the residual stream."""
    layers: Annotated[Int, Field(ge=1, le=1024)] = 2
    """Number of transformer blocks."""
    heads: Annotated[Int, Field(ge=1, le=1024)] = 4
    """Number of attention heads; divides hidden_size."""
    rope_theta: Annotated[Float, Field(ge=100.0, le=1e12)] = 10_000.0
    """Base of rotary positions (arXiv 2104.09864). The greater, the more of a head can match by content what stands hundreds
    of tokens back: the slower pairs of dimensions hardly turn over such a distance."""
    vocabulary: Annotated[Int, Field(ge=300, le=1_000_000)] = 420
    """Tokenizer entries (byte-level BPE: 256 bytes, markers, the rest merges)."""
    seed: Seed = 0
    """Seed of initial weights, demonstrations and their order."""
    demonstrations: Demonstrations

    def check(self) -> None:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be divisible by 2 * heads ({2 * self.heads})")


class PretrainedPolicy(Section):
    """Any transformers causal language model."""

    kind: Literal["pretrained"]
    model: str
    """Hub id, path of a local directory, or ``package:<module>`` for weights that an installed package carries."""
    revision: str | None = None
    """Branch, tag or commit on the hub; give a commit to make runs repeatable."""
    gguf_file: str | None = None
    """The GGUF file in there that holds weights and tokenizer; its weights are dequantised. Where it is the only one beside no
    config.json, a directory or package need not name it."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision in which the policy samples, is evaluated and is saved, and that of the reference; anything below float32
    changes numbers. Weights are trained in float32: with ``bfloat16`` their matrix products are bfloat16 (autocast), with
    ``float16`` all is float32, as gradients would leave its range."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off unless you have read that code."""
    demonstrations: WarmStart | None = None
    """Supervision before everything else: what comes out is the reference policy. null: the model as it is."""

    def check(self) -> None:
        if self.model.startswith("package:"):
            self.refuse_ignored(f"model is {self.model}, whose version is the installed one", "revision")
