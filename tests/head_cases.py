"""Policies and scenes for tests of heads."""

from __future__ import annotations

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipeline.model.policy import Policy

VOCABULARY, WIDTH, TEMPERATURE = 23, 16, 0.8


def tiny_policy(seed: int = 0) -> Policy:
    """One random layer, with logits far from uniform."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.4,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
            eos_token_id=0,
        )
    ).eval()
    return Policy(model, None)


@torch.no_grad()
def shaken(module: torch.nn.Module, seed: int, size: float = 0.2) -> None:
    """Noise on every parameter, so that no two networks are equal."""
    draws = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter += size * torch.randn(parameter.shape, generator=draws, dtype=parameter.dtype)
