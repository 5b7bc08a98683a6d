"""Networks beside the policy that a method declares: value functions, and Q with its target network.

One interface for all: ``estimate`` before the update, ``loss`` in it, ``after_step`` behind each step. What a method
declares is in its advantage's settings (``estimates.declared_heads``); ``HEADS`` has the class for each kind of settings.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.model.policy import Policy
from pipeline.model.scoring import LOGITS_PER_CHUNK, predicting_hidden
from pipeline.objective.regularisers import value_loss
from pipeline.objective.soft import soft_policy_loss, soft_state
from pipeline.settings.heads import Critic, QFunction

Columns = Mapping[str, Shaped[Tensor, "n ..."]]
"""Of the wanted tokens, by name."""


@dataclass(frozen=True)
class Scene:
    """A few sequences, and the n tokens in them that are wanted."""

    policy: Policy
    reference: Policy
    temperature: float
    """Of sampling."""
    sequences: Sequence[np.ndarray]
    """Token ids."""
    wanted: Sequence[np.ndarray]
    """Masks of the wanted tokens."""
    hidden: Float[Tensor, "n width"]
    """The policy's hidden states at the positions that predict the wanted tokens."""

    @cached_property
    def tokens(self) -> Int[Tensor, " n"]:
        """Ids of the wanted tokens."""
        ids = np.concatenate([s[w] for s, w in zip(self.sequences, self.wanted, strict=True)])
        return torch.from_numpy(ids.astype(np.int64)).to(self.hidden.device)

    @cached_property
    def reference_hidden(self) -> Float[Tensor, "n width"]:
        """The reference policy's hidden states there."""
        with torch.no_grad():
            return predicting_hidden(self.reference, self.sequences, self.wanted)

    def through(self, trunk: nn.Module) -> Float[Tensor, "n width"]:
        """Another trunk's hidden states there."""
        return predicting_hidden(self.policy, self.sequences, self.wanted, backbone=trunk)


class Head(nn.Module):
    """A network that reads the policy's hidden states (kind ``trunk``) or has a trunk of its own (``model``)."""

    def __init__(self, name: str, settings: Critic | QFunction, reference: Policy) -> None:
        super().__init__()
        self.name, self.settings = name, settings
        self.trunk = (
            copy.deepcopy(reference.backbone).float().requires_grad_(True) if settings.kind == "model" else None
        )

    def estimate(self, scene: Scene) -> dict[str, Float[Tensor, " n"]]:
        """What the advantage is told of the wanted tokens; called without gradient."""
        raise NotImplementedError

    def loss(self, scene: Scene, columns: Columns, train_trunk: bool) -> Float[Tensor, " n"]:
        """Loss per wanted token; ``columns`` holds ``<name>_target``, and what ``estimate`` gave before the update."""
        raise NotImplementedError

    def soft_objective(self, scene: Scene) -> Float[Tensor, " n"] | None:
        """A policy loss per wanted token that only this head can give, or None."""
        return None

    def after_step(self) -> None:
        """What follows an optimizer step."""

    def _read(self, scene: Scene, train_trunk: bool = True) -> Float[Tensor, "n width"]:
        if self.trunk is not None:
            return scene.through(self.trunk)
        return scene.hidden if train_trunk else scene.hidden.detach()


class ValueHead(Head):
    """V of the state in which each token is chosen. The linear head starts at zero."""

    def __init__(self, name: str, settings: Critic, reference: Policy) -> None:
        super().__init__(name, settings, reference)
        self.head = _zero_linear(reference.head.weight.shape[1], 1)
        self._clip = settings.clip

    def estimate(self, scene: Scene) -> dict[str, Float[Tensor, " n"]]:
        return {self.name: self._values(self._read(scene))}

    def loss(self, scene: Scene, columns: Columns, train_trunk: bool) -> Float[Tensor, " n"]:
        values = self._values(self._read(scene, train_trunk))
        return value_loss(values, columns[self.name], columns[f"{self.name}_target"], self._clip)

    def _values(self, hidden: Float[Tensor, "n width"]) -> Float[Tensor, " n"]:
        values: Tensor = self.head(hidden.float()).squeeze(-1)
        return values


