"""What would reweighting change? Answered from episodes that are already there, with no new rollouts.

The gradient of a weighted policy-gradient loss is linear in the token weights, and every weight of a grid of (alpha, beta,
tau, signal) is a sum of a few parts: one per role, and for each signal and tau the action tokens' sigmoid. So a group of
episodes needs one backward pass per part, whatever the size of the grid; everything else is arithmetic on these vectors.
Vectors are kept as count sketches (Charikar, Chen and Farach-Colton, 2002): inner products stay what they are up to about
one over the root of their length.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.model.loading import load_trained
from pipeline.model.memory import tokens_per_forward
from pipeline.model.scoring import batches_of, predicting_hidden, score_tokens
from pipeline.objective.batch import TokenBatch, token_batch
from pipeline.objective.estimates import declared_heads
from pipeline.objective.methods import shape_rewards, token_advantages
from pipeline.objective.standardise import z_score
from pipeline.objective.weights import signal_values
from pipeline.progress.display import within
from pipeline.settings.params import Config
from pipeline.settings.weight import ActFocusWeight
from pipeline.trajectories.trajectory import RESPONSE_ROLES, Role, Trajectories
from pipeline.workspace.errors import UserError
from pipeline.workspace.processes import Tell, run_in_processes
from pipeline.workspace.randomness import generator

SKETCH = 2**15
"""Length of a sketched gradient."""
RESAMPLES = 200

FIXED = tuple(role.name.lower() for role in RESPONSE_ROLES)
"""Parts of the gradient that every weight uses, by role."""


class Point(NamedTuple):
    """One point of the grid."""

    alpha: float
    beta: float
    tau: float
    signal: str


@dataclass(frozen=True)
class GroupsTask:
    """Some groups, to be worked on in a process of their own."""

    config: Config
    policy: Path
    groups: list[tuple[Trajectories, np.ndarray]]
    """Episodes of a group, and for each of their tokens the advantage times each part's weight, (N, parts)."""


def grid(alphas: Sequence[float], betas: Sequence[float], taus: Sequence[float], signals: Sequence[str]) -> list[Point]:
    """All combinations; where beta is 0, tau and signal do nothing and one point stands for all."""
    points = [
        Point(a, b, t, s) if b else Point(a, 0.0, taus[0], signals[0])
        for a, b, t, s in itertools.product(alphas, betas, taus, signals)
    ]
    return list(dict.fromkeys(points))


