"""Drawn values and slow references for tests of the objective."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.objective.batch import TokenBatch
from pipeline.objective.methods import (
    entropy_terms,
)
from pipeline.objective.surrogates import UpdateTokens
from pipeline.objective.weights import actfocus_weights
from pipeline.settings.method import Method
from pipeline.settings.weight import ActFocusWeight
from pipeline.trajectories.trajectory import Role
from tests.batches import section, unbranched

BOTH_TERMS = {"kind": "fixed", "entropy": 0.01, "kl": 0.1}


def update_tokens(row: Method, batch: TokenBatch, **columns: torch.Tensor) -> UpdateTokens:
    """The batch's trainable tokens in an update; ``columns`` have an entry per token of the batch, or per trainable one."""
    keep = batch.trainable
    given_columns = {
        "logprob_old": batch.logprob,
        "ref_logprob": batch.ref_logprob,
        "entropy_terms": torch.stack(entropy_terms(row, batch)[0], dim=-1),
        "noise": batch.noise,
        "trajectory": batch.trajectory,
    } | columns
    return UpdateTokens(**{name: c[keep] if len(c) == len(keep) else c for name, c in given_columns.items()})


def actfocus(batch: TokenBatch, alpha: float, beta: float, tau: float, form: str, signal: str) -> torch.Tensor:
    """The function by the paper's letters."""
    letters = {"reasoning_downweight": alpha, "redistribution_strength": beta, "redistribution_temperature": tau}
    return actfocus_weights(batch, section(ActFocusWeight, **letters, form=form, signal=signal))


def flat_columns(trajectory: torch.Tensor, returns: Sequence[float], group: Sequence[int]) -> dict[str, torch.Tensor]:
    """Columns of a float64 batch of one turn per trajectory in which every token is trainable."""
    zeros = torch.zeros(len(trajectory), dtype=torch.float64)
    return {
        "role": torch.full_like(trajectory, int(Role.ACTION)),
        "trainable": torch.ones_like(trajectory, dtype=torch.bool),
        "trajectory": trajectory,
        "group": torch.tensor(group),
        "success": torch.tensor(returns) > 0,
        "returns": torch.tensor(returns, dtype=torch.float64),
        "turn": trajectory,
        "turn_trajectory": torch.arange(len(returns)),
        "turn_state": torch.arange(len(returns)),
        **dict.fromkeys(("reward", "logprob", "ref_logprob", "entropy", "ref_entropy", "energy", "noise"), zeros),
        **unbranched(len(returns)),
    }


def golden_batch() -> TokenBatch:
    """One trajectory: prompt, <think>, one word, <answer>, two action tokens, </answer>."""
    roles = [Role.PROMPT, Role.THINK_TAG, Role.REASONING, Role.ANSWER_TAG, Role.ACTION, Role.ACTION, Role.ANSWER_TAG]
    zeros = torch.zeros(7, dtype=torch.float64)
    return TokenBatch(
        role=torch.tensor([int(role) for role in roles]),
        trainable=torch.tensor([False] + [True] * 6),
        trajectory=torch.zeros(7, dtype=torch.long),
        turn=torch.tensor([-1] + [0] * 6),
        turn_trajectory=torch.tensor([0]),
        turn_state=torch.tensor([0]),
        group=torch.tensor([0]),
        success=torch.tensor([True]),
        returns=torch.tensor([1.0], dtype=torch.float64),
        reward=torch.tensor([0.0] * 6 + [1.0], dtype=torch.float64),
        logprob=zeros,
        entropy=zeros,
        energy=torch.tensor([0.0, -9.0, -9.0, -9.0, -3.0, -1.0, -9.0], dtype=torch.float64),
        ref_logprob=zeros,
        ref_entropy=zeros,
        noise=zeros,
        **unbranched(1),
    )
