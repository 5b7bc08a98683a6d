"""LoRA is the policy whose weights have the product added; its base is in memory once, and in no checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.commands import export
from pipeline.evaluation.evaluate import evaluate
from pipeline.model.adapters import find_adapters, is_adapted, merged, save_trained, with_adapters
from pipeline.model.loading import load_policy, load_trained
from pipeline.model.policy import Policy
from pipeline.model.scoring import predicting_hidden, score_tokens
from pipeline.model.trunk import has_own_forward
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.settings.lora import Lora
from pipeline.settings.params import parse
from pipeline.settings.presets import overlay
from pipeline.training.module import PolicyGradient
from pipeline.training.run import TrainingJob, train_until
from pipeline.training.seed_key import training_task
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import read_json, write_json
from pipeline.workspace.layout import Layout
from pipeline.workspace.manifest import MANIFEST, copy_whole
from pipeline.workspace.yaml_files import read_yaml
from tests.test_acceptance import GROUPED, TOKENIZER, random_model
from tests.trainings import LAKE, ROOT, TINY, configured, fit, left, quiet, same, weights

RANK = {"rank": 4, "alpha": 6.0}
SHAPES: dict[str, dict[str, Any]] = {"llama": GROUPED, "qwen3": GROUPED, "gpt2": {}}
KEY = "params.yaml: methods.{}.learning_rate * train.lora.learning_rate_factor"
ADAPTED = {"train": {"lora": RANK}}


def moved(policy: Policy, seed: int = 0) -> Policy:
    """The policy with adapters that do something."""
    adapted = with_adapters(policy, Lora(**RANK), seed)
    torch.manual_seed(seed)
    for name, weight in adapted.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return adapted


def mean_loss(policy: Policy) -> tuple[Tensor, Tensor]:
    """Of a few sequences, with log-probabilities."""
    draws = np.random.default_rng(0)
    sequences = [draws.integers(0, 250, length) for length in (9, 4, 17)]
    wanted = [np.arange(len(sequence)) > 1 for sequence in sequences]
    tokens = torch.from_numpy(np.concatenate([s[w] for s, w in zip(sequences, wanted, strict=True)]))
    scores = score_tokens(predicting_hidden(policy, sequences, wanted), tokens, policy.head, 0.9)
    return -scores.logprob.mean() - 0.1 * scores.entropy.mean(), scores.logprob.detach()


@pytest.mark.parametrize("kind", ["scratch", "llama", "qwen3", "gpt2"])
def test_adapters_are_weights_with_the_product_added(kind: str, policy: Policy) -> None:
    """Loss, log-probabilities, transformers' own logits, and gradients: by the chain rule from those of the weights."""
    policy = policy if kind == "scratch" else Policy(random_model(kind, SHAPES[kind]).eval(), TOKENIZER)
    adapted = moved(policy)
    whole = merged(adapted)
    assert has_own_forward(adapted.backbone) == has_own_forward(whole.backbone) == (kind != "gpt2")
    assert is_adapted(adapted)
    assert not is_adapted(whole)
    assert {type(m) for m in whole.model.modules()} == {type(m) for m in policy.model.modules()}
    losses, logprobs = zip(*map(mean_loss, (adapted, whole)), strict=True)
    without = mean_loss(policy)[1]
    assert float((logprobs[0] - without).abs().max()) > 1e-3
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(logprobs[0], logprobs[1], atol=1e-5, rtol=0)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted.model(ids).logits, whole.model(ids).logits, atol=1e-4, rtol=1e-5)
    for loss in losses:
        loss.backward()
    slopes = {name: p.grad for name, p in whole.model.named_parameters()}
    scale, found = RANK["alpha"] / RANK["rank"], 0
    for name, module in adapted.model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            slope = slopes[f"{name}.weight"]
            assert slope is not None
            slope = slope.T if kind == "gpt2" else slope
            torch.testing.assert_close(b.grad, scale * slope @ a.T, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(a.grad, scale * b.T @ slope, atol=1e-5, rtol=1e-4)
            found += 1
    assert found > 3
    assert all(p.grad is None for name, p in adapted.model.named_parameters() if "lora" not in name)


def test_new_adapters_change_nothing_and_come_from_their_seed_alone(policy: Policy) -> None:
    before, state = mean_loss(policy)[1], torch.get_rng_state()
    one, same_again, other = (with_adapters(policy, Lora(**RANK), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(mean_loss(one)[1], before)
    assert same(weights(one.model), weights(same_again.model))
    assert not same(weights(one.model), weights(other.model))
    assert not is_adapted(policy)


def test_half_precision_is_adapted_and_merged_in_float32(policy: Policy) -> None:
    exact = {name: weight.clone() for name, weight in policy.model.bfloat16().state_dict().items()}
    adapted = moved(policy)
    trained = {p.dtype for p in adapted.model.parameters() if p.requires_grad}
    assert (trained, adapted.model.model.embed_tokens.weight.dtype) == ({torch.float32}, torch.bfloat16)
    name = "model.layers.0.mlp.up_proj"
    module = adapted.model.get_submodule(name)
    product = module.lora_B["default"].weight @ module.lora_A["default"].weight
    whole = merged(adapted).model.get_submodule(name).weight
    torch.testing.assert_close(whole, exact[f"{name}.weight"].float() + 1.5 * product, atol=1e-7, rtol=1e-6)
    assert same(policy.model.state_dict(), exact)
    torch.testing.assert_close(mean_loss(adapted)[1], mean_loss(merged(adapted))[1], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_training_moves_adapters_alone_and_its_base_is_in_memory_once(method: str, directory: Path) -> None:
    policy = load_policy(directory)
    module = PolicyGradient(configured(ADAPTED), LAKE, method, 0, policy)
    reference, before = module.learner.reference, weights(policy.model)
    started = weights(module.policy.model)
    assert same(weights(reference.model), before)
    models = policy.model, reference.model, module.policy.model
    places = {p.data_ptr() for model in models for p in model.parameters()}
    adapters = [p for p in module.policy.model.parameters() if p.requires_grad]
    assert len(places) == len({p.data_ptr() for p in policy.model.parameters()}) + len(adapters)
    assert module.learner.masters[0].weights == adapters
    assert module.learner.masters[0].rate == (
        KEY.format(method),
        pytest.approx(10 * module.learner.method.learning_rate),
    )
    fit(module, 2)
    assert same(weights(reference.model), before)
    assert same(weights(policy.model), before)
    changed = {name for name, weight in weights(module.policy.model).items() if not torch.equal(weight, started[name])}
    assert changed == {name for name in started if "lora_" in name}
    assert changed
    assert module.curve[0]["recompute_error"] < 1e-4


def test_a_training_is_gone_on_with_from_adapters_alone(directory: Path, tmp_path: Path) -> None:
    """Stopped after its first iteration, its checkpoint has no base; the result is the same, and is played the same."""
    config = configured(ADAPTED)
    results = []
    for name, stops in (("straight", (2,)), ("stopped", (1, 2))):
        task = training_task(config, LAKE, "ppo", 0, directory, tmp_path / name)
        for stop in stops:
            train_until(TrainingJob(task, None, None), stop, quiet)
            if stop == 1:
                saved = torch.load(task.cache / "checkpoint.ckpt", weights_only=True)["state_dict"]
                assert all("lora_" in key for key in saved if key.startswith("model."))
                assert {key.partition(".")[0] for key in saved} == {"model", "heads"}
        results.append(task.result)
    assert left(results[0]) == left(results[1])
    assert {f.name for f in (results[0] / "policy").iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    assert not (results[0] / "policy" / "model.safetensors").exists()
    assert str(tmp_path) not in (results[0] / "policy" / "adapter_config.json").read_text()

    layout = Layout(tmp_path / "run")
    shutil.copytree(directory, layout.policy)
    final = layout.final_policy(LAKE, "ppo", 0)
    copy_whole(results[0] / "policy", final)
    policies = [load_trained(final, config), load_trained(results[0] / "policy", config, base=directory)]
    played = [evaluate(TransformersEngine(p), p.tokenizer, config, LAKE, 0, 1.0) for p in policies]
    np.testing.assert_array_equal(played[0].logprob, played[1].logprob)
    module = fit(PolicyGradient(config, LAKE, "ppo", 0, load_policy(directory)), 2)
    own = evaluate(TransformersEngine(module.policy), module.policy.tokenizer, config, LAKE, 0, 1.0)
    np.testing.assert_array_equal(played[0].input_ids, own.input_ids)
    np.testing.assert_array_equal(played[0].logprob, own.logprob)


def test_an_export_is_a_plain_model(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of adapters, and of whole weights: as they are. What is there already is left alone."""
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "params.yaml", overlay(overlay(read_yaml(ROOT / "params.yaml"), TINY), {"seeds": [0, 1]}))
    layout = Layout(tmp_path)
    shutil.copytree(directory, layout.policy)
    adapted = moved(load_policy(directory))
    save_trained(adapted, layout.final_policy(LAKE, "grpo", 0), layout.base)
    save_trained(load_policy(directory), layout.final_policy(LAKE, "grpo", 1), layout.base)
    for seed in (0, 1):
        export.main("grpo", Path(f"out/{seed}"), seed=seed)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained("out/0")(ids).logits
        torch.testing.assert_close(found, adapted.model(ids).logits, atol=1e-5, rtol=1e-5)
    exported, own = left(Path("out/1")), left(layout.final_policy(LAKE, "grpo", 1))
    assert exported.pop(MANIFEST) != own.pop(MANIFEST)  # each knows its folder
    assert exported == own
    with pytest.raises(UserError, match=r"^--to: out/1 is there already; allowed: a new or an empty folder$"):
        export.main("grpo", Path("out/1"))


def test_adapters_that_cannot_be_put_on_are_refused_in_one_line(directory: Path, tmp_path: Path) -> None:
    policy = load_policy(directory)
    with pytest.raises(UserError, match=r"^lora.targets: 'q_pro' is no projection .*; did you mean 'q_proj'\?$"):
        with_adapters(policy, Lora(targets=["v_proj", "q_pro"]), 0)
    with pytest.raises(UserError, match=r"^lora.targets: 'lm_head' is no projection"):
        with_adapters(policy, Lora(targets=["lm_head"]), 0)
    target = tmp_path / "adapters"
    save_trained(moved(policy), target, str(directory))
    assert is_adapted(load_policy(target))
    settings = read_json(target / "adapter_config.json")

    def refused(changes: dict[str, Any], said: str) -> None:
        write_json(target / "adapter_config.json", {**settings, **changes})
        with pytest.raises(UserError, match=rf"^policy: '{target}'.*{said}") as error:
            load_policy(target)
        assert "\n" not in str(error.value)

    refused({"base_model_name_or_path": None}, "adapters without a base: .* has no base_model_name_or_path$")
    refused({"base_model_name_or_path": "../gone"}, "adapters without a base: .*gone: no such model directory$")
    refused({"modules_to_save": ["lm_head"]}, r"modules_to_save: \['lm_head'\] is not supported; allowed: None$")
    refused({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' is not supported; allowed: True$")
    refused({"peft_type": "LOHA"}, "adapters of type LOHA; allowed: LORA$")
    refused({"target_modules": ["q_proj"]}, "its adapters do not fit its base: ")
    refused({"r": 2}, "its adapters do not fit its base: .*lora_")
    assert find_adapters(directory) is None


def test_a_trunk_of_its_own_beside_adapters_is_refused() -> None:
    slot = {"kind": "gae", "critic": {"kind": "model"}}
    raw = overlay(read_yaml(ROOT / "params.yaml"), {"train": {"lora": {}}, "methods": {"mine": {"advantage": slot}}})
    with pytest.raises(
        UserError, match=r"^params.yaml: methods.mine.advantage.critic.kind: 'model' is not allowed with"
    ):
        parse(raw)
