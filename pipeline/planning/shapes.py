"""How large a policy is: known from its settings or its configuration, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from pipeline.model.origin import origin
from pipeline.planning.flops import head_shape
from pipeline.settings.lora import Lora
from pipeline.settings.params import Config
from pipeline.settings.policy import PretrainedPolicy, ScratchPolicy
from pipeline.workspace.errors import UserError, line_of

FAMILIES: dict[str, type[Any]] = {"Qwen2": Qwen2Config, "Qwen3": Qwen3Config, "Llama": LlamaConfig}
KNOWN: dict[str, tuple[str, int, int, int, int, int, int, int, bool]] = {
    "HuggingFaceTB/SmolLM2-135M": ("Llama", 576, 30, 9, 3, 64, 1536, 49_152, True),
    "Qwen/Qwen2.5-0.5B": ("Qwen2", 896, 24, 14, 2, 64, 4864, 151_936, True),
    "Qwen/Qwen2.5-1.5B": ("Qwen2", 1536, 28, 12, 2, 128, 8960, 151_936, True),
    "Qwen/Qwen2.5-3B": ("Qwen2", 2048, 36, 16, 2, 128, 11_008, 151_936, True),
    "Qwen/Qwen2.5-7B": ("Qwen2", 3584, 28, 28, 4, 128, 18_944, 152_064, False),
    "Qwen/Qwen3-0.6B": ("Qwen3", 1024, 28, 16, 8, 128, 3072, 151_936, True),
    "Qwen/Qwen3-1.7B": ("Qwen3", 2048, 28, 16, 8, 128, 6144, 151_936, True),
    "Qwen/Qwen3-4B": ("Qwen3", 2560, 36, 32, 8, 128, 9728, 151_936, True),
    "Qwen/Qwen3-8B": ("Qwen3", 4096, 36, 32, 8, 128, 12_288, 151_936, False),
    "meta-llama/Llama-3.2-1B": ("Llama", 2048, 16, 32, 8, 64, 8192, 128_256, True),
    "meta-llama/Llama-3.2-3B": ("Llama", 3072, 28, 24, 8, 128, 8192, 128_256, True),
    "meta-llama/Llama-3.1-8B": ("Llama", 4096, 32, 32, 8, 128, 14_336, 128_256, False),
}
"""Family, width, layers, heads, key-value heads, numbers of a head, intermediate size, vocabulary and whether the output head
is the embedding, from the ``config.json`` of these models on the hub. With ``-Instruct`` behind they are the same."""


@dataclass(frozen=True)
class Shape:
    """What a policy's size decides."""

    name: str
    config: Any
    """transformers configuration of the language model."""
    dtype: torch.dtype
    """In which it samples, and that of the reference."""
    lora: Lora | None = None

    @cached_property
    def _model(self) -> Any:
        with torch.device("meta"):  # has shapes, and no memory
            return AutoModelForCausalLM.from_config(self.config)

    @cached_property
    def parameters(self) -> int:
        """Weights, each once."""
        return sum(weight.numel() for weight in self._model.parameters())

    @cached_property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of every linear map of the layers, by name."""
        head, linear = self._model.get_output_embeddings(), nn.Linear
        return {
            name: (module.out_features, module.in_features)
            for name, module in self._model.named_modules()
            if isinstance(module, linear) and module is not head
        }

    @cached_property
    def trained(self) -> int:
        """Numbers that an optimizer trains: all weights, or those of adapters."""
        if self.lora is None:
            return self.parameters
        targets = self.lora.targets
        chosen = (shape for name, shape in self.projections.items() if targets is None or _last(name) in targets)
        return self.lora.rank * sum(rows + columns for rows, columns in chosen)

    @property
    def read(self) -> int:
        """Weights that a forward pass reads: an embedding that is not the output head is looked up, not read."""
        looked_up = 0 if self.config.tie_word_embeddings else self.config.vocab_size * self.config.hidden_size
        return self.parameters - int(looked_up)

    @property
    def packed(self) -> int:
        """Numbers of the maps that sampling on a processor arranges anew (see ``PackedWeights``)."""
        return sum(rows * columns for rows, columns in self.projections.values()) + (
            int(self.config.vocab_size * self.config.hidden_size)
        )

    @property
    def token_numbers(self) -> int:
        """Keys and values of a token, in all layers."""
        _, groups, size = head_shape(self.config)
        return 2 * groups * size * int(self.config.num_hidden_layers)

    @property
    def layer_numbers(self) -> int:
        """What a layer makes of a token: the residual stream and its norm twice, queries and what attention mixes, keys and
        values, three columns of the MLP."""
        heads, groups, size = head_shape(self.config)
        inner: int = self.config.intermediate_size
        return 4 * int(self.config.hidden_size) + 2 * heads * size + 2 * groups * size + 3 * inner

    @property
    def copied(self) -> bool:
        """Whether it samples from a copy of the trained weights, in another precision than float32."""
        return self.lora is None and self.dtype != torch.float32


def shape_of(config: Config, model: str | None = None) -> Shape:
    """The shape of a params file's policy, or of another ``model`` in its place.

    Raises:
        UserError: it is not known, and its configuration cannot be read.
    """
    policy, lora = config.policy, config.train.lora
    if isinstance(policy, ScratchPolicy) and model is None:
        return Shape("from scratch", _scratch(policy), torch.float32, lora)
    dtype = torch.float32 if isinstance(policy, ScratchPolicy) else getattr(torch, policy.dtype)
    own = policy if isinstance(policy, PretrainedPolicy) and model is None else None
    name = model if own is None else own.model
    assert name is not None
    found = KNOWN.get(name.removesuffix("-Instruct"))
    if found is not None:
        return Shape(name, _configuration(*found), dtype, lora)
    return Shape(name, _read(name, own), dtype, lora)


def _read(name: str, policy: PretrainedPolicy | None) -> Any:
    place = origin(name, policy.gguf_file if policy else None)
    options: dict[str, Any] = {} if place.gguf_file is None else {"gguf_file": place.gguf_file}
    options |= {"revision": policy.revision, "trust_remote_code": policy.trust_remote_code} if policy else {}
    try:
        return AutoConfig.from_pretrained(place.source, **options).get_text_config()
    except Exception as error:  # of any kind: files, the library, the network
        known = ", ".join(KNOWN)
        raise UserError(
            f"policy: {name!r}: its configuration cannot be read ({line_of(error)[:120]}); known without it: {known}"
        ) from None


def _scratch(policy: ScratchPolicy) -> Any:
    size = policy.hidden_size // policy.heads
    shape = (policy.hidden_size, policy.layers, policy.heads, policy.heads, size, 4 * policy.hidden_size)
    return _configuration("Qwen2", *shape, policy.vocabulary, True)


def _configuration(
    family: str,
    width: int,
    layers: int,
    heads: int,
    groups: int,
    size: int,
    inner: int,
    vocabulary: int,
    tied: bool,
) -> Any:
    return FAMILIES[family](
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=size,
        intermediate_size=inner,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


def _last(name: str) -> str:
    return name.rpartition(".")[2]
