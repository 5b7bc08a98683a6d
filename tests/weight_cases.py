"""Settings and references for tests of token weights."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.objective.batch import TokenBatch
from pipeline.trajectories.trajectory import Role
from tests.batches import CLOSE, unbranched


def trainable_tokens(batch: TokenBatch) -> list[int]:
    return [t for t, chosen in enumerate(batch.trainable.tolist()) if chosen]


def assert_weights(actual: torch.Tensor, expected: dict[int, float]) -> None:
    """Equal to a reference that names the tokens it does not leave at 0."""
    row = [expected.get(t, 0.0) for t in range(len(actual))]
    torch.testing.assert_close(actual, torch.tensor(row, dtype=torch.float64), **CLOSE)


def line(roles: list[Role], **columns: Any) -> TokenBatch:
    """One trajectory of one response, after a prompt; columns are of the response's tokens."""
    n = len(roles)
    zeros = torch.zeros(n + 1, dtype=torch.float64)

    def column(name: str) -> torch.Tensor:
        return torch.tensor([0.0, *columns[name]], dtype=torch.float64) if name in columns else zeros.clone()

    return TokenBatch(
        role=torch.tensor([int(Role.PROMPT), *map(int, roles)]),
        trainable=torch.tensor([False] + [True] * n),
        trajectory=torch.zeros(n + 1, dtype=torch.long),
        turn=torch.tensor([-1] + [0] * n),
        turn_trajectory=torch.tensor([0]),
        turn_state=torch.tensor([0]),
        group=torch.tensor([0]),
        success=torch.tensor([columns.get("success", True)]),
        returns=torch.ones(1, dtype=torch.float64),
        reward=zeros,
        logprob=column("logprob"),
        entropy=column("entropy"),
        energy=column("energy"),
        ref_logprob=zeros,
        ref_entropy=zeros,
        noise=column("noise"),
        **unbranched(1),
        iteration=columns.get("iteration", 0),
        advantage=column("advantage"),
    )
