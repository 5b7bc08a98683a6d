"""The Lightning module: an epoch is an iteration."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from torch.utils.data import DataLoader

from pipeline.model.policy import Policy
from pipeline.objective.estimates import declared_heads, needed_behind
from pipeline.progress.timing import Phases
from pipeline.rollout.making import make_engine
from pipeline.settings.method import Method
from pipeline.settings.params import Config
from pipeline.training.budget import progress, training_over
from pipeline.training.checks import require_finite_training
from pipeline.training.collection import Collection
from pipeline.training.heads import Head, make_heads
from pipeline.training.iteration import Memory, run_iteration, update_columns
from pipeline.training.masters import ADAM_EPS, Masters, Rate
from pipeline.training.update import Learner
from pipeline.trajectories.trajectory import Trajectories
from pipeline.workspace.finite import located


class PolicyGradient(lightning.LightningModule):
    """Trains a policy, in place, with one method.

    ``first`` are the annotated episodes of the first iteration, if they have been sampled already.
    """

    def __init__(
        self, config: Config, name: str, method_name: str, seed: int, policy: Policy, first: Trajectories | None = None
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config, self.name, self.seed, self.policy = config, name, seed, policy
        method, reference = config.methods[method_name], policy.frozen_copy()
        # What Lightning trains and saves; the reference policy is not a module, and so it does neither with that.
        self.model = policy.model.requires_grad_(True)
        heads = make_heads(declared_heads(method.advantage), reference)
        self.heads = torch.nn.ModuleList(heads)
        masters = masters_of(method, policy, heads, f"{config.params_file}: methods.{method_name}")
        self.masters = torch.nn.ModuleList(masters)
        self.learner = Learner(config, method, policy, reference, heads, masters)
        self.engine = make_engine(config, policy)
        self.phases = Phases()
        closing = bool(needed_behind(method.advantage))
        self.collection = Collection(
            config, name, seed, method.branching, self.engine, policy, reference, self.phases, first, closing
        )
        self.memory: Memory = {}
        """What adaptive slots keep from one iteration for the next."""
        self.curve: list[dict[str, float]] = []
        """One row of metrics per finished iteration."""
        self.last_episodes: Trajectories | None = None
        """The episodes of the latest iteration, annotated."""
        self.last_update: dict[str, np.ndarray] = {}
        """What the training's last update made of their tokens (see ``update_columns``); empty before it."""

    def configure_optimizers(self) -> Any:
        groups = [{"params": m.weights, "lr": m.rate.value} for m in self.learner.masters if m.rate is not None]
        optimizer = torch.optim.Adam(groups, betas=self.config.train.betas, eps=ADAM_EPS)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: self._schedule())
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _schedule(self) -> float:
        """Factor of the learning rates after the iterations that the curve has."""
        done, total = progress(self.curve, self.config.train)
        return max(0.0, 1 - done / total) if self.config.train.schedule == "linear" else 1.0

    def on_fit_start(self) -> None:
        """Lightning has moved what it trains; the reference policy follows."""
        self.learner.reference.model.to(self.device)

    def train_dataloader(self) -> DataLoader[int]:
        """One item per epoch, and nothing in it: data loaders are prefetched, an iteration must not be."""
        return DataLoader([0], batch_size=None)  # type: ignore[arg-type]

    def training_step(self, *_: Any) -> None:
        """One iteration.

        Raises:
            NumericsError: a weight, a log-probability or a metric is not finite, or not what it should be.
        """
        optimizer: Any = self.optimizers()
        with located(f"iteration {len(self.curve)}"):
            with self.phases.phase("prepare"):  # all that is no phase of its own
                done = run_iteration(self.collection, self.learner, optimizer, self.memory, self.curve)
            require_finite_training(self, optimizer, done.metrics)
        self.last_episodes, self.memory = done.episodes, done.memory
        self.curve.append({"iteration": float(len(self.curve)), **done.metrics})
        if training_over(self.curve, self.config.train):
            self.last_update = update_columns(done, self.learner)
        scheduler: Any = self.lr_schedulers()
        scheduler.step()  # after the curve: the schedule is over what it says has been spent

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        tried = [masters.tried for masters in self.learner.masters]
        checkpoint |= {"curve": self.curve, "memory": self.memory, "tried": tried}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.curve, self.memory = checkpoint["curve"], checkpoint["memory"]
        for masters, tried in zip(self.learner.masters, checkpoint["tried"], strict=True):
            masters.tried = tried


def masters_of(method: Method, policy: Policy, heads: Sequence[Head], key: str) -> list[Masters]:
    """What an optimizer trains of the policy, then of each head; ``key`` is the method's in params.yaml."""
    sections = {id(section): f"{key}.advantage.{name}.learning_rate" for name, section in method.advantage}
    trained = [Masters(policy.model.parameters(), Rate(f"{key}.learning_rate", method.learning_rate))]
    for head in heads:
        rate = Rate(sections[id(head.settings)], head.settings.learning_rate)
        trained.append(Masters((p for p in head.parameters() if p.requires_grad), rate))
    return trained
