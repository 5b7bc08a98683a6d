"""Which signal finds the decision points? Branches at the tokens that it ranks highest, and what they are worth.

At a token, several candidates are sampled in its place, and from each several continuations: how much of the variance of
returns lies between candidates is what that token decides (one-way analysis of variance, random effects, unbiased).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from pipeline.energy.annotate import annotate_own, score_trajectories
from pipeline.model.loading import load_trained
from pipeline.model.memory import tokens_per_forward
from pipeline.progress.display import span
from pipeline.rollout.branch_scores import blank_tokens, branch_scores
from pipeline.rollout.branching import ranked_positions
from pipeline.rollout.collector import play
from pipeline.rollout.engine import RolloutEngine
from pipeline.rollout.episode import Episode, Setup
from pipeline.rollout.making import make_engine
from pipeline.rollout.specs import EpisodeSpec, iteration_specs
from pipeline.settings.branching import Positions
from pipeline.settings.params import Config
from pipeline.training.run import TrainingJob, train_one
from pipeline.training.seed_key import training_task
from pipeline.trajectories.builder import build
from pipeline.trajectories.trajectory import REPORTED_ROLES, Role
from pipeline.workspace.errors import UserError
from pipeline.workspace.processes import Tell, run_in_processes
from pipeline.workspace.randomness import generator

SIGNALS: tuple[str, ...] = get_args(Positions.model_fields["signal"].annotation)
ROLES = {role: name for name, roles in REPORTED_ROLES.items() for role in roles}
RESAMPLES = 2000


def control_of(signal: str) -> str:
    """The signal that draws among the same tokens."""
    return "action_random" if signal.startswith("action_") else "random"


@dataclass(frozen=True)
class SampleSizes:
    """How much is sampled."""

    seeds: Sequence[int]
    """Each gives ``rollout.groups`` initial states."""
    positions: int
    """Tokens per signal and initial state."""
    candidates: int
    """Sampled in place of each token, at least 2."""
    continuations: int
    """From each candidate on, at least 2."""


@dataclass(frozen=True)
class SeedTask:
    """One seed's states, to be worked on in a process of their own."""

    config: Config
    name: str
    policy: Path
    method: str
    seed: int
    sizes: SampleSizes
    cache: Path


class Position(NamedTuple):
    """One token, and what sampling it again told."""

    signal: str
    state: str
    """Its initial state's group."""
    role: str
    between: float
    """Variance of returns between candidates; unbiased, so it may be negative."""
    within: float
    """Variance within."""


def decisions(config: Config, policy: Path, name: str, method: str, sizes: SampleSizes, cache: Path) -> dict[str, Any]:
    """Roles and explained variance of the tokens that each signal ranks highest.

    One iteration of ``method`` moves the policy for APPO's branching score; ``cache`` keeps these short trainings.

    Returns:
        Per signal that has found a token ``positions``, ``roles`` (shares), ``between`` (mean variance that a token
        decides), ``explained`` (its share of all variance at these tokens) and ``minus_control`` (that share less the one of
        the signal's control, None for a control), each of these three with a 95 % percentile bootstrap over states. The
        reference policy plays all of them: nothing here is about trainings.

    Raises:
        UserError: the method branches itself, or too little is sampled.
    """
    if config.methods[method].branching.kind != "none":
        raise UserError(f"methods.{method}: it shall move the policy once, and must not branch itself; name another")
    if sizes.candidates < 2 or sizes.continuations < 2:
        raise UserError("--candidates and --continuations must be at least 2: there is no variance in one")
    tasks = {f"seed {seed}": SeedTask(config, name, policy, method, seed, sizes, cache) for seed in sizes.seeds}
    found = run_in_processes(_measure, tasks, config.trainings, f"Decisions on {name}", config.threads)
    measured = [position for part in found.values() for position in part]
    return {
        "environment": name,
        "states": len({position.state for position in measured}),
        "plan": {"positions": sizes.positions, "candidates": sizes.candidates, "continuations": sizes.continuations},
        "signals": summarised(measured),
    }


def _measure(task: SeedTask, report: Tell) -> list[Position]:
    config, sizes = task.config, task.sizes
    once = config.model_copy(update={"train": config.train.model_copy(update={"iterations": 1, "tokens": None})})
    training = training_task(once, task.name, task.method, task.seed, task.policy, task.cache)
    report(0, config.rollout.groups, "initial states")
    with span("one training iteration:", 0.0, 0.0):
        left = train_one(TrainingJob(training, None, None), lambda *_: None)
        moved = load_trained(left / "policy", config, base=task.policy)
    reference = load_trained(task.policy, config)
    temperature, budget = config.rollout.temperature, tokens_per_forward(config, reference)
    engine = make_engine(config, reference)
    setup = Setup(reference.tokenizer, config, task.name)
    specs = iteration_specs(config, task.name, task.seed, 0)
    with span("initial episodes:", 0.0, 0.0):
        episodes = play(engine, map(setup.begin, specs), temperature, count=len(specs))
    with span("reference scores:", 0.0, 0.0):
        table = annotate_own(build([episode.builder for episode in episodes]), reference, temperature, budget)
    shift = score_trajectories(moved, table, temperature, budget)[0] - table.logprob
    blank = blank_tokens(reference.tokenizer, table.input_ids)
    sections = [Positions.model_validate({"kind": "positions", "signal": signal}) for signal in SIGNALS]
    scores = {
        section.signal: branch_scores(section, table, generator(task.seed, "decisions", section.signal), shift, blank)
        for section in sections
    }
    rows = [table.tokens(e) for e in range(len(table))]
    result = []
    for done, group in enumerate(dict.fromkeys(table.episodes["group_id"])):
        members = [e for e, own in enumerate(table.episodes["group_id"]) if own == group]
        sampled = [np.flatnonzero(table.sampled[rows[e]]) for e in members]
        wanted = {}
        for signal, own in scores.items():
            ranked = ranked_positions([own[rows[e]] for e in members], sampled, "before")
            wanted[signal] = [(members[row], split) for row, split in ranked[: sizes.positions]]
        places = list(dict.fromkeys(itertools.chain(*wanted.values())))
        with span("branches:"):
            found = resampled(engine, episodes, places, sizes, temperature)
        returns = dict(zip(places, found, strict=True))
        for signal, chosen in wanted.items():
            for place in chosen:
                role = ROLES[Role(int(table.role[rows[place[0]]][place[1]]))]
                result.append(Position(signal, group, role, *components(returns[place])))
        report(done + 1, config.rollout.groups, "initial states")
    return result