def replay(
    config: Config, policy: Path, table: Trajectories, name: str, points: Sequence[Point], groups: int
) -> dict[str, Any]:
    """Direction, noise and shares of the gradient under every weight of the grid, at the reference policy.

    Args:
        policy: directory of the reference policy, which sampled the annotated table.
        name: key in ``methods``: its reward, advantage, and its weights of tags and malformed text if it has them.
        groups: how many of the table's groups are used, from the first.

    Returns:
        A ``rows`` entry per point: ``cosine_uniform`` of the gradient over all groups with the one under uniform weights,
        ``cosine_many`` of an iteration's worth of groups with the uniform gradient of all others, ``snr`` (see
        ``signal_to_noise``) with its standard error ``snr_error``, and ``share_<role>``: each role's part of the summed
        norms of its groups' gradients.

    Raises:
        UserError: the method needs a network beside the policy, or there are too few groups.
    """
    method = config.methods[name]
    if declared_heads(method.advantage):
        raise UserError(f"methods.{name}: replay has no values for advantage {method.advantage.kind}; name another")
    members = [np.flatnonzero(table.groups == g) for g in range(min(groups, int(table.groups.max()) + 1))]
    if len(members) < 2 * config.rollout.groups:
        raise UserError(f"replay needs at least {2 * config.rollout.groups} groups, there are {len(members)}")
    chosen = table.select(np.concatenate(members))
    batch = shape_rewards(method, token_batch(chosen, generator(0, "replay")))
    advantage = token_advantages(method, batch, {}).advantage
    pairs = list(dict.fromkeys((point.signal, point.tau) for point in points if point.beta))
    parts = (part_weights(batch, pairs) * advantage.unsqueeze(-1)).numpy()
    by_group = np.split(parts, chosen.offsets[np.cumsum([len(own) for own in members])[:-1]])
    work = [(table.select(own), rows) for own, rows in zip(members, by_group, strict=True)]
    size = -(-len(work) // config.workers)
    shares = (work[first : first + size] for first in range(0, len(work), size))
    tasks = {f"part {i}": GroupsTask(config, policy, share) for i, share in enumerate(shares)}
    found = run_in_processes(group_gradients, tasks, config.workers, "replay", config.threads)
    gradients = np.concatenate(list(found.values()))
    weight = method.weight if isinstance(method.weight, ActFocusWeight) else ActFocusWeight(kind="actfocus")
    uniform = gradients[:, : len(FIXED)].sum(1)

    def row(point: Point) -> dict[str, Any]:
        factors = part_factors(point, pairs, weight)
        weighted = np.einsum("gpd,p->gd", gradients, factors)
        return {
            **point._asdict(),
            "cosine_uniform": cosine(weighted.sum(0), uniform.sum(0)),
            "cosine_many": cosine_to_others(weighted, uniform, config.rollout.groups),
            **signal_to_noise(weighted)._asdict(),
            **role_shares(gradients, factors),
        }

    many = cosine_to_others(uniform, uniform, config.rollout.groups)
    return {
        "schema": 1,
        "method": name,
        "groups": len(members),
        "sketch": SKETCH,
        "uniform": {"cosine_many": many, **signal_to_noise(uniform)._asdict()},
        "rows": [row(point) for point in points],
    }


def part_weights(batch: TokenBatch, pairs: Sequence[tuple[str, float]]) -> Float[Tensor, "n parts"]:
    """Per token: 1 in the column of its role, and in the column of each (signal, tau) an action token's sigmoid."""
    columns = [batch.of(role).to(batch.reward.dtype) for role in RESPONSE_ROLES]
    action = batch.of(Role.ACTION)
    for signal, tau in pairs:
        z = z_score(signal_values(batch, signal, action), action) / tau
        columns.append(torch.where(action, torch.sigmoid(z), 0.0))
    return torch.stack(columns, dim=-1)


def part_factors(point: Point, pairs: Sequence[tuple[str, float]], weight: ActFocusWeight) -> np.ndarray:
    """With which factor each part enters: ``sum_p factor_p * part_p`` are ``weights.actfocus_weights`` of the point."""
    think = point.alpha if weight.think_tag_weight is None else weight.think_tag_weight
    malformed = point.alpha if weight.malformed_weight is None else weight.malformed_weight
    fixed = [point.alpha, 1.0, think, weight.answer_tag_weight, malformed]
    return np.array(fixed + [point.beta * (pair == (point.signal, point.tau)) for pair in pairs])


def group_gradients(task: GroupsTask, report: Tell) -> np.ndarray:
    """(groups, parts, SKETCH): sketched gradients of ``sum_t part_t * A_t * log pi_t`` by the policy's parameters."""
    report(0, len(task.groups), "groups")
    config, policy = task.config, load_trained(task.policy, task.config)
    parameters = list(policy.model.parameters())
    length = sum(p.numel() for p in parameters)
    draws = generator(0, "sketch")
    bucket = torch.from_numpy(draws.integers(0, SKETCH, length))
    sign = torch.from_numpy(draws.integers(0, 2, length) * 2 - 1).float()
    result = np.zeros((len(task.groups), task.groups[0][1].shape[1], SKETCH), dtype=np.float32)
    for number, (episodes, parts) in enumerate(task.groups):
        pieces = batches_of(policy, episodes.sequences, tokens_per_forward(config, policy))
        for done, piece in enumerate(pieces):
            within(done / len(pieces))
            own = episodes.select(piece)
            sampled = [own.sampled[own.tokens(e)] for e in range(len(own))]
            hidden = predicting_hidden(policy, own.sequences, sampled)
            tokens = torch.from_numpy(own.input_ids[own.sampled].astype(np.int64)).to(policy.device)
            logprob = score_tokens(hidden, tokens, policy.head, config.rollout.temperature, policy.cap).logprob
            weights = np.concatenate([parts[episodes.tokens(e)] for e in piece])
            factors = torch.from_numpy(weights[own.sampled]).to(logprob)
            for part in range(factors.shape[1]):
                if not bool(factors[:, part].any()):
                    continue
                gradients = torch.autograd.grad(
                    (factors[:, part] * logprob).sum(), parameters, retain_graph=True, materialize_grads=True
                )
                flat = torch.cat([g.reshape(-1).float().cpu() for g in gradients])
                result[number, part] += torch.zeros(SKETCH).index_add_(0, bucket, flat * sign).numpy()
        report(number + 1, len(task.groups), "groups")
    return result


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two vectors; 0 if one is zero."""
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm else 0.0


def cosine_to_others(weighted: np.ndarray, uniform: np.ndarray, size: int) -> float:
    """Mean cosine of the weighted gradient of ``size`` random groups with the uniform one of all other groups."""
    draws, total, found = generator(0, "replay", "batches"), uniform.sum(0), []
    for _ in range(RESAMPLES):
        own = draws.permutation(len(weighted))[:size]
        found.append(cosine(weighted[own].sum(0), total - uniform[own].sum(0)))
    return float(np.mean(found))


class SignalToNoise(NamedTuple):
    """An estimate and its standard error."""

    snr: float
    snr_error: float


def signal_to_noise(gradients: np.ndarray) -> SignalToNoise:
    """``|mean|^2 / variance of the mean`` of a gradient over all groups, from random halves of them.

    Of halves with means a and b, ``a . b`` has the squared norm of the true mean as its expectation, and ``|a - b|^2 / 4``
    the variance of the mean over both; each is averaged over the resamples. About 0 for pure noise, and below it by chance.
    The standard error is a jackknife's over groups, of the same ratio over all halves at once.
    """
    products = gradients.astype(np.float64) @ gradients.T.astype(np.float64)
    draws, half = generator(0, "replay", "halves"), len(gradients) // 2
    signal = noise = 0.0
    for _ in range(RESAMPLES):
        order = draws.permutation(len(gradients))
        side = np.zeros((2, len(gradients)))
        side[0, order[:half]] = side[1, order[half : 2 * half]] = 1 / half
        signal += float(side[0] @ products @ side[1])
        noise += float((side[0] - side[1]) @ products @ (side[0] - side[1])) / 4
    left_out = [_ratio(np.delete(np.delete(products, g, 0), g, 1)) for g in range(len(products))]
    spread = float(np.sum((np.array(left_out) - np.mean(left_out)) ** 2))
    return SignalToNoise(signal / noise if noise else 0.0, math.sqrt(spread * (1 - 1 / len(products))))


def _ratio(products: np.ndarray) -> float:
    """Signal over noise from all pairs of groups; the noise is that of one more group's mean."""
    count, squares = len(products), float(np.trace(products))
    signal = (float(products.sum()) - squares) / (count * (count - 1))
    noise = (squares / count - signal) / (count + 1)
    return signal / noise if noise > 0 else 0.0


def role_shares(gradients: np.ndarray, factors: np.ndarray) -> dict[str, float]:
    """Share of each role in the sum over groups of the norms of the role's gradient."""
    scaled = gradients * factors[:, None]
    by_role = {role: scaled[:, index] for index, role in enumerate(FIXED)}
    by_role["action"] = by_role["action"] + scaled[:, len(FIXED) :].sum(1)
    by_role["tag"] = by_role.pop("think_tag") + by_role.pop("answer_tag")
    norms = {role: float(np.linalg.norm(vectors, axis=1).sum()) for role, vectors in by_role.items()}
    total = sum(norms.values()) or 1.0
    return {f"share_{role}": norm / total for role, norm in norms.items()}
