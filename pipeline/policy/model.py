"""Loading and saving policies: a causal language model with its tokenizer, as a Hugging Face directory."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from pipeline.config import Config, ConfigError
from pipeline.policy.trunk import hidden_states, packed_attention


@dataclass(frozen=True)
class Policy:
    """A causal language model and its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def backbone(self) -> torch.nn.Module:
        """The model without its output head: token ids to hidden states."""
        backbone: torch.nn.Module = self.model.base_model
        return backbone

    @property
    def head(self) -> torch.nn.Linear:
        """The output head: hidden states to logits."""
        head: torch.nn.Linear = self.model.get_output_embeddings()
        return head

    def frozen_copy(self) -> Policy:
        """An independent copy without gradients."""
        model = copy.deepcopy(self.model).eval()
        model.requires_grad_(False)
        return Policy(model, self.tokenizer)

    def save(self, directory: str | Path) -> None:
        """Write weights (safetensors), configuration and tokenizer; equal policies give equal bytes."""
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


def load_policy(
    source: str | Path, *, revision: str | None = None, dtype: str = "float32", trust_remote_code: bool = False
) -> Policy:
    """Load a policy from a local directory or the hub.

    Raises:
        ConfigError: it cannot be loaded, has no fast tokenizer, or is not a head on a trunk.
    """
    path = Path(source)
    if (path.is_absolute() or str(source).startswith(".")) and not path.is_dir():
        raise ConfigError(f"policy: {source}: no such model directory")
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = _load_tokenizer(source, options)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype), attn_implementation="sdpa", use_safetensors=True, **options
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"policy: {str(source)!r} cannot be loaded: {_first_line(error)}") from None
    if not tokenizer.is_fast:
        raise ConfigError(f"policy: {str(source)!r} has no fast tokenizer, which tracking token roles needs")
    policy = Policy(model.eval(), tokenizer)
    _check_head(policy, str(source))
    return policy


def load_trained(directory: str | Path, config: Config) -> Policy:
    """Load a policy that the pipeline has written: in the precision of ``policy.dtype``, on the GPU if there is one.

    Raises:
        ConfigError: the directory is not there; ``models/policy`` would be a hub id, too.
    """
    if not Path(directory).is_dir():
        raise ConfigError(f"{directory}: no such policy; run `make repro` first")
    policy = load_policy(directory, dtype=config.policy.dtype if config.policy.kind == "pretrained" else "float32")
    policy.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return policy


def save_replacing(policy: Policy, directory: Path) -> None:
    """Write a policy beside its target first, so that an interrupted save leaves the old one."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    policy.save(partial)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def _load_tokenizer(source: str | Path, options: dict[str, Any]) -> Any:
    """``AutoTokenizer``, unless the directory names the plain fast class.

    For a model type that has a tokenizer class of its own (qwen2), ``AutoTokenizer`` then rebuilds that class's
    pre-tokenizer around the vocabulary, and silently encodes differently from ``tokenizer.json``.
    """
    named = get_tokenizer_config(source, **options).get("tokenizer_class")
    if named in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        return PreTrainedTokenizerFast.from_pretrained(source, **options)
    return AutoTokenizer.from_pretrained(source, **options)


@torch.no_grad()
def _check_head(policy: Policy, source: str) -> None:
    """Log-probabilities are computed from trunk and head, on packed sequences; refuse a model that cannot do so."""
    if policy.head is None:
        raise ConfigError(f"policy: {source!r} has no output head")
    config = policy.model.config
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if windowed or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ConfigError(f"policy: {source!r} uses sliding-window attention, which is not supported")
    lengths, device = (4, 3), policy.device
    pieces = [torch.arange(length, device=device) for length in lengths]
    theirs = torch.cat([policy.model(input_ids=piece.unsqueeze(0)).logits[0] for piece in pieces]).float()
    try:
        packed = torch.cat(pieces)  # a token's position is its id here
        hidden = hidden_states(policy.backbone, packed, packed, packed_attention(lengths, device))
    except (TypeError, AttributeError, ValueError, RuntimeError, IndexError) as error:
        raise ConfigError(f"policy: {source!r} cannot run on packed sequences: {_first_line(error)}") from None
    ours = policy.head(hidden).float()
    tolerance = (1e-3 if policy.model.dtype == torch.float32 else 5e-2) * float(theirs.abs().max())
    if not torch.allclose(ours, theirs, atol=tolerance, rtol=0):
        raise ConfigError(
            f"policy: {source!r} computes other logits on packed sequences; its attention is not exchangeable, or "
            "something follows its output head"
        )


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
