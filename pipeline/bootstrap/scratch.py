"""A policy from scratch: a small Qwen2 model supervised on noisy demonstrations of the scripted expert.

It ends up knowing the task and playing it badly, which is where reinforcement learning starts.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipeline.bootstrap.demonstrations import Demonstration, demonstrations_of
from pipeline.bootstrap.supervision import StepReport, encode, supervise
from pipeline.bootstrap.tokenizer import train_tokenizer
from pipeline.model.policy import Policy
from pipeline.settings.params import Environment
from pipeline.settings.policy import ScratchPolicy
from pipeline.trajectories.prompting import Dialogue, user_message
from pipeline.workspace.randomness import key

WARM_UP = 20
"""Steps until the learning rate is at its peak."""


def bootstrap(
    settings: ScratchPolicy, environments: dict[str, Environment], report: StepReport, checkpoint: Path | None = None
) -> Policy:
    """Make tokenizer and model, and supervise the model on demonstrations of all environments (see ``supervise``).

    Returns the reference policy, in evaluation mode.

    Raises:
        UserError: an environment has no expert, or one that does not plan where it must, or does not keep to what ``playing.step`` asks of it.
    """
    plan = settings.demonstrations
    phases = [
        demonstrations_of(environments, plan, settings.seed, index, plan.episodes) for index in range(len(plan.phases))
    ]
    sample = ((environments[name], demonstration) for demos in phases for name, demonstration in demos[:300])
    texts = (text for section, demonstration in sample for text in _texts(section, demonstration))
    tokenizer = train_tokenizer(texts, settings.vocabulary)
    policy = Policy(_new_model(settings, tokenizer, max(e.context_tokens for e in environments.values())), tokenizer)
    dialogues = {name: Dialogue(tokenizer, e.layout, "", e.response_tokens) for name, e in environments.items()}
    examples = [
        [encode(dialogues[name], demonstration, environments[name].context_tokens) for name, demonstration in demos]
        for demos in phases
    ]
    supervise(policy, plan, examples, plan.learning_rate, WARM_UP, report, checkpoint=checkpoint)
    return policy


def _texts(section: Environment, demonstration: Demonstration) -> Iterator[str]:
    """What the tokenizer is to write in few tokens."""
    if section.layout == "published":
        yield demonstration.instructions
    for number, turn in enumerate(demonstration.turns, start=1):
        yield user_message(section.layout, number, turn.observation, turn.actions_left, section.response_tokens)
        yield from (turn.reasoning, turn.action)


def _new_model(settings: ScratchPolicy, tokenizer: Any, context: int) -> Any:
    torch.manual_seed(key(settings.seed, "initial weights") % 2**63)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=4 * settings.hidden_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=context,
            rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
    )
