"""Loading a policy, from a directory or the hub, and refusing one that could not be trained as it is."""

import json
from collections.abc import Iterable
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from pipeline.model.policy import Policy
from pipeline.model.trunk import Heads, hidden_states, packed_attention
from pipeline.settings.params import Config
from pipeline.workspace.errors import UserError


def load_policy(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    context: int | None = None,
) -> Policy:
    """Load a policy from a local directory, or from a branch, tag or commit of the hub, maybe with code that comes with it.

    The longest sequence that it will be given has ``context`` tokens; None: as many as it has positions for.

    Raises:
        UserError: it cannot be loaded; its weights are not all there, or not finite; it has no fast tokenizer, or one
            that does not fit; it is not a head on a trunk of causal attention that can be packed.
    """
    path, name = Path(source), f"policy: {str(source)!r}"
    if (path.is_absolute() or str(source).startswith(".")) and not path.is_dir():
        raise UserError(f"policy: {source}: no such model directory")
    if path.is_dir():
        _check_files(path)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        kind = AutoConfig.from_pretrained(source, **options)
        if kind.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not trust_remote_code:
            raise ValueError(f"a model of type {kind.model_type} is no causal language model")
        tokenizer = _load_tokenizer(source, options)
        options |= {"dtype": getattr(torch, dtype), "use_safetensors": True, "ignore_mismatched_sizes": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    except Exception as error:  # of any kind: files, the library, and code that came with the model
        raise UserError(f"{name} cannot be loaded: {_short(error)}") from None
    model, loading = loaded
    policy = Policy(model.eval(), tokenizer)
    try:
        _check_weights(policy, loading, name)
        _check_tokenizer(policy, name)
        _check_forward(policy, name, context)
    except UserError:
        raise
    except Exception as error:  # of any kind: the model's code meets what it was not written for
        raise UserError(f"{name} cannot be used: {_short(error)}") from None
    return policy


def load_trained(directory: str | Path, config: Config) -> Policy:
    """Load a policy that the pipeline has written: in the precision of ``policy.dtype``, on the GPU if there is one.

    Raises:
        UserError: the directory is not there; ``models/policy`` would be a hub id, too.
    """
    if not Path(directory).is_dir():
        raise UserError(f"{directory}: no such policy; run `make repro` first")
    dtype = config.policy.dtype if config.policy.kind == "pretrained" else "float32"
    policy = load_policy(directory, dtype=dtype, context=longest_context(config))
    policy.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return policy


def longest_context(config: Config) -> int:
    """Tokens of the longest sequence that a policy is given."""
    return max(section.context_tokens for section in config.environments.values())


def _load_tokenizer(source: str | Path, options: dict[str, Any]) -> Any:
    """``AutoTokenizer``, unless the directory names the plain fast class.

    For a model type that has a tokenizer class of its own (qwen2), ``AutoTokenizer`` then rebuilds that class's
    pre-tokenizer around the vocabulary, and silently encodes differently from ``tokenizer.json``.
    """
    named = get_tokenizer_config(source, **options).get("tokenizer_class")
    if named in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        return PreTrainedTokenizerFast.from_pretrained(source, **options)
    return AutoTokenizer.from_pretrained(source, **options)


def _check_files(directory: Path) -> None:
    """Refuse placeholders, and files of weights that are cut, before a library reads them."""
    for file in sorted(directory.iterdir()):
        if file.is_file():
            with file.open("rb") as opened:
                if opened.read(23) == b"version https://git-lfs":
                    raise UserError(f"policy: {file}: only a git-LFS pointer to the file; run `git lfs pull`")
    vocabularies = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
    if not any(file for pattern in vocabularies for file in directory.glob(pattern)):
        raise UserError(f"policy: {directory}: no tokenizer.json, nor another tokenizer's files")
    settings = directory / "generation_config.json"
    if settings.is_file() and not _is_mapping(settings):  # the library would go on without the end tokens
        raise UserError(f"policy: {settings}: not JSON, or no mapping")
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    files = {whole} if whole.is_file() else set[Path]()
    if not files and index.is_file():
        try:
            weights = {key: directory / file for key, file in json.loads(index.read_bytes())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"policy: {index}: not an index of weights") from None
        files = set(weights.values())
        missing = sorted(file.name for file in files if not file.is_file())
        if missing:
            lost = _some(key for key, file in weights.items() if file.name in missing)
            raise UserError(f"policy: {index}: {_some(missing)} not there; without {lost}")
    for file in sorted(files):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"policy: {file}: cut, or not safetensors: {_short(error)}") from None


def _is_mapping(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_bytes()), dict)
    except ValueError:
        return False


def _check_weights(policy: Policy, loading: dict[str, Any], name: str) -> None:
    """Refuse what a directory's weights leave to chance, and what they hold beside the model.

    What the library knows to be legitimate (tied heads, buffers of old versions) is not in ``loading``.
    """
    sizes = (f"{key} {tuple(held)} for {tuple(expected)}" for key, held, expected in loading["mismatched_keys"])
    found = {
        "missing": loading["missing_keys"],
        "of another size": sizes,
        "not in the model": loading["unexpected_keys"],
    }
    wrong = "; ".join(f"{some} {kind}" for kind, keys in found.items() if (some := _some(keys)))
    if wrong:
        raise UserError(f"{name}: its weights are not those of its config.json: {wrong}")
    if getattr(policy.model.config, "quantization_config", None) is not None:
        raise UserError(f"{name}: its weights are quantised, which cannot be trained")
    for key, value in policy.model.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"{name}: {key} holds numbers that are not finite in {str(value.dtype)[6:]}")


