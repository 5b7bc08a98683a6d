"""One iteration of training, up to the update: collect, annotate, filter, advantages, weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Config, Method
from pipeline.energy.annotate import annotate
from pipeline.evaluation.evaluate import summary
from pipeline.objective.batch import TokenBatch, token_batch
from pipeline.objective.filters import group_deviation
from pipeline.objective.methods import select_groups, token_advantages, token_weights
from pipeline.policy.model import Policy
from pipeline.policy.scoring import length_batches
from pipeline.randomness import generator
from pipeline.rollout.collector import collect, iteration_specs
from pipeline.rollout.engine import RolloutEngine
from pipeline.timing import Phases
from pipeline.trajectory import Role, Trajectories

Values = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], Tensor]
"""From sequences and masks of wanted tokens to one value per wanted token."""


@dataclass(frozen=True)
class Example:
    """One trajectory, ready to be trained on. Tensors have one entry per trainable token."""

    ids: np.ndarray
    trainable: np.ndarray
    role: Tensor
    logprob: Tensor
    ref_logprob: Tensor
    advantage: Tensor
    weight: Tensor
    value: Tensor
    value_target: Tensor


@dataclass(frozen=True)
class Iteration:
    """What one update works on."""

    number: int
    trajectories: Trajectories
    """All that were collected, annotated."""
    examples: list[Example]
    """Those that passed the filter."""
    metrics: dict[str, float]


@torch.no_grad()
def prepare_iteration(
    config: Config,
    name: str,
    method: Method,
    seed: int,
    number: int,
    engine: RolloutEngine,
    reference: Policy,
    values: Values | None,
    first: Trajectories | None = None,
    phases: Phases | None = None,
) -> Iteration:
    """Collect and annotate an iteration's episodes, and give every token its advantage and weight.

    Args:
        config: params.yaml.
        name: key in ``environments``.
        method: one choice per slot.
        seed: of this training.
        number: of the iteration, from 0.
        engine: samples from the current policy.
        reference: the frozen reference policy.
        values: the critic's values, for methods that have one.
        first: the annotated episodes of iteration 0 if the rollout stage has already sampled them.
        phases: told how long everything takes.
    """
    phases = phases or Phases()
    if number == 0 and first is not None:
        trajectories = first
    else:
        with phases.phase("collect"):
            specs = iteration_specs(config, name, seed, number)
            sampled = collect(engine, reference.tokenizer, config, name, specs, config.rollout.temperature)
        with phases.phase("annotate"):
            trajectories = annotate(sampled, reference, config.rollout.temperature, config.train.tokens_per_forward)

    everything = token_batch(trajectories)
    kept = select_groups(method, everything.returns, everything.group)
    metrics = _collection_metrics(trajectories, everything, kept)
    if not bool(kept.any()):
        return Iteration(number, trajectories, [], metrics)

    selected = trajectories.select(torch.nonzero(kept).squeeze(-1).numpy())
    batch = token_batch(selected)
    with phases.phase("values"):
        estimated = None if values is None else _token_values(selected, values, config.train.tokens_per_forward)
    with phases.phase("advantages"):
        estimate = token_advantages(method, batch, estimated)
    with phases.phase("weights"):
        weights = token_weights(method, batch)
    examples = _examples(selected, batch, estimate.advantage, weights, estimated, estimate.value_target)
    if estimated is not None and estimate.value_target is not None:
        metrics["explained_variance"] = _explained_variance(estimated, estimate.value_target, batch.trainable)
    return Iteration(number, trajectories, examples, metrics)


def minibatches(examples: list[Example], config: Config, seed: int, iteration: int) -> list[list[Example]]:
    """The examples in the order of all passes, cut into minibatches; each pass is shuffled by a named draw.

    A last minibatch of less than half the size joins the one before it.
    """
    size, result = config.train.minibatch, []
    for number in range(config.train.passes):
        order = generator(seed, "minibatches", iteration, number).permutation(len(examples))
        pieces = [order[i : i + size] for i in range(0, len(order), size)]
        if len(pieces) > 1 and len(pieces[-1]) < size / 2:
            pieces[-2:] = [np.concatenate(pieces[-2:])]
        result += [[examples[i] for i in piece] for piece in pieces]
    return result


def _token_values(trajectories: Trajectories, values: Values, tokens_per_forward: int) -> Tensor:
    flat = torch.zeros(len(trajectories.input_ids))
    for batch in length_batches(trajectories.lengths, tokens_per_forward):
        spans = [slice(trajectories.offsets[e], trajectories.offsets[e + 1]) for e in batch]
        wanted = [trajectories.sampled[span] for span in spans]
        index = np.concatenate([np.arange(s.start, s.stop)[w] for s, w in zip(spans, wanted, strict=True)])
        flat[torch.from_numpy(index)] = values([trajectories.input_ids[s] for s in spans], wanted).float().cpu()
    return flat


def _examples(
    trajectories: Trajectories,
    batch: TokenBatch,
    advantage: Tensor,
    weight: Tensor,
    value: Tensor | None,
    target: Tensor | None,
) -> list[Example]:
    nothing = torch.zeros_like(advantage)
    columns = {
        "role": batch.role,
        "logprob": batch.logprob,
        "ref_logprob": batch.ref_logprob,
        "advantage": advantage,
        "weight": weight,
        "value": nothing if value is None else value,
        "value_target": nothing if target is None else target,
    }
    result = []
    for episode in range(len(trajectories)):
        span = slice(int(trajectories.offsets[episode]), int(trajectories.offsets[episode + 1]))
        trainable = trajectories.sampled[span]
        mask = torch.from_numpy(trainable)
        result.append(
            Example(
                ids=trajectories.input_ids[span],
                trainable=trainable,
                **{column: values[span][mask] for column, values in columns.items()},
            )
        )
    return result


def _collection_metrics(trajectories: Trajectories, batch: TokenBatch, kept: Tensor) -> dict[str, float]:
    metrics = summary(trajectories)
    deviation = group_deviation(batch.returns, batch.group)
    difference = (batch.logprob - batch.ref_logprob)[batch.trainable]
    entropy = torch.from_numpy(trajectories.entropy)
    metrics |= {
        "entropy": float(entropy[batch.trainable].mean()),
        "entropy_action": _mean(entropy[batch.of(Role.ACTION)]),
        "entropy_reasoning": _mean(entropy[batch.of(Role.REASONING)]),
        "kl_reference": float(difference.mean()),
        "zero_variance_groups": float((deviation == 0).sum()),
        "kept_trajectories": float(kept.sum()),
        "episodes": float(len(trajectories)),
        "tokens": float(batch.trainable.sum()),
    }
    if trajectories.episodes["iteration"][0] == 0:
        metrics["recompute_error"] = float(difference.abs().max())
    return metrics


def _explained_variance(values: Tensor, targets: Tensor, trainable: Tensor) -> float:
    target = targets[trainable]
    spread = target.var(unbiased=False)
    return float(1 - (target - values[trainable]).var(unbiased=False) / spread) if spread > 0 else 0.0


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0
