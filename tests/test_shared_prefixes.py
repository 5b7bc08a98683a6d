"""What sequences have in common at their beginning is computed once, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipeline.energy.annotate import annotate
from pipeline.model import scoring, shared_prefixes
from pipeline.model.policy import Policy
from pipeline.model.scoring import batches_of, length_batches, predicting_hidden
from pipeline.model.shared_prefixes import LEAST_WIDTH, MOST_READ, prefix_batches, shared_tokens, sharing
from pipeline.settings.presets import preset_values
from pipeline.training.module import PolicyGradient
from tests.config_cases import PRESETS, ROOT
from tests.trainings import configured, standing, supervised, unmoved, updated

few_tokens = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=9)
"""Random sequences of three tokens are trees."""
SHAPE: dict[str, Any] = {
    "vocab_size": 3,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MODELS: dict[str, Callable[[], Any]] = {
    "our forward, kernels": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "our forward, PyTorch's attention": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"head_dim": 8})),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SHAPE)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, sliding_window=64)),
}


@cache
def model_of(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def arrays(sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    return [np.array(sequence) for sequence in sequences]


def beginnings(sequences: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Of every token, all up to it."""
    return [tuple(sequence[: t + 1]) for sequence in sequences for t in range(len(sequence))]


@settings(max_examples=200)
@given(few_tokens)
def test_every_beginning_is_computed_once(sequences: list[list[int]]) -> None:
    whole, shared = beginnings(sequences), shared_tokens(arrays(sequences))
    computed = [whole[index] for index in shared.computed]
    assert sorted(shared.computed) == list(shared.computed)
    assert len(computed) == len(set(computed)) == len(set(whole))
    assert [computed[number] for number in shared.source] == whole


@settings(max_examples=200)
@given(few_tokens, st.integers(1, 30))
def test_batches_hold_what_begins_alike_within_the_budget(sequences: list[list[int]], budget: int) -> None:
    batches = prefix_batches(arrays(sequences), budget)
    assert sorted(int(i) for batch in batches for i in batch) == list(range(len(sequences)))
    for batch in batches:
        own = [sequences[i] for i in batch]
        assert len(own) == 1 or len(set(beginnings(own))) <= budget
        assert len(own) == 1 or len(own) * max(map(len, own)) <= MOST_READ * budget
    assert [sequences[i] for batch in batches for i in batch] == sorted(sequences)
    assert len(prefix_batches(arrays(sequences), 1000)) == 1


def test_a_group_stays_together_where_batches_by_length_would_tear_it_apart() -> None:
    prompts = [[1] * 20, [2] * 20]
    sequences = arrays([prompts[i % 2] + [0] * (1 + i // 2) for i in range(8)])
    assert [set(batch) for batch in prefix_batches(sequences, 32)] == [{0, 2, 4, 6}, {1, 3, 5, 7}]
    assert all(len({i % 2 for i in batch}) == 2 for batch in length_batches([len(s) for s in sequences], 48))


@pytest.mark.parametrize("name", PRESETS)
def test_small_policies_from_scratch_keep_the_order_of_their_sums(name: str) -> None:
    """Their results are published; a width from which beginnings are shared comes with new ones."""
    policy = preset_values(name, ROOT)["policy"]
    assert policy["kind"] != "scratch" or policy["hidden_size"] < LEAST_WIDTH


def test_sharing_must_pay() -> None:
    prompt = [1, 2, 1, 2, 1, 2]
    group = arrays([[*prompt, 0], [*prompt, 1]])
    assert sharing(group, LEAST_WIDTH - 1) is None
    assert sharing(group[:1], LEAST_WIDTH) is None
    assert sharing(arrays([[0] * 20, [1] * 20]), LEAST_WIDTH) is None
    assert sharing(arrays([[0] * 20, [0, *[1] * 19]]), LEAST_WIDTH) is None
    found = sharing(group, LEAST_WIDTH)
    assert found is not None
    assert len(found.computed) == 8


def read(policy: Policy, sequences: list[np.ndarray], wanted: list[np.ndarray]) -> list[Tensor]:
    """Hidden states, and the gradients of all parameters of the trunk for a random direction."""
    policy.model.zero_grad()
    hidden = predicting_hidden(policy, sequences, wanted)
    (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in policy.backbone.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=12)
@given(few_tokens, st.integers(0, 99))
def test_gradients_are_those_without_sharing(name: str, sequences: list[list[int]], seed: int) -> None:
    policy, ids = Policy(model_of(name), None), arrays(sequences)
    draws = np.random.default_rng(seed)
    wanted = [(draws.random(len(own)) < 0.7) & (np.arange(len(own)) > 0) for own in ids]
    alone = read(policy, ids, wanted)
    counts: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prefixes, "LEAST_WIDTH", 0)
        patch.setattr(shared_prefixes, "LEAST_SAVED", 0.0)
        count_positions(patch, counts)
        shared = read(policy, ids, wanted)
    assert counts == [len(set(beginnings(sequences)) if len(sequences) > 1 else sequences[0])]
    assert len(alone) > 10 or not any(map(np.any, wanted))
    for ours, theirs in zip(shared, alone, strict=True):
        assert ours.shape == theirs.shape
        if len(theirs):
            assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))


