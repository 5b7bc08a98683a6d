"""Random forests and a tree written out, for tests of trees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from pipeline.objective.batch import TokenBatch, token_batch
from pipeline.settings.method import Method
from pipeline.trajectories.builder import EpisodeBuilder, build
from pipeline.trajectories.trajectory import RESPONSE_ROLES, Role, Trajectories
from tests.batches import BRANCHES, method

ADVANTAGES: dict[str, dict[str, Any]] = {
    "shared_prefix": {"kind": "shared_prefix", "credit": "soft"},
    "shared_prefix_hard": {"kind": "shared_prefix", "credit": "hard"},
    "prefix_credit": {"kind": "prefix_credit", "credit": 0.7},
    "siblings": {"kind": "siblings", "scope": "segment"},
    "siblings_turn": {"kind": "siblings", "scope": "turn", "discount": 0.9, "format": (0.1, -0.05), "least": 1e-4},
    "candidates": {"kind": "candidates"},
    "reinforced": {"kind": "reinforced", "coefficient": 0.5},
}


FLOATS = ("returns", "reward", "logprob", "entropy", "energy", "ref_logprob", "ref_entropy", "noise")


ACTFOCUS = {"kind": "actfocus", "reasoning_downweight": 0.1, "redistribution_strength": 0.5}


def row(advantage: dict[str, Any], **slots: Any) -> Method:
    return method(advantage=advantage, branching=BRANCHES[advantage["kind"]], **slots)


@dataclass
class Playing:
    """Plays random episodes."""

    draw: st.DrawFn
    numbers: np.random.Generator

    def response(self, episode: EpisodeBuilder, start: int, least: int) -> None:
        """The rest of the response that began at ``start``, and its turn's end."""
        roles = self.draw(st.lists(st.sampled_from(RESPONSE_ROLES), min_size=least, max_size=4))
        n = len(roles)
        episode.append_sampled(
            self.numbers.integers(0, 50, n).tolist(),
            [int(role) for role in roles],
            (-self.numbers.random(n)).tolist(),
            self.numbers.random(n).tolist(),
        )
        answered = any(episode.tokens["sampled"][start:])
        reward = self.draw(st.sampled_from([0.0, 1.0, -0.1])) if answered else 0.0
        episode.close_turn(start, reward, "a", True, f"state {self.draw(st.integers(0, 2))}")

    def turns(self, episode: EpisodeBuilder, most: int) -> None:
        """More turns, then the episode's end."""
        for _ in range(self.draw(st.integers(0, most))):
            episode.append_text([7], Role.OBSERVATION)
            start = len(episode)
            if self.draw(st.booleans()):
                episode.append_text([9], Role.THINK_TAG)
            self.response(episode, start, least=0)
        episode.finish(self.draw(st.booleans()), "turns")


@st.composite
def forests(draw: st.DrawFn, deep: bool = True) -> Trajectories:
    """Annotated trees of one to three groups, their rows in any order that has a parent before its branches.

    Some branches are siblings, some share a place with none; ``deep``: branches may have branches. Some episodes were
    sampled at another temperature than 1.
    """
    playing = Playing(draw, np.random.default_rng(draw(st.integers(0, 2**32 - 1))))
    grown: list[EpisodeBuilder] = []
    for number in range(draw(st.integers(1, 9))):
        identity: dict[str, Any] = {"episode_id": f"e{number}", "group_id": f"g{draw(st.integers(0, 2))}"}
        identity |= {"environment": "toy", "state_key": identity["group_id"], "seed": 0, "iteration": 1}
        identity |= {"policy_version": 1, "temperature": draw(st.sampled_from([1.0, 1.0, 1.2]))}
        places = [
            (parent, split)
            for parent in grown
            if parent.identity["group_id"] == identity["group_id"] and (deep or parent.identity.get("parent") is None)
            for split in own_tokens(parent)
        ]
        if places and draw(st.integers(0, 3)):
            parent, split = draw(st.sampled_from(places))
            episode = parent.before(split, **identity)
            (start,) = [turn["start"] for turn in parent.turns if turn["start"] <= split < turn["end"]]
            playing.response(episode, start, least=1)
        else:
            episode = EpisodeBuilder(**identity)
            episode.append_text([1, 2], Role.PROMPT)
            playing.response(episode, len(episode), least=0)
        playing.turns(episode, 2)
        grown.append(episode)
    trajectories = build(grown)
    columns = [playing.numbers.standard_normal(len(trajectories.input_ids)).astype(np.float32) for _ in range(3)]
    named = zip(("energy", "ref_logprob", "ref_entropy"), columns, strict=True)
    return replace(trajectories, **{name: np.where(trajectories.sampled, c, 0) for name, c in named})


