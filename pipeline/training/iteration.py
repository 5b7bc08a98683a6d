"""One iteration of training, from annotated episodes to the update: filter, advantages, weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.evaluate import summary
from pipeline.model.scoring import length_batches
from pipeline.objective.batch import TokenBatch, token_batch
from pipeline.objective.estimates import needed_behind
from pipeline.objective.filters import group_deviation
from pipeline.objective.methods import (
    entropy_terms,
    select_groups,
    shape_rewards,
    token_advantages,
    token_weights,
)
from pipeline.progress.display import span
from pipeline.progress.timing import Phases
from pipeline.rollout.branching import branches_by_role
from pipeline.settings.method import Method
from pipeline.settings.params import Config
from pipeline.trajectories.trajectory import CUT_OFF, Role, Trajectories
from pipeline.workspace.finite import require_finite
from pipeline.workspace.randomness import generator

Estimate = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], dict[str, Tensor]]
"""From sequences and masks of wanted tokens to what a method's heads say: columns of one number per wanted token."""

Memory = Mapping[str, Mapping[str, float]]
"""What adaptive slots keep from one iteration for the next, by slot; part of a checkpoint."""


@dataclass(frozen=True)
class Example:
    """One trajectory, ready to be trained on. Tensors have one entry (or row) per trainable token."""

    ids: np.ndarray
    trainable: np.ndarray
    role: Tensor
    logprob: Tensor
    ref_logprob: Tensor
    advantage: Tensor
    weight: Tensor
    entropy_terms: Tensor
    noise: Tensor
    heads: dict[str, Tensor]
    """What each head said before the update, its ``<name>_target``, and where it has one (``<name>_mask``)."""


@dataclass(frozen=True)
class Iteration:
    """What one update works on."""

    number: int
    trajectories: Trajectories
    """All that were collected, annotated."""
    examples: list[Example]
    """Those that passed the filter."""
    kept: np.ndarray
    """bool: which of the trajectories these are."""
    metrics: dict[str, float]
    whole: bool
    """All of its episodes are here; otherwise their branches are still to come."""
    memory: Memory = field(default_factory=dict)
    """For the next iteration."""


@torch.no_grad()
def prepare_iteration(
    config: Config,
    method: Method,
    seed: int,
    number: int,
    collected: Trajectories,
    estimate: Estimate | None,
    phases: Phases | None = None,
    memory: Memory | None = None,
) -> Iteration:
    """Filter an iteration's episodes, and give every token its advantage and weight.

    Args:
        config: params.yaml.
        method: one choice per slot.
        seed: of this training.
        number: of the iteration, from 0.
        collected: its annotated episodes; see ``Collection``.
        estimate: what the method's heads say, if it has any.
        phases: told how long everything takes.
        memory: what adaptive slots have kept from the iteration before.
    """
    phases, memory = phases or Phases(), memory or {}
    temperature = config.rollout.temperature
    whole = len(collected) == config.rollout.groups * config.rollout.group_size
    everything = token_batch(collected, generator(seed, "slots", number), number, temperature)
    kept = select_groups(method, everything)
    metrics = _collection_metrics(collected, everything, kept)
    if method.branching.kind != "none":
        metrics |= {f"branches_{role}": count for role, count in branches_by_role(collected).items()}
    if not bool(kept.any()):
        return Iteration(number, collected, [], kept.numpy(), metrics, whole, memory)

    selected = collected.select(torch.nonzero(kept).squeeze(-1).numpy())
    batch = shape_rewards(method, token_batch(selected, generator(seed, "slots", number), number, temperature))
    with phases.phase("values"), span("values", 0.7, 0.7):
        estimates, behind = dict[str, Tensor](), dict[str, Tensor]()
        if estimate is not None:
            asked = needed_behind(method.advantage)
            estimates, behind = _estimates(selected, estimate, config.train.tokens_per_forward, asked)
    with phases.phase("advantages"):
        advantages = token_advantages(method, batch, {**estimates, **behind}, memory.get("advantage"))
        batch = replace(batch, advantage=advantages.advantage)
    with phases.phase("weights"):
        weights = token_weights(method, batch)
        if advantages.times is not None:
            weights = weights * advantages.times
    terms, remembered = entropy_terms(method, batch, memory.get("regulariser"))
    heads = dict(estimates)
    for name, (target, mask) in advantages.targets.items():
        heads |= {f"{name}_target": target, f"{name}_mask": mask.to(target.dtype)}
        if name in estimates:
            metrics[f"{name}_explained_variance"] = _explained_variance(estimates[name], target, mask)
    examples = _examples(selected, batch, weights, torch.stack(terms, dim=-1), heads)
    if advantages.times is not None:  # episodes that are there for what they tell of others
        counted = batch.per_trajectory(advantages.times) > 0
        examples = [example for example, wanted in zip(examples, counted.tolist(), strict=True) if wanted]
        kept = kept.clone().masked_scatter_(kept, counted)
    kept_memory = {"advantage": advantages.state, "regulariser": remembered}
    metrics |= {f"{slot}_{key}": value for slot, state in kept_memory.items() for key, value in state.items()}
    return Iteration(number, collected, examples, kept.numpy(), metrics, whole, kept_memory)


