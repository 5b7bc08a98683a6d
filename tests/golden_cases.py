"""Golden values of other projects' code, and what is compared with them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.objective.batch import TokenBatch
from pipeline.objective.methods import (
    coefficients,
    token_weights,
)
from pipeline.objective.surrogates import UpdateTokens
from pipeline.settings.method import Method
from pipeline.trajectories.trajectory import Role
from tests.batches import unbranched

CLOSE = {"rtol": 1e-7, "atol": 1e-9}
"""Both sides are float64. verl adds 1e-8 to the token counts that it divides by, a relative error of up to 1e-8."""


PROMPT = 2
"""Prompt tokens put before each trajectory: verl's rows have none."""


@cache
def golden() -> dict[str, Any]:
    file = Path(__file__).parent / "golden" / "golden.json"
    return dict(json.loads(file.read_text(encoding="utf-8")))


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mask() -> Tensor:
    return torch.tensor(golden()["batch"]["mask"]) > 0


def at(values: Any) -> Tensor:
    """The peer's numbers at sampled tokens, row after row: the order of our trainable tokens."""
    return tensor(values)[mask()]


def flat(values: Any, before: float = 9.0) -> Tensor:
    """The peer's padded rows as our flat tokens: behind a prompt, without the padding."""
    rows = []
    for row, chosen in zip(tensor(values), mask(), strict=True):
        end = int(chosen.nonzero().max()) + 1
        rows.append(torch.cat([torch.full((PROMPT,), before, dtype=row.dtype), row[:end]]))
    return torch.cat(rows)


def batch() -> TokenBatch:
    """The golden batch as ours; numbers on tokens that the policy did not sample are not 0."""
    given = golden()["batch"]
    trainable = flat(given["mask"], before=0.0) > 0
    lengths = [PROMPT + int(chosen.nonzero().max()) + 1 for chosen in mask()]
    trajectory = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    begins = trainable & ~torch.cat([torch.tensor([False]), trainable[:-1]])
    turn = torch.where(trainable, begins.long().cumsum(0) - 1, -1)
    entropy = golden()["whole_loss"][0]["entropy"]
    returns = tensor(given["reward"]).sum(-1)
    return TokenBatch(
        role=torch.where(trainable, int(Role.REASONING), int(Role.OBSERVATION)),
        trainable=trainable,
        trajectory=trajectory,
        turn=turn,
        turn_trajectory=trajectory[begins],
        turn_state=torch.arange(int(begins.sum())),
        group=torch.tensor(given["group"]),
        success=returns > 0,
        returns=returns,
        reward=flat(given["reward"], before=0.0),
        logprob=flat(given["old_logprob"]),
        entropy=flat(entropy),
        energy=flat(entropy),
        ref_logprob=flat(given["ref_logprob"]),
        ref_entropy=flat(entropy),
        noise=flat(entropy),
        **unbranched(len(lengths)),
    )


def in_update(row: Method, advantage: Any, noise: Tensor | None = None) -> UpdateTokens:
    """The batch's trainable tokens under the peer's current policy; logprob and entropy are leaves."""
    given, own = golden()["batch"], batch()
    chosen = own.trainable
    factors = coefficients(row, token_weights(row, own), chosen, own.trajectory)[chosen]
    terms = torch.zeros(len(factors), 4, dtype=torch.float64)
    terms[:, 0] = row.regulariser.entropy
    terms[:, 2], terms[:, 3] = -torch.inf, torch.inf
    return UpdateTokens(
        logprob=at(given["logprob"]).requires_grad_(True),
        entropy=at(golden()["whole_loss"][0]["entropy"]).requires_grad_(True),
        logprob_old=at(given["old_logprob"]),
        ref_logprob=at(given["ref_logprob"]),
        advantage=at(advantage),
        coefficient=factors,
        entropy_terms=terms,
        noise=torch.zeros_like(factors) if noise is None else noise,
        trajectory=own.trajectory[chosen],
    )