def resampled(
    engine: RolloutEngine,
    episodes: Sequence[Episode],
    places: Sequence[tuple[int, int]],
    sizes: SampleSizes,
    temperature: float,
) -> list[np.ndarray]:
    """Returns behind candidates for some tokens of finished episodes.

    Args:
        places: index of an episode, and position of one of its sampled tokens.

    Returns:
        Per place float64 (candidates, continuations). A candidate with which an episode ends has equal returns.
    """
    candidates = [
        Episode.branch(episodes[row], _named(episodes[row].spec, split, number), split)
        for row, split in places
        for number in range(sizes.candidates)
    ]
    with span("candidates", 0.0, 1 / sizes.continuations):
        first = play(engine, candidates, temperature)
    following = [_after(episode) for episode in first]
    again = [
        Episode.branch(episode, _named(episode.spec, split, number), split)
        for episode, split in zip(first, following, strict=True)
        if split is not None
        for number in range(sizes.continuations - 1)
    ]
    with span("continuations", 1 / sizes.continuations, 1.0):
        second = iter(play(engine, again, temperature))
    rows = []
    for episode, split in zip(first, following, strict=True):
        own = _return(episode)
        others = [own if split is None else _return(next(second)) for _ in range(sizes.continuations - 1)]
        rows.append([own, *others])
    return list(np.array(rows).reshape(len(places), sizes.candidates, sizes.continuations))


def components(returns: np.ndarray) -> tuple[float, float]:
    """Variance components of a one-way layout with random effects, from returns (candidates, continuations).

    Between candidates it is ``(MS_between - MS_within) / continuations``, and within ``MS_within``: both unbiased.
    """
    size = returns.shape[1]
    between = size * float(returns.mean(axis=1).var(ddof=1))
    within = float(returns.var(axis=1, ddof=1).mean())
    return (between - within) / size, within


def summarised(positions: Sequence[Position]) -> dict[str, Any]:
    """By signal: shares of roles, variances with intervals over states, and the difference to its control."""
    states = list(dict.fromkeys(position.state for position in positions))
    index = {state: number for number, state in enumerate(states)}
    sums = {signal: np.zeros((len(states), 3)) for signal in SIGNALS}
    for position in positions:
        sums[position.signal][index[position.state]] += (position.between, position.within, 1.0)
    draws = generator(0, "decisions bootstrap").integers(len(states), size=(RESAMPLES, len(states)))
    rows = {}
    for signal, own in sums.items():
        roles = [position.role for position in positions if position.signal == signal]
        if not roles:
            continue
        control = sums[control_of(signal)]
        paired = np.concatenate([own, control], axis=1)
        beyond = _interval(paired, draws, lambda total: _share(total) - _share(total[..., 3:]))
        rows[signal] = {
            "positions": len(roles),
            "roles": {role: roles.count(role) / len(roles) for role in REPORTED_ROLES},
            "between": _interval(own, draws, lambda total: total[..., 0] / np.maximum(total[..., 2], 1.0)),
            "explained": _interval(own, draws, _share),
            "minus_control": beyond if control is not own and control.any() else None,
        }
    return rows


def _interval(sums: np.ndarray, draws: np.ndarray, statistic: Any) -> dict[str, float]:
    low, high = np.percentile(statistic(sums[draws].sum(axis=1)), [2.5, 97.5])
    estimate = float(statistic(sums.sum(axis=0)))
    return {"mean": round(estimate, 6), "low": round(float(low), 6), "high": round(float(high), 6)}


def _share(total: np.ndarray) -> np.ndarray:
    """Of sums of the variances between and within."""
    between, variance = total[..., 0], total[..., 0] + total[..., 1]
    return np.where(variance > 0, between / np.where(variance > 0, variance, 1.0), 0.0)


def _named(spec: EpisodeSpec, split: int, number: int) -> EpisodeSpec:
    """A continuation's own name and draws."""
    return replace(spec, episode_id=f"{spec.episode_id}@{split}.{number}", draws=(*spec.draws, "again", split, number))


def _after(episode: Episode) -> int | None:
    """Position of the second token that a branch has sampled itself; None if it has sampled one."""
    chosen = np.flatnonzero(episode.builder.tokens["sampled"])
    own = chosen[chosen > episode.builder.identity["split"]]
    return int(own[0]) if len(own) else None


def _return(episode: Episode) -> float:
    return float(episode.builder.outcome["return"])
