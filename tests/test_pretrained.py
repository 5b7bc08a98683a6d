"""Pretrained policies go all the way, and what a method remembers survives a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from pipeline.energy.annotate import annotate
from pipeline.evaluation.evaluate import episode_results, evaluate
from pipeline.model.loading import load_policy, load_trained
from pipeline.model.policy import Policy
from pipeline.rollout.collector import collect
from pipeline.rollout.specs import iteration_specs
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.training.module import PolicyGradient
from pipeline.trajectories.trajectory import RESPONSE_ROLES
from tests.trainings import LAKE, configured, fit, same, weights

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pretrained(kind: str, directory: Path) -> None:
    """A small model with random weights and a tokenizer that knows no tags, as if downloaded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_end|>", "<|im_start|>"] if kind == "qwen2" else ["</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["player 0 1 goal 3 3 holes 1 2", "Left Right Up Down"] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], chat_template=CHAT if kind == "qwen2" else None
    )
    torch.manual_seed(3)
    shape: dict[str, Any] = {
        "vocab_size": len(fast),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": fast.eos_token_id,
    }
    model: Any
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **shape))
    Policy(model, fast).save(directory)


@pytest.mark.parametrize(("kind", "prefill"), [("qwen2", "<think>"), ("llama", "")])
def test_a_pretrained_policy_goes_all_the_way(kind: str, prefill: str, tmp_path: Path) -> None:
    pretrained(kind, tmp_path / "model")
    environment = {"layout": "published", "max_turns": 2, "context_tokens": 1500, "actions_per_turn": 2}
    config = configured(
        {
            "policy": {"kind": "pretrained", "model": str(tmp_path / "model")},
            "environments": {LAKE: environment},
            "rollout": {"prefill": prefill, "temperature": 0.8},
        }
    )
    assert config.policy.kind == "pretrained"
    policy = load_policy(config.policy.model, dtype=config.policy.dtype)
    assert len(policy.tokenizer("<think>", add_special_tokens=False)["input_ids"]) > 1
    specs = iteration_specs(config, LAKE, 0, 0)
    sampled = collect(TransformersEngine(policy), policy.tokenizer, config, LAKE, specs, 0.8)
    annotated = annotate(sampled, policy, 0.8, 4096)
    assert annotated.ref_logprob is not None
    np.testing.assert_allclose(annotated.ref_logprob, annotated.logprob, atol=1e-4)
    forced = ~annotated.sampled & np.isin(annotated.role, RESPONSE_ROLES)
    assert bool(forced.any()) == bool(prefill)

    before = weights(policy.model)
    module = fit(PolicyGradient(config, LAKE, "ppo_actfocus", 0, policy, annotated), 1)
    assert module.curve[0]["recompute_error"] < 1e-4
    assert module.curve[0]["non_finite_losses"] == 0
    assert not same(weights(policy.model), before)

    policy.save(tmp_path / "trained")
    trained = load_trained(tmp_path / "trained", config)
    assert same(weights(trained.model), weights(policy.model))
    played = evaluate(TransformersEngine(trained), trained.tokenizer, config, LAKE, 0, 0.5)
    results = episode_results(played, environment=LAKE, method="ppo_actfocus", seed=0, temperature=0.5)
    assert len(results) == 4
    assert results["rollout"].to_pylist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "slots",
    [
        {"regulariser": {"kind": "entropy_target", "entropy": 0.01, "target": 1.5, "rate": 0.1}},
        {"regulariser": {"kind": "entropy_band", "entropy": 0.01, "alpha": 10.0, "low": 0.99, "high": 1.01}},
        {"advantage": {"kind": "entropy_gae", "budget": 1.5}},
        {"advantage": {"kind": "soft_q", "q": {"polyak": 0.5}}, "surrogate": {"kind": "soft_q"}},
    ],
    ids=lambda slots: next(iter(slots.values()))["kind"],
)
def test_what_a_method_remembers_survives_a_checkpoint(slots: dict[str, Any], policy: Policy, tmp_path: Path) -> None:
    """Adaptive slots and target networks: stopped after two iterations of four and gone on with, nothing differs."""
    config = configured({"methods": {"adaptive": slots}, "train": {"iterations": 4}})

    def trained(iterations: int, checkpoint: Path | None = None) -> tuple[lightning.Trainer, PolicyGradient]:
        own = Policy(copy.deepcopy(policy.model), policy.tokenizer)
        module = PolicyGradient(config, LAKE, "adaptive", 0, own)
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=iterations,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
        return trainer, module

    trainer, stopped = trained(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, straight = trained(4, tmp_path / "half.ckpt")[1], trained(4)[1]
    assert same(weights(resumed), weights(straight))
    assert not same(weights(stopped), weights(straight))
    assert resumed.memory == straight.memory
    assert resumed.curve == straight.curve
