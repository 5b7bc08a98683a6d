"""What a policy is: a causal language model with its tokenizer, saved as a Hugging Face directory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pipeline.model.shards import whole
from pipeline.workspace.files import replacing
from pipeline.workspace.manifest import write_manifest


@dataclass(frozen=True)
class Policy:
    """A causal language model and its tokenizer."""

    model: Any
    tokenizer: Any
    computing: torch.dtype | None = None
    """Precision of the trunk's matrix products and of logits, where it is below that of the weights; the engine has none."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def backbone(self) -> torch.nn.Module:
        """The model without its output head: token ids to hidden states."""
        backbone: torch.nn.Module = self.model.base_model
        return backbone

    @property
    def head(self) -> torch.nn.Linear:
        """The output head: hidden states to logits."""
        head: torch.nn.Linear = self.model.get_output_embeddings()
        return head

    @property
    def cap(self) -> float | None:
        """What soft-caps the output head's logits (Gemma 2), if anything."""
        cap: float | None = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return cap

    def logits(
        self, hidden: Float[Tensor, "n width"], linear: Callable[[Tensor, Any], Tensor] | None = None
    ) -> Float[Tensor, "n v"]:
        """Of last hidden states; in their precision, or float32 if they are capped. ``linear`` is as in ``trunk``."""
        product = F.linear(hidden, *weights_for(hidden, self.head)) if linear is None else linear(hidden, self.head)
        return soft_capped(product, self.cap)

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a response: those of the generation settings, and the tokenizer's own."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        named = configured if isinstance(configured, list) else [configured]
        return frozenset({*named, self.tokenizer.eos_token_id} - {None})

    def frozen_copy(self) -> Policy:
        """An independent copy without gradients; weights that are frozen already are shared with it."""
        shared = {id(weight): weight for weight in self.model.parameters() if not weight.requires_grad}
        return Policy(copy.deepcopy(self.model, shared).eval().requires_grad_(False), self.tokenizer)

    def autocast(self) -> torch.autocast:
        """Inside, matrix products are in the precision ``computing``; norms, sums and what is added up stay in float32."""
        return torch.autocast(self.device.type, self.computing, enabled=self.computing is not None)

    @torch.no_grad()
    def follow(self, other: Policy) -> None:
        """Take over the weights of a policy of the same shape, rounded to the precision of these."""
        for own, weight in zip(self.model.parameters(), other.model.parameters(), strict=True):
            own.copy_(whole(weight))

    def save(self, directory: Path) -> None:
        """Write weights (safetensors), configuration, tokenizer and a list of their checksums; equal policies give equal bytes.

        An existing directory is replaced at the end, so that an interrupted save leaves it as it was.
        """
        with replacing(directory) as partial:
            self.model.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
            write_manifest(partial)


def soft_capped(logits: Float[Tensor, "*n"], cap: float | None) -> Float[Tensor, "*n"]:
    """``cap tanh(logits / cap)`` in float32, or the logits themselves without a cap."""
    return logits if cap is None else (logits.float() / cap).tanh() * cap


def weights_for(hidden: Float[Tensor, "n width"], head: torch.nn.Linear) -> tuple[Tensor, Tensor | None]:
    """A head's weight and bias in the precision of the hidden states that it makes logits of; differentiable."""
    return head.weight.to(hidden.dtype), None if head.bias is None else head.bias.to(hidden.dtype)
