"""One iteration of training on one screen: collect, annotate, filter, advantages, weights, update."""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from pipeline.energy.annotate import with_entropies
from pipeline.evaluation.evaluate import summary
from pipeline.objective.batch import TokenBatch, token_batch
from pipeline.objective.estimates import AdvantageEstimate
from pipeline.objective.filters import group_deviation
from pipeline.objective.methods import entropy_terms, select_groups, shape_rewards, token_advantages, token_weights
from pipeline.progress.display import span
from pipeline.rollout.forest import branches_by_role
from pipeline.settings.method import Method
from pipeline.settings.train import Train
from pipeline.training.budget import Rows
from pipeline.training.checks import require_recomputed, require_version
from pipeline.training.collection import Collection
from pipeline.training.correcting import corrected
from pipeline.training.gradients import gradient_share
from pipeline.training.tokens import TokenTable, token_table
from pipeline.training.update import Learner, averages, update
from pipeline.training.update_kl import UpdateKL, measures_update_kl
from pipeline.trajectories.repetition import repetition
from pipeline.trajectories.trajectory import Role, Trajectories
from pipeline.workspace.randomness import generator

Memory = Mapping[str, Mapping[str, float]]
"""What adaptive slots keep from one iteration for the next, by slot; part of a checkpoint."""

UPDATES = 0.7, 1.0
"""About which part of an iteration they are; it is only for telling how far it is."""

LEAST_RETURN = 0.01
"""A root mean square of returns counts as so much, where it is less: those of an iteration without any success."""

NOTHING = TokenTable(torch.zeros(0, dtype=torch.long), {})
"""What is trained on where no group has passed the filter."""


@dataclass(frozen=True)
class Iteration:
    """What an iteration leaves."""

    episodes: Trajectories
    """All that were collected, annotated."""
    table: TokenTable
    """The tokens that the last round was trained on."""
    minibatches: Sequence[np.ndarray]
    """Its updates, by the indices of their trajectories in the table, pass by pass."""
    metrics: Mapping[str, float]
    memory: Memory
    """For the next iteration."""


def run_iteration(collection: Collection, learner: Learner, optimizer: Any, memory: Memory, curve: Rows) -> Iteration:
    """Collect episodes, and update the policy with them; ``memory`` and ``curve`` are those of the iterations before.

    There is one round, or two where branches are placed by how the policy has moved: a pass over the initial ones moves it.
    """
    config, method, phases = learner.config, learner.method, collection.phases
    number, updates, earlier = len(curve), list[dict[str, float]](), frozenset[str]()
    for waves in collection.collect(number, curve[-1]["entropy"] if curve else 0.0):
        episodes = collection.annotate(waves)
        rescored = collection.rescored(episodes)
        episodes = with_entropies(episodes, rescored.entropy)

        everything = _token_batch(collection, rescored, number)
        passed = select_groups(method, everything)
        metrics = _collection_metrics(method, rescored, everything, passed)
        metrics["sampling_error"] = _sampling_error(collection, episodes, earlier, metrics, curve)
        metrics |= _sampler_metrics(collection, episodes, rescored, number)
        earlier = frozenset(episodes.episodes["episode_id"])
        kept, table, minibatches, remembered = np.flatnonzero(passed), NOTHING, list[np.ndarray](), memory
        if not len(kept):
            continue
        chosen = rescored.select(kept)
        batch = shape_rewards(method, _token_batch(collection, chosen, number))

        with phases.phase("values"), span("values", UPDATES[0], UPDATES[0]):
            values, behind = learner.estimates(chosen)
        with phases.phase("advantages"):
            estimate = token_advantages(method, batch, values | behind, memory.get("advantage"))
            batch = replace(batch, advantage=estimate.advantage)
        with phases.phase("weights"):
            weight = token_weights(method, batch)
        terms, state = entropy_terms(method, batch, memory.get("regulariser"))
        remembered = {"advantage": estimate.state, "regulariser": state}
        metrics |= _explained_variances(values, estimate) | _sizes(values, batch)
        metrics |= {f"{slot}_{key}": value for slot, own in remembered.items() for key, value in own.items()}

        table = token_table(episodes, kept, batch, values, estimate, weight, terms)
        table, touched = corrected(table, episodes, rescored, config)
        metrics |= touched
        whole = len(episodes) == config.rollout.groups * config.rollout.group_size
        minibatches = shuffled(len(table), config.train, collection.seed, number, whole)
        if minibatches and whole and number % config.train.validate_every == 0:
            with phases.phase("gradients"), span("measuring gradients", UPDATES[0], UPDATES[0]):
                draws = generator(collection.seed, "gradients", number)
                metrics |= gradient_share(learner.whole, table.select(minibatches[0]), draws)
        with phases.phase("update"), span("updates:", *UPDATES):
            watched = _watched(collection, learner, table, number)
            for rows in _told(minibatches):
                skipped = _skipped_in_a_row(updates, curve)
                updates.append(update(learner, optimizer, table.select(rows), number, skipped))
                with phases.phase("update_kl"):
                    updates[-1] |= watched.after_update() if watched else {}

    metrics |= averages(updates) | {"updates": float(len(updates))}
    if skipped := _skipped_in_a_row(updates, curve):
        metrics["skipped_in_a_row"] = float(skipped)
    if learner.heads:  # what they cost in memory
        metrics["head_parameters"] = float(sum(p.numel() for head in learner.heads for p in head.parameters()))
    return Iteration(episodes, table, minibatches, metrics, remembered)


