"""The value function of methods that have one."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.config import Critic
from pipeline.policy.model import Policy
from pipeline.policy.scoring import predicting_hidden


class ValueFunction(nn.Module):
    """V of the state in which each token is chosen.

    ``trunk`` reads the policy's own hidden states; ``model`` has a trunk of its own, which starts as the reference
    policy's. The head starts at zero.
    """

    def __init__(self, settings: Critic, reference: Policy) -> None:
        super().__init__()
        width = reference.head.weight.shape[1]
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.trunk = copy.deepcopy(reference.backbone).requires_grad_(True) if settings.kind == "model" else None

    def forward(
        self,
        policy: Policy,
        hidden: Float[Tensor, "n width"],
        sequences: Sequence[np.ndarray],
        wanted: Sequence[np.ndarray],
        train_trunk: bool = True,
    ) -> Float[Tensor, " n"]:
        """Values of the wanted tokens.

        Args:
            policy: whose hidden states are given.
            hidden: the policy's, at the positions that predict the wanted tokens.
            sequences: token ids, read by a trunk of its own.
            wanted: masks of the wanted tokens.
            train_trunk: let the value's gradient into a shared trunk.
        """
        if self.trunk is not None:
            hidden = predicting_hidden(policy, sequences, wanted, backbone=self.trunk)
        elif not train_trunk:
            hidden = hidden.detach()
        values: Tensor = self.head(hidden.float()).squeeze(-1)
        return values


@torch.inference_mode()
def batch_values(
    critic: ValueFunction, policy: Policy, sequences: Sequence[np.ndarray], wanted: Sequence[np.ndarray]
) -> Float[Tensor, " n"]:
    """Values of the wanted tokens of a few sequences, without gradient."""
    hidden = torch.zeros(0) if critic.trunk is not None else predicting_hidden(policy, sequences, wanted)
    values: Tensor = critic(policy, hidden, sequences, wanted)
    return values
