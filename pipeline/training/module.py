"""The Lightning module: an epoch is an iteration."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline.config import GAE, Config, Method
from pipeline.objective.aggregation import coefficients
from pipeline.objective.methods import policy_loss
from pipeline.objective.regularisers import kl_penalty, value_loss
from pipeline.policy.model import Policy
from pipeline.policy.scoring import TokenScores, length_batches, predicting_hidden, score_tokens
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.timing import Phases
from pipeline.training.critic import ValueFunction, batch_values
from pipeline.training.iteration import Example, Iteration, minibatches, prepare_iteration
from pipeline.trajectory import RESPONSE_ROLES, Role, Trajectories

RECOMPUTE_TOLERANCE = 1e-3
"""Largest difference between sampled and recomputed float32 log-probabilities that a training starts with."""


class PolicyGradient(lightning.LightningModule):
    """Trains a policy with one method.

    Args:
        config: params.yaml.
        name: key in ``environments``.
        method_name: key in ``methods``.
        seed: of this training.
        policy: trained in place.
        first: annotated episodes of the first iteration, if already sampled.
    """

    def __init__(
        self, config: Config, name: str, method_name: str, seed: int, policy: Policy, first: Trajectories | None = None
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config, self.name, self.seed, self.first = config, name, seed, first
        self.method: Method = config.methods[method_name]
        self.model = policy.model.requires_grad_(True)
        self.policy = policy
        # In a tuple, so that Lightning neither trains nor saves it.
        self._frozen = (policy.frozen_copy(),)
        slot = self.method.advantage
        self.critic_settings = slot.critic if isinstance(slot, GAE) else None
        self.critic = ValueFunction(self.critic_settings, self.reference) if self.critic_settings else None
        self.engine = TransformersEngine(policy, config.rollout.batch_episodes)
        self.phases = Phases()
        self.curve: list[dict[str, float]] = []
        """One row of metrics per finished iteration."""
        self.last_episodes: Trajectories | None = None
        """The episodes of the latest iteration, annotated."""

    @property
    def reference(self) -> Policy:
        """The frozen reference policy."""
        return self._frozen[0]

    def configure_optimizers(self) -> Any:
        groups = [{"params": list(self.model.parameters()), "lr": self.method.learning_rate}]
        if self.critic is not None and self.critic_settings is not None:
            groups.append({"params": list(self.critic.parameters()), "lr": self.critic_settings.learning_rate})
        optimizer = torch.optim.Adam(groups, betas=self.config.train.betas)
        total = self.config.train.iterations
        linear = self.config.train.schedule == "linear"
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / total if linear else 1.0)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_fit_start(self) -> None:
        """Lightning has moved what it trains; the reference policy follows."""
        self.reference.model.to(self.device)

    def train_dataloader(self) -> DataLoader[int]:
        """One item per epoch, and nothing in it: data loaders are prefetched, an iteration must not be."""
        return DataLoader([0], batch_size=None)  # type: ignore[arg-type]

    def collect(self) -> Iteration:
        """Sample the current iteration's episodes with the current policy."""
        self.engine.forget()
        self.engine.policy_version = self.current_epoch
        critic, policy = self.critic, self.policy
        return prepare_iteration(
            self.config,
            self.name,
            self.method,
            self.seed,
            self.current_epoch,
            self.engine,
            self.reference,
            None if critic is None else lambda ids, wanted: batch_values(critic, policy, ids, wanted),
            self.first,
            self.phases,
        )

    def training_step(self, *_: Any) -> None:
        """One iteration: collect, then update minibatch by minibatch."""
        with self.phases.phase("prepare"):
            iteration = self.collect()
            self._check_recomputed(iteration)
        record = _Averages()
        with self.phases.phase("update"):
            batches = minibatches(iteration.examples, self.config, self.seed, iteration.number)
            for minibatch in batches:
                self._update(minibatch, iteration.number, record)
            scheduler: Any = self.lr_schedulers()
            scheduler.step()
        metrics = {**iteration.metrics, **record.means(), "updates": float(len(batches))}
        if batches:
            with self.phases.phase("moved"):
                metrics |= self._moved(batches[-1])
        self.last_episodes = iteration.trajectories
        self.curve.append({"iteration": float(iteration.number), **metrics})

    def _check_recomputed(self, iteration: Iteration) -> None:
        """Invariant 1: before the first update, scoring the stored ids gives the log-probabilities they were sampled with."""
        error = iteration.metrics.get("recompute_error", 0.0)
        if self.model.dtype == torch.float32 and error > RECOMPUTE_TOLERANCE:
            raise RuntimeError(f"recomputed log-probabilities differ from the sampled ones by {error:.2g}")

    def _update(self, minibatch: list[Example], iteration: int, record: _Averages) -> None:
        """One optimizer step; gradients of the pieces add up to the minibatch's exactly."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad(set_to_none=True)
        tokens = sum(len(example.role) for example in minibatch)
        warming = self.critic_settings is not None and iteration < self.critic_settings.warmup_iterations
        factors = _coefficients(minibatch, self.method.aggregation)
        totals: dict[str, float] = {}
        for piece in length_batches([len(e.ids) for e in minibatch], self.config.train.tokens_per_forward):
            loss, terms = self._loss([minibatch[i] for i in piece], [factors[i] for i in piece], tokens, warming)
            self.manual_backward(loss)
            for key, value in terms.items():
                totals[key] = totals.get(key, 0.0) + float(value.detach())
        totals["gradient_norm"] = self._clip(self.model)
        if self.critic is not None:
            totals["critic_gradient_norm"] = self._clip(self.critic)
        finite = all(map(math.isfinite, totals.values()))
        if finite:
            optimizer.step()
            record.add(totals | _gradient_share(minibatch, factors))
        record.add({"non_finite_losses": float(not finite)}, summed=True)

    def _loss(
        self, examples: list[Example], factors: list[Tensor], tokens: int, warming: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        sequences, wanted = [e.ids for e in examples], [e.trainable for e in examples]
        hidden, scores = self._score(examples)
        device = hidden.device

        def column(name: str) -> Tensor:
            return torch.cat([getattr(e, name) for e in examples]).to(device)

        parts = policy_loss(
            self.method,
            logprob=scores.logprob,
            entropy=scores.entropy,
            logprob_old=column("logprob"),
            ref_logprob=column("ref_logprob"),
            advantage=column("advantage"),
            coefficient=torch.cat(factors).to(device),
            tokens=tokens,
        )
        terms = {
            "loss": parts.surrogate,
            "policy_entropy": parts.entropy,
            "kl_loss": parts.kl,
            "clip_fraction": parts.clipped,
        }
        total = parts.total * 0.0 if warming else parts.total
        if self.critic is not None and self.critic_settings is not None:
            values = self.critic(self.policy, hidden, sequences, wanted, train_trunk=not warming)
            clip = self.critic_settings.clip
            error = value_loss(values, column("value"), column("value_target"), clip).sum() / tokens
            terms["value_loss"] = error
            total = total + self.critic_settings.coefficient * error
        return total, terms

    def _score(self, examples: list[Example]) -> tuple[Tensor, TokenScores]:
        wanted = [e.trainable for e in examples]
        hidden = predicting_hidden(self.policy, [e.ids for e in examples], wanted)
        chosen = torch.cat([torch.from_numpy(e.ids[e.trainable].astype("int64")) for e in examples]).to(hidden.device)
        return hidden, score_tokens(hidden, chosen, self.policy.head, self.config.rollout.temperature)

    def _clip(self, module: torch.nn.Module) -> float:
        parameters = [p for p in module.parameters() if p.grad is not None]
        return float(torch.nn.utils.clip_grad_norm_(parameters, self.config.train.gradient_clip))

    @torch.no_grad()
    def _moved(self, minibatch: list[Example]) -> dict[str, float]:
        """KL(behaviour || policy) after the iteration's updates, by role, on its last minibatch (estimator k3)."""
        pieces = length_batches([len(e.ids) for e in minibatch], self.config.train.tokens_per_forward)
        examples = [minibatch[i] for piece in pieces for i in piece]
        now = torch.cat([self._score([minibatch[i] for i in piece])[1].logprob.cpu() for piece in pieces])
        before, role = (torch.cat([getattr(e, key) for e in examples]) for key in ("logprob", "role"))
        moved = kl_penalty(before, now, "k3")
        shares = {"action": Role.ACTION, "reasoning": Role.REASONING}
        return {f"kl_update_{k}": float(moved[role == r].mean()) for k, r in shares.items() if bool((role == r).any())}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["curve"] = self.curve

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.curve = checkpoint["curve"]


