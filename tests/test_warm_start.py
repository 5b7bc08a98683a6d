"""A pretrained policy's warm start: its demonstrations, their limits, full weights and adapters, and the stage."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoTokenizer

from pipeline.bootstrap import warm_start as module
from pipeline.bootstrap.demonstrations import Demonstration, demonstrate
from pipeline.bootstrap.supervision import encode
from pipeline.bootstrap.warm_start import warm_start
from pipeline.environments import make
from pipeline.environments.frozen_lake import FrozenLakeExpert
from pipeline.model.loading import load_policy, load_trained
from pipeline.model.policy import Policy
from pipeline.settings.params import Config
from pipeline.settings.policy import Phase
from pipeline.settings.presets import overlay
from pipeline.trajectories.prompting import Dialogue
from pipeline.trajectories.trajectory import Role
from pipeline.workspace.errors import UserError
from pipeline.workspace.yaml_files import read_yaml
from tests import scripted
from tests.scripted import NAME, play, specs_of
from tests.test_pretrained import CHAT, pretrained
from tests.trainings import LAKE, ROOT, TINY, configured, quiet, same, weights

PLAN: dict[str, Any] = {
    "phases": [{"steps": 6, "reasoning_words": [0, 2], "action_noise": 0.2}],
    "learning_rate": 3e-3,
    "batch_episodes": 4,
}
OPENED = CHAT.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
CLOSED = CHAT.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer that knows no tags."""
    target = tmp_path_factory.mktemp("downloaded") / "model"
    pretrained("qwen2", target)
    return target


def warm(model: Path, changes: dict[str, Any] | None = None, plan: dict[str, Any] | None = None) -> Config:
    policy = {"kind": "pretrained", "model": str(model), "demonstrations": {**PLAN, **(plan or {})}}
    lake = {LAKE: {"response_tokens": 80, "context_tokens": 900}}
    return configured(overlay({"policy": policy, "environments": lake}, changes or {}))


def started(config: Config, report: Any = quiet) -> Policy:
    assert config.policy.kind == "pretrained"
    assert config.policy.demonstrations is not None
    return warm_start(load_policy(config.policy.model), config.policy.demonstrations, config, report)


# ------------------------------------------------------------------------------------------------------- demonstrations


