"""Tokenizers and texts for tests of prompts and parsing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.bootstrap.tokenizer import train_tokenizer

properties = settings(max_examples=150)


CHATML = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role != 'system' or not loop.first %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""The text part of Qwen2.5's chat template."""


def byte_level(special: list[str], **options: Any) -> Any:
    """A tokenizer of few merges, in which ``<think>`` is several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=280 + len(special), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["let me think answer the answer think"] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **options)


COMPACT = train_tokenizer(["player 0 1 goal 3 3 holes none", "let me think", "Left Right Up Down"] * 3, 320)


QWEN = byte_level(["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>", chat_template=CHATML)


BASE = byte_level(["</s>"], eos_token="</s>")


TOKENIZERS = pytest.mark.parametrize("tokenizer", [COMPACT, QWEN, BASE], ids=["compact", "qwen", "base"])


def ended(tokenizer: Any, replies: list[str], by_eos: bool) -> list[str]:
    """Replies as the template must be given them: its own end mark is not part of a message."""
    return [reply + tokenizer.eos_token for reply in replies] if by_eos and tokenizer is not QWEN else replies
