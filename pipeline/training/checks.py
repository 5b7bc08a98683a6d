"""What ends a training: log-probabilities that are not those of the policy (invariant 1), and numbers that are not finite."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from pipeline.model.shards import own_part
from pipeline.trajectories.trajectory import Trajectories
from pipeline.workspace.finite import NumericsError, require_finite

BOUNDS = {torch.float32: (1e-4, 1e-4), torch.float16: (4e-3, 0.06), torch.bfloat16: (0.03, 0.4)}
"""Largest error of an episode that passes for rounding, in logits, by the policy's precision: at least, and at most.

Between them ``GROWTH`` times what a training's first iteration, which cannot be stale, has shown on its own model and
device. Measured between sampling from a cache and scoring whole sequences: trained policies of 1 and 4 layers at most 9e-7
in float32, 0.0013 in float16 and 0.010 in bfloat16; random ones of 24 layers with 4.6 nats of entropy, the worst there
was, 9e-6, 0.011 and 0.075.
"""
GROWTH = 3.0
LARGEST = 1e-3
"""Largest difference of any float32 log-probability, times the temperature, that a training starts with."""
SHARPER = 0.05
"""Largest factor, less 1, between 1 / temperature of sampling and of scoring: a temperature of 0.9 for 1 makes 0.11."""
ONE_OF = 64
"""Of so many episodes one is drawn; the longest is looked at in any case, as what is stale shows in late turns."""
LEAST_MOVABLE, LEAST_TOKENS, ERRORS = 0.1, 20, 4.0


class Agreement(NamedTuple):
    """How far sampled log-probabilities are from recomputed ones."""

    error: float
    """An error e of a token's logit changes its log-probability by ``(1 - p) e / temperature``. Root mean square of the
    differences in an episode, times the temperature, over that of ``max(1 - p, 0.1)``; the largest of the episodes."""
    sharper: float
    """By which factor, less 1, logits have been larger in sampling than in scoring; 0 as far as it is within four standard
    errors, or there are fewer than 20 tokens."""


def recomputed(
    episodes: Trajectories,
    score: Callable[[Trajectories, float], list[np.ndarray]],
    draws: np.random.Generator,
    everything: bool = False,
) -> Agreement:
    """Score a few episodes again, or ``everything``, and compare; of branches the tokens behind the split.

    ``score`` gives log-probability and entropy of every sampled token of some episodes at a temperature, under the policy
    as it is.
    """
    if not len(episodes):
        return Agreement(0.0, 0.0)
    count, temperatures = len(episodes), np.array(episodes.episodes["temperature"], dtype=np.float64)
    drawn = draws.permutation(count)[: count if everything else max(1, count // ONE_OF)]
    chosen = sorted({int(episodes.lengths.argmax()), *drawn.tolist()})
    errors, sharper = [0.0], [0.0]
    for temperature in sorted({float(temperatures[row]) for row in chosen}):
        some = episodes.select([row for row in chosen if temperatures[row] == temperature])
        tokens = some.trainable
        now, entropy = (column[tokens].astype(np.float64) for column in score(some, temperature)[:2])
        difference, owner = some.logprob[tokens] - now, some.token_episode[tokens]
        movable = np.bincount(owner, np.maximum(LEAST_MOVABLE, 1 - np.exp(now)) ** 2)
        squares = np.bincount(owner, (temperature * difference) ** 2)
        errors += np.sqrt(squares[movable > 0] / movable[movable > 0]).tolist()
        sharper.append(_sharper(difference, now + entropy))
    return Agreement(float(np.max(errors)), float(max(sharper, key=abs)))  # np.max: NaN, if one of them is


def _sharper(difference: np.ndarray, surprise: np.ndarray) -> float:
    """Slope of the differences by ``log p + entropy``, which is how log-probabilities change as logits grow."""
    spread = float(np.square(surprise).sum())
    if len(difference) < LEAST_TOKENS or spread == 0:
        return 0.0
    slope = float((difference * surprise).sum()) / spread
    error = np.sqrt(np.square(difference - slope * surprise).sum() / (len(difference) - 1) / spread)
    return float(np.sign(slope) * max(0.0, abs(slope) - ERRORS * error))


def require_recomputed(found: Agreement, dtype: torch.dtype, first: float | None, everywhere: float = 0.0) -> None:
    """Refuse episodes that another policy than this one has sampled.

    Args:
        found: see ``recomputed``.
        dtype: of the weights that are sampled from.
        first: error in the training's first iteration; None in that one.
        everywhere: largest difference from the reference policy's log-probabilities, which it still has, in logits.

    Raises:
        NumericsError: an error is above the precision's bound, or the temperature another one.
    """
    said = "sampled tokens do not have the log-probabilities that the policy gives them"
    least, most = BOUNDS[dtype]
    bound = most if first is None else min(most, max(least, GROWTH * first))
    if not found.error <= bound:
        raise NumericsError(
            f"{said}: they differ by {found.error:.2g} logits, and at most {bound:.2g} is rounding in "
            f"{str(dtype).removeprefix('torch.')}; the engine samples from other weights, from a cache of other weights, or at "
            "another temperature"
        )
    if dtype == torch.float32 and not everywhere <= LARGEST:
        raise NumericsError(f"{said}: one differs by {everywhere:.2g} from the reference policy's, which it still is")
    if not abs(found.sharper) <= SHARPER:
        raise NumericsError(
            f"{said}: logits were {1 + found.sharper:.3g} times as large in sampling; its temperature is another"
        )


def require_version(episodes: Trajectories, version: int, older: int = 0) -> None:
    """Refuse episodes that the engine has not sampled after it was given the weights of a version, or of at most so many
    ``older`` ones.

    Raises:
        NumericsError: some carry another version.
    """
    others = sorted(set(episodes.episodes["policy_version"]) - {*range(version - older, version + 1)})
    if others:
        raise NumericsError(
            f"the engine samples from other weights: of version {', '.join(map(str, others))}, and the policy has {version}"
        )


def require_finite_training(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, metrics: Mapping[str, float]
) -> None:
    """Refuse to go on from weights, optimizer states or metrics that are not finite.

    Raises:
        NumericsError: one of them is not; nothing of its iteration may be kept.
    """
    for name, weight in module.state_dict().items():
        require_finite(name, own_part(weight))
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            require_finite(f"the optimizer's {key} of {names[parameter]}", own_part(value))
    for name, number in metrics.items():
        require_finite(name, number)
