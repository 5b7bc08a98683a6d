"""What the slots see: an iteration's annotated tokens as flat tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.trajectory import Role, Trajectories


@dataclass(frozen=True)
class TokenBatch:
    """N tokens of E trajectories, prompts and observations included, in order."""

    role: Int[Tensor, " n"]
    """A ``Role`` per token."""
    trainable: Bool[Tensor, " n"]
    """The policy chose this token; all other tokens have advantage and weight 0."""
    trajectory: Int[Tensor, " n"]
    """Index of the token's trajectory, non-decreasing."""
    group: Int[Tensor, " e"]
    """Index of each trajectory's group."""
    returns: Float[Tensor, " e"]
    """Sum of rewards per trajectory."""
    reward: Float[Tensor, " n"]
    """Each turn's reward on its last trainable token."""
    logprob: Float[Tensor, " n"]
    """Behaviour policy, 0 where not trainable."""
    energy: Float[Tensor, " n"]
    """-logsumexp of the reference policy's raw logits."""
    ref_logprob: Float[Tensor, " n"]
    """Reference policy."""
    ref_entropy: Float[Tensor, " n"]
    """Reference policy, nats."""

    def of(self, *roles: Role) -> Bool[Tensor, " n"]:
        """Mask of the trainable tokens with one of these roles."""
        wanted = torch.tensor([int(role) for role in roles])
        return torch.isin(self.role, wanted) & self.trainable

    @property
    def trajectories(self) -> int:
        """E, the number of trajectories."""
        return len(self.returns)


def token_batch(trajectories: Trajectories) -> TokenBatch:
    """Flat tensors of annotated trajectories.

    Raises:
        ValueError: they are not annotated.
        TrajectoryError: a reward has no sampled token to stand on.
    """
    if not trajectories.annotated:
        raise ValueError("trajectories are not annotated")
    assert trajectories.energy is not None
    assert trajectories.ref_logprob is not None
    assert trajectories.ref_entropy is not None

    def tensor(values: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.array(values)).to(dtype)

    return TokenBatch(
        role=tensor(trajectories.role, torch.long),
        trainable=tensor(trajectories.sampled, torch.bool),
        trajectory=tensor(trajectories.token_episode, torch.long),
        group=tensor(trajectories.groups, torch.long),
        returns=tensor(trajectories.returns, torch.float32),
        reward=tensor(trajectories.token_rewards(), torch.float32),
        logprob=tensor(trajectories.logprob, torch.float32),
        energy=tensor(trajectories.energy, torch.float32),
        ref_logprob=tensor(trajectories.ref_logprob, torch.float32),
        ref_entropy=tensor(trajectories.ref_entropy, torch.float32),
    )
