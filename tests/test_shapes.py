"""Shapes are checked: under the tests, a call whose tensors do not fit its annotations is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from jaxtyping import TypeCheckError

from pipeline.contracts.slot import made_up
from pipeline.objective.group_advantages import group_advantage


def test_returns_and_groups_of_different_length_are_refused() -> None:
    returns, group = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1])
    assert len(group_advantage(returns, group, std=True, ddof=0, eps=1e-6)) == 3
    with pytest.raises(TypeCheckError, match=r"parameter 'group'"):
        group_advantage(returns, group[:2], std=True, ddof=0, eps=1e-6)


def test_a_column_of_another_dtype_or_length_is_no_part_of_a_batch() -> None:
    batch = made_up(0)
    with pytest.raises(TypeCheckError, match=r"parameter 'turn'"):
        replace(batch, turn=batch.turn[1:])
    with pytest.raises(TypeCheckError, match=r"parameter 'trainable'"):
        replace(batch, trainable=batch.trainable.long())