class _Averages:
    """Means (and sums) of metrics over an iteration's minibatches."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, float], summed: bool = False) -> None:
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
            self._counts[key] = 1 if summed else self._counts.get(key, 0) + 1

    def means(self) -> dict[str, float]:
        return {key: total / self._counts[key] for key, total in self._sums.items()}


def _coefficients(minibatch: list[Example], aggregation: str) -> list[Tensor]:
    lengths = [len(example.weight) for example in minibatch]
    weight = torch.cat([example.weight for example in minibatch])
    owner = torch.repeat_interleave(torch.arange(len(minibatch)), torch.tensor(lengths))
    return list(coefficients(weight, torch.ones_like(weight, dtype=torch.bool), owner, aggregation).split(lengths))


def _gradient_share(minibatch: list[Example], factors: list[Tensor]) -> dict[str, float]:
    """Share of ``|c_t A_t|`` by role: where the surrogate's gradient is asked to go before any clipping."""
    role = torch.cat([example.role for example in minibatch])
    pull = torch.cat([(f * e.advantage).abs() for e, f in zip(minibatch, factors, strict=True)])
    total = float(pull.sum()) or 1.0
    share = {r: float(pull[role == r].sum()) / total for r in RESPONSE_ROLES}
    return {
        "gradient_share_reasoning": share[Role.REASONING],
        "gradient_share_action": share[Role.ACTION],
        "gradient_share_tag": share[Role.THINK_TAG] + share[Role.ANSWER_TAG],
        "gradient_share_other": share[Role.OTHER],
    }
