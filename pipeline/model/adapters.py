"""Low-rank adapters on a policy (LoRA, by peft): put on, merged, saved and loaded. Importing peft takes seconds."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from pipeline.model.policy import Policy
from pipeline.settings.lora import Lora
from pipeline.settings.mistakes import nearest
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import read_json, replacing, write_json
from pipeline.workspace.manifest import write_manifest
from pipeline.workspace.randomness import key

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
"""Files of peft's, and what it puts before the names of weights."""

PLAIN = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version"),
)
"""What a configuration may say, and adapters are still a product added to a projection."""


def is_adapted(policy: Policy) -> bool:
    """Whether there are adapters on it."""
    return hasattr(policy.model, "peft_config")


def with_adapters(policy: Policy, settings: Lora, seed: int) -> Policy:
    """A policy with new adapters on it, which alone are trained; at first it computes what it does without them.

    The weights of the policy given are frozen, and are the new one's too: they are in memory once. Adapters are float32,
    and the seed decides them. Adapters that the given policy has are merged first.

    Raises:
        UserError: a target is no projection of the policy's.
    """
    from peft import LoraConfig

    base = merged(policy)
    base.model.requires_grad_(False)
    adapted = base.frozen_copy()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        target_modules=_targets(base, settings),
    )
    _inject(adapted.model, config)
    draws = torch.Generator().manual_seed(key(seed, "adapters") % 2**63)
    for name, weight in adapted.model.named_parameters():
        if weight.requires_grad:
            first = torch.zeros(weight.shape)
            weight.data = (_drawn(first, draws) if ".lora_A." in name else first).to(weight.device)
    return adapted


def merged(policy: Policy) -> Policy:
    """The same policy as a plain model: the adapters' products added to a copy of its weights, all in float32.

    A policy without adapters is returned as it is.
    """
    if not is_adapted(policy):
        return policy
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = copy.deepcopy(policy.model).float().requires_grad_(True)
    for name, module in [*model.named_modules()]:
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config
    return Policy(model.eval(), policy.tokenizer)


def save_trained(policy: Policy, directory: Path, base: str) -> None:
    """Save a policy, like ``Policy.save``: of an adapted one the adapters alone, in peft's format.

    ``base`` is the path, from the directory, of the policy that they are on; or its hub id.
    """
    if not is_adapted(policy):
        return policy.save(directory)
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(policy.model, save_embedding_layers=False)
    settings = policy.model.peft_config["default"].to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
    with replacing(directory) as partial:
        partial.mkdir()
        save_file({PREFIX + name: w.contiguous() for name, w in weights.items()}, partial / WEIGHTS, {"format": "pt"})
        write_json(partial / CONFIG, {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()})
        policy.tokenizer.save_pretrained(partial)
        write_manifest(partial)


class Adapters(NamedTuple):
    """Adapters in a directory or on the hub."""

    source: str
    revision: str | None
    base: str
    """Directory or hub id of the policy that they are on."""
    base_revision: str | None
    tokenizer: bool
    """Whether they have their own, which may know more of a dialogue than the base's."""


def find_adapters(source: str | Path, revision: str | None = None, base: Path | None = None) -> Adapters | None:
    """What a directory or hub id has of adapters; None if it is no adapter's. A ``base`` is used in place of its own.

    Raises:
        UserError: it does not say on which policy they are, or that is not there.
    """
    file = find_adapter_config_file(str(source), revision=revision)
    if file is None:
        return None
    settings, name = read_json(Path(file)), f"policy: {str(source)!r}"
    if not isinstance(settings, dict):
        raise UserError(f"{name}: {CONFIG}: not a mapping")
    own = settings.get("base_model_name_or_path") or ""
    if not isinstance(own, str):
        raise UserError(f"{name}: {CONFIG}: base_model_name_or_path: {own!r} is not a text")
    if base is None and not own:
        raise UserError(f"{name}: adapters without a base: {CONFIG} has no base_model_name_or_path")
    beside = Path(source) / (base or own)  # of an absolute path, the path itself
    if base is None and not beside.is_dir() and (own.startswith(".") or Path(own).is_absolute()):
        raise UserError(f"{name}: adapters without a base: base_model_name_or_path: {beside}: no such model directory")
    found = str(base or (beside.resolve() if beside.is_dir() else own))
    tokenizer = cached_file(source, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    return Adapters(str(source), revision, found, None if base else settings.get("revision"), tokenizer is not None)


def put_on(policy: Policy, adapters: Adapters) -> Policy:
    """Put adapters that were saved on a policy, in place, and freeze its weights; adapters that it has are merged first.

    Raises:
        UserError: they are no LoRA, or were made for another model.
    """
    from peft import LoraConfig, PeftConfig, set_peft_model_state_dict

    source, name = adapters.source, f"policy: {adapters.source!r}"
    config = PeftConfig.from_pretrained(source, revision=adapters.revision)
    if not isinstance(config, LoraConfig):
        raise UserError(f"{name}: adapters of type {config.peft_type.value}; allowed: LORA")
    plain = LoraConfig().to_dict()
    for option, value in config.to_dict().items():
        if option not in PLAIN and value != plain[option]:
            raise UserError(f"{name}: {CONFIG}: {option}: {value!r} is not supported; allowed: {plain[option]!r}")
    file = cached_file(source, WEIGHTS, revision=adapters.revision)
    weights = {name.removeprefix(PREFIX): weight for name, weight in load_file(str(file)).items()}
    model = merged(policy).model.requires_grad_(False)
    _inject(model, config)
    with warnings.catch_warnings(action="ignore"):  # of sizes: they are refused below
        loaded: Any = set_peft_model_state_dict(model, weights, ignore_mismatched_sizes=True)
    wrong = [*(key for key in loaded.missing_keys if "lora_" in key), *loaded.unexpected_keys]
    if wrong:
        raise UserError(f"{name}: its adapters do not fit its base: {wrong[0]} is missing, of another size or too many")
    return Policy(model.eval(), policy.tokenizer)


def _inject(model: Any, config: Any) -> None:
    """Put adapters with any numbers on a model, in float32."""
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # it sets what it warns of
        inject_adapter_in_model(config, model)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def _drawn(weight: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """As ``nn.Linear`` draws its weight."""
    return nn.init.kaiming_uniform_(weight, a=5**0.5, generator=draws)


def _targets(policy: Policy, settings: Lora) -> list[str]:
    """The targets, all of which must be ends of names of projections."""
    projections = {
        name.rpartition(".")[2]
        for name, module in policy.model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not policy.head
    }
    for target in settings.targets or ():
        if target not in projections:
            raise UserError(f"lora.targets: {target!r} is no projection of the policy's{nearest(target, projections)}")
    return sorted(settings.targets or projections)
