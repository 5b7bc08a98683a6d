"""The Lightning module: an epoch is an iteration."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from torch.utils.data import DataLoader

from pipeline.model.adapters import with_adapters
from pipeline.model.memory import recompute_where_needed
from pipeline.model.policy import Policy
from pipeline.model.shards import share_out
from pipeline.objective.estimates import declared_heads, needed_behind
from pipeline.progress.timing import Phases
from pipeline.rollout.ray_pool import RayPool
from pipeline.rollout.sampler import make_sampler
from pipeline.settings.lora import Lora
from pipeline.settings.method import Method
from pipeline.settings.params import Config
from pipeline.training.ahead import Ahead
from pipeline.training.budget import progress, training_over
from pipeline.training.checks import require_finite_training
from pipeline.training.collection import Collection
from pipeline.training.heads import Head, make_heads
from pipeline.training.iteration import Memory, run_iteration, update_columns
from pipeline.training.masters import ADAM_EPS, Masters, Rate, with_masters
from pipeline.training.team import ALONE, Team
from pipeline.training.update import Learner
from pipeline.trajectories.trajectory import Trajectories
from pipeline.workspace.finite import located


class PolicyGradient(lightning.LightningModule):
    """Trains a policy with one method: in place, or by adapters on it, which are on ``policy`` of the module then.

    Whatever the policy's precision, what is trained is float32 from here on.

    ``first`` are the annotated episodes of the first iteration, if they have been sampled already. Where processes share out
    the policy's weights, each samples from a copy that has all.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        method_name: str,
        seed: int,
        policy: Policy,
        first: Trajectories | None = None,
        team: Team = ALONE,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        method, lora = config.methods[method_name], config.train.lora
        policy.model.requires_grad_(lora is None)  # what is frozen is shared with the reference
        reference = policy.frozen_copy()
        if lora is not None:
            policy = with_adapters(policy, lora, seed)
        self.config, self.name, self.seed, self.team = config, name, seed, team
        copied = team.sharded or (lora is None and policy.model.dtype != torch.float32)
        self.sampled = policy.frozen_copy() if copied else policy
        if team.sharded:  # gradients of single tokens are measured on it
            self.sampled.model.requires_grad_(True)
        self.policy = policy = with_masters(policy)
        recompute_where_needed(config, name, policy)
        # What Lightning trains and saves; the reference policy is not a module, and so it does neither with that.
        self.model = policy.model
        heads = make_heads(declared_heads(method.advantage), reference)
        self.heads = torch.nn.ModuleList(heads)
        masters = masters_of(method, lora, policy, heads, f"{config.params_file}: methods.{method_name}")
        self.learner = Learner(config, method, policy, reference, heads, masters, self.sampled, team)
        self.engine = make_sampler(config, self.sampled)
        self.phases = Phases()
        closing = bool(needed_behind(method.advantage))
        ahead = Ahead(self.engine) if config.train.asynchronous and isinstance(self.engine, RayPool) else None
        self.collection = Collection(
            config,
            name,
            seed,
            method.branching,
            self.engine,
            policy,
            reference,
            self.phases,
            first,
            closing,
            team,
            ahead,
        )
        self.memory: Memory = {}
        """What adaptive slots keep from one iteration for the next."""
        self.curve: list[dict[str, float]] = []
        """One row of metrics per finished iteration."""
        self.last_episodes: Trajectories | None = None
        """The episodes of the latest iteration, annotated."""
        self.last_update: dict[str, np.ndarray] = {}
        """What the training's last update made of their tokens (see ``update_columns``); empty before it."""

    def configure_model(self) -> None:
        """Leave each process its part of the policy's weights, where they are shared out; those of heads are not."""
        if self.team.sharded:
            assert self.device_mesh is not None
            share_out(self.model, self.device_mesh["data_parallel"])
            self.learner.masters[0].weights = [p for p in self.model.parameters() if p.requires_grad]

    def configure_optimizers(self) -> Any:
        groups = [{"params": masters.weights, "lr": masters.rate.value} for masters in self.learner.masters]
        optimizer = torch.optim.Adam(groups, betas=self.config.train.betas, eps=ADAM_EPS)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: self._schedule())
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _schedule(self) -> float:
        """Factor of the learning rates after the iterations that the curve has."""
        done, total = progress(self.curve, self.config.train)
        return max(0.0, 1 - done / total) if self.config.train.schedule == "linear" else 1.0

    def on_fit_start(self) -> None:
        """Lightning has moved what it trains; what it does not know follows."""
        for other in (self.learner.reference, self.sampled):
            other.model.to(self.device)

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

    def result(self) -> Policy:
        """The policy as it is now, in the precision in which it samples and is evaluated."""
        self.engine.sync(self.policy, len(self.curve))
        return self.sampled

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        tried = [masters.tried for masters in self.learner.masters]
        checkpoint |= {"curve": self.curve, "memory": self.memory, "tried": tried}
        if (ahead := self.collection.ahead) is not None and not training_over(self.curve, self.config.train):
            checkpoint["ahead"] = ahead.state()
        for name in self._frozen():
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if frozen := self._frozen():
            checkpoint["state_dict"] |= frozen
        self.curve, self.memory = checkpoint["curve"], checkpoint["memory"]
        for masters, tried in zip(self.learner.masters, checkpoint["tried"], strict=True):
            masters.tried = tried
        if self.collection.ahead is not None:
            self.collection.ahead.restore(checkpoint.get("ahead", {}))

    def teardown(self, stage: str) -> None:
        """Workers end with the training."""
        if isinstance(self.engine, RayPool):
            self.engine.close()

    def _frozen(self) -> dict[str, torch.Tensor]:
        """What adapters are on: it is in the reference policy's files, and in no checkpoint."""
        weights = self.model.named_parameters(remove_duplicate=False)
        return {f"model.{name}": weight for name, weight in weights if not weight.requires_grad}


def masters_of(method: Method, lora: Lora | None, policy: Policy, heads: Sequence[Head], key: str) -> list[Masters]:
    """What an optimizer trains of the policy, then of each head; ``key`` is the method's in params.yaml."""
    sections = {id(section): f"{key}.advantage.{name}.learning_rate" for name, section in method.advantage}
    rate = Rate(f"{key}.learning_rate", method.learning_rate)
    if lora is not None:
        rate = Rate(f"{rate.key} * train.lora.learning_rate_factor", rate.value * lora.learning_rate_factor)
    trained = [Masters([p for p in policy.model.parameters() if p.requires_grad], rate)]
    for head in heads:
        rate = Rate(sections[id(head.settings)], head.settings.learning_rate)
        trained.append(Masters([p for p in head.parameters() if p.requires_grad], rate))
    return trained
