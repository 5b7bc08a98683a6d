"""Trainings that several processes do together, and what must not depend on how many they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pipeline.model.policy import Policy
from pipeline.model.shards import whole
from pipeline.settings.params import Config
from pipeline.training.callbacks import Validation
from pipeline.training.masters import Masters
from pipeline.training.module import PolicyGradient
from pipeline.training.run import make_trainer
from pipeline.training.team import ALONE, Team
from tests.trainings import LAKE, configured

ACTFOCUS: dict[str, Any] = {"kind": "actfocus", "reasoning_downweight": 0.1, "redistribution_strength": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    "actfocus": {"weight": ACTFOCUS, "aggregation": {"kind": "weight_sum"}},
    "ppo": {
        "weight": ACTFOCUS,
        "advantage": {"kind": "gae", "whiten": True, "critic": {"kind": "trunk", "learning_rate": 1e-3}},
        "aggregation": {"kind": "token_mean"},
        "surrogate": {"kind": "covariance_clip"},
    },
    "ppo_apart": {
        "advantage": {"kind": "gae", "whiten": True, "critic": {"kind": "model", "learning_rate": 1e-3}},
        "aggregation": {"kind": "sequence_mean"},
    },
    "etpo": {
        "advantage": {"kind": "soft_q", "gamma": 0.99, "q": {"kind": "model", "learning_rate": 1e-3}},
        "aggregation": {"kind": "constant", "tokens": 40},
        "surrogate": {"kind": "soft_q"},
        "regulariser": {"kind": "fixed", "entropy": 0.0, "kl": 0.0},
    },
    "arpo": {
        "branching": {"kind": "entropy_rise", "initial": 2, "slope": 0.2, "threshold": 0.3, "penalty": 0.0, "tokens": 8, "width": 1},
        "advantage": {"kind": "shared_prefix", "credit": "soft"},
        "regulariser": {"kind": "entropy_band"},
    },
    "appo": {
        "branching": {
            "kind": "positions", "initial": 3, "signal": "branching_score", "side": "after", "among": "all", "width": 1,
            "discount": 1.0, "bounds": [0.8, 1.2],
        },
        "advantage": {"kind": "prefix_credit", "credit": 1.0, "ddof": 0},
        "surrogate": {"kind": "procedure_clip"},
    },
}  # fmt: skip
"""All aggregations, heads that read the policy's hidden states or have a trunk of their own, trees, surrogates with plans, and
slots that remember."""


class Trained(NamedTuple):
    """What a training leaves in memory."""

    gradients: list[dict[str, Tensor]]
    """Of every update, before they are clipped, by the parameter's name."""
    curve: list[dict[str, float]]
    weights: dict[str, Tensor]
    """Of policy and heads."""
    tokens: list[int]
    """Ids of all tokens of the last iteration's episodes."""


def team_config(changes: dict[str, Any] | None = None) -> Config:
    """Three groups, which two processes cannot share out equally; one state to validate, which one of them has; and pieces of
    minibatches of which they have unequally many."""
    train = {"iterations": 1, "minibatch": 5, "passes": 1, "tokens_per_forward": 256, "validate_every": 1}
    sizes = {
        "rollout": {"groups": 3, "group_size": 4},
        "bottleneck": {"groups": 3},
        "evaluation": {"validation_states": 1, "validation_rollouts": 2},
    }
    return configured({"methods": METHODS, "train": train, **sizes, **(changes or {})})


def trained(config: Config, method: str, policy: Policy, folder: Path, team: Team = ALONE) -> Trained:
    """Train in this process, alone or with the others of a team."""
    own = Policy(copy.deepcopy(policy.model), policy.tokenizer)
    module = PolicyGradient(config, LAKE, method, 0, own, team=team)
    with recorded(module) as gradients:
        make_trainer(folder, config.train.iterations, [Validation()], team).fit(module)
    weights = {name: whole(weight.detach()).clone() for name, weight in module.named_parameters()}
    assert module.last_episodes is not None
    return Trained(gradients, module.curve, weights, module.last_episodes.input_ids.tolist())


@contextmanager
def recorded(module: PolicyGradient) -> Iterator[list[dict[str, Tensor]]]:
    """The gradients that updates clip, while they do so as ever."""
    found: list[dict[str, Tensor]] = []
    clip = Masters.clip

    def clipped(masters: Masters, norm: float) -> float:
        names = {id(weight): name for name, weight in module.named_parameters()}
        if masters is module.learner.masters[0]:
            found.append({})
        found[-1] |= {names[id(w)]: whole(w.grad).clone() for w in masters.weights if w.grad is not None}
        return clip(masters, norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Masters, "clip", clipped)
        yield found


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest, in units of the largest number."""
    assert one.keys() == other.keys()
    size = max(float(value.abs().max()) for value in other.values())
    return max(float((one[name] - other[name]).abs().max()) for name in one) / (size or 1.0)


def numbers(row: dict[str, float]) -> dict[str, Tensor]:
    """A row of a curve without its times, one number each."""
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in row.items() if "second" not in name}
