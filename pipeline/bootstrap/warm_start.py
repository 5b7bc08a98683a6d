"""Warm start of a pretrained policy: one that hardly keeps the format, or never succeeds, has nothing to learn from.

Supervision is by the scripted expert, in the policy's own tokens and chat template, as the collector uses them.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int

from pipeline.bootstrap.demonstrations import demonstrations_of
from pipeline.bootstrap.supervision import Example, StepReport, encode, supervise
from pipeline.model.adapters import merged, with_adapters
from pipeline.model.memory import tokens_per_forward
from pipeline.model.policy import Policy
from pipeline.settings.params import Config, Environment
from pipeline.settings.policy import WarmStart
from pipeline.trajectories.prompting import Dialogue
from pipeline.workspace.errors import UserError

WARM_UP = 0.1
"""Share of all steps until the learning rate is at its peak."""


def warm_start(
    policy: Policy, plan: WarmStart, config: Config, report: StepReport, checkpoint: Path | None = None
) -> Policy:
    """Supervise a policy with float32 weights on demonstrations of all environments: in place, or by adapters on it.

    Returns the reference policy, in evaluation mode; adapters are merged.

    Raises:
        UserError: as ``bootstrap``; a demonstrated episode is longer than ``context_tokens`` before its first turn is over,
            or a response longer than ``response_tokens``.
    """
    policy.model.to("cuda" if torch.cuda.is_available() else "cpu")
    examples = [_examples(policy, plan, index, config) for index in range(len(plan.phases))]
    warm_up = math.ceil(WARM_UP * sum(phase.steps for phase in plan.phases))
    rate, budget = plan.learning_rate, tokens_per_forward(config, policy)
    if plan.lora is not None:
        policy, rate = with_adapters(policy, plan.lora, plan.seed), rate * plan.lora.learning_rate_factor
    supervise(policy, plan, examples, rate, warm_up, report, budget, checkpoint)
    return merged(policy)


def _examples(policy: Policy, plan: WarmStart, index: int, config: Config) -> list[Example]:
    """Of a phase, as many as it takes, and no more."""
    environments = config.environments
    taken = math.ceil(plan.phases[index].steps * plan.batch_episodes / len(environments))
    demonstrations = demonstrations_of(environments, plan, plan.seed, index, min(plan.episodes, taken))
    dialogues = {
        name: Dialogue(policy.tokenizer, section.layout, config.rollout.prefill, section.response_tokens)
        for name, section in environments.items()
    }
    found = dict[str, list[Example]]()
    examples = list[Example]()
    for name, demonstration in demonstrations:
        examples.append(encode(dialogues[name], demonstration, environments[name].context_tokens))
        found.setdefault(name, []).append(examples[-1])
    for name, own in found.items():
        _require_room(name, environments[name], own)
    return examples


def _require_room(name: str, section: Environment, examples: Sequence[Example]) -> None:
    """What is demonstrated must be possible within the limits of an episode."""
    longest = max(len(example.ids) for example in examples)
    if longest > section.context_tokens:
        raise UserError(
            f"environments.{name}.context_tokens: {section.context_tokens} is less than the {longest} tokens of a "
            "demonstration's first turn; raise it"
        )
    response = max(int(_responses(example.learnt).max()) for example in examples)
    if response > section.response_tokens:
        raise UserError(
            f"environments.{name}.response_tokens: {section.response_tokens} is less than the {response} tokens of a "
            "demonstrated response; raise it, or shorten policy.demonstrations.phases.0.reasoning_words"
        )


def _responses(learnt: Bool[np.ndarray, " n"]) -> Int[np.ndarray, " turns"]:
    """Tokens of each response: the runs of what is learnt, which observations divide."""
    borders = np.flatnonzero(np.diff(np.concatenate([[False], learnt, [False]]).astype(np.int8)))
    lengths: np.ndarray = np.diff(borders)[::2]
    return lengths
