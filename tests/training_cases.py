"""Params and toy methods for tests of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.model.policy import Policy
from pipeline.settings.params import Config
from pipeline.training.iteration import Iteration
from pipeline.training.module import PolicyGradient
from tests.trainings import LAKE, unmoved


def prepared(config: Config, method: str, policy: Policy, estimate: Any = None) -> Iteration:
    return unmoved(PolicyGradient(config, LAKE, method, 0, policy), estimate)


def token_number(sequences: Any, wanted: Any) -> dict[str, Tensor]:
    """Stands in for a critic: values that differ from token to token."""
    return {"value": torch.cat([torch.arange(int(mask.sum())) / 10 for mask in wanted])}
