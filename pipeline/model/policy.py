"""What a policy is: a causal language model with its tokenizer, saved as a Hugging Face directory."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.workspace.files import replacing


@dataclass(frozen=True)
class Policy:
    """A causal language model and its tokenizer."""

    model: Any
    tokenizer: Any

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
    def ends(self) -> frozenset[int]:
        """Tokens that end a response: those of the generation settings, and the tokenizer's own."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        named = configured if isinstance(configured, list) else [configured]
        return frozenset({*named, self.tokenizer.eos_token_id} - {None})

    def frozen_copy(self) -> Policy:
        """An independent copy without gradients."""
        return Policy(copy.deepcopy(self.model).eval().requires_grad_(False), self.tokenizer)

    def save(self, directory: Path) -> None:
        """Write weights (safetensors), configuration and tokenizer; equal policies give equal bytes.

        An existing directory is replaced at the end, so that an interrupted save leaves it as it was.
        """
        with replacing(directory) as partial:
            self.model.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
