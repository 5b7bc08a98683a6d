"""Examples of what policies do: which episodes of every method, and of the reference policy, are worth reading."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.analysis.comparison import REFERENCE
from pipeline.analysis.trees import branched_from
from pipeline.settings.params import Config
from pipeline.trajectories.records import NUMBERS
from pipeline.trajectories.table import read_with
from pipeline.trajectories.trajectory import Trajectories, TrajectoryError
from pipeline.workspace.errors import UserError
from pipeline.workspace.layout import Layout


@dataclass(frozen=True)
class Played:
    """Episodes of one policy."""

    trajectories: Trajectories
    columns: Mapping[str, np.ndarray]
    """What the update made of their tokens: names of ``episodes.NUMBERS``, a number per token, NaN where none."""


def read_played(path: Path) -> Played:
    """Read the episodes of a training's last iteration (``training.iteration.update_columns``).

    Raises:
        TrajectoryError: as ``trajectory.read``.
    """
    return Played(*read_with(path, NUMBERS))


def read_all_played(
    config: Config, layout: Layout, annotated: Mapping[str, Trajectories]
) -> dict[tuple[str, str], Played]:
    """(environment, method) -> the first seed's last episodes; of the reference policy, that seed's first ones.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    found = {}
    for environment in config.environments:
        for method in config.methods:
            try:
                found[environment, method] = read_played(layout.episodes(environment, method))
            except TrajectoryError as error:
                raise UserError(f"{error}; `dvc repro` makes it") from None
        table = annotated[environment]
        rows = [i for i, seed in enumerate(table.episodes["seed"]) if seed == config.seeds[0]]
        found[environment, REFERENCE] = Played(table.select(rows), {})
    return found


def choose(played: Mapping[str, Played], states: int, episodes: int) -> dict[str, list[int]]:
    """Which episodes of each method to show: of the initial states whose returns vary most, the best and the worst.

    Variances are summed over methods, so that methods which have met the same states show the same ones. Half of a
    state's episodes have its highest returns, half its lowest; the first ones where returns are equal. What an episode
    branched from is shown too, so that its shared tokens can be read where they were sampled.
    """
    members: dict[str, dict[str, list[int]]] = {}
    for method, entry in played.items():
        for index, state in enumerate(entry.trajectories.episodes["state_key"]):
            members.setdefault(method, {}).setdefault(state, []).append(index)
    spread: dict[str, float] = {}
    for method, groups in members.items():
        returns = played[method].trajectories.returns
        for state, own in groups.items():
            spread[state] = spread.get(state, 0.0) + float(np.var(returns[own]))
    chosen: dict[str, list[int]] = {}
    for method, groups in members.items():
        returns, chosen[method] = played[method].trajectories.returns, []
        for state in sorted(groups, key=lambda key: -round(spread[key], 9))[:states]:
            ranked = sorted(groups[state], key=lambda index: -returns[index])
            best = ranked[: -(-episodes // 2)]
            worst = [index for index in ranked[::-1] if index not in best][: episodes - len(best)]
            shown = _with_ancestors([*best, *worst], branched_from(played[method].trajectories, groups[state]))
            chosen[method] += [index for index in ranked if index in shown]
    return chosen


def _with_ancestors(episodes: Sequence[int], parents: Mapping[int, int]) -> set[int]:
    found = set(episodes)
    while further := {parents[episode] for episode in found if episode in parents} - found:
        found |= further
    return found
