"""The Lightning module: an epoch is an iteration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline.model.policy import Policy
from pipeline.model.scoring import TokenScores, length_batches, predicting_hidden, score_tokens
from pipeline.objective.estimates import declared_heads, needed_behind
from pipeline.objective.methods import coefficients, policy_loss, surrogate_loss, surrogate_plan
from pipeline.objective.regularisers import kl_penalty
from pipeline.objective.surrogates import UpdateTokens
from pipeline.progress.display import span, within
from pipeline.progress.timing import Phases
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.settings.method import Method
from pipeline.settings.params import Config
from pipeline.training.budget import progress, training_over
from pipeline.training.checks import recomputed, require_finite_training, require_recomputed
from pipeline.training.collection import Collection
from pipeline.training.episodes import update_columns
from pipeline.training.gradients import gradient_share
from pipeline.training.heads import Head, Scene, make_heads
from pipeline.training.iteration import Example, Iteration, Memory, minibatches, prepare_iteration
from pipeline.training.masters import ADAM_EPS, Masters, Rate, take_step
from pipeline.trajectories.trajectory import RESPONSE_ROLES, Role, Trajectories
from pipeline.workspace.finite import located, require_finite
from pipeline.workspace.randomness import generator

UPDATES = 0.7, 1.0
"""About which part of an iteration they are; it is only for telling how far it is."""


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
        self.config, self.name, self.seed = config, name, seed
        self.method: Method = config.methods[method_name]
        self.model = policy.model.requires_grad_(True)
        self.policy = policy
        # In a tuple, so that Lightning neither trains nor saves it.
        self._frozen = (policy.frozen_copy(),)
        self.heads = torch.nn.ModuleList(make_heads(declared_heads(self.method.advantage), self.reference))
        self.masters = torch.nn.ModuleList(self._trained(f"{config.params_file}: methods.{method_name}"))
        self.memory: Memory = {}
        """What adaptive slots keep from one iteration for the next."""
        self.engine = TransformersEngine(policy, config.rollout.batch_episodes)
        self.phases = Phases()
        self.collection = Collection(
            config,
            name,
            seed,
            self.method.branching,
            self.engine,
            policy,
            self.reference,
            self.phases,
            first,
            closing=bool(needed_behind(self.method.advantage)),
        )
        self.curve: list[dict[str, float]] = []
        """One row of metrics per finished iteration."""
        self.last_episodes: Trajectories | None = None
        """The episodes of the latest iteration, annotated."""
        self.last_update: dict[str, np.ndarray] = {}
        """What the training's last update made of their tokens (see ``update_columns``); empty before it."""

    @property
    def reference(self) -> Policy:
        """The frozen reference policy."""
        return self._frozen[0]

    def configure_optimizers(self) -> Any:
        groups = [{"params": m.weights, "lr": m.rate.value} for m in self._masters() if m.rate is not None]
        optimizer = torch.optim.Adam(groups, betas=self.config.train.betas, eps=ADAM_EPS)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: self._schedule())
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _trained(self, key: str) -> Iterator[Masters]:
        """What is trained: of the policy first, then of each head."""
        yield Masters(self.model.parameters(), Rate(f"{key}.learning_rate", self.method.learning_rate))
        sections = {id(section): f"{key}.advantage.{name}.learning_rate" for name, section in self.method.advantage}
        for head in self._heads():
            rate = Rate(sections[id(head.settings)], head.settings.learning_rate)
            yield Masters((p for p in head.parameters() if p.requires_grad), rate)

    def _schedule(self) -> float:
        """Factor of the learning rates after the iterations that the curve has."""
        done, total = progress(self.curve, self.config.train)
        return max(0.0, 1 - done / total) if self.config.train.schedule == "linear" else 1.0

    def on_fit_start(self) -> None:
        """Lightning has moved what it trains; the reference policy follows."""
        self.reference.model.to(self.device)

    def train_dataloader(self) -> DataLoader[int]:
        """One item per epoch, and nothing in it: data loaders are prefetched, an iteration must not be."""
        return DataLoader([0], batch_size=None)  # type: ignore[arg-type]

    def rounds(self) -> Iterator[Iteration]:
        """What the current iteration trains on, sampled with the policy as it is when each is asked for."""
        self.engine.forget()
        self.engine.policy_version = self.current_epoch
        estimate = self._estimate if len(self.heads) else None
        before: set[str] = set()
        """Sampled in an earlier round, by a policy that has been updated since."""
        for episodes in self.collection.rounds(self.current_epoch):
            names = episodes.episodes["episode_id"]
            fresh = episodes.select([row for row, name in enumerate(names) if name not in before])
            before |= set(names)
            draws = generator(self.seed, "recomputed", self.current_epoch)
            found = recomputed(fresh, self.collection.now, draws, everything=not self.curve)
            iteration = prepare_iteration(
                self.config,
                self.method,
                self.seed,
                self.current_epoch,
                self.collection.at_temperature(episodes),
                estimate,
                self.phases,
                self.memory,
            )
            first = self.curve[0]["sampling_error"] if self.curve else None
            everywhere = self.config.rollout.temperature * iteration.metrics.get("recompute_error", 0.0)
            require_recomputed(found, self.model.dtype, first, everywhere)
            metrics = iteration.metrics | {"sampling_error": found.error}
            yield replace(iteration, trajectories=episodes, metrics=metrics)

    def training_step(self, *_: Any) -> None:
        """One iteration: collect, then update minibatch by minibatch.

        Raises:
            NumericsError: a weight, a log-probability or a metric is not finite, or not what it should be.
        """
        with located(f"iteration {self.current_epoch}"):
            self._iterate()
        scheduler: Any = self.lr_schedulers()
        scheduler.step()  # after the curve: the schedule is over what it says has been spent

    def _iterate(self) -> None:
        record, updates, number, passes = _Averages(), 0, self.current_epoch, self.config.train.passes
        for iteration in self.phases.each("prepare", self.rounds()):
            # Where branches are placed by how the policy has moved, one pass over the initial episodes makes it move.
            numbers = range(passes) if iteration.whole else [passes]
            batches = minibatches(iteration.examples, self.config, self.seed, number, numbers)
            if batches and iteration.whole and number % self.config.train.validate_every == 0:
                with self.phases.phase("gradients"), span("measuring gradients", UPDATES[0], UPDATES[0]):
                    record.add(gradient_share(self, batches[0], generator(self.seed, "gradients", number)))
            with self.phases.phase("update"), span("updates:", *UPDATES):
                for index, minibatch in enumerate(batches):
                    with span(f"{index} of {len(batches)} done,", index / len(batches), (index + 1) / len(batches)):
                        self._update(minibatch, number, record)
            updates += len(batches)
        metrics = {**iteration.metrics, **record.means(), "updates": float(updates)}
        if batches:
            with self.phases.phase("moved"):
                metrics |= self._moved(batches[-1])
        if len(self.heads):  # what they cost in memory
            metrics["head_parameters"] = float(sum(p.numel() for p in self.heads.parameters()))
        optimizer: Any = self.optimizers()
        require_finite_training(self, optimizer, metrics)
        self.last_episodes, self.memory = iteration.trajectories, iteration.memory
        self.curve.append({"iteration": float(number), **metrics})
        if training_over(self.curve, self.config.train):
            self.last_update = update_columns(iteration, [(m, self.factors(m)) for m in batches])

    def _update(self, minibatch: list[Example], iteration: int, record: _Averages) -> None:
        """One optimizer step; gradients of the pieces add up to the minibatch's exactly."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad(set_to_none=True)
        warming = any(iteration < head.settings.warmup_iterations for head in self._heads())
        factors = self.factors(minibatch)
        rows = self.plan(minibatch, factors)
        sizes = _Sizes.of(minibatch)
        totals: dict[str, float] = {}
        done = 0
        for piece in self._pieces(minibatch):
            within(done / len(minibatch), f"{done} of {len(minibatch)} episodes of the next")
            done += len(piece)
            chosen = None if rows is None else torch.cat([rows[i] for i in piece])
            loss, terms = self._loss([minibatch[i] for i in piece], [factors[i] for i in piece], chosen, sizes, warming)
            self.manual_backward(loss)
            for masters in self._masters():
                masters.gather()
            for key, value in terms.items():
                totals[key] = totals.get(key, 0.0) + float(value.detach())
        names = ["gradient_norm", *(f"{head.name}_gradient_norm" for head in self._heads())]
        for key, masters in zip(names, self._masters(), strict=True):
            totals[key] = masters.clip(self.config.train.gradient_clip)
        finite = all(map(math.isfinite, totals.values()))
        limit = self.method.regulariser.skip_above_kl
        skipped = limit is not None and not totals["kl_behaviour"] <= limit
        if skipped:  # the policy stands still, heads go on
            self._masters()[0].stand_still()
        if finite:
            take_step(optimizer.step, self._masters())
            for head in self._heads():
                head.after_step()
            record.add(totals | _gradient_share(minibatch, factors))
        record.add({"non_finite_losses": float(not finite), "skipped_steps": float(skipped)}, summed=True)

    def factors(self, minibatch: list[Example]) -> list[Tensor]:
        """c_t of each example's trainable tokens."""
        lengths = [len(example.weight) for example in minibatch]
        weight, advantage = (torch.cat([getattr(e, key) for e in minibatch]) for key in ("weight", "advantage"))
        owner = torch.repeat_interleave(torch.arange(len(minibatch)), torch.tensor(lengths))
        everything = torch.ones_like(weight, dtype=torch.bool)
        return list(coefficients(self.method, weight, everything, owner, advantage).split(lengths))

    @torch.no_grad()
    def plan(self, minibatch: list[Example], factors: list[Tensor]) -> list[Tensor] | None:
        """The surrogate's plan for the whole minibatch as the policy scores it now, a tensor per example."""
        planned = surrogate_plan(self.method)
        if planned is None:
            return None
        scores: dict[int, list[Tensor]] = {}
        for piece in self._pieces(minibatch):
            examples = [minibatch[i] for i in piece]
            now = self._score(examples)[1]
            lengths = [len(example.role) for example in examples]
            columns = zip(now.logprob.cpu().split(lengths), now.entropy.cpu().split(lengths), strict=True)
            scores |= {int(i): list(column) for i, column in zip(piece, columns, strict=True)}
        logprob, entropy = (torch.cat([scores[i][k] for i in range(len(minibatch))]) for k in (0, 1))
        rows = planned(update_tokens(minibatch, factors, logprob, entropy))
        return list(rows.split([len(example.role) for example in minibatch]))

    def _loss(
        self,
        examples: list[Example],
        factors: list[Tensor],
        rows: Tensor | None,
        sizes: _Sizes,
        warming: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        scene, tokens = self._tokens(examples, factors)
        parts = policy_loss(self.method, tokens, None if rows is None else rows.to(tokens.logprob.device), sizes.tokens)
        terms = {
            "loss": parts.surrogate,
            "policy_entropy": parts.entropy,
            "kl_loss": parts.kl,
            "kl_behaviour": parts.moved,
            "clip_fraction": parts.clipped,
        }
        total = parts.total * 0.0 if warming else parts.total
        for head in self._heads():
            columns = {k: torch.cat([e.heads[k] for e in examples]).to(scene.hidden.device) for k in examples[0].heads}
            errors = head.loss(scene, columns, train_trunk=not warming) * columns[f"{head.name}_mask"]
            error = errors.sum() / sizes.targets[head.name]
            terms[f"{head.name}_loss"] = error
            total = total + head.settings.coefficient * error
        return total, terms

    def surrogate_losses(self, examples: list[Example], factors: list[Tensor], rows: Tensor | None) -> Tensor:
        """``c_t * surrogate_t`` of each trainable token, with gradient."""
        _, tokens = self._tokens(examples, factors)
        return tokens.coefficient * surrogate_loss(self.method, tokens, rows).loss

    def _tokens(self, examples: list[Example], factors: list[Tensor]) -> tuple[Scene, UpdateTokens]:
        hidden, scores = self._score(examples)
        scene = self._scene([e.ids for e in examples], [e.trainable for e in examples], hidden)
        soft = next((s for head in self._heads() if (s := head.soft_objective(scene)) is not None), None)
        return scene, update_tokens(examples, factors, scores.logprob, scores.entropy, soft)

    def _estimate(self, sequences: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> dict[str, Tensor]:
        with torch.inference_mode():
            scene = self._scene(sequences, wanted, predicting_hidden(self.policy, sequences, wanted))
            return {name: column for head in self._heads() for name, column in head.estimate(scene).items()}

    def _scene(self, sequences: Sequence[np.ndarray], wanted: Sequence[np.ndarray], hidden: Tensor) -> Scene:
        return Scene(self.policy, self.reference, self.config.rollout.temperature, sequences, wanted, hidden)

    def _heads(self) -> list[Head]:
        return list(self.heads)  # type: ignore[arg-type]

    def _masters(self) -> list[Masters]:
        return list(self.masters)  # type: ignore[arg-type]

    def _pieces(self, minibatch: list[Example]) -> list[np.ndarray]:
        return length_batches([len(e.ids) for e in minibatch], self.config.train.tokens_per_forward)

    def _score(self, examples: list[Example]) -> tuple[Tensor, TokenScores]:
        wanted = [e.trainable for e in examples]
        hidden = predicting_hidden(self.policy, [e.ids for e in examples], wanted)
        chosen = torch.cat([torch.from_numpy(e.ids[e.trainable].astype("int64")) for e in examples]).to(hidden.device)
        scores = score_tokens(hidden, chosen, self.policy.head, self.config.rollout.temperature)
        require_finite("a log-probability in the update", scores.logprob)
        return hidden, scores

    @torch.no_grad()
    def _moved(self, minibatch: list[Example]) -> dict[str, float]:
        """KL(behaviour || policy) after the iteration's updates, by role, on its last minibatch (estimator k3)."""
        pieces = length_batches([len(e.ids) for e in minibatch], self.config.train.tokens_per_forward)
        examples = [minibatch[i] for piece in pieces for i in piece]
        now = torch.cat([self._score([minibatch[i] for i in piece])[1].logprob.cpu() for piece in pieces])
        before, role = (torch.cat([getattr(e, key) for e in examples]) for key in ("logprob", "role"))
        moved = kl_penalty(before, now, "k3")
        shares = {"action": Role.ACTION, "reasoning": Role.REASONING}
        return {
            f"kl_iteration_{k}": float(moved[role == r].mean()) for k, r in shares.items() if bool((role == r).any())
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {"curve": self.curve, "memory": self.memory, "tried": [m.tried for m in self._masters()]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.curve, self.memory = checkpoint["curve"], checkpoint["memory"]
        for masters, tried in zip(self._masters(), checkpoint["tried"], strict=True):
            masters.tried = tried


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


@dataclass(frozen=True)
class _Sizes:
    """What a minibatch's means divide by."""

    tokens: int
    targets: dict[str, float]
    """Tokens with a target, by head."""

    @classmethod
    def of(cls, minibatch: list[Example]) -> _Sizes:
        masks = [name for name in minibatch[0].heads if name.endswith("_mask")]
        targets = {m.removesuffix("_mask"): max(1.0, float(sum(e.heads[m].sum() for e in minibatch))) for m in masks}
        return cls(sum(len(e.role) for e in minibatch), targets)


def update_tokens(
    examples: list[Example], factors: list[Tensor], logprob: Tensor, entropy: Tensor, soft: Tensor | None = None
) -> UpdateTokens:
    """The examples' trainable tokens as the objective wants them, where the scores are."""
    lengths = torch.tensor([len(example.role) for example in examples])

    def column(name: str) -> Tensor:
        return torch.cat([getattr(example, name) for example in examples]).to(logprob.device)

    return UpdateTokens(
        logprob=logprob,
        entropy=entropy,
        logprob_old=column("logprob"),
        ref_logprob=column("ref_logprob"),
        advantage=column("advantage"),
        coefficient=torch.cat(factors).to(logprob.device),
        entropy_terms=column("entropy_terms"),
        noise=column("noise"),
        trajectory=torch.repeat_interleave(torch.arange(len(examples)), lengths).to(logprob.device),
        soft=soft,
    )


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
