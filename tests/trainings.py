"""What tests of trainings share: a configuration at toy size, its reference policy, and short trainings."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from torch import Tensor

from pipeline.bootstrap.scratch import bootstrap
from pipeline.model.policy import Policy
from pipeline.settings.params import Config, parse
from pipeline.settings.presets import overlay
from pipeline.training import iteration
from pipeline.training.iteration import Iteration
from pipeline.training.module import PolicyGradient
from pipeline.training.tokens import TokenTable
from pipeline.training.update import Learner, update
from pipeline.workspace.yaml_files import read_yaml

ROOT = Path(__file__).parents[1]
LAKE = "frozen_lake"
TINY = {
    "policy": {
        "hidden_size": 32,
        "layers": 1,
        "heads": 2,
        "vocabulary": 320,
        "demonstrations": {
            "reasoning": "facts",
            "phases": [{"steps": 60, "reasoning_words": [0, 2], "action_noise": 0.2}],
            "episodes": 100,
            "batch_episodes": 8,
            "learning_rate": 0.01,
        },
    },
    "environments": {"frozen_lake": {"max_turns": 4, "response_tokens": 20, "context_tokens": 400}},
    "rollout": {"groups": 2, "group_size": 4},
    "bottleneck": {"groups": 4},
    "train": {"iterations": 2, "minibatch": 4, "passes": 2},
    "method_defaults": {"learning_rate": 1e-4, "regulariser": {"kind": "fixed", "entropy": 0.001, "kl": 0.01}},
    "evaluation": {"states": 2, "rollouts": 2},
}


def configured(changes: dict[str, Any] | None = None) -> Config:
    """params.yaml at toy size, with changes on top of that."""
    return parse(overlay(overlay(read_yaml(ROOT / "params.yaml"), TINY), changes or {}))


def supervised(config: Config, report: Callable[[int, int, float], None] | None = None) -> Policy:
    """The reference policy of a configuration; that of ``configured()`` is the fixture ``policy``."""
    assert config.policy.kind == "scratch"
    return bootstrap(config.policy, config.environments, report or quiet)


def quiet(done: int, total: int, what: Any = None) -> None:
    """A report of progress that nobody reads."""


def fit(module: PolicyGradient, iterations: int) -> PolicyGradient:
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=iterations,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    return module


def standing(module: PolicyGradient, optimizer: torch.optim.Optimizer | None = None) -> PolicyGradient:
    """The module as it stands within ``fit``, so that one update can be made."""
    chosen = optimizer or module.configure_optimizers()["optimizer"]
    module.optimizers = lambda: chosen  # type: ignore[method-assign]
    return module


def updated(module: PolicyGradient, minibatch: TokenTable, iteration: int = 0) -> dict[str, float]:
    """What one update of a training that stands measures."""
    return update(module.learner, module.optimizers(), minibatch, iteration)


def unmoved(
    module: PolicyGradient, estimate: Any = None, instead: Callable[..., dict[str, float]] = lambda *_: {}
) -> Iteration:
    """The first iteration of a training, in which nothing is updated.

    Args:
        module: the training.
        estimate: what to believe in place of its heads.
        instead: what to do in place of an update.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iteration, "gradient_share", lambda *_: {})
        patch.setattr(iteration, "measures_update_kl", lambda *_: False)
        patch.setattr(iteration, "update", instead)
        if estimate is not None:
            patch.setattr(Learner, "estimate", lambda _, sequences, wanted: estimate(sequences, wanted))
        return iteration.run_iteration(module.collection, module.learner, None, {}, [])


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy({name: value.detach() for name, value in module.state_dict().items()})


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def left(result: Path) -> dict[str, str]:
    """Hashes of what a training leaves in the folder of its result, but for times and run ids."""
    return {
        path.relative_to(result).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(result.rglob("*"))
        if path.is_file() and path.name not in ("timings.json", "runs.json")
    }
