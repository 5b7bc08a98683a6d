"""What the slots see: an iteration's annotated tokens as flat tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.trajectories.trajectory import Role, Trajectories

SlotMemory = Mapping[str, float]
"""What an adaptive slot has kept from earlier iterations; empty at first."""

MEASURED = ("returns", "logprob", "entropy", "energy", "ref_logprob", "ref_entropy")


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """N tokens of E trajectories, prompts and observations included, in order; T turns."""

    role: Int[Tensor, " n"]
    """A ``Role`` per token."""
    trainable: Bool[Tensor, " n"]
    """The policy chose this token; all other tokens have advantage and weight 0."""
    trajectory: Int[Tensor, " n"]
    """Index of the token's trajectory, non-decreasing."""
    turn: Int[Tensor, " n"]
    """Index of the turn whose response holds the token, over all trajectories; -1 outside responses."""
    turn_trajectory: Int[Tensor, " t"]
    """Index of each turn's trajectory, non-decreasing."""
    turn_state: Int[Tensor, " t"]
    """Index of the environment's state before each turn: equal where group and ``state_key`` are."""
    group: Int[Tensor, " e"]
    """Index of each trajectory's group."""
    success: Bool[Tensor, " e"]
    """The trajectory's episode succeeded."""
    returns: Float[Tensor, " e"]
    """Sum of rewards per trajectory."""
    reward: Float[Tensor, " n"]
    """Each turn's reward on its last sampled token; 0 where not trainable, so that shared tokens have theirs once."""
    logprob: Float[Tensor, " n"]
    """Behaviour policy, 0 where not trainable."""
    entropy: Float[Tensor, " n"]
    """Behaviour policy, nats; 0 where not trainable."""
    energy: Float[Tensor, " n"]
    """-logsumexp of the reference policy's raw logits."""
    ref_logprob: Float[Tensor, " n"]
    """Reference policy."""
    ref_entropy: Float[Tensor, " n"]
    """Reference policy, nats."""
    noise: Float[Tensor, " n"]
    """A named uniform draw from [0, 1) per token, for slots that choose at random."""
    iteration: int = 0
    """Of the training, from 0."""
    parent: Int[Tensor, " e"]
    """Index of the trajectory that each one branches from, -1 for none; always an earlier one."""
    split: Int[Tensor, " e"]
    """Tokens shared with that; they are trainable there, or further up."""
    regular: Bool[Tensor, " e"]
    """Sampled at ``rollout.temperature``."""
    advantage: Float[Tensor, " n"] | Float[Tensor, "0"] = field(default_factory=lambda: torch.zeros(0))
    """A_t, once the advantage slot has been asked; empty before."""
    names: Sequence[str] = ()
    """Of the trajectories' episodes, for errors; empty where they are not known."""

    def of(self, *roles: Role) -> Bool[Tensor, " n"]:
        """Mask of the trainable tokens with one of these roles."""
        wanted = torch.tensor([int(role) for role in roles])
        return torch.isin(self.role, wanted) & self.trainable

    @property
    def trajectories(self) -> int:
        """E, the number of trajectories."""
        return len(self.returns)

    def place(self, token: int) -> str:
        """Where a token is, in words."""
        row = int(self.trajectory[token])
        before = int((self.trajectory < row).sum())
        return f"token {token - before} of " + (f"episode {self.names[row]}" if self.names else f"trajectory {row}")

    def per_trajectory(self, values: Float[Tensor, " n"]) -> Float[Tensor, " e"]:
        """Sums over each trajectory's trainable tokens."""
        chosen = torch.where(self.trainable, values, 0.0)
        return torch.zeros(self.trajectories, dtype=values.dtype).index_add_(0, self.trajectory, chosen)


def token_batch(
    trajectories: Trajectories, draws: np.random.Generator, iteration: int = 0, temperature: float | None = None
) -> TokenBatch:
    """Flat tensors of annotated trajectories, of which those sampled at ``temperature`` (None: at any) are regular.

    Raises:
        ValueError: they are not annotated.
        TrajectoryError: a reward has no sampled token to stand on.
    """
    if not trajectories.annotated:
        raise ValueError("trajectories are not annotated")
    owner = np.repeat(np.arange(len(trajectories)), np.diff(trajectories.turn_offsets))
    visited: dict[tuple[int, str], int] = {}
    states = [
        visited.setdefault((int(group), key), len(visited))
        for group, key in zip(trajectories.groups[owner], trajectories.turns["state_key"], strict=True)
    ]

    def tensor(values: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.array(values)).to(dtype)

    temperatures = np.array(trajectories.episodes["temperature"], dtype=np.float64)
    rewards = np.where(trajectories.trainable, trajectories.token_rewards(), 0.0)
    return TokenBatch(
        role=tensor(trajectories.role, torch.long),
        trainable=tensor(trajectories.trainable, torch.bool),
        trajectory=tensor(trajectories.token_episode, torch.long),
        turn=tensor(trajectories.token_turn(), torch.long),
        turn_trajectory=tensor(owner, torch.long),
        turn_state=torch.tensor(states, dtype=torch.long),
        group=tensor(trajectories.groups, torch.long),
        success=tensor(np.array(trajectories.episodes["success"]), torch.bool),
        reward=tensor(rewards, torch.float32),
        **{name: tensor(getattr(trajectories, name), torch.float32) for name in MEASURED},
        noise=tensor(draws.random(len(trajectories.role), dtype=np.float32), torch.float32),
        iteration=iteration,
        parent=tensor(trajectories.parents, torch.long),
        split=tensor(trajectories.splits, torch.long),
        regular=torch.from_numpy(temperatures == temperature) | (temperature is None),
        names=trajectories.episodes["episode_id"],
    )


def positions(batch: TokenBatch) -> Int[Tensor, " n"]:
    """How many trainable tokens of its trajectory come before each token."""
    seen = batch.trainable.long().cumsum(0) - batch.trainable.long()
    first = torch.full((batch.trajectories,), len(seen), dtype=torch.long)
    first = first.scatter_reduce(0, batch.trajectory, seen, "amin")
    return seen - first[batch.trajectory]
