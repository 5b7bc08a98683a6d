"""The packed forward against transformers' own, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from pipeline.model import trunk
from pipeline.model.attention import packed_attention
from pipeline.model.kernels import library, native
from pipeline.model.trunk import hidden_states

VOCABULARY = 23
LENGTHS = (5, 1, 18, 40, 16, 2)
OWN = {
    "qwen2": (Qwen2Model, Qwen2Config, {"sliding_window": None}),
    "llama": (LlamaModel, LlamaConfig, {}),
    "llama with all biases": (LlamaModel, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "qwen3": (Qwen3Model, Qwen3Config, {"sliding_window": None}),
    "mistral": (MistralModel, MistralConfig, {"sliding_window": None}),
}
OTHER = {
    "gpt2": (GPT2Model, GPT2Config, {}),
    "gpt_neox": (GPTNeoXModel, GPTNeoXConfig, {}),
    "llama with another activation": (LlamaModel, LlamaConfig, {"hidden_act": "gelu"}),
}


def random_backbone(name: str, size: int, dtype: torch.dtype = torch.float32) -> Any:
    """No parameter is left at zero or one, where a mistake would not show; heads have ``size`` numbers."""
    model, config, special = (OWN | OTHER)[name]
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 4 * size,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "attn_implementation": "eager",
        "pad_token_id": None,
    }
    if name not in ("gpt2", "gpt_neox"):
        shape |= {"num_key_value_heads": 2, "head_dim": size}
    backbone = model(config(**shape, **special)).eval().to(dtype)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            spread = torch.randn(parameter.shape, generator=draws).to(dtype)
            parameter.copy_(0.3 * spread if parameter.dim() > 1 else parameter + 0.3 * spread)
    return backbone


def packed(lengths: Sequence[int] = LENGTHS) -> tuple[Tensor, Tensor]:
    """Random ids of sequences that stand one after another, and their positions."""
    ids = np.random.default_rng(0).integers(VOCABULARY, size=sum(lengths))
    return torch.from_numpy(ids), torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))


def one_at_a_time(backbone: Any, ids: Tensor, lengths: Sequence[int] = LENGTHS) -> Tensor:
    pieces = [
        backbone(input_ids=piece[None], use_cache=False).last_hidden_state[0] for piece in ids.split(list(lengths))
    ]
    return torch.cat(pieces)


def with_gradients(backbone: Any, hidden: Tensor) -> list[Tensor]:
    """The hidden states, and the gradients of all parameters for a random direction."""
    backbone.zero_grad()
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden.dtype)
    (hidden * direction).sum().backward()
    gradients = [parameter.grad for parameter in backbone.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [hidden.detach(), *(gradient.clone() for gradient in gradients)]


def assert_equal_up_to_rounding(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 2e-5) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().max()) <= tolerance * max(1.0, float(theirs.abs().max()))


def check_against_transformers(backbone: Any, forward: Callable[..., Tensor] = hidden_states) -> None:
    ids, positions = packed()
    expected = with_gradients(backbone, one_at_a_time(backbone, ids))
    attend = packed_attention(LENGTHS, torch.device("cpu"))
    actual = with_gradients(backbone, forward(backbone, ids, positions, attend))
    assert_equal_up_to_rounding(actual, expected)
    assert backbone.config._attn_implementation == "eager"


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("name", OWN)
def test_own_forward_is_the_models(name: str, size: int) -> None:
    """With heads of 8 through PyTorch's attention, with heads of 16 through the kernel, where there is a compiler."""
    backbone = random_backbone(name, size)
    assert trunk.has_own_forward(backbone)
    assert native.attends(torch.empty(1, size)) == (size == 16 and library.library() is not None)
    check_against_transformers(backbone)


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("name", OTHER)
def test_other_models_run_their_own_forward(name: str, size: int) -> None:
    backbone = random_backbone(name, size)
    assert not trunk.has_own_forward(backbone)
    check_against_transformers(backbone)


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("name", OWN)
def test_own_families_can_run_transformers_forward_too(name: str, size: int) -> None:
    check_against_transformers(random_backbone(name, size), trunk._transformers_forward)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gpt_neox"])
def test_another_precision_needs_no_kernel(name: str) -> None:
    backbone = random_backbone(name, 16, torch.float64)
    ids, positions = packed()
    expected = with_gradients(backbone, one_at_a_time(backbone, ids))
    attend = packed_attention(LENGTHS, torch.device("cpu"))
    actual = with_gradients(backbone, hidden_states(backbone, ids, positions, attend))
    # transformers computes codes and norms in float32, whatever the model's precision
    assert_equal_up_to_rounding(actual, expected, 1e-5)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gpt2"])
def test_what_stands_beside_a_sequence_changes_nothing(name: str) -> None:
    backbone = random_backbone(name, 16)
    ids, positions = packed()
    others = (ids + 1) % VOCABULARY
    kept = slice(6, 24)  # the third sequence
    others[kept] = ids[kept]
    attend = packed_attention(LENGTHS, torch.device("cpu"))
    with torch.no_grad():
        one, two = (hidden_states(backbone, x, positions, attend) for x in (ids, others))
    torch.testing.assert_close(one[kept], two[kept], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(one[24:], two[24:], atol=0.1)


@pytest.mark.parametrize("wanted", [[0], [3, 4, 5, 30, 81], [24, 63], []])
@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gpt2"])
def test_wanted_rows_are_those_of_the_whole(name: str, size: int, wanted: list[int]) -> None:
    """Values and gradients; of some sequences nothing is wanted."""
    backbone, rows = random_backbone(name, size), torch.tensor(wanted, dtype=torch.int64)
    ids, positions = packed()
    attend = packed_attention(LENGTHS, torch.device("cpu"))
    whole = with_gradients(backbone, hidden_states(backbone, ids, positions, attend)[rows]) if wanted else None
    some = hidden_states(backbone, ids, positions, attend, rows)
    assert some.shape == (len(wanted), 4 * size)
    if whole is not None:
        assert_equal_up_to_rounding(with_gradients(backbone, some), whole)


class LowRank(nn.Module):
    """A linear layer with something trainable beside it, as LoRA puts it there."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Scaled(nn.Linear):
    """Still a linear layer, but not what its weight says."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("place", ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"])
def test_what_is_put_around_a_projection_is_not_passed_over(place: str) -> None:
    torch.manual_seed(0)
    for kind in (LowRank, Scaled):
        backbone = random_backbone("qwen2", 16)
        layer = backbone.layers[1]
        plain = layer.get_submodule(place)
        if kind is LowRank:
            layer.set_submodule(place, LowRank(plain))
        else:
            scaled = Scaled(plain.in_features, plain.out_features, bias=plain.bias is not None)
            scaled.load_state_dict(plain.state_dict())
            layer.set_submodule(place, scaled)
        assert not trunk.has_own_forward(backbone)
        check_against_transformers(backbone)


def test_a_failing_forward_leaves_the_models_attention() -> None:
    backbone = random_backbone("gpt2", 16)
    ids, positions = packed()

    def fail(*_: Any) -> Tensor:
        raise RuntimeError("the caller's")

    with pytest.raises(RuntimeError, match="the caller's"):
        hidden_states(backbone, ids, positions, fail)
    assert backbone.config._attn_implementation == "eager"
