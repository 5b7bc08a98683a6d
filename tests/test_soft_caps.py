"""Soft caps of logits, in scoring and its written-out backward pass, and wherever else logits are made."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3TextConfig, MistralConfig, PretrainedConfig

from pipeline.model import scoring
from pipeline.model.attention import plain_attention
from pipeline.model.policy import Policy, soft_capped
from pipeline.model.scoring import score_tokens

VOCABULARY = 23


@pytest.mark.parametrize("cap", [0.7, 5.0, 1e4])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_capped_scores_and_their_gradients_equal_those_of_double_precision(
    monkeypatch: pytest.MonkeyPatch, cap: float, temperature: float
) -> None:
    """11 tokens in chunks of 4. A cap far above all logits leaves them."""
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", 4 * VOCABULARY)
    draws = torch.Generator().manual_seed(0)
    head, tokens = torch.nn.Linear(16, VOCABULARY), torch.randint(VOCABULARY, (11,), generator=draws)
    hidden, slopes = torch.randn(11, 16, generator=draws), torch.randn(3, 11, generator=draws)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws))
    exact = [x.detach().double().requires_grad_() for x in (hidden, head.weight, head.bias)]
    hidden.requires_grad_()

    raw = cap * torch.tanh((exact[0] @ exact[1].T + exact[2]) / cap)
    tempered = (raw / temperature).log_softmax(-1)
    entropy = -(tempered.exp() * tempered).sum(-1)
    expected = (tempered.gather(-1, tokens[:, None])[:, 0], entropy, raw.logsumexp(-1))
    sum((s.double() * x).sum() for s, x in zip(slopes, expected, strict=True)).backward()
    actual = score_tokens(hidden, tokens, head, temperature, cap)
    sum((s * x).sum() for s, x in zip(slopes, actual, strict=True)).backward()
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.detach().double(), theirs.detach(), atol=1e-5, rtol=2e-5)
    for mine, theirs in zip((hidden, head.weight, head.bias), exact, strict=True):
        assert float(theirs.grad.abs().max()) > 1e-3
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-4, rtol=2e-5)


@pytest.mark.parametrize("cap", [0.2, None])
def test_a_policys_logits_are_those_of_its_model(cap: float | None) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
    policy = Policy(Gemma2ForCausalLM(Gemma2Config(**shape, **heads, final_logit_softcapping=cap)).eval(), None)
    assert policy.cap == cap
    ids = torch.arange(9)[None]
    with torch.no_grad():
        hidden = policy.backbone(ids).last_hidden_state[0]
        torch.testing.assert_close(policy.logits(hidden), policy.model(ids).logits[0])
        uncapped = torch.nn.functional.linear(hidden, policy.head.weight)
    assert torch.equal(policy.logits(hidden), uncapped) == (cap is None)


def test_a_cap_bounds_logits_and_without_one_they_are_the_same_tensor() -> None:
    logits = torch.linspace(-100, 100, 9, dtype=torch.bfloat16)
    assert soft_capped(logits, None) is logits
    capped = soft_capped(logits, 30.0)
    assert capped.dtype == torch.float32
    assert float(capped.abs().max()) <= 30
    assert bool((capped.diff() > 0).all())


PLAIN = [
    (MistralConfig(sliding_window=None), True),
    (MistralConfig(sliding_window=64, max_position_embeddings=64), True),
    (MistralConfig(sliding_window=63, max_position_embeddings=64), False),
    (Gemma3TextConfig(sliding_window=64, max_position_embeddings=64), True),
    (Gemma3TextConfig(sliding_window=16, max_position_embeddings=64), False),
    (Gemma3TextConfig(sliding_window=16, num_hidden_layers=1, layer_types=["full_attention"]), True),
    (Gemma2Config(sliding_window=64, max_position_embeddings=64, attn_logit_softcapping=50.0), False),
    (Gemma2Config(sliding_window=64, max_position_embeddings=64, attn_logit_softcapping=None), True),
]


@pytest.mark.parametrize(("config", "plain"), PLAIN)
def test_attention_is_plain_without_a_cap_or_a_window_that_a_sequence_can_outgrow(
    config: PretrainedConfig, plain: bool
) -> None:
    assert plain_attention(config) == plain
