"""A policy that computes in bfloat16 by autocast, against the same policy in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipeline.model.policy import Policy
from pipeline.model.scoring import TokenScores, predicting_hidden, score_tokens

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=2, head_dim=16, **SHAPE)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SHAPE)),  # rotary, by transformers' own forward
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=64, n_layer=2, n_head=4, n_positions=64)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_scores_and_gradients_are_those_of_float32_but_for_rounding(kind: str) -> None:
    torch.manual_seed(0)
    model: Any = MODELS[kind]().eval()
    draws = np.random.default_rng(0)
    sequences = [draws.integers(50, size=length) for length in (20, 33, 7)]
    wanted = [np.arange(len(ids)) > 2 for ids in sequences]
    tokens = torch.from_numpy(np.concatenate([ids[3:] for ids in sequences]))
    found: dict[Any, tuple[TokenScores, Tensor, Tensor]] = {}
    for computing in (None, torch.bfloat16):
        policy = replace(Policy(model, None), computing=computing)
        hidden = predicting_hidden(policy, sequences, wanted)
        scores = score_tokens(hidden, tokens, policy.head, 0.7)
        model.zero_grad(set_to_none=True)
        (scores.logprob.mean() + 0.1 * scores.entropy.mean()).backward()
        assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {
            torch.float32
        }
        slope = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found[computing] = scores, slope, hidden
    (exact, slope, _), (scores, low, hidden) = found[None], found[torch.bfloat16]
    assert hidden.dtype == torch.bfloat16
    assert 0 < float((scores.logprob - exact.logprob).abs().max()) < 0.15
    assert float(torch.cosine_similarity(slope, low, dim=0)) > 0.999
    # What follows the logits is in float32, whatever they are in.
    raw = policy.logits(hidden).float()
    log = torch.log_softmax(raw / 0.7, dim=-1)
    torch.testing.assert_close(scores.logprob, log.gather(-1, tokens[:, None])[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.entropy, -(log.exp() * log).sum(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.logsumexp, raw.logsumexp(-1), atol=1e-5, rtol=0)
