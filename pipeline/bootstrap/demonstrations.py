"""Demonstrated episodes of an environment's scripted expert: what it is shown, its reasoning, and its noisy actions."""

import copy
import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.environments import initial_states, make
from pipeline.environments.playing import actions_left_of, parse_action, reset, step, text_of
from pipeline.environments.text_environment import id_of
from pipeline.progress.display import span, within
from pipeline.settings.params import Environment
from pipeline.settings.policy import Demonstrations, Phase, Reasoning
from pipeline.trajectories.prompting import plain_text
from pipeline.workspace.errors import UserError
from pipeline.workspace.randomness import generator

TRIES = 100
"""Random actions that are drawn to find one other than the demonstrated."""


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


def expert_of(environment: Any, reasoning: Reasoning = "facts") -> Any:
    """The scripted expert beside an environment, for demonstrations with this kind of reasoning.

    Raises:
        UserError: its module has no ``expert``, or one without the ``plan`` that the kind asks for.
    """
    name = type(environment).__module__
    module = importlib.import_module(name)
    if not hasattr(module, "expert"):
        raise UserError(
            f"policy.demonstrations: are an expert's, and {id_of(environment)!r} has none; set policy to {{kind: "
            f"pretrained, model: ...}} without them, or write `expert` in module {name} (docs/environments.md)"
        )
    expert = module.expert()
    if reasoning != "facts" and not hasattr(expert, "plan"):
        raise UserError(
            f"policy.demonstrations.reasoning: {reasoning} needs an expert that plans, and that of {id_of(environment)!r} "
            f"does not; set it to facts, or write `plan` for `expert` in module {name} (docs/environments.md)"
        )
    return expert


def demonstrate(
    environment: Any,
    expert: Any,
    state_seed: int,
    phase: Phase,
    draws: np.random.Generator,
    section: Environment,
    reasoning: Reasoning = "facts",
) -> Demonstration:
    """One episode of the expert, its actions replaced by random ones with probability ``phase.action_noise``.

    Its reasoning is facts, and behind them what the kind of ``reasoning`` adds: see ``Demonstrations.reasoning``.

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
        facts, plans = expert.reason(environment, words, draws), list[str]()
        shown = (plain_text(observation), reward, actions_left_of(environment))
        beginning = copy.deepcopy(environment) if section.actions_per_turn > 1 else environment
        actions, reward = list[str](), 0.0
        while not over and len(actions) < section.actions_per_turn:
            action, planned = _choose(environment, expert, phase, draws, reasoning)
            if actions and parse_action(beginning, action) is None:
                break
            if planned is not None:
                plans.append(expert.plan(environment, planned, draws))
            observation, earned, over = step(environment, action)
            actions, reward = [*actions, action], reward + earned
        said = " ".join(filter(None, [facts, " then ".join(plans)]))
        demonstration.turns.append(Turn(*shown, plain_text(said), plain_text(" || ".join(actions))))
    return demonstration


def _choose(
    environment: Any, expert: Any, phase: Phase, draws: np.random.Generator, reasoning: Reasoning
) -> tuple[str, str | None]:
    """The action to demonstrate, and the one that its reasoning plans; None: it plans none."""
    planned = expert.act(environment, draws)
    if reasoning == "plan" and draws.random() < phase.plan_noise:
        planned = expert.random_action(environment, draws)
    noisy = draws.random() < phase.action_noise
    action = expert.random_action(environment, draws) if noisy else planned
    if reasoning == "misleading":
        others = (expert.random_action(environment, draws) for _ in range(TRIES))
        return action, next((other for other in others if other != action), None)
    return action, planned if reasoning == "plan" else None


def demonstrations_of(
    environments: dict[str, Environment], plan: Demonstrations, seed: int, index: int, episodes: int
) -> list[tuple[str, Demonstration]]:
    """So many ``episodes`` of each environment for the ``index``-th phase, from 0, in the order in which they are learnt,
    each with its environment's name."""
    found = list[tuple[str, Demonstration]]()
    with span(f"demonstrations of phase {index + 1} of {len(plan.phases)}", 0.0, 0.0):
        for name, section in environments.items():
            environment = make(section)
            expert = expert_of(environment, plan.reasoning)
            draws = generator(seed, "demonstrations", name, index)
            states = initial_states(environment, "demonstrations", episodes, draws)
            for number, state in enumerate(states):
                within(0.0, f"in {name}: {number} of {len(states)} episodes")
                shown = demonstrate(environment, expert, state, plan.phases[index], draws, section, plan.reasoning)
                found.append((name, shown))
    order = generator(seed, "demonstration order", index).permutation(len(found))
    return [found[i] for i in order]
