"""How much memory a forward pass with gradients takes, and what follows from that.

All is told by the model's shape and the memory that the machine has, not by what is free in it: equal runs are equal.
"""

from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.model.kernels import native
from pipeline.model.policy import Policy
from pipeline.model.scoring import LOGITS_PER_CHUNK
from pipeline.model.shared_prefixes import LEAST_WIDTH, MOST_READ
from pipeline.model.trunk import has_own_forward
from pipeline.settings.params import Config

SHARE = 0.25
"""Of a worker's part of the memory, for activations, and for keys and values: weights, their gradients and Adam's moments want
the rest."""
FEWEST, MOST = 256, 65_536
"""Tokens of a forward pass whose size is found here."""
UNFUSED = 1.5
"""How much more PyTorch's own operations keep for the backward pass than our forward with its kernels."""
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says what a container may use."""


def tokens_per_forward(config: Config, policy: Policy) -> int:
    """``train.tokens_per_forward``; for ``auto`` the largest power of two that fits into ``allowance``."""
    if config.train.tokens_per_forward != "auto":
        return config.train.tokens_per_forward
    return most_tokens(policy.model.config, number_size(policy), allowance(config, policy.device))


def most_tokens(shape: Any, size: float, bytes_allowed: float) -> int:
    """The largest power of two of tokens whose activations fit; at least ``FEWEST``, at most ``MOST``."""
    tokens = MOST
    while tokens > FEWEST and activation_bytes(shape, tokens, size) > bytes_allowed:
        tokens //= 2
    return tokens


def recompute_where_needed(config: Config, environment: str, policy: Policy) -> None:
    """Let the policy's layers compute activations again in the backward pass, where those of the longest sequence that an
    environment may have do not fit; gradients stay the same."""
    longest = config.environments[environment].context_tokens
    needed = activation_bytes(policy.model.config, longest, number_size(policy))
    if needed > allowance(config, policy.device):
        policy.model.activation_checkpointing_enable({"use_reentrant": False})


def activation_bytes(shape: Any, tokens: int, size: float) -> float:
    """What a forward pass over packed tokens holds at most until its backward pass is over, without weights and gradients.

    ``shape`` is a transformers configuration, ``size`` bytes of a number (see ``number_size``). Of each layer are held the
    residual stream and its norm before attention and before the MLP, queries, keys, values and what attention mixes, three
    intermediate columns of the MLP; one layer more for the gradients under way, and a chunk of logits with its gradients.
    """
    text = shape.get_text_config()
    width, heads = text.hidden_size, text.num_attention_heads
    head = getattr(text, "head_dim", None) or width // heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    inner = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None) or 4 * width
    experts = getattr(text, "num_experts_per_tok", None) or 1
    read = MOST_READ if width >= LEAST_WIDTH else 1
    layer = 4 * width + 2 * heads * head + 2 * read * groups * head + 3 * experts * inner
    logits = 4 * min(tokens * text.vocab_size, LOGITS_PER_CHUNK)  # always float32
    return float(size * tokens * (text.num_hidden_layers + 1) * layer + 4 * logits)


def number_size(policy: Policy) -> float:
    """Bytes of a number of activations; more where PyTorch keeps more of them."""
    dtype = policy.model.dtype
    fused = has_own_forward(policy.backbone) and native.computes(torch.empty(1, policy.head.in_features, dtype=dtype))
    return float(dtype.itemsize) * (1 if fused and policy.device.type == "cpu" else UNFUSED)


def allowance(config: Config, device: torch.device) -> float:
    """Bytes that the activations of one of the ``workers`` may take, or its keys and values while it samples."""
    return SHARE * total_memory(device) / config.workers


def total_memory(device: torch.device) -> int:
    """Bytes of memory of a device; of the machine or the container, where it computes itself."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = (Path(limit).read_text().strip() for limit in LIMITS if Path(limit).exists())
    return min([int(psutil.virtual_memory().total), *(int(limit) for limit in limits if limit.isdigit())])
