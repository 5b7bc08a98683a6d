"""Playing held-out initial states and recording what happened, episode by episode."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.environments import initial_states, make
from pipeline.model.loading import load_trained
from pipeline.progress.display import span, within
from pipeline.rollout.sampler import Sampler, make_sampler, sample_episodes
from pipeline.rollout.specs import EpisodeSpec, group_specs
from pipeline.settings.params import Config
from pipeline.trajectories.trajectory import CUT_OFF, RESPONSES, Role, Trajectories
from pipeline.workspace.finite import located
from pipeline.workspace.processes import Tell
from pipeline.workspace.randomness import generator


def evaluation_specs(
    config: Config, name: str, split: str, states: int, rollouts: int, seed: int, purpose: str
) -> list[EpisodeSpec]:
    """``rollouts`` episodes of each of ``states`` distinct initial states of a split.

    The states are the same for every method and seed; noise and token draws depend on the seed, not on the method.
    """
    draws = generator(0, "evaluation states", name, split)
    found = initial_states(make(config.environments[name]), split, states, draws, distinct=True)
    return group_specs(name, found, rollouts, seed, 0, purpose)


def evaluate(
    sampler: Sampler, tokenizer: Any, config: Config, name: str, seed: int, temperature: float
) -> Trajectories:
    """Play the test split at one temperature, as ``evaluation`` in params.yaml says."""
    plan = config.evaluation
    specs = evaluation_specs(config, name, "test", plan.states, plan.rollouts, seed, f"test at {temperature:g}")
    return sample_episodes(sampler, tokenizer, config, name, specs, temperature)


@dataclass(frozen=True)
class EvaluationTask:
    """One policy at one temperature."""

    config: Config
    environment: str
    method: str
    seed: int
    policy: Path
    temperature: float


def evaluate_policy(task: EvaluationTask, report: Tell) -> pa.Table:
    """Load a policy in a process of its own and play the test split; returns ``episode_results``."""
    within(0.0, "loading the policy", insist=True)
    policy = load_trained(task.policy, task.config)
    sampler, total = make_sampler(task.config, policy), task.config.evaluation.states * task.config.evaluation.rollouts
    report(0, total, "episodes")
    with span("", 0, total), located(str(task.policy)):
        played = evaluate(sampler, policy.tokenizer, task.config, task.environment, task.seed, task.temperature)
    labels = {name: getattr(task, name) for name in ("environment", "method", "seed", "temperature")}
    return episode_results(played, **labels)


def validate(
    sampler: Sampler,
    tokenizer: Any,
    config: Config,
    name: str,
    seed: int,
    own_rows: Callable[[list[str]], Sequence[int]] = lambda groups: range(len(groups)),
) -> Trajectories:
    """Play the validation split at the headline temperature, or ``own_rows`` of its episodes, given by their groups."""
    plan = config.evaluation
    specs = evaluation_specs(
        config, name, "validation", plan.validation_states, plan.validation_rollouts, seed, "validation"
    )
    own = [specs[row] for row in own_rows([spec.group_id for spec in specs])]
    return sample_episodes(sampler, tokenizer, config, name, own, plan.temperatures[0])


def episode_results(trajectories: Trajectories, **labels: Any) -> pa.Table:
    """One row per episode, the input of every comparison; columns are those of ``trajectories.results``.

    The labels (environment, method, seed, temperature), state (initial state's key), rollout (number among the
    state's episodes), success, return, end_reason, turns, of these valid_turns, disallowed_turns, malformed_turns
    and cut_turns (see ``trajectory.RESPONSES``), tokens (sampled), action_tokens.
    """
    responses, sampled = np.array(trajectories.responses), trajectories.sampled
    numbers = defaultdict[str, Iterator[int]](itertools.count)
    count = len(trajectories)
    return pa.table(
        {
            **{label: [value] * count for label, value in labels.items()},
            "state": trajectories.episodes["state_key"],
            "rollout": [next(numbers[group]) for group in trajectories.episodes["group_id"]],
            "success": trajectories.episodes["success"],
            "return": trajectories.episodes["return"],
            "end_reason": trajectories.episodes["end_reason"],
            "turns": np.diff(trajectories.turn_offsets),
            **{f"{kind}_turns": _counts(responses == kind, trajectories.turn_offsets) for kind in RESPONSES},
            "tokens": _counts(sampled, trajectories.offsets),
            "action_tokens": _counts(sampled & (trajectories.role == Role.ACTION), trajectories.offsets),
        }
    )


def _counts(marked: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """int64 (E,): how many of each episode's turns or tokens are marked."""
    counts: np.ndarray = np.add.reduceat(marked.astype(np.int64), offsets[:-1])
    return counts


def summary(trajectories: Trajectories) -> dict[str, float]:
    """Rates that are watched during training, in [0, 1], and lengths in tokens and turns per episode."""
    sampled = trajectories.sampled
    ends, responses = trajectories.episodes["end_reason"], trajectories.responses
    return {
        "success": float(np.mean(trajectories.episodes["success"])),
        "return": float(np.mean(trajectories.returns)),
        "valid_action_rate": responses.count("valid") / len(responses),
        **{f"{kind}_rate": responses.count(kind) / len(responses) for kind in RESPONSES if kind != "valid"},
        "action_token_share": float((sampled & (trajectories.role == Role.ACTION)).sum() / max(1, sampled.sum())),
        "tokens_per_episode": float(sampled.sum() / len(trajectories)),
        "turns_per_episode": float(np.diff(trajectories.turn_offsets).mean()),
        "truncated": sum(map(ends.count, CUT_OFF)) / len(ends),
    }
