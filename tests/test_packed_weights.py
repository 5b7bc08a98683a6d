"""Sampling's arranged weights give what the usual product gives, adapters included; where they do not pay, nothing changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.model import packed_weights
from pipeline.model.adapters import is_adapted
from pipeline.model.packed_weights import PackedWeights
from pipeline.model.policy import Policy
from pipeline.model.shared_prefixes import LEAST_WIDTH
from pipeline.model.trunk import project, projections
from pipeline.rollout.engine import Request, Sampling
from pipeline.rollout.transformers_engine import TransformersEngine
from tests.engine_cases import assert_scored_by_a_fresh_forward
from tests.test_acceptance import GROUPED, TOKENIZER, random_model
from tests.test_adapters import moved

WIDE = {**GROUPED, "hidden_size": LEAST_WIDTH, "intermediate_size": 320}
BIASED = {"attention_bias": True, "mlp_bias": True}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", WIDE),
    "llama with biases": ("llama", {**WIDE, **BIASED}),
    "qwen2": ("qwen2", WIDE),
    "qwen3": ("qwen3", WIDE),
}


def wide_policy(kind: str, adapted: bool) -> Policy:
    policy = Policy(random_model(*KINDS[kind]), TOKENIZER)
    with torch.no_grad():
        for weight in policy.model.parameters():  # logits of a few units, as in a smaller model
            weight.mul_(0.3 if weight.dim() > 1 else 1)
    return moved(policy) if adapted else policy


def linears(policy: Policy) -> list[Any]:
    return [*(p for layer in policy.backbone.layers for p in projections(layer)), policy.head]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_product_is_the_usual_one(kind: str, adapted: bool, dtype: torch.dtype) -> None:
    """For any number of rows, whatever number was meant."""
    policy = wide_policy(kind, adapted)
    policy.model.to(dtype)
    packed = PackedWeights(policy, 32)
    maps = linears(policy)
    for linear in maps:
        for rows in (1, 7, 32, 300):
            x = torch.randn(rows, linear.in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)
            with torch.no_grad():
                usual = project(x, linear)
            tolerance = 1e-5 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(packed(x, linear), usual, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("kind", ["llama with biases", "qwen3"])
def test_an_engine_samples_from_the_weights_there_are(kind: str, adapted: bool) -> None:
    """Prompts, single tokens and turns; and again after the weights, or their adapters, have changed."""
    policy = wide_policy(kind, adapted)
    engine, draws = TransformersEngine(policy, 4), np.random.default_rng(0)
    assert engine._linear._packed
    before = None
    for _ in range(2):
        prefixes = [draws.integers(3, 250, length).tolist() for length in (17, 3, 40, 3, 9)]
        requests = [Request(prefix, draws.random(6)) for prefix in prefixes]
        for prefix, answer in zip(prefixes, engine.generate(requests, Sampling(0.8, "</answer>")), strict=True):
            assert_scored_by_a_fresh_forward(policy, prefix, answer, 0.8)
        after = engine.generate([Request([5, 6, 7], np.array([0.5]))], Sampling(1.0, "</answer>"))[0].entropy
        assert after != before
        before = after
        with torch.no_grad():
            for weight in policy.model.parameters():
                if weight.requires_grad or not is_adapted(policy):
                    weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        engine.sync(policy, 1)


@pytest.mark.parametrize("why", ["narrow", "no room", "no oneDNN"])
def test_where_it_does_not_pay_the_usual_product_stays(
    why: str, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes, too."""
    if why != "narrow":
        policy = wide_policy("llama", True)
        assert PackedWeights(policy, 32)._packed
    if why == "no room":
        monkeypatch.setattr(packed_weights, "total_memory", lambda device: 1e6)
    if why == "no oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    packed = PackedWeights(policy, 32)
    assert not packed._packed
    for linear in linears(policy):
        x = torch.randn(3, linear.in_features)
        assert torch.equal(packed(x, linear), project(x, linear))


def test_of_a_model_that_transformers_computes_the_head_alone_is_arranged() -> None:
    policy = Policy(random_model("gpt2", {"hidden_size": LEAST_WIDTH}), TOKENIZER)
    assert list(PackedWeights(policy, 8)._packed) == [policy.head]
    prefix, draws = list(range(3, 30)), np.random.default_rng(0)
    answer = TransformersEngine(policy, 2).generate([Request(prefix, draws.random(5))], Sampling(1.0, "</answer>"))[0]
    assert_scored_by_a_fresh_forward(policy, prefix, answer, 1.0)