@pytest.mark.parametrize("layout", ["compact", "published"])
@pytest.mark.parametrize(
    ("template", "prefill", "forced"),
    [(CHAT, "", ""), (CHAT, "<think>", "<think>"), (OPENED, "", "<think>\n"), (CLOSED, "", "<think>\n\n</think>\n\n")],
    ids=["plain", "prefill", "opened", "closed"],
)
def test_in_a_models_own_tokens_a_demonstration_is_what_the_collector_records(
    layout: str, template: str, prefill: str, forced: str, downloaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(downloaded)
    tokenizer.chat_template = template
    assert len(tokenizer("<think>", add_special_tokens=False)["input_ids"]) > 1
    monkeypatch.setattr(scripted, "TOKENIZER", tokenizer)
    limits = {"response_tokens": 90, "context_tokens": 9000, "layout": layout}
    lake = scripted.config({"prefill": prefill}, {"success_rate": 1.0}, **limits)
    section, phase = lake.environments[NAME], Phase(steps=1, reasoning_words=(1, 3), action_noise=0.3)
    for state in range(3):
        made = demonstrate(make(section), FrozenLakeExpert(), state, phase, np.random.default_rng(state), section)
        said = [f"<think>{turn.reasoning}</think><answer>{turn.action}</answer>" for turn in made.turns]
        if "</think>" in forced:
            said = [f"<answer>{turn.action}</answer>" for turn in made.turns]
        rest = [text.removeprefix("<think>") if forced else text for text in said]
        recorded, _ = play(lake, lambda _, turn, rest=rest: rest[turn], specs_of(lake, [state])[:1])
        shown = encode(Dialogue(tokenizer, layout, prefill, 90), made, section.context_tokens)  # type: ignore[arg-type]
        for column, expected in zip(shown, (recorded.input_ids, recorded.role, recorded.sampled), strict=True):
            np.testing.assert_array_equal(column, expected)
        assert set(recorded.turns["valid"]) == {True}
        assert tokenizer.decode(shown.ids[shown.learnt]) == "".join(rest)
        assert bool((shown.roles[shown.learnt] == Role.ACTION).any())


def test_a_demonstration_ends_where_its_context_is_full(policy: Policy) -> None:
    section = configured().environments[LAKE]
    phase = Phase(steps=1, reasoning_words=(2, 2), action_noise=0.0)
    made = max(
        (demonstrate(make(section), FrozenLakeExpert(), s, phase, np.random.default_rng(s), section) for s in range(9)),
        key=lambda demonstration: len(demonstration.turns),
    )
    dialogue = Dialogue(policy.tokenizer, section.layout, "", section.response_tokens)
    whole = encode(dialogue, made, 400)
    shorter = encode(dialogue, Demonstration(made.instructions, made.turns[:-1]), 400)
    assert len(made.turns) > 1
    np.testing.assert_array_equal(encode(dialogue, made, len(whole.ids)).ids, whole.ids)
    np.testing.assert_array_equal(encode(dialogue, made, len(whole.ids) - 1).ids, shorter.ids)
    assert len(encode(dialogue, made, 1).ids) > 1


def test_no_more_is_demonstrated_than_is_learnt_from(downloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    made = module.demonstrations_of
    monkeypatch.setattr(module, "demonstrations_of", lambda *given: asked.append(given[-1]) or made(*given))
    started(warm(downloaded))
    started(warm(downloaded, plan={"episodes": 5}))
    assert asked == [24, 5]


@pytest.mark.parametrize(("key", "value"), [("response_tokens", 40), ("context_tokens", 60)])
def test_a_demonstration_that_does_not_fit_an_episode_is_refused(key: str, value: int, downloaded: Path) -> None:
    with pytest.raises(
        UserError, match=rf"^environments\.{LAKE}\.{key}: {value} is less than the \d+ tokens"
    ) as raised:
        started(warm(downloaded, {"environments": {LAKE: {key: value}}}))
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------------------------------------------------- supervision


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["weights", "adapters"])
def test_a_warm_start_lowers_the_loss_and_is_repeatable(downloaded: Path, lora: Any) -> None:
    losses: list[float] = []
    config = warm(downloaded, plan={"lora": lora} if lora else {})
    policy = started(config, lambda step, total, loss: losses.append(loss))
    assert len(losses) == 6
    assert losses[-1] < 0.9 * losses[0]
    assert same(weights(policy.model), weights(started(config).model))
    before = weights(load_policy(downloaded).model)
    assert weights(policy.model).keys() == before.keys()
    moved = {name for name, value in weights(policy.model).items() if not torch.equal(value, before[name])}
    assert ("model.embed_tokens.weight" in moved) == (lora is None)
    assert "model.layers.0.mlp.up_proj.weight" in moved
    assert not policy.model.training


def test_a_batch_in_pieces_has_the_same_gradients(downloaded: Path) -> None:
    policies = [started(warm(downloaded, {"train": {"tokens_per_forward": most}})) for most in (1, 1_000_000)]
    for one, other in zip(*(weights(policy.model).values() for policy in policies), strict=True):
        torch.testing.assert_close(one, other, atol=3e-4, rtol=0)  # Adam's first steps are signs of gradients


def test_the_stage_leaves_the_warm_policy_in_the_precision_asked_for(
    downloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.commands.cli import run
    from stages.policy import main

    section = {"kind": "pretrained", "model": str(downloaded), "dtype": "bfloat16", "demonstrations": PLAN}
    lake = {LAKE: {"response_tokens": 80, "context_tokens": 900}}
    raw = overlay(overlay(read_yaml(ROOT / "params.yaml"), TINY), {"environments": lake, "workers": 1})
    with (tmp_path / "params.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump({**raw, "policy": section}, file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stages.policy"])
    run(main)
    assert capsys.readouterr().out.startswith("models/policy: ")
    config = warm(downloaded)
    expected = copy.deepcopy(started(config).model).bfloat16()
    config = config.model_copy(update={"policy": config.policy.model_copy(update={"dtype": "bfloat16"})})
    assert same(weights(load_trained("models/policy", config).model), weights(expected))