def own_tokens(episode: EpisodeBuilder) -> list[int]:
    """Where a branch may begin: tokens that the episode has sampled itself, but for the first of these.

    At that one it would be a sibling of the episode, a branch of the episode's own parent.
    """
    split = episode.identity.get("split") or 0
    return [t for t, chosen in enumerate(episode.tokens["sampled"]) if chosen and t > split]


def batch_of(trajectories: Trajectories) -> TokenBatch:
    """In float64."""
    batch = token_batch(trajectories, np.random.default_rng(0), 1, temperature=1.0)
    return replace(batch, **{name: getattr(batch, name).double() for name in FLOATS})


class Written:
    """A forest as sets: each token of each row is a node, named by the row that sampled it and its place there."""

    def __init__(self, batch: TokenBatch) -> None:
        self.batch = batch
        self.parent, self.split = batch.parent.tolist(), batch.split.tolist()
        self.group, self.returns = batch.group.tolist(), batch.returns.tolist()
        self.success, self.regular = batch.success.tolist(), batch.regular.tolist()
        owner = batch.trajectory.tolist()
        self.rows = range(batch.trajectories)
        self.first = [owner.index(e) for e in self.rows]
        self.length = [owner.count(e) for e in self.rows]
        self.nodes = [(e, t - self.first[e]) for t, e in enumerate(owner)]
        self.trainable = batch.trainable.tolist()
        self.paths = [[self.node(e, place) for place in range(self.length[e])] for e in self.rows]
        self._rows: dict[tuple[int, int], list[int]] = {}
        for e, path in enumerate(self.paths):
            for node in path:
                self._rows.setdefault(node, []).append(e)

    def node(self, e: int, place: int) -> tuple[int, int]:
        return self.node(self.parent[e], place) if place < self.split[e] else (e, place)

    def through(self, node: tuple[int, int]) -> list[int]:
        """All rows whose path holds the node."""
        return self._rows[node]

    def chosen(self) -> list[tuple[int, tuple[int, int]]]:
        """Token and node of all that is trained on."""
        return [(t, node) for t, node in enumerate(self.nodes) if self.trainable[t]]

    def stretch(self, node: tuple[int, int]) -> list[tuple[int, int]]:
        """The nodes of the same row through which the same rows pass, in order."""
        e, rows = node[0], self.through(node)
        return [own for own in self.paths[e] if own[0] == e and self.through(own) == rows]

    def before(self, node: tuple[int, int]) -> tuple[Any, ...]:
        """What comes before a node: the node before, or the group's initial state."""
        e, place = node
        return self.node(e, place - 1) if place else ("initial", self.group[e])


def sapling(rewards: tuple[float, float] = (1.0, 0.0)) -> Trajectories:
    """A root of four sampled tokens, and a branch that goes on with two others after the first."""
    root = EpisodeBuilder(
        episode_id="root", group_id="g", environment="toy", state_key="s", seed=0, iteration=0, policy_version=0
    )
    root.append_text([1], Role.PROMPT)
    root.append_sampled([2, 3, 4, 5], [Role.ACTION] * 4, [-1.0] * 4, [0.5] * 4)
    branch = root.before(2, **{**root.identity, "episode_id": "branch"})
    root.close_turn(1, rewards[0], "a", True, "s")
    root.finish(rewards[0] > 0, "goal")
    branch.append_sampled([6, 7], [Role.ACTION] * 2, [-1.0] * 2, [0.5] * 2)
    branch.close_turn(1, rewards[1], "a", True, "s")
    branch.finish(rewards[1] > 0, "goal")
    trajectories = build([root, branch])
    nothing = np.zeros(len(trajectories.input_ids), dtype=np.float32)
    return replace(trajectories, energy=nothing, ref_logprob=nothing, ref_entropy=nothing)
