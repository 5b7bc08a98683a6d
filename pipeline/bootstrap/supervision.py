"""A policy from scratch: a small Qwen2 model supervised on noisy demonstrations of the scripted expert.

It ends up knowing the task and playing it badly, which is where reinforcement learning starts.
"""

import copy
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipeline.bootstrap.tokenizer import train_tokenizer
from pipeline.environments import initial_states, make
from pipeline.environments.playing import actions_left_of, parse_action, reset, step, text_of
from pipeline.environments.text_environment import id_of
from pipeline.model.policy import Policy
from pipeline.model.scoring import predicting_hidden, score_tokens
from pipeline.progress.display import span, within
from pipeline.settings.params import Environment, Phase, ScratchPolicy
from pipeline.trajectories.builder import EpisodeBuilder
from pipeline.trajectories.prompting import Dialogue, plain_text, user_message
from pipeline.trajectories.trajectory import Role
from pipeline.workspace.errors import UserError
from pipeline.workspace.finite import require_finite
from pipeline.workspace.randomness import generator, key


@dataclass(frozen=True)
class Turn:
    """A demonstrated turn: what the policy will be shown, and what it is to answer."""

    observation: str
    reward: float
    """Of the turn before, as the observation comes with it; 0 in the first turn."""
    actions_left: int | None
    """None if the environment does not know it."""
    reasoning: str
    action: str
    """Several are joined by ``||``."""


@dataclass(frozen=True)
class Demonstration:
    """One episode of the expert."""

    instructions: str
    turns: list[Turn]


def bootstrap(
    settings: ScratchPolicy, environments: dict[str, Environment], report: Callable[[int, int, float], None]
) -> Policy:
    """Make tokenizer and model, and supervise the model on demonstrations of all environments.

    ``report`` is called with step, number of steps and loss. Returns the reference policy, in evaluation mode.

    Raises:
        UserError: an environment has no expert, or does not keep to what ``playing.step`` asks of it.
    """
    plan = settings.demonstrations
    phases = []
    for index, phase in enumerate(plan.phases):
        with span(f"demonstrations of phase {index + 1} of {len(plan.phases)}", 0.0, 0.0):
            phases.append(_demonstrations(environments, settings, phase, index))
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


def expert_of(environment: Any) -> Any:
    """The scripted expert beside an environment.

    Raises:
        UserError: its module has no ``expert``.
    """
    name = type(environment).__module__
    module = importlib.import_module(name)
    if not hasattr(module, "expert"):
        raise UserError(
            f"policy.kind: scratch learns from an expert, and {id_of(environment)!r} has none; set policy to "
            f"{{kind: pretrained, model: ...}}, or write `expert` in module {name} (docs/environments.md)"
        )
    return module.expert()


def demonstrate(
    environment: Any, expert: Any, state_seed: int, phase: Phase, draws: np.random.Generator, section: Environment
) -> Demonstration:
    """One episode of the expert, its actions replaced by random ones with probability ``phase.action_noise``.

    It is cut off after ``section.max_turns`` turns. A turn has up to ``section.actions_per_turn`` actions. Each is chosen
    in the state that the one before has led to, which the policy will not have seen: where there is noise, the expert
    knows more than can be learnt. The collector refuses a turn with an action that is not allowed at its beginning, so a
    turn ends before such an action.
    """
    observation = reset(environment, int(draws.integers(2**31)), state_seed)
    demonstration = Demonstration(plain_text(text_of(environment, "instructions")), [])
    reward, over = 0.0, False
    while not over and len(demonstration.turns) < section.max_turns:
        words = int(draws.integers(phase.reasoning_words[0], phase.reasoning_words[1] + 1))
        reasoning = expert.reason(environment, words, draws)
        shown = (plain_text(observation), reward, actions_left_of(environment), plain_text(reasoning))
        beginning = copy.deepcopy(environment) if section.actions_per_turn > 1 else environment
        actions, reward = list[str](), 0.0
        while not over and len(actions) < section.actions_per_turn:
            action = expert.act(environment, draws)
            if draws.random() < phase.action_noise:
                action = expert.random_action(environment, draws)
            if actions and parse_action(beginning, action) is None:
                break
            observation, earned, over = step(environment, action)
            actions, reward = [*actions, action], reward + earned
        demonstration.turns.append(Turn(*shown, plain_text(" || ".join(actions))))
    return demonstration


def _demonstrations(
    environments: dict[str, Environment], settings: ScratchPolicy, phase: Phase, index: int
) -> list[tuple[str, Demonstration]]:
    plan, found = settings.demonstrations, list[tuple[str, Demonstration]]()
    for name, section in environments.items():
        environment = make(section)
        expert = expert_of(environment)
        draws = generator(settings.seed, "demonstrations", name, index)
        states = initial_states(environment, "demonstrations", plan.episodes, draws)
        for number, state in enumerate(states):
            within(0.0, f"in {name}: {number} of {len(states)} episodes")
            found.append((name, demonstrate(environment, expert, state, phase, draws, section)))
    order = generator(settings.seed, "demonstration order", index).permutation(len(found))
    return [found[i] for i in order]


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