class QHead(Head):
    """Q over the vocabulary, with a target network that follows by Polyak averages (ETPO, arXiv 2402.06700).

    Estimates: ``taken``, Q of the wanted tokens, and ``soft_value``, the target network's ``V - b KL``. Logits are held a
    chunk at a time, in the backward pass too.
    """

    def __init__(self, name: str, settings: QFunction, reference: Policy) -> None:
        super().__init__(name, settings, reference)
        self.q = settings
        vocabulary, width = reference.head.weight.shape
        self.head = _zero_linear(width, vocabulary)
        self.target_head = copy.deepcopy(self.head).requires_grad_(False)
        self.target_trunk = None if self.trunk is None else copy.deepcopy(self.trunk).requires_grad_(False)

    def estimate(self, scene: Scene) -> dict[str, Float[Tensor, " n"]]:
        followed = scene.hidden if self.target_trunk is None else scene.through(self.target_trunk)
        policy, reference = scene.policy.logits, scene.reference.logits

        def soft(own: Tensor, ref: Tensor, target: Tensor) -> Tensor:
            state = soft_state(policy(own), reference(ref), self.target_head(target.float()), scene.temperature)
            return state.value - self.q.kl_weight * state.kl

        return {
            "taken": self._taken(self._read(scene), scene.tokens),
            "soft_value": _chunked(soft, len(scene.policy.head.weight), scene.hidden, scene.reference_hidden, followed),
        }

    def loss(self, scene: Scene, columns: Columns, train_trunk: bool) -> Float[Tensor, " n"]:
        """Huber loss of ``y - Q(x, w)``."""
        taken, target = self._taken(self._read(scene, train_trunk), scene.tokens), columns[f"{self.name}_target"]
        return F.huber_loss(taken, target, reduction="none", delta=self.q.huber_delta)

    def soft_objective(self, scene: Scene) -> Float[Tensor, " n"]:
        with torch.no_grad():
            read = self._read(scene)
        policy, reference = scene.policy.logits, scene.reference.logits

        def loss(own: Tensor, ref: Tensor, mine: Tensor) -> Tensor:
            with torch.no_grad():
                ref_logits, q = reference(ref), self.head(mine.float())
            return soft_policy_loss(policy(own), ref_logits, q, scene.temperature, self.q.kl_weight)

        return _chunked(loss, len(scene.policy.head.weight), scene.hidden, scene.reference_hidden, read)

    @torch.no_grad()
    def after_step(self) -> None:
        online = [*self.head.parameters(), *(self.trunk.parameters() if self.trunk is not None else ())]
        trunk = () if self.target_trunk is None else self.target_trunk.parameters()
        for slow, fast in zip([*self.target_head.parameters(), *trunk], online, strict=True):
            slow.lerp_(fast, 1 - self.q.polyak)

    def _taken(self, hidden: Float[Tensor, "n width"], tokens: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        return (hidden.float() * self.head.weight[tokens]).sum(-1) + self.head.bias[tokens]


HEADS: dict[type[Any], Callable[..., Head]] = {Critic: ValueHead, QFunction: QHead}


def make_heads(settings: Mapping[str, Critic | QFunction], reference: Policy) -> list[Head]:
    """The heads that a method declares."""
    return [HEADS[type(section)](name, section, reference) for name, section in settings.items()]


def _zero_linear(width: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(width, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _chunked(function: Callable[..., Tensor], vocabulary: int, *rows: Tensor) -> Float[Tensor, " n"]:
    """A function of rows, so many rows at a time that no more than a chunk's logits are held at once."""
    size = max(1, LOGITS_PER_CHUNK // (4 * vocabulary))
    pieces = zip(*(column.split(size) for column in rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([function(*piece) for piece in pieces])
    return torch.cat([checkpoint(function, *piece, use_reentrant=False) for piece in pieces])