def _check_tokenizer(policy: Policy, name: str) -> None:
    tokenizer, text = policy.tokenizer, "<think>a</think><answer>b</answer>"
    if not tokenizer.is_fast:
        raise UserError(f"{name} has no fast tokenizer, which tracking token roles needs")
    written = tokenizer.backend_tokenizer.decode(
        tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=False
    )
    if written.strip() != text:
        raise UserError(
            f"{name}: its tokenizer, of {len(tokenizer)} tokens, cannot write {text}, but {shorten(written, 60)!r}"
        )
    rows, last = policy.model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values())
    if last >= rows:
        raise UserError(f"{name}: its tokenizer has tokens up to {last}, its embedding only {rows} rows")
    unknown = sorted(end for end in policy.ends if end not in range(len(tokenizer)))
    if unknown:
        raise UserError(
            f"{name}: generation_config.json: eos_token_id: {unknown[0]} is not among its tokenizer's "
            f"{len(tokenizer)} tokens"
        )


@torch.no_grad()
def _check_forward(policy: Policy, name: str, context: int | None) -> None:
    """Log-probabilities are computed from trunk and head, on packed sequences; refuse a model that cannot do so.

    Sequences that begin, and one that ends at the last position, must get the logits together that transformers gives
    each alone.
    """
    model, config = policy.model, policy.model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    last = min((length for length in (context, positions) if length), default=64)
    window = _window(config)
    if window is not None and window < last:
        raise UserError(
            f"{name}: its attention has a window of {window} tokens, and sequences may have {last} (context_tokens); "
            "windows are not supported"
        )
    if policy.head is None:
        raise UserError(f"{name} has no output head")
    if not _ends_with_head(policy):
        raise UserError(f"{name} computes its logits from more than its output head; what follows it is not supported")
    beginning = [(0, 4), (0, 3)]
    for spans in (beginning, [*beginning, (max(0, last - 4), last)]):
        ours, theirs = _logits(policy, spans, config.num_hidden_layers)
        if not bool(torch.isfinite(theirs).all()):
            raise UserError(f"{name} computes logits that are not finite in {str(model.dtype)[6:]}")
        if not float((ours - theirs).abs().max()) <= rounding(model.dtype) * float(theirs.abs().max()):
            grown = f"its position codes change as a sequence grows to {last} tokens (context_tokens)"
            reason = "its attention is not exchangeable" if spans is beginning else grown
            raise UserError(f"{name} computes other logits on packed sequences; {reason}")


def rounding(dtype: torch.dtype) -> float:
    """By how much of the greatest logit two ways of computing logits may differ."""
    return 1e-4 if dtype == torch.float32 else 5e-2


def _logits(policy: Policy, spans: list[tuple[int, int]], depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of sequences that are given by their positions: packed, and by transformers one by one; both float32."""
    device, rows = policy.device, policy.model.get_input_embeddings().weight.shape[0]
    places = [torch.arange(start, stop, device=device) for start, stop in spans]
    pieces = [(7 * place + 3) % rows for place in places]
    theirs = [
        policy.model(input_ids=piece[None], position_ids=place[None], use_cache=False).logits[0].float()
        for piece, place in zip(pieces, places, strict=True)
    ]
    attention, layers = packed_attention([len(piece) for piece in pieces], device), list[int]()

    def attend(layer: int, heads: Heads) -> torch.Tensor:
        layers.append(layer)
        return attention(layer, heads)

    hidden = hidden_states(policy.backbone, torch.cat(pieces), torch.cat(places), attend)
    if layers != list(range(depth)):
        raise ValueError(f"{len(set(layers))} of its {depth} layers let their attention be exchanged")
    return F.linear(hidden, policy.head.weight, policy.head.bias).float(), torch.cat(theirs)


def _ends_with_head(policy: Policy) -> bool:
    """Whether logits are what the output head gives, however large: small ones would pass a soft cap unchanged."""
    given: list[torch.Tensor] = []

    def enlarge(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        given.append(logits * (1000 / logits.abs().max().clamp_min(1e-30)))
        return given[-1]

    hook = policy.head.register_forward_hook(enlarge)
    try:
        logits = policy.model(input_ids=torch.arange(4, device=policy.device)[None], use_cache=False).logits
    finally:
        hook.remove()
    return len(given) == 1 and torch.equal(logits.float(), given[0].float())


def _window(config: Any) -> int | None:
    """Tokens that the narrowest layer's attention looks back, itself included; None: all."""
    sizes = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention"] if getattr(config, "use_sliding_window", True) else []
    found = [getattr(config, key, None) for kind, key in sizes.items() if kind in kinds]
    return min((size for size in found if size), default=None)


def _some(names: Iterable[str]) -> str:
    """Two of them, in order, and how many more there are."""
    ordered = sorted(names)
    return ", ".join(ordered[:2]) + (f" and {len(ordered) - 2} more" if len(ordered) > 2 else "")


def _short(error: BaseException) -> str:
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return shorten(line, 160, placeholder=" …")
