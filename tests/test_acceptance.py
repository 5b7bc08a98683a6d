"""Which model directories are accepted as a policy, and that those that are go all the way; the others' one line."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BertConfig, BertLMHeadModel, T5Config, T5Model

from pipeline.bootstrap.tokenizer import train_tokenizer
from pipeline.energy.annotate import annotate
from pipeline.model import checks
from pipeline.model.attention import Attend, packed_attention
from pipeline.model.checks import check_family
from pipeline.model.loading import load_policy, load_trained, longest_context
from pipeline.model.policy import Policy
from pipeline.rollout.acceptance import accept
from pipeline.rollout.collector import collect
from pipeline.rollout.specs import iteration_specs
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.settings.params import Config
from pipeline.settings.presets import overlay
from pipeline.training.module import PolicyGradient
from pipeline.workspace.errors import UserError
from pipeline.workspace.yaml_files import read_yaml
from tests.trainings import LAKE, ROOT, TINY, configured, fit, same, weights

CONTEXT = 400
"""Of the toy configuration."""
TOKENIZER = train_tokenizer(["player 0 1 goal 3 3 holes none", "let me think", "Left Right Up Down"] * 3, 320)
SHAPE: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": TOKENIZER.eos_token_id,
    "pad_token_id": TOKENIZER.pad_token_id,
}
GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "intermediate_size": 48,
    "num_key_value_heads": 4,
}
"""Attention over compressed keys and values, as DeepSeek's."""
FACTORS = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


def long_rope(original: int) -> dict[str, Any]:
    return {
        **GROUPED,
        "original_max_position_embeddings": original,
        "rope_parameters": {**FACTORS, "original_max_position_embeddings": original},
    }


def scaled_rope(kind: str) -> dict[str, Any]:
    factor = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    return {**GROUPED, "rope_parameters": factor}


FULL = {"layer_types": ["full_attention"] * 2, "use_sliding_window": True, "sliding_window": 16}
NARROW = {**GROUPED, "sliding_window": 16}
"""Far below the toy configuration's episodes."""
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
ACCEPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "llama with yarn": ("llama", scaled_rope("yarn")),
    "qwen2 that mentions a window": ("qwen2", {**GROUPED, **FULL}),
    "qwen3 with experts": ("qwen3_moe", {**GROUPED, **EXPERTS}),
    "mistral with a narrow window": ("mistral", NARROW),
    "gemma2 with windows and caps": ("gemma2", {**NARROW, **CAPS}),
    "gemma3 with windows": ("gemma3_text", {**NARROW, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "gpt_neox": ("gpt_neox", {"intermediate_size": 48}),
    "phi3 within its first length": ("phi3", long_rope(CONTEXT)),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "long rope": (
        "phi3",
        long_rope(128),
        "its position codes change as a sequence grows to 400 tokens (context_tokens)",
    ),
    "scaled logits": ("cohere", {**GROUPED, "logit_scale": 0.06}, "computes its logits from more than its output head"),
    "sinks": (
        "gpt_oss",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 512},
        "its attention is given s_aux, which is not supported",
    ),
    "latent attention": (
        "deepseek_v3",
        LATENT,
        "cannot be sampled from: attention has 4 heads of 16 numbers, where the model's configuration says 4 heads of 8",
    ),
    "values of another size": ("deepseek_v3", {**LATENT, "v_head_dim": 8}, "keys of 16 numbers and values of 8"),
    "attention of its own": ("bloom", {}, "0 of its 2 layers let their attention be exchanged"),
    "no attention": ("mamba", {}, "a model of type mamba has state, not attention, in some of its layers or all"),
    "convolutions": (
        "lfm2",
        {**GROUPED, "layer_types": ["conv", "full_attention"]},
        "a model of type lfm2 has state, not attention",
    ),
}


