"""GGUF files: whether one is whole, and what transformers leaves to do once it has read one."""

import json
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata

from pipeline.workspace.errors import UserError

_PRE_TOKENIZERS = {"smollm": [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]}
"""What splits a text before merges, by its name in the file; transformers knows others, and takes GPT-2's for these."""


def check_gguf(file: Path) -> None:
    """Refuse what the library would fail on in words of its own.

    Raises:
        UserError: the file is cut, or no GGUF file; or the package that reads its weights is not installed.
    """
    try:
        header = GgufHeader.from_file(str(file))
        end = header.data_start + max(tensor.offset + tensor.nbytes for tensor in header.tensors)
        whole, reason = file.stat().st_size >= end, f"{file.stat().st_size} of {end} bytes"
    except Exception as error:  # of any kind: bytes are read as numbers, whatever they are
        whole, reason = False, f"{error or type(error).__name__}".removeprefix(f"{file} ")
    if not whole:
        raise UserError(f"policy: {file}: cut, or not a GGUF file: {shorten(reason, 120)}")
    if find_spec("gguf") is None:
        raise UserError(
            f"policy: {file}: reading its weights needs the package gguf; run `pip install 'actfocus[smollm2]'`"
        )


def finish(model: Any, tokenizer: Any, file: Path) -> Any:
    """Make of a dequantised model what a directory would have given, so that it can be saved; returns its tokenizer.

    All tokens that the file names as ends are ends.
    """
    if model.hf_quantizer is not None:
        model.hf_quantizer.remove_quantization_config(model)
    metadata, _ = read_gguf_metadata(str(file))
    ends = {metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")} - {None}
    if ends:
        model.generation_config.eos_token_id = sorted(ends)
    return _own(tokenizer, metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.pre", ""))


def _own(tokenizer: Any, count: int, pre: str) -> PreTrainedTokenizerFast:
    """The tokenizer of the file's ``count`` tokens alone, of the plain class that is loaded as it was saved.

    The library builds it on GPT-2's, whose special tokens it may have added behind them.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["id"] < count]
    backend = Tokenizer.from_str(json.dumps(parts))
    if pre in _PRE_TOKENIZERS:
        backend.pre_tokenizer = Sequence(_PRE_TOKENIZERS[pre])
    named = {key: getattr(tokenizer, key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    there = {key: token for key, token in named.items() if token and backend.token_to_id(token) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tokenizer.chat_template, **there)
