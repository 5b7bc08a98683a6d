"""Policies of several families and a slow engine, for tests of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pipeline.bootstrap.tokenizer import train_tokenizer
from pipeline.model.loading import load_policy
from pipeline.model.policy import Policy
from pipeline.model.trunk import hidden_states
from pipeline.rollout import transformers_engine
from pipeline.rollout.engine import Continuation, Request, RolloutEngine, Sampling

TEXTS = ["player 0 1 goal 3 3 holes 1 2", "Left Right Up Down", "let me think, rows apart 2", "<think> <answer>"] * 3


STOP = "</answer>"


SHAPE = {
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "attn_implementation": "sdpa",
}


def plain_tokenizer() -> Any:
    """Byte-level BPE that knows no tags and has no chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)


def random_policy(kind: str, size: int, directory: Path) -> Policy:
    """Saved and loaded, as every policy of the pipeline is; ``size`` is that of its 4 heads."""
    torch.manual_seed(1)
    tokenizer = train_tokenizer(TEXTS, 320) if kind == "qwen2" else plain_tokenizer()
    shape = {
        **SHAPE,
        "hidden_size": 4 * size,
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, num_key_value_heads=2, **shape))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, num_key_value_heads=2, **shape))
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**shape))
    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(tie_word_embeddings=False, **shape))
    Policy(model.eval(), tokenizer).save(directory)
    return load_policy(directory)


def named(kind_and_size: tuple[str, int]) -> str:
    return "{}-{}".format(*kind_and_size)


def encode(policy: Policy, text: str) -> list[int]:
    return list(policy.tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def full_logprobs(policy: Policy, ids: Sequence[int], temperature: float) -> torch.Tensor:
    """Log-probabilities after every position, from one fresh pass without cache or mask."""
    logits = policy.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].double()
    return torch.log_softmax(logits / temperature, -1)


def assert_scored_by_a_fresh_forward(
    policy: Policy, prefix: Sequence[int], answer: Continuation, temperature: float
) -> None:
    expected = full_logprobs(policy, [*prefix, *answer.ids], temperature)[len(prefix) - 1 : -1]
    chosen = expected[torch.arange(len(answer.ids)), torch.tensor(answer.ids)]
    entropy = -(expected.exp() * expected).sum(-1)
    np.testing.assert_allclose(answer.logprob, chosen, atol=1e-4)
    np.testing.assert_allclose(answer.entropy, entropy, atol=1e-4)


def draws_for(policy: Policy, prefix: Sequence[int], wanted: Sequence[int], temperature: float) -> np.ndarray:
    """The uniform draws that make a policy say ``wanted``: the middle of each token's interval."""
    result = []
    logprobs = full_logprobs(policy, [*prefix, *wanted], temperature)
    for t, token in enumerate(wanted):
        probability = logprobs[len(prefix) - 1 + t].exp().numpy()
        result.append(probability[:token].sum() + probability[token] / 2)
    return np.array(result)


class Conversation:
    """An episode as the collector drives it: a growing prefix, draws of its own, observations of varied length."""

    def __init__(self, prompt: list[int], seed: int, turns: int) -> None:
        self.ids, self.turns, self.prompt = list(prompt), turns, list(prompt)
        self.draws = np.random.default_rng(seed)

    def request(self) -> Request:
        return Request(list(self.ids), self.draws.random(int(self.draws.integers(1, 9))))

    def take(self, answer: Continuation) -> None:
        self.ids += answer.ids
        self.turns -= 1
        if self.turns:
            self.ids += self.draws.integers(3, 250, size=int(self.draws.integers(1, 12))).tolist()


def conversations(policy: Policy, adjacent: bool = False) -> list[Conversation]:
    """Six episodes of three prompts, one prompt shared by three of them; they leave at different turns.

    With ``adjacent`` those of one prompt follow each other, as the members of a group do.
    """
    shared = encode(policy, "player 0 1 goal 3 3")
    prompts = [shared, encode(policy, "Up"), shared, encode(policy, "let me think, holes 1 2, rows apart 2"), shared]
    prompts.append(encode(policy, "Up"))
    assert len({prompt[0] for prompt in prompts}) == 3  # so that only equal prompts have anything in common
    turns = [4, 2, 1, 5, 3, 5]
    made = [Conversation(p, 10 + i, t) for i, (p, t) in enumerate(zip(prompts, turns, strict=True))]
    return sorted(made, key=lambda episode: episode.prompt) if adjacent else made


Record = list[list[tuple[Request, Continuation]]]
"""For each episode what was asked and answered, turn by turn."""


def play(engine: RolloutEngine, episodes: list[Conversation], sampling: Sampling) -> Record:
    record: Record = [[] for _ in episodes]
    asked: list[Request] = []

    def requests() -> Iterator[Request]:
        for episode in episodes:
            asked.append(episode.request())
            yield asked[-1]

    def follow(number: int, answer: Continuation) -> Request | None:
        record[number].append((asked[number], answer))
        episodes[number].take(answer)
        if not episodes[number].turns:
            return None
        asked[number] = episodes[number].request()
        return asked[number]

    last = engine.generate(requests(), sampling, follow)
    assert last == [turns[-1][1] for turns in record]
    return record


@contextmanager
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Lengths of the batches that pass through the model."""
    lengths: list[int] = []

    def counted(backbone: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        lengths.append(len(ids))
        return hidden_states(backbone, ids, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(transformers_engine, "hidden_states", counted)
        yield lengths


def distinct_positions(episodes: list[Conversation]) -> int:
    """Of episodes that are over: shared prompts once, the rest of each; a last sampled token never has to pass."""
    shared = sum(len(prompt) for prompt in {tuple(episode.prompt) for episode in episodes})
    return shared + sum(len(episode.ids) - len(episode.prompt) - 1 for episode in episodes)