def random_model(kind: str, changes: dict[str, Any]) -> Any:
    """No parameter is left at zero or one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SHAPE, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * (parameter.dim() == 1) + 0.15 * torch.randn(parameter.shape))
    return model


def admitted(directory: Path, config: Config) -> Policy:
    """As the policy stage does."""
    policy = load_policy(directory, context=longest_context(config))
    accept(policy, str(directory), config)
    return policy


def refusal(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        admitted(directory, configured())
    line = str(caught.value)
    assert line.startswith("policy: ")
    assert "\n" not in line
    assert len(line.replace(str(directory), "model")) < 300
    return line


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_policy_that_is_accepted_is_one_that_works(name: str, tmp_path: Path) -> None:
    """It samples, and transformers gives its tokens the same log-probabilities; it is annotated, updated, saved and loaded."""
    Policy(random_model(*ACCEPTED[name]), TOKENIZER).save(tmp_path)
    config = configured()
    policy = admitted(tmp_path, config)
    sampled = collect(
        TransformersEngine(policy), policy.tokenizer, config, LAKE, iteration_specs(config, LAKE, 0, 0), 1.0
    )
    annotated = annotate(sampled, policy, 1.0, 4096)
    assert annotated.ref_logprob is not None
    np.testing.assert_allclose(annotated.ref_logprob, annotated.logprob, atol=1e-3)
    longest = annotated.tokens(int(annotated.lengths.argmax()))
    scored = np.where(annotated.sampled[longest], by_transformers(policy, annotated.input_ids[longest]), 0)
    np.testing.assert_allclose(annotated.ref_logprob[longest], scored, atol=1e-3)
    before = weights(policy.model)
    module = fit(PolicyGradient(config, LAKE, "ppo_actfocus", 0, policy, annotated), 1)
    assert module.curve[0]["non_finite_losses"] == 0
    assert module.curve[0]["recompute_error"] < 1e-3
    assert not same(weights(policy.model), before)
    policy.save(tmp_path / "trained")
    assert same(weights(load_trained(tmp_path / "trained", config).model), weights(policy.model))


def by_transformers(policy: Policy, ids: np.ndarray) -> np.ndarray:
    """Log-probability of each token of one episode, 0 of the first, by transformers' own forward."""
    tokens = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        logprobs = policy.model(input_ids=tokens[None], use_cache=False).logits[0].double().log_softmax(-1)
    return np.r_[0, logprobs[:-1].gather(-1, tokens[1:, None])[:, 0].numpy()]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    kind, changes, said = REFUSED[name]
    Policy(random_model(kind, changes), TOKENIZER).save(tmp_path)
    assert said in refusal(tmp_path)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    """One that looks ahead, and one that is no language model at all."""
    shape = {"num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    Policy(BertLMHeadModel(BertConfig(**{**SHAPE, **shape})), TOKENIZER).save(tmp_path / "bert")
    assert "its attention looks ahead" in refusal(tmp_path / "bert")
    t5 = T5Model(T5Config(vocab_size=len(TOKENIZER), d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2))
    Policy(t5, TOKENIZER).save(tmp_path / "t5")
    assert refusal(tmp_path / "t5").endswith("cannot be loaded: a model of type t5 is no causal language model")


def test_the_policy_stage_refuses_what_cannot_be_sampled_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.policy import main

    Policy(random_model("deepseek_v3", LATENT), TOKENIZER).save(tmp_path / "model")
    made = overlay(read_yaml(ROOT / "params.yaml"), TINY | {"policy": {"kind": "pretrained", "model": "./model"}})
    YAML().dump(made, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["policy"])
    with pytest.raises(UserError, match=r"^policy: './model' cannot be sampled from: attention has 4 heads of 16"):
        main()
    assert not (tmp_path / "models").exists()


# --------------------------------------------------------------------------------------------- damaged directories


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sound")
    Policy(random_model("llama", GROUPED), TOKENIZER).save(directory)
    return directory


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def settings_of(directory: Path, file: str = "config.json", **changes: Any) -> None:
    path = directory / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tensors_of(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def rename(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if "layers.1.mlp" in key]:
        tensors[key.replace("mlp", "ffn")] = tensors.pop(key)


def in_shards(directory: Path) -> dict[str, str]:
    """The weights in two files, and which has which."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    parts = {f"model-0000{n}-of-00002.safetensors": sorted(tensors)[n - 1 :: 2] for n in (1, 2)}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, directory / file, metadata={"format": "pt"})
    where = {key: file for file, keys in parts.items() for key in keys}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


def as_adapter(directory: Path, base: object) -> None:
    (directory / "config.json").unlink()
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))


def with_slow_tokenizer(directory: Path) -> None:
    """One of the last classes that are written in Python alone."""
    for file in directory.glob("tokenizer*"):
        file.unlink()
    (directory / "vocab.json").write_text(json.dumps({"a</w>": 0, "<unk>": 1}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CTRLTokenizer"}))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
LAYER = "model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight and 7 more"


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a layer too few": (
        lambda d: settings_of(d, num_hidden_layers=3),
        "its weights are not those of its config.json: model.layers.2.input_layernorm.weight, "
        "model.layers.2.mlp.down_proj.weight and 7 more missing",
    ),
    "a layer too many": (
        lambda d: settings_of(d, num_hidden_layers=1),
        "model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight and 7 more not in the model",
    ),
    "other names": (
        lambda d: tensors_of(d, rename),
        "model.layers.1.mlp.down_proj.weight, model.layers.1.mlp.gate_proj.weight and 1 more missing; "
        "model.layers.1.ffn.down_proj.weight, model.layers.1.ffn.gate_proj.weight and 1 more not in the model",
    ),
    "other sizes": (
        lambda d: settings_of(d, intermediate_size=64),
        "model.layers.0.mlp.down_proj.weight (32, 48) for (32, 64), model.layers.0.mlp.gate_proj.weight (48, 32) for",
    ),
    "no head": (
        lambda d: tensors_of(d, lambda tensors: tensors.pop("lm_head.weight")),
        "config.json: lm_head.weight missing",
    ),
    "a value head": (
        lambda d: tensors_of(d, lambda tensors: tensors.update(v_head=torch.ones(2))),
        "config.json: v_head not in the model",
    ),
    "not a number": (
        lambda d: tensors_of(d, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].fill_(torch.nan)),
        "model.layers.1.mlp.up_proj.weight holds numbers that are not finite in float32",
    ),
    "pointer to weights": (
        lambda d: (d / "model.safetensors").write_text(POINTER),
        "model.safetensors: only a git-LFS pointer to the file; run `git lfs pull`",
    ),
    "pointer to a tokenizer": (
        lambda d: (d / "tokenizer.json").write_text(POINTER),
        "tokenizer.json: only a git-LFS pointer to the file",
    ),
    "empty": (lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors: cut, or not safetensors"),
    "cut": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]),
        "model.safetensors: cut, or not safetensors",
    ),
    "a shard too few": (
        lambda d: (d / in_shards(d)["lm_head.weight"]).unlink(),
        "model-00001-of-00002.safetensors not there; without lm_head.weight, model.layers.0.input_layernorm.weight and",
    ),
    "a shard that is none": (
        lambda d: (d / in_shards(d)["lm_head.weight"]).write_bytes(b"x" * 99),
        "model-00001-of-00002.safetensors: cut, or not safetensors",
    ),
    "no index": (
        lambda d: (in_shards(d), (d / "model.safetensors.index.json").write_text("[]")),
        "model.safetensors.index.json: not an index of weights",
    ),
    "weights that may hold code": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "pytorch_model.bin may hold code and are not read; convert the weights to safetensors",
    ),
    "an adapter whose base is gone": (
        lambda d: as_adapter(d, "./nowhere"),
        "adapters without a base: base_model_name_or_path: ",
    ),
    "an adapter of a number": (
        lambda d: as_adapter(d, 3),
        "adapter_config.json: base_model_name_or_path: 3 is not a text",
    ),
    "an adapter of nothing": (
        lambda d: as_adapter(d, None),
        "adapters without a base: adapter_config.json has no base_model_name_or_path",
    ),
    "a slow tokenizer": (
        with_slow_tokenizer,
        "has no fast tokenizer, which tracking token roles needs; a tokenizer.json",
    ),
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        "cannot be loaded: Error no file named model.safetensors found",
    ),
    "no configuration": (lambda d: (d / "config.json").write_text("{"), "cannot be loaded: "),
    "no settings": (
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": [0,'),
        "generation_config.json: not JSON, or no mapping",
    ),
    "no tokenizer's files": (
        lambda d: [file.unlink() for file in d.glob("tokenizer*")],
        "no tokenizer.json, nor another",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer.json").write_text("{"), "cannot be loaded: "),
    "an end that is no token": (
        lambda d: settings_of(d, "generation_config.json", eos_token_id=[0, 999]),
        f"generation_config.json: eos_token_id: 999 is not among its tokenizer's {len(TOKENIZER)} tokens",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_directory_whose_files_do_not_belong_together_is_refused(damaged: Path, name: str) -> None:
    damage, said = DAMAGE[name]
    damage(damaged)
    assert said in refusal(damaged)


def test_what_a_library_knows_to_be_absent_or_left_over_is_no_damage(damaged: Path) -> None:
    """A tied head, and buffers that older versions saved."""
    settings_of(damaged, tie_word_embeddings=True)
    tensors_of(damaged, lambda t: (t.pop("lm_head.weight"), t.update({"model.rotary_emb.inv_freq": torch.ones(4)})))
    admitted(damaged, configured())


def test_weights_in_several_files_are_accepted(damaged: Path) -> None:
    in_shards(damaged)
    admitted(damaged, configured())


def test_a_tokenizer_must_fit_the_embedding_and_write_the_tags(damaged: Path, sound: Path) -> None:
    greater = copy.deepcopy(TOKENIZER)
    greater.add_tokens(["one", "more"])
    greater.save_pretrained(damaged)
    rows = len(TOKENIZER)
    assert refusal(damaged).endswith(f"its tokenizer has tokens up to {rows + 1}, its embedding only {rows} rows")
    shutil.copy(sound / "tokenizer.json", damaged)
    parts = json.loads((damaged / "tokenizer.json").read_text())
    parts["normalizer"] = {"type": "Replace", "pattern": {"String": "<"}, "content": " "}
    parts["added_tokens"] = [token for token in parts["added_tokens"] if "think" not in token["content"]]
    (damaged / "tokenizer.json").write_text(json.dumps(parts))
    assert "cannot write <think>a</think><answer>b</answer>, but " in refusal(damaged)


@pytest.mark.parametrize(("context", "works"), [(50, True), (51, False)])
def test_a_window_that_is_not_kept_is_noticed_if_an_episode_can_outgrow_it(
    tmp_path: Path, context: int, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_windows(lengths: Sequence[int], device: torch.device) -> Attend:
        attention = packed_attention(lengths, device)
        return lambda layer, heads: attention(layer, heads._replace(window=None))

    Policy(random_model("mistral", {**GROUPED, "sliding_window": 50}), TOKENIZER).save(tmp_path)
    load_policy(tmp_path, context=context)
    monkeypatch.setattr(checks, "packed_attention", without_windows)
    if works:
        load_policy(tmp_path, context=context)
    else:
        with pytest.raises(UserError, match=r"looks back otherwise than over 50 tokens$"):
            load_policy(tmp_path, context=context)


@pytest.mark.parametrize(
    "kind", ["mamba2", "jamba", "rwkv", "recurrent_gemma", "falcon_h1", "qwen3_next", "granitemoehybrid", "minimax"]
)
def test_a_family_with_state_is_refused_by_name_before_its_weights_are_read(kind: str) -> None:
    with pytest.raises(UserError, match=rf"^policy: 'x': a model of type {kind} has state, not attention, "):
        check_family(CONFIG_MAPPING[kind](), torch.float32, False, "policy: 'x'")


def test_experts_are_refused_below_float32() -> None:
    with pytest.raises(UserError, match=r"in bfloat16 rounding sends tokens to other of its 128 experts .* float32$"):
        check_family(CONFIG_MAPPING["qwen3_moe"](), torch.bfloat16, False, "policy: 'x'")
    for kind in ("llama", "gemma2", "gemma3_text", "gpt2", "opt", "phi3"):
        check_family(CONFIG_MAPPING[kind](), torch.bfloat16, False, "policy: 'x'")
