"""Episodes of made-up entropies in trees, for tests of branching."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from pipeline.rollout.tree import Origin, Tree
from pipeline.trajectories.builder import EpisodeBuilder
from pipeline.trajectories.trajectory import Role

fresh = itertools.count(100)


def plant(budget: int, seed: int = 0) -> Tree:
    return Tree(specs=[None] * budget, draws=np.random.default_rng(seed))  # type: ignore[list-item]


def say(builder: EpisodeBuilder, turns: Sequence[Sequence[float]], start: int | None = None) -> None:
    """Turns with tokens of these entropies, two tokens of observation between them; the first may have begun."""
    for number, entropies in enumerate(turns):
        if number:
            builder.append_text([next(fresh), next(fresh)], Role.OBSERVATION)
        begun = len(builder) if start is None or number else start
        ids, size = [next(fresh) for _ in entropies], len(entropies)
        builder.append_sampled(ids, [Role.REASONING] * size, [-1.0] * size, list(entropies))
        builder.close_turn(begun, 0.0, "", False, "s")


def add(
    tree: Tree, origin: Origin, turns: Sequence[Sequence[float]], value: float = 0.0, success: bool = False
) -> None:
    """An episode that was played from there."""
    origin, name = tree.owner(origin), str(len(tree.episodes))
    if origin.parent is None:
        builder, start = EpisodeBuilder(episode_id=name), None
        builder.append_text([1, 2, 3], Role.PROMPT)
    else:
        parent = tree.episodes[origin.parent].builder
        builder = parent.before(origin.split, episode_id=name)
        start = parent.turns[len(builder.turns)]["start"]
    say(builder, turns, start)
    builder.turns[-1]["reward"] = value
    builder.finish(success, "turns")
    tree.episodes.append(SimpleNamespace(builder=builder))  # type: ignore[arg-type]
    tree.origins.append(origin)


def asked(tree: Tree, growth: Iterator[list[Origin]], turns: Callable[[Origin], Any]) -> list[list[Origin]]:
    """What a growth asks for, answered with episodes of these turns until there is no room."""
    places = []
    while tree.room and (origins := next(growth, None)) is not None:
        places.append(origins)
        for origin in origins[: tree.room]:
            add(tree, origin, turns(origin))
    return places


def at(*places: tuple[int, int]) -> list[Origin]:
    return [Origin(parent, split) for parent, split in places]