def count_positions(patch: pytest.MonkeyPatch, counts: list[int]) -> None:
    """Note the tokens of each packed batch that passes through a model."""

    def counted(backbone: Any, ids: Tensor, *rest: Any, forward: Any = scoring.hidden_states) -> Tensor:
        counts.append(len(ids))
        return forward(backbone, ids, *rest)

    patch.setattr(scoring, "hidden_states", counted)


def test_a_group_of_the_published_bandit_falls_by_60_percent_in_annotation_and_update() -> None:
    """Positions are counted; energies and the update's gradients stay the same."""
    bandit = {
        "id": "actfocus/Bandit-v1",
        "settings": {"low_reward": 0.1, "high_reward": 1.0, "high_probability": 0.25},
        "layout": "published",
        "max_turns": 1,
        "actions_per_turn": 1,
        "response_tokens": 24,
        "context_tokens": 1000,
    }
    config = configured(
        {
            "environments": {"frozen_lake": None, "bandit": bandit},
            "policy": {
                "hidden_size": LEAST_WIDTH,
                "heads": 8,
                "demonstrations": {"phases": [{"steps": 1, "reasoning_words": [0, 2], "action_noise": 0.5}]},
            },
            "rollout": {"groups": 1, "group_size": 16},
            "train": {"minibatch": 16, "gradient_clip": 1e6},
        }
    )
    policy, found = supervised(config), {}
    for width in (LEAST_WIDTH, 10 * LEAST_WIDTH):
        own = Policy(copy.deepcopy(policy.model), policy.tokenizer)
        module = PolicyGradient(config, "bandit", "grpo", 0, own)
        standing(module, torch.optim.SGD(module.parameters(), lr=1.0))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shared_prefixes, "LEAST_WIDTH", width)
            iteration = unmoved(module)
            annotation, learning = list[int](), list[int]()
            with patch.context() as counting:
                count_positions(counting, annotation)
                annotated = annotate(iteration.episodes, policy, 1.0, 4096)
            count_positions(patch, learning)
            draws = torch.randn(len(iteration.table["advantage"]), generator=torch.Generator().manual_seed(0))
            updated(module, iteration.table.with_columns(advantage=draws))
        gradients = {name: parameter.grad for name, parameter in own.model.named_parameters()}
        found[width] = annotated, sum(annotation), sum(learning), gradients
    (ours, *shared, gradients), (theirs, *all_of_them, expected) = found.values()
    assert np.array_equal(ours.input_ids, theirs.input_ids)
    np.testing.assert_allclose(ours.energy, theirs.energy, rtol=1e-5, atol=1e-5)
    tokens = len(ours.input_ids)
    assert all_of_them[0] >= tokens
    assert all(count <= 0.4 * whole for count, whole in zip(shared, all_of_them, strict=True))
    for name, gradient in gradients.items():
        assert float((gradient - expected[name]).abs().max()) <= 1e-5 * float(expected[name].abs().max()), name


def test_small_models_have_the_batches_that_they_had() -> None:
    policy = Policy(model_of("gpt2"), None)
    sequences = arrays([[1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1]])
    assert [list(b) for b in batches_of(policy, sequences, 9)] == [list(b) for b in length_batches([4, 5, 2], 9)]
