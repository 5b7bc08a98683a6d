"""A language model's size on this machine: update and decoding against the matrix peak, on one core and on two.

The shape is SmolLM2-135M's, the weights are random: speed does not depend on what they are, and nothing has to be installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import matrix_peak
from benchmarks.subjects import synthetic
from benchmarks.throughput import update_rates
from benchmarks.timing import rates, repeated, say
from pipeline.bootstrap.tokenizer import train_tokenizer
from pipeline.model.policy import Policy
from pipeline.planning.flops import sampling_flops
from pipeline.rollout.engine import Request, Sampling
from pipeline.rollout.transformers_engine import TransformersEngine

SMOLLM2 = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
PROMPT, SAMPLED, EPISODES, SEQUENCES, LENGTH = 200, 32, 32, 8, 256
"""Tokens of the prompt that all episodes share, tokens sampled behind it in each, sequences of an update and their tokens."""
REPEATS = 3


def language_model(shape: dict[str, Any] | None = None, threads: tuple[int, ...] = (1, 2)) -> Any:
    """By the number of threads: the matrix peak, the update's and decoding's useful FLOP/s and tokens per second."""
    tokenizer = train_tokenizer(["Left Right Up Down"], 320)
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**(shape or SMOLLM2), eos_token_id=tokenizer.eos_token_id))
    policy, found = Policy(model.eval(), tokenizer), {}
    for count in threads:
        say(f"language model: {count} thread{'s' * (count > 1)}")
        peak = matrix_peak(count, torch.float32, torch.device("cpu"))["peak"]
        torch.set_num_threads(count)
        try:
            found[str(count)] = {
                "peak": peak,
                "decoding": decoding_rates(policy),
                "update": update_rates(policy, *synthetic(policy, SEQUENCES, LENGTH), SEQUENCES * LENGTH, REPEATS),
            }
        finally:
            torch.set_num_threads(1)
    return found


def decoding_rates(policy: Policy, episodes: int = EPISODES) -> dict[str, Any]:
    """Tokens per second of episodes that are sampled together behind one prompt, and useful FLOP/s, the prompt's included."""
    engine, draws = TransformersEngine(policy, episodes), np.random.default_rng(0)
    requests = [Request([1 + i % 300 for i in range(PROMPT)], draws.random(SAMPLED)) for _ in range(episodes)]

    def decode() -> None:
        engine.forget()
        engine.generate(requests, Sampling(1.0, "\x00never"))

    seconds = repeated(decode, REPEATS)
    # The last token of each is sampled, and passes through no layer.
    flops = sampling_flops(
        policy.model.config, [PROMPT], [PROMPT + SAMPLED - 1] * episodes, 1 + episodes * (SAMPLED - 1)
    )
    return {
        "episodes": episodes,
        "tokens_per_second": rates(episodes * SAMPLED, seconds),
        "flops_per_second": rates(flops, seconds),
    }