def minibatches(
    examples: list[Example], config: Config, seed: int, iteration: int, passes: Iterable[int] | None = None
) -> list[list[Example]]:
    """The examples in the order of all passes, cut into minibatches; each pass is shuffled by a draw of its number.

    A last minibatch of less than half the size joins the one before it. ``passes``: their numbers, if not those of
    ``train.passes``.
    """
    size, result = config.train.minibatch, []
    for number in range(config.train.passes) if passes is None else passes:
        order = generator(seed, "minibatches", iteration, number).permutation(len(examples))
        pieces = [order[i : i + size] for i in range(0, len(order), size)]
        if len(pieces) > 1 and len(pieces[-1]) < size / 2:
            pieces[-2:] = [np.concatenate(pieces[-2:])]
        result += [[examples[i] for i in piece] for piece in pieces]
    return result


def _estimates(
    trajectories: Trajectories, estimate: Estimate, tokens_per_forward: int, asked: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The heads' columns over all tokens, 0 where not trainable; and behind the last ones.

    The second are ``<name>_behind`` of the names asked for, one number per episode: of the state behind the last token
    where the episode was cut off, 0 elsewhere. A head reads them where the next response would begin, as it reads the value
    of any response's first token: what is collected for that is ``closing``.
    """
    flat, trainable, tokens = dict[str, Tensor](), trajectories.trainable, len(trajectories.input_ids)
    more = np.isin(trajectories.episodes["end_reason"], CUT_OFF) & bool(asked)
    for batch in length_batches(trajectories.lengths + more, tokens_per_forward):
        sequences, wanted, index = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
        for e in batch:
            span = np.arange(trajectories.offsets[e], trajectories.offsets[e + 1])
            ids, chosen = trajectories.input_ids[span], trainable[span]
            # Which token is put behind the last does not matter: what predicts it has not seen it.
            sequences.append(np.append(ids, ids[-1:]) if more[e] else ids)
            wanted.append(np.append(chosen, True) if more[e] else chosen)
            index += [span[chosen], np.array([tokens + e] if more[e] else [], dtype=span.dtype)]
        places = torch.from_numpy(np.concatenate(index))
        for name, values in estimate(sequences, wanted).items():
            column = flat.setdefault(name, torch.zeros(tokens + len(trajectories)))
            column[places] = values.float().cpu()
    columns = {name: column[:tokens] for name, column in flat.items()}
    return columns, {f"{name}_behind": flat[name][tokens:] for name in asked}


def _examples(
    trajectories: Trajectories, batch: TokenBatch, weight: Tensor, terms: Tensor, heads: dict[str, Tensor]
) -> list[Example]:
    columns = {
        "role": batch.role,
        "logprob": batch.logprob,
        "ref_logprob": batch.ref_logprob,
        "advantage": batch.advantage,
        "weight": weight,
        "entropy_terms": terms,
        "noise": batch.noise,
    }
    result, everywhere = [], trajectories.trainable
    for name, values in {**columns, **heads}.items():
        if name != "entropy_terms":  # bounds of an entropy may be infinite
            require_finite(f"{name} of a token", values[torch.from_numpy(everywhere)])
    for episode in range(len(trajectories)):
        span = slice(int(trajectories.offsets[episode]), int(trajectories.offsets[episode + 1]))
        trainable = everywhere[span]
        mask = torch.from_numpy(trainable)
        result.append(
            Example(
                ids=trajectories.input_ids[span],
                trainable=trainable,
                **{name: values[span][mask] for name, values in columns.items()},
                heads={name: values[span][mask] for name, values in heads.items()},
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
        before = (batch.parent < 0) & batch.regular  # what was sampled before any update, and as it is scored
        metrics["recompute_error"] = float(difference[before[batch.trajectory[batch.trainable]]].abs().max())
    return metrics


def _explained_variance(values: Tensor, targets: Tensor, trainable: Tensor) -> float:
    target = targets[trainable]
    spread = target.var(unbiased=False)
    return float(1 - (target - values[trainable]).var(unbiased=False) / spread) if spread > 0 else 0.0


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0