def update_columns(iteration: Iteration, learner: Learner) -> dict[str, np.ndarray]:
    """What the updates have made of all tokens that an iteration has collected; of several passes the last c_t.

    Returns:
        ``advantage`` A_t, ``weight`` of the weight slot and ``coefficient`` c_t, after aggregation: float32 (N,), NaN where
        nothing was trained (prompts, observations, forced tokens, episodes that the filter dropped).
    """
    names, count = ("advantage", "weight", "coefficient"), len(iteration.episodes.input_ids)
    found = {name: np.full(count, np.nan, dtype=np.float32) for name in names}
    for rows in iteration.minibatches:
        minibatch = learner.with_coefficients(iteration.table.select(rows))
        for name, column in found.items():
            column[minibatch["place"].numpy()] = minibatch[name].float().numpy()
    return found


def shuffled(count: int, train: Train, seed: int, iteration: int, whole: bool = True) -> list[np.ndarray]:
    """Trajectories in the order of all passes, cut into minibatches; each pass is shuffled by a draw of its number.

    A last minibatch of less than half the size joins the one before it. Where not the ``whole`` iteration is there yet,
    but for its branches, it has one pass, with a number of its own.
    """
    result = list[np.ndarray]()
    for number in range(train.passes) if whole else [train.passes]:
        order = generator(seed, "minibatches", iteration, number).permutation(count)
        pieces = [order[i : i + train.minibatch] for i in range(0, count, train.minibatch)]
        if len(pieces) > 1 and len(pieces[-1]) < train.minibatch / 2:
            pieces[-2:] = [np.concatenate(pieces[-2:])]
        result += pieces
    return result


def _watched(collection: Collection, learner: Learner, table: TokenTable, number: int) -> UpdateKL | None:
    """What tells how far each update of an iteration moves the policy, where that is measured."""
    if not len(table) or not measures_update_kl(learner, number):
        return None
    with collection.phases.phase("update_kl"):
        return UpdateKL(learner, table, generator(collection.seed, "update kl", number))


def _skipped_in_a_row(updates: Rows, curve: Rows) -> int:
    """How many updates were not finite since the last one that was, those of the iterations before among them."""
    in_a_row = list(takewhile(lambda row: row.get("non_finite_losses", 0.0), reversed(updates)))
    before = curve[-1].get("skipped_in_a_row", 0.0) if curve and len(in_a_row) == len(updates) else 0.0
    return len(in_a_row) + int(before)


