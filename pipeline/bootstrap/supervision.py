"""A policy from scratch: a small Qwen2 model supervised on noisy demonstrations of the scripted expert.

It ends up knowing the task and playing it badly, which is where reinforcement learning starts.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipeline.bootstrap.demonstrations import Demonstration, demonstrations_of
from pipeline.bootstrap.tokenizer import train_tokenizer
from pipeline.model.policy import Policy
from pipeline.model.scoring import predicting_hidden, score_tokens
from pipeline.progress.display import span, within
from pipeline.settings.params import Environment
from pipeline.settings.policy import ScratchPolicy
from pipeline.trajectories.builder import EpisodeBuilder
from pipeline.trajectories.prompting import Dialogue, user_message
from pipeline.trajectories.trajectory import Role
from pipeline.workspace.finite import require_finite
from pipeline.workspace.randomness import key


def bootstrap(
    settings: ScratchPolicy, environments: dict[str, Environment], report: Callable[[int, int, float], None]
) -> Policy:
    """Make tokenizer and model, and supervise the model on demonstrations of all environments.

    ``report`` is called with step, number of steps and loss. Returns the reference policy, in evaluation mode.

    Raises:
        UserError: an environment has no expert, or one that does not plan where it must, or does not keep to what ``playing.step`` asks of it.
    """
    plan = settings.demonstrations
    phases = []
    for index, phase in enumerate(plan.phases):
        with span(f"demonstrations of phase {index + 1} of {len(plan.phases)}", 0.0, 0.0):
            phases.append(demonstrations_of(environments, settings, phase, index))
    sample = ((environments[name], demonstration) for demos in phases for name, demonstration in demos[:300])
    texts = (text for section, demonstration in sample for text in _texts(section, demonstration))
    tokenizer = train_tokenizer(texts, settings.vocabulary)
    model = _new_model(settings, tokenizer, max(e.context_tokens for e in environments.values()))
    policy = Policy(model, tokenizer)
    _supervise(policy, settings, phases, environments, report)
    model.eval()
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


def _supervise(
    policy: Policy,
    settings: ScratchPolicy,
    phases: list[list[tuple[str, Demonstration]]],
    environments: dict[str, Environment],
    report: Callable[[int, int, float], None],
) -> None:
    plan = settings.demonstrations
    dialogues = {name: Dialogue(policy.tokenizer, e.layout, "", e.response_tokens) for name, e in environments.items()}
    optimizer = torch.optim.AdamW(
        policy.model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    total = sum(phase.steps for phase in plan.phases)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 0.5 * (1 + math.cos(math.pi * step / total)))
    )
    policy.model.train()
    step = 0
    for demos, phase in zip(phases, plan.phases, strict=True):
        within(0.0, "encoding demonstrations")
        encoded = [_encode(dialogues[name], demonstration) for name, demonstration in demos]
        for batch in range(phase.steps):
            chosen = [encoded[(batch * plan.batch_episodes + i) % len(encoded)] for i in range(plan.batch_episodes)]
            loss = _supervised_loss(policy, chosen, plan.action_weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            value = float(loss.detach())
            require_finite(f"policy.demonstrations: the loss of step {step}", value)
            report(step, total, value)


def _encode(dialogue: Dialogue, demonstration: Demonstration) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and roles of a demonstrated episode; prompts exactly as the collector will send them."""
    episode, encode = EpisodeBuilder(), dialogue.encode
    add = episode.append_text
    for number, turn in enumerate(demonstration.turns, start=1):
        if number == 1:
            add(dialogue.opening(demonstration.instructions, turn.observation, turn.actions_left), Role.PROMPT)
        else:
            add(dialogue.following(number, turn.observation, turn.reward, False, turn.actions_left), Role.OBSERVATION)
        add(encode(f"<think>{dialogue.carried(turn.reasoning)}"), Role.REASONING)
        add(encode("</think><answer>"), Role.REASONING)
        add(encode(dialogue.carried(turn.action)), Role.ACTION)
        add(encode("</answer>"), Role.ANSWER_TAG)
    return np.array(episode.ids), np.array(episode.tokens["role"])


def _supervised_loss(policy: Policy, batch: list[tuple[np.ndarray, np.ndarray]], action_weight: float) -> torch.Tensor:
    wanted = [roles >= Role.REASONING for _, roles in batch]
    hidden = predicting_hidden(policy, [ids for ids, _ in batch], wanted)
    tokens = torch.from_numpy(np.concatenate([ids[mask] for (ids, _), mask in zip(batch, wanted, strict=True)]))
    roles = torch.from_numpy(np.concatenate([r[mask] for (_, r), mask in zip(batch, wanted, strict=True)]))
    weight = torch.where(roles == Role.ACTION, action_weight, 1.0)
    scores = score_tokens(hidden, tokens, policy.head, temperature=1.0)
    return -(weight * scores.logprob).sum() / weight.sum()
