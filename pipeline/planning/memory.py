"""What a device has to hold while an iteration runs on it, item by item."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from pipeline.model.memory import SHARE, UNFUSED, activation_bytes, most_tokens
from pipeline.planning.lengths import Lengths
from pipeline.planning.shapes import Shape
from pipeline.planning.work import PlannedIteration
from pipeline.rollout.key_value_cache import PAGE
from pipeline.settings.params import Config
from pipeline.training.update_kl import ROLES, TOKENS
from pipeline.workspace.errors import UserError

FULL = 0.9
"""Of a device's memory that may be planned with: allocators and libraries want the rest."""
OPTIMIZER = 12
"""Bytes of a trained number besides itself: its gradient and Adam's two moments, float32."""


class Holding(NamedTuple):
    """Bytes by item, of a device that ..."""

    both: dict[str, float]
    """... samples, annotates and trains."""
    sampling: dict[str, float]
    """... samples."""
    training: dict[str, float]
    """... annotates and trains."""


def numbers_bytes(shape: Shape, unfused: bool = True) -> float:
    """Bytes of a number of activations, by ``model.memory.number_size``'s rule."""
    return shape.dtype.itemsize * (UNFUSED if unfused else 1.0)


class Sizes(NamedTuple):
    """What memory decides."""

    slots: int
    """Episodes that are sampled together."""
    budget: int
    """Tokens of a forward pass."""
    recomputes: bool


def sizes(config: Config, environment: str, shape: Shape, memory: float, processor: bool, workers: int) -> Sizes:
    """How large batches are on a device with so many bytes, by the same rules as in a training.

    Raises:
        UserError: not a single episode fits.
    """
    allowed = SHARE * memory / workers
    number, context = numbers_bytes(shape, not processor), config.environments[environment].context_tokens
    budget = config.train.tokens_per_forward
    limit = 1e9 * config.rollout.cache_gigabytes if config.rollout.cache_gigabytes else allowed
    longest = max(section.context_tokens for section in config.environments.values())
    fit = int(limit // page_bytes(shape)) // math.ceil(longest / PAGE)
    if fit < 1:
        raise UserError(
            f"rollout.cache_gigabytes: {limit / 1e9:.3g} GB do not hold the keys and values of an episode of {longest} tokens "
            f"(context_tokens); allowed: {math.ceil(longest / PAGE) * page_bytes(shape) / 1e9:.3g} or more"
        )
    return Sizes(
        min(config.rollout.batch_episodes, fit),
        most_tokens(shape.config, number, allowed) if budget == "auto" else budget,
        activation_bytes(shape.config, context, number) > allowed,
    )


def page_bytes(shape: Shape) -> float:
    """Of a page of the cache: keys and values of ``PAGE`` tokens, in all layers."""
    return float(PAGE * shape.token_numbers * shape.dtype.itemsize)


def cache_bytes(shape: Shape, lengths: Lengths, slots: int) -> float:
    """Keys and values of as many episodes as there are slots, at their full length, in pages.

    Whole pages of a prompt are held once for the members of a group that are sampled together; episodes go on behind it in
    pages of their own.
    """
    chosen = slice(0, slots)
    shared = lengths.prompt[chosen] // PAGE
    own = -(-lengths.whole[chosen] // PAGE) - shared
    first = np.unique(lengths.group[chosen], return_index=True)[1]
    return float(own.sum() + shared[first].sum()) * page_bytes(shape)


def held(iteration: PlannedIteration, spread_over: int = 1) -> Holding:
    """What devices hold; weights, gradients, moments and reference are ``spread_over`` so many of those that train (FSDP)."""
    shape, size, weights = iteration.shape, iteration.shape.dtype.itemsize, float(iteration.shape.parameters)
    sampling = {
        "weights to sample from": size * weights,
        "weights arranged for sampling": float(size * shape.packed) if iteration.packs else 0.0,
        "keys and values": cache_bytes(shape, iteration.lengths, iteration.slots),
    }
    states = {
        "weights": 4 * weights if shape.lora is None else size * weights + 4.0 * shape.trained,
        "gradients and Adam's moments": float(OPTIMIZER * shape.trained),
        "networks beside the policy": iteration.trunks * weights * (4 + OPTIMIZER),
        "reference policy": size * weights if shape.lora is None else 0.0,
    }
    rows = min(len(ROLES) * TOKENS, int(iteration.lengths.sampled.sum()))
    passing = {
        "activations and logits": _activations(iteration),
        "distributions of update KL": 8.0 * rows * shape.config.vocab_size if iteration.processor else 0.0,
    }
    training = {**{name: amount / spread_over for name, amount in states.items()}, **passing}
    both = {**sampling, **training}
    if not shape.copied and spread_over == 1:  # it samples from what is trained
        del both["weights to sample from"]
    return Holding(*({k: v for k, v in part.items() if v} for part in (both, sampling, training)))


def _activations(iteration: PlannedIteration) -> float:
    shape, number = iteration.shape, numbers_bytes(iteration.shape, not iteration.processor)
    tokens = max(int(iteration.lengths.whole.max()), min(iteration.budget, int(iteration.lengths.whole.sum())))
    everything, layers = activation_bytes(shape.config, tokens, number), shape.config.num_hidden_layers
    if not iteration.recomputes:
        return everything
    inputs = number * tokens * shape.config.hidden_size * layers
    return float(everything * 2 / (layers + 1) + inputs)  # of one layer all, of every layer its input
