"""The turns of a batch: their rewards, where they begin and end, and what holds for each of their tokens."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.objective.batch import TokenBatch


def turn_rewards(batch: TokenBatch) -> Float[Tensor, " t"]:
    """Sum of the rewards on each turn's tokens."""
    inside = batch.turn >= 0
    total = torch.zeros(len(batch.turn_trajectory), dtype=batch.reward.dtype)
    return total.index_add_(0, batch.turn[inside], batch.reward[inside])


def turns_to_tokens(batch: TokenBatch, per_turn: Float[Tensor, " t"]) -> Float[Tensor, " n"]:
    """Broadcast a turn's value to its trainable tokens; 0 elsewhere."""
    if len(per_turn) == 0:
        return torch.zeros_like(batch.reward)
    return torch.where(batch.trainable, per_turn[batch.turn.clamp_min(0)], 0.0)


def first_of_turn(batch: TokenBatch) -> Bool[Tensor, " n"]:
    """The first trainable token of each turn."""
    return _edge(batch, batch.turn, slice(1, None), slice(None, -1))


def last_of_turn(batch: TokenBatch) -> Bool[Tensor, " n"]:
    """The last trainable token of each turn."""
    return _edge(batch, batch.turn, slice(None, -1), slice(1, None))


def last_of_trajectory(batch: TokenBatch) -> Bool[Tensor, " n"]:
    """The last trainable token of each trajectory."""
    return _edge(batch, batch.trajectory, slice(None, -1), slice(1, None))


def _edge(batch: TokenBatch, owner: Int[Tensor, " n"], here: slice, there: slice) -> Bool[Tensor, " n"]:
    index = torch.nonzero(batch.trainable).squeeze(-1)
    own = owner[index]
    edge = torch.ones_like(own, dtype=torch.bool)
    edge[here] = own[here] != own[there]
    mask = torch.zeros_like(batch.trainable)
    mask[index[edge]] = True
    return mask
