"""Loading a policy, from a directory or the hub, and refusing one that could not be trained as it is."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.hub import cached_file

from pipeline.model.adapters import Adapters, find_adapters, put_on
from pipeline.model.checks import check_family, check_finite, check_forward, check_tokenizer, check_weights
from pipeline.model.files import check_files, check_pointers, short
from pipeline.model.gguf import check_gguf, finish
from pipeline.model.origin import origin
from pipeline.model.policy import Policy
from pipeline.settings.params import Config
from pipeline.workspace.errors import UserError
from pipeline.workspace.manifest import MANIFEST, require_whole


def load_policy(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    context: int | None = None,
    gguf_file: str | None = None,
    base: Path | None = None,
) -> Policy:
    """Load a policy from a local directory, an installed package (``package:name``), or a branch, tag or commit of the hub.

    Code that comes with it is run if it may be. Of a GGUF file, in any of them, the weights are dequantised. The longest
    sequence that the policy will be given has ``context`` tokens; None: as many as it has positions for. Adapters are put
    on their base: the policy that they name, or ``base``.

    Raises:
        UserError: it cannot be loaded; its weights are not all there, or not finite; it has no fast tokenizer, or one
            that does not fit; it is not a head on a trunk of causal attention that can be packed.
    """
    place, name, precision = origin(source, gguf_file), f"policy: {str(source)!r}", getattr(torch, dtype)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if isinstance(place.source, Path):
        check_pointers(place.source)
    if place.gguf_file is None:
        if (adapters := find_adapters(place.source, revision, base)) is not None:
            on = load_policy(
                adapters.base, **options | {"revision": adapters.base_revision}, dtype=dtype, context=context
            )
            return _adapted(on, adapters, options, name, context)
        if isinstance(place.source, Path):
            check_files(place.source)
    try:
        file = None
        if place.gguf_file is not None:
            file = Path(str(cached_file(place.source, place.gguf_file, revision=revision)))
            check_gguf(file)
            options["gguf_file"] = place.gguf_file
        config = AutoConfig.from_pretrained(place.source, **options)
        check_family(config, precision, trust_remote_code, name)
        tokenizer = _load_tokenizer(place.source, options)
        options |= {"dtype": precision, "use_safetensors": True, "ignore_mismatched_sizes": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(place.source, output_loading_info=True, **options)
        model, loading = loaded
        if file is not None:
            tokenizer = finish(model, tokenizer, file)
    except UserError:
        raise
    except Exception as error:  # of any kind: files, the library, and code that came with the model
        raise UserError(f"{name} cannot be loaded: {short(error)}") from None
    policy = Policy(model.eval(), tokenizer)
    try:
        check_weights(policy, loading, name)
        check_tokenizer(policy, name)
        check_forward(policy, name, context)
    except UserError:
        raise
    except Exception as error:  # of any kind: the model's code meets what it was not written for
        raise UserError(f"{name} cannot be used: {short(error)}") from None
    return policy


def _adapted(on: Policy, adapters: Adapters, options: dict[str, Any], name: str, context: int | None) -> Policy:
    """A policy with adapters, and with their tokenizer if they have one. See ``load_policy``."""
    try:
        tokenizer = _load_tokenizer(adapters.source, options) if adapters.tokenizer else on.tokenizer
        policy = put_on(Policy(on.model, tokenizer), adapters)
        check_finite(policy, name)
        check_tokenizer(policy, name)
        check_forward(policy, name, context)
    except UserError:
        raise
    except Exception as error:  # of any kind: files, the library
        raise UserError(f"{name} cannot be loaded: {short(error)}") from None
    return policy


def load_trained(directory: str | Path, config: Config, base: Path | None = None) -> Policy:
    """Load a policy that the pipeline has written: in the precision of ``policy.dtype``, on the GPU if there is one.

    Adapters that are not where they look for their base need it as ``base``. A directory without a manifest was written by
    an earlier version, and taken as it is.

    Raises:
        UserError: the directory is not there (``models/policy`` would be a hub id, too), or a file of it, or of the policy
            that adapters are on, is not as it was written, or it is another training's.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such policy; run `make repro` first")
    if (directory / MANIFEST).exists():
        require_whole(directory, moved=not directory.name.startswith("seed-"))
        adapters = find_adapters(directory, base=base)
        if adapters is not None and (Path(adapters.base) / MANIFEST).exists():
            require_whole(Path(adapters.base), moved=True)
    dtype = config.policy.dtype if config.policy.kind == "pretrained" else "float32"
    policy = load_policy(directory, dtype=dtype, context=longest_context(config), base=base)
    policy.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return policy


def longest_context(config: Config) -> int:
    """Tokens of the longest sequence that a policy is given."""
    return max(section.context_tokens for section in config.environments.values())


def _load_tokenizer(source: str | Path, options: dict[str, Any]) -> Any:
    """``AutoTokenizer``, unless a directory names the plain fast class.

    For a model type that has a tokenizer class of its own (qwen2), ``AutoTokenizer`` then rebuilds that class's
    pre-tokenizer around the vocabulary, and silently encodes differently from ``tokenizer.json``.
    """
    if "gguf_file" in options:
        return AutoTokenizer.from_pretrained(source, **options)
    named = get_tokenizer_config(source, **options).get("tokenizer_class")
    if named in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        return PreTrainedTokenizerFast.from_pretrained(source, **options)
    return AutoTokenizer.from_pretrained(source, **options)
