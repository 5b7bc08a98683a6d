"""Refusing a loaded policy that could not be sampled from and trained as it is."""

from textwrap import shorten
from typing import Any

import numpy as np
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.model.attention import Heads, packed_attention, window_of
from pipeline.model.files import some_of
from pipeline.model.policy import Policy, soft_capped
from pipeline.model.trunk import hidden_states
from pipeline.workspace.errors import UserError

COMPARED = 8
"""Last tokens of a sequence whose logits are compared."""

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def check_family(config: Any, dtype: torch.dtype, trust_remote_code: bool, name: str) -> None:
    """Refuse, before weights are read, what is no transformer of one kind of token, or routes in too low a precision.

    ``config`` is the model's; ``dtype`` is what it would compute in.
    """
    kind = config.model_type
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not trust_remote_code:
        raise UserError(f"{name} cannot be loaded: a model of type {kind} is no causal language model")
    if _has_state(config):
        raise UserError(
            f"{name}: a model of type {kind} has state, not attention, in some of its layers or all, and no token of a "
            "state can be scored without all before it; models of full or windowed attention are supported"
        )
    experts = max((getattr(config, key, None) or 0 for key in _EXPERTS), default=0)
    if experts > 1 and dtype != torch.float32:
        raise UserError(
            f"{name}: in {str(dtype)[6:]} rounding sends tokens to other of its {experts} experts when trained than when "
            "sampled; set policy.dtype: float32"
        )


def _has_state(config: Any) -> bool:
    classes = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())
    if any(getattr(c, "_is_stateful", False) for c in (classes if isinstance(classes, tuple) else (classes,))):
        return True
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    return any(not kind.endswith("attention") or kind in ("linear_attention", "lightning_attention") for kind in kinds)


def check_weights(policy: Policy, loading: dict[str, Any], name: str) -> None:
    """Refuse what a directory's weights leave to chance, and what they hold beside the model.

    What the library knows to be legitimate (tied heads, buffers of old versions) is not in ``loading``.
    """
    sizes = (f"{key} {tuple(held)} for {tuple(expected)}" for key, held, expected in loading["mismatched_keys"])
    found = {
        "missing": loading["missing_keys"],
        "of another size": sizes,
        "not in the model": loading["unexpected_keys"],
    }
    wrong = "; ".join(f"{some} {kind}" for kind, keys in found.items() if (some := some_of(keys)))
    if wrong:
        raise UserError(f"{name}: its weights are not those of its config.json: {wrong}")
    if getattr(policy.model.config, "quantization_config", None) is not None:
        raise UserError(f"{name}: its weights are quantised, which cannot be trained")
    check_finite(policy, name)


def check_finite(policy: Policy, name: str) -> None:
    """Refuse weights that are NaN or infinite, by their tensor."""
    for key, value in policy.model.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"{name}: {key} holds numbers that are not finite in {str(value.dtype)[6:]}")


def check_tokenizer(policy: Policy, name: str) -> None:
    tokenizer, text = policy.tokenizer, "<think>a</think><answer>b</answer>"
    if not tokenizer.is_fast:
        raise UserError(
            f"{name} has no fast tokenizer, which tracking token roles needs; a tokenizer.json in its directory is one"
        )
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
def check_forward(policy: Policy, name: str, context: int | None) -> None:
    """Log-probabilities are computed from trunk and head, on packed sequences; refuse a model that cannot do so.

    Sequences that begin, one that outgrows the narrowest window, and one that ends at the last position must get the
    logits together that transformers gives each alone.
    """
    model, config = policy.model, policy.model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    last = min((length for length in (context, positions) if length), default=64)
    window = window_of(config)
    if policy.head is None:
        raise UserError(f"{name} has no output head")
    if not _ends_with_head(policy):
        raise UserError(f"{name} computes its logits from more than its output head; what follows it is not supported")
    checked = [((0, 4), "its attention is not exchangeable")]
    if window is not None and window < last:
        checked.append(((0, min(last, window + COMPARED)), f"it looks back otherwise than over {window} tokens"))
    grown = f"its position codes change as a sequence grows to {last} tokens (context_tokens)"
    checked.append(((max(0, last - 4), last), grown))
    for span, reason in checked:
        ours, theirs = _logits(policy, [(0, 3), span], config.num_hidden_layers)
        if not bool(torch.isfinite(theirs).all()):
            raise UserError(f"{name} computes logits that are not finite in {str(model.dtype)[6:]}")
        if not float((ours - theirs).abs().max()) <= rounding(model.dtype) * float(theirs.abs().max()):
            raise UserError(f"{name} computes other logits on packed sequences; {reason}")


def rounding(dtype: torch.dtype) -> float:
    """By how much of the greatest logit two ways of computing logits may differ."""
    return 1e-4 if dtype == torch.float32 else 5e-2


def _logits(policy: Policy, spans: list[tuple[int, int]], depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the last tokens of sequences that are given by their positions: packed, and by transformers one by one.

    Both are float32.
    """
    device, rows = policy.device, policy.model.get_input_embeddings().weight.shape[0]
    places = [torch.arange(start, stop, device=device) for start, stop in spans]
    pieces = [(7 * place + 3) % rows for place in places]
    theirs = [
        policy.model(input_ids=piece[None], position_ids=place[None], use_cache=False).logits[0, -COMPARED:].float()
        for piece, place in zip(pieces, places, strict=True)
    ]
    attention, layers = packed_attention([len(piece) for piece in pieces], device), list[int]()

    def attend(layer: int, heads: Heads) -> torch.Tensor:
        layers.append(layer)
        return attention(layer, heads)

    ends = np.cumsum([len(piece) for piece in pieces])
    last = [np.arange(end - min(len(piece), COMPARED), end) for end, piece in zip(ends, pieces, strict=True)]
    wanted = torch.from_numpy(np.concatenate(last)).to(device)
    hidden = hidden_states(policy.backbone, torch.cat(pieces), torch.cat(places), attend, wanted)
    if layers != list(range(depth)):
        raise ValueError(f"{len(set(layers))} of its {depth} layers let their attention be exchanged")
    return policy.logits(hidden).float(), torch.cat(theirs)


def _ends_with_head(policy: Policy) -> bool:
    """Whether logits are what the output head gives, capped as configured, however large: small ones are hardly capped."""
    given: list[torch.Tensor] = []

    def enlarge(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        given.append(logits * (1000 / logits.abs().max().clamp_min(1e-30)))
        return given[-1]

    hook = policy.head.register_forward_hook(enlarge)
    try:
        logits = policy.model(input_ids=torch.arange(4, device=policy.device)[None], use_cache=False).logits
    finally:
        hook.remove()
    if len(given) != 1:
        return False
    expected = soft_capped(given[0], policy.cap).float()
    near = 0.0 if policy.cap is None else rounding(policy.model.dtype) * policy.cap
    return float((logits.float() - expected).abs().max()) <= near