def _told(minibatches: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """One after the other, while it is told how many are done."""
    for index, rows in enumerate(minibatches):
        with span(f"{index} of {len(minibatches)} done,", index / len(minibatches), (index + 1) / len(minibatches)):
            yield rows


def _token_batch(collection: Collection, trajectories: Trajectories, number: int) -> TokenBatch:
    """What the slots see, each time with the same draws."""
    draws = generator(collection.seed, "slots", number)
    return token_batch(trajectories, draws, number, collection.config.rollout.temperature)


def _sampling_error(
    collection: Collection, episodes: Trajectories, earlier: Container[str], metrics: Mapping[str, float], curve: Rows
) -> float:
    """How many logits the episodes that are not of an ``earlier`` round are off from what the policy gives.

    Raises:
        NumericsError: that is not rounding (see ``require_recomputed``), or another version of the weights has sampled.
    """
    fresh = [row for row, name in enumerate(episodes.episodes["episode_id"]) if name not in earlier]
    fresh_episodes = episodes.select(fresh)
    require_version(fresh_episodes, len(curve), collection.config.train.asynchronous)
    found = collection.agreement(fresh_episodes, len(curve))
    first = curve[0]["sampling_error"] if curve else None
    everywhere = collection.config.rollout.temperature * metrics.get("recompute_error", 0.0)
    require_recomputed(found, collection.reference.model.dtype, first, everywhere)
    return found.error


def _sampler_metrics(
    collection: Collection, sampled: Trajectories, rescored: Trajectories, number: int
) -> dict[str, float]:
    """What sampling has in another way than the update, over tokens: mean and largest size.

    ``sampler_difference`` is between log-probabilities of sampling and those that ratios are of, in nats. ``weights_age``,
    where episodes are sampled ahead, is how many iterations the policy has been updated for since it sampled a token.
    """
    tokens, found = sampled.trainable, dict[str, np.ndarray]()
    if collection.mixed or collection.ahead is not None:
        found["sampler_difference"] = np.abs(sampled.logprob - rescored.logprob)[tokens]
    if collection.ahead is not None:
        ages = number - np.array(sampled.episodes["policy_version"])
        found["weights_age"] = ages[sampled.token_episode][tokens]
    return {
        f"{name}{end}": float(of(values))
        for name, values in found.items()
        for end, of in (("", np.mean), ("_largest", np.max))
    }


def _collection_metrics(
    method: Method, trajectories: Trajectories, batch: TokenBatch, passed: Bool[Tensor, " e"]
) -> dict[str, float]:
    """What is told of all episodes of an iteration."""
    deviation = group_deviation(batch.returns, batch.group)
    difference = (batch.logprob - batch.ref_logprob)[batch.trainable]
    entropy = torch.from_numpy(trajectories.entropy)
    metrics = summary(trajectories) | {
        "entropy": float(entropy[batch.trainable].mean()),
        "entropy_action": _mean(entropy[batch.of(Role.ACTION)]),
        "entropy_reasoning": _mean(entropy[batch.of(Role.REASONING)]),
        "kl_reference": float(difference.mean()),
        "zero_variance_groups": float((deviation == 0).sum()),
        "kept_trajectories": float(passed.sum()),
        "episodes": float(len(trajectories)),
        "tokens": float(batch.trainable.sum()),
        "repetition": repetition(trajectories),
    }
    if trajectories.episodes["iteration"][0] == 0:
        before = (batch.parent < 0) & batch.regular  # what was sampled before any update, and as it is scored
        metrics["recompute_error"] = float(difference[before[batch.trajectory[batch.trainable]]].abs().max())
    if method.branching.kind != "none":
        metrics |= {f"branches_{role}": count for role, count in branches_by_role(trajectories).items()}
    return metrics


def _explained_variances(values: Mapping[str, Tensor], estimate: AdvantageEstimate) -> dict[str, float]:
    """Share of the targets' variance that each head has foreseen; 0 where they do not vary."""
    result = {}
    for name, (target, mask) in estimate.targets.items():
        if name in values:
            error, spread = (target - values[name])[mask].var(unbiased=False), target[mask].var(unbiased=False)
            result[f"{name}_explained_variance"] = float(1 - error / spread) if spread > 0 else 0.0
    return result


def _sizes(values: Mapping[str, Tensor], batch: TokenBatch) -> dict[str, float]:
    """How large the heads' estimates are against the returns, by root mean squares."""
    returns = max(LEAST_RETURN, float(batch.returns.square().mean().sqrt()))
    return {
        f"{name}_to_return": float(column[batch.trainable].double().square().mean().sqrt()) / returns
        for name, column in values.items()
    }


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0
