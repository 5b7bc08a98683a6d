"""Which trajectories pass through a token when some branch from others, and which stretches compete.

Trajectory e has sampled its tokens from ``split_e`` on, and shares those before with its parent. A token that e has
sampled is also part of every branch that leaves e behind it, and of all that branches from these.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.objective.batch import TokenBatch
from pipeline.objective.gae import discounted_returns
from pipeline.objective.turns import turn_rewards


def first_tokens(batch: TokenBatch) -> Int[Tensor, " e"]:
    """Index of each trajectory's first token."""
    lengths = torch.bincount(batch.trajectory, minlength=batch.trajectories)
    return lengths.cumsum(0) - lengths


def through(batch: TokenBatch, values: Float[Tensor, " e"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Over the trajectories through each token: the sum of their values, and how many they are.

    Both are right where a token is trainable; elsewhere other trajectories may share it too. The batch holds whole trees.

    Raises:
        ValueError: a branch stands before the trajectory that it branches from.
    """
    parents, splits, first = batch.parent.tolist(), batch.split.tolist(), first_tokens(batch).tolist()
    total, size = values.clone(), torch.ones_like(values)
    for branch in reversed(range(len(parents))):
        if parents[branch] >= branch:
            raise ValueError("a branch stands before the trajectory that it branches from")
        if parents[branch] >= 0:  # all that lies beneath is complete by now
            total[parents[branch]] += total[branch]
            size[parents[branch]] += size[branch]
    sums, counts = values[batch.trajectory], torch.ones_like(batch.reward)
    for branch, (parent, split) in enumerate(zip(parents, splits, strict=True)):
        if parent >= 0:
            sums[first[parent] : first[parent] + split] += total[branch]
            counts[first[parent] : first[parent] + split] += size[branch]
    return sums, counts


def turn_ahead(batch: TokenBatch) -> Int[Tensor, " n"]:
    """Index of the turn that holds each token, or of its trajectory's next one; -1 behind the last."""
    none = len(batch.turn_trajectory)
    ahead = torch.where(batch.turn >= 0, batch.turn, none).flip(0).cummin(0).values.flip(0)
    owner = torch.cat([batch.turn_trajectory, torch.tensor([-1])])
    return torch.where(owner[ahead] == batch.trajectory, ahead, -1)


def returns_through(batch: TokenBatch, discount: float) -> Float[Tensor, " n"]:
    """Mean, over the trajectories through each token, of their returns from the token's turn on, discounted by turn.

    In float64, so that undiscounted means of equal returns are equal. Right where ``through`` is.
    """
    parents, splits, first = batch.parent.tolist(), batch.split.tolist(), first_tokens(batch).tolist()
    shared = [(b, p, splits[b]) for b, p in enumerate(parents) if p >= 0]
    reward = batch.reward.double()
    for branch, parent, split in shared:  # what was earned before the branching stands in the parent
        reward[first[branch] : first[branch] + split] = reward[first[parent] : first[parent] + split]
    of_turns = discounted_returns(turn_rewards(replace(batch, reward=reward)), batch.turn_trajectory, discount)
    ahead = turn_ahead(batch)
    total = torch.where(ahead >= 0, torch.cat([of_turns, of_turns.new_zeros(1)])[ahead], 0.0)
    count = torch.ones_like(total)
    for branch, parent, split in reversed(shared):  # all that lies beneath is complete by now
        for column in (total, count):
            column[first[parent] : first[parent] + split] += column[first[branch] : first[branch] + split]
    return total / count


class Segments(NamedTuple):
    """S stretches of tokens between two branchings; every trainable token is in exactly one."""

    token: Int[Tensor, " n"]
    """Segment of each token, -1 where not trainable."""
    first: Int[Tensor, " s"]
    """Each one's first token."""
    place: Int[Tensor, " s"]
    """Where it begins: equal for the segments that compete there, those of a group's initial state among them."""
    branching: Bool[Tensor, " s"]
    """It begins at a branching, not at the initial state."""


def segments(batch: TokenBatch) -> Segments:
    """Cut the trajectories of trees at their branchings.

    At a branching before token s of trajectory e compete what e itself went on with and every branch of e with split s.
    """
    parents, splits, first = batch.parent.tolist(), batch.split.tolist(), first_tokens(batch).tolist()
    ends = [*first[1:], len(batch.role)]
    places: dict[tuple[str, int, int], int] = {}
    token = torch.full_like(batch.role, -1)
    begins: list[int] = []
    place: list[int] = []
    branching: list[bool] = []
    for e, (parent, split) in enumerate(zip(parents, splits, strict=True)):
        own = sorted({splits[b] for b, p in enumerate(parents) if p == e})
        at = ("root", int(batch.group[e]), 0) if parent < 0 else ("split", parent, split)
        for start, end, key in zip(
            [split, *own], [*own, ends[e] - first[e]], [at, *(("split", e, s) for s in own)], strict=True
        ):
            token[first[e] + start : first[e] + end] = len(begins)
            begins.append(first[e] + start)
            place.append(places.setdefault(key, len(places)))
            branching.append(key[0] == "split")
    token = torch.where(batch.trainable, token, -1)
    return Segments(token, torch.tensor(begins), torch.tensor(place), torch.tensor(branching))
