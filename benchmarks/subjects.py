"""What is measured on: the reference policy and its episodes, and random ones of other sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipeline.model.loading import load_trained
from pipeline.model.policy import Policy
from pipeline.settings.params import Config, load
from pipeline.training.seed_key import table_slice
from pipeline.trajectories.table import read
from pipeline.trajectories.trajectory import Trajectories
from pipeline.workspace.layout import Layout

ENVIRONMENT = "frozen_lake"
SHAPES = {"0.2 M": (64, 2, 4), "1.1 M": (128, 4, 4), "3 M": (256, 4, 8), "20 M": (512, 6, 8)}
"""Hidden size, layers, heads."""


@dataclass(frozen=True)
class Setup:
    """What is measured on."""

    config: Config
    policy_directory: Path
    table: Path
    device: torch.device
    dtype: torch.dtype

    def policy(self) -> Policy:
        return load_trained(self.policy_directory, self.config)

    def scratch(self, hidden: int, layers: int, heads: int, context: int = 4096) -> Policy:
        """A random Qwen2 of another size with the policy's tokenizer."""
        tokenizer = self.policy().tokenizer
        torch.manual_seed(0)
        shape = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
        model: Any = Qwen2ForCausalLM(shape)
        return Policy(model.to(self.device, self.dtype).eval(), tokenizer)

    def episodes(self) -> Trajectories:
        """The annotated episodes of the first seed's first iteration."""
        found = table_slice(read(self.table), self.config, ENVIRONMENT, 0)
        assert found is not None
        return found


def default_setup(params: Path, layout: Layout, device: str) -> Setup:
    """The reference policy and table that ``make repro`` has made."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return Setup(load(params), layout.policy, layout.annotated(ENVIRONMENT), torch.device(device), dtype)


def pieces(episodes: Trajectories) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token ids and masks of sampled tokens, episode by episode."""
    spans = [slice(a, b) for a, b in zip(episodes.offsets[:-1], episodes.offsets[1:], strict=True)]
    return [episodes.input_ids[s] for s in spans], [episodes.sampled[s] for s in spans]


def synthetic(policy: Policy, count: int, length: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Random sequences, of which the later half of every 40 tokens is to be predicted."""
    draws = np.random.default_rng(0)
    ids = [draws.integers(0, len(policy.tokenizer), length).astype(np.int32) for _ in range(count)]
    return ids, [np.arange(length) % 40 >= 20] * count
