"""The contracts over every registered environment and the worked example, and the document of both."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from pipeline.contracts.environment import CONTRACTS, check_environment
from pipeline.contracts.environment.suite import Seen, proceed
from pipeline.environments import make
from pipeline.environments.making import OURS
from pipeline.settings.params import Config, Environment, parse
from pipeline.settings.presets import overlay
from pipeline.workspace.yaml_files import read_yaml

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
DOCUMENT = ROOT / "docs" / "environments.md"
SOUND = {name: Environment(id=name) for name in OURS} | {
    "slippery FrozenLake": Environment(id="actfocus/FrozenLake-v1", settings={"success_rate": 0.8}),
    "Sokoban with two boxes": Environment(id="actfocus/Sokoban-v1", settings={"boxes": 2, "max_actions": 30}),
    "faulty lamps": Environment(id="lamps:Lamps-v0", settings={"faulty": 0.1}),
}
"""Every registered environment, and the worked example."""


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's folder is where Python looks for modules."""
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture(params=SOUND.values(), ids=SOUND.keys())
def sound(request: pytest.FixtureRequest, examples: None) -> Environment:
    return request.param


def test_our_environments_and_the_example_keep_every_contract(sound: Environment) -> None:
    assert check_environment(sound) == []


def test_the_environments_of_params_keep_every_contract() -> None:
    for section in parse(read_yaml(ROOT / "params.yaml")).environments.values():
        assert check_environment(section) == []


def course(environment: Any, draws: np.random.Generator) -> Iterator[tuple[str, str, Seen]]:
    """The expert's words, its actions or random ones, and what follows, up to the end."""
    expert = sys.modules[type(environment).__module__].expert()
    while not environment.done:
        words = expert.reason(environment, 9, draws)
        choose = expert.random_action if draws.random() < 0.3 else expert.act
        action = choose(environment, draws)
        yield words, action, proceed(environment, [action])[0]


def shown() -> dict[str, list[Any]]:
    """What some episodes of every sound environment show, from the first observation on."""
    found: dict[str, list[Any]] = {name: [] for name in SOUND}
    for name, section in SOUND.items():
        environment: Any = make(section)
        for seed in range(10):
            observation, _ = environment.reset(seed=seed, options={"state_seed": seed} if seed % 2 else None)
            found[name] += [observation, environment.instructions, environment.state_key]
            found[name] += [list(turn) for turn in course(environment, np.random.default_rng(seed))]
    return found


@pytest.mark.parametrize("hash_seed", ["0", "4242"])
def test_the_same_seeds_show_the_same_in_a_process_under_another_hash_seed_and_without_torch(
    hash_seed: str, examples: None
) -> None:
    program = "import json, sys; from tests.test_contracts_kept import shown; print(json.dumps([shown(), 'torch' in sys.modules]))"
    changed = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": f"{ROOT}:{EXAMPLES}"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | changed, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [shown(), False]


def test_a_copy_in_mid_episode_goes_on_as_a_replay_from_the_seed_does(sound: Environment) -> None:
    for seed in range(20):
        original, replay, draws = make(sound), make(sound), np.random.default_rng(seed)
        original.reset(seed=seed)
        turns = list(islice(course(original, draws), seed % 4))
        key, twin = original.state_key, copy.deepcopy(original)
        turns += course(twin, draws)
        assert original.state_key == key
        replay.reset(seed=seed)
        assert [seen for _, _, seen in turns] == proceed(replay, [action for _, action, _ in turns])


# ---------------------------------------------------------------------------------------------------- the worked example


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.S)


def documented(changes: dict[str, Any]) -> Config:
    """params.yaml with the document's environments, and changes."""
    raw = read_yaml(ROOT / "params.yaml")
    for block in blocks("yaml"):
        raw = overlay(raw, YAML(typ="safe").load(block))
    return parse(overlay(raw, changes), "document")


def test_the_documents_yaml_is_valid_on_top_of_params(examples: None) -> None:
    section = documented({}).environments["lamps"]
    assert section.id == "lamps:Lamps-v0"
    assert documented({}).environments["webshop"].context_tokens == 8192
    assert check_environment(section) == []


def test_the_document_names_every_contract() -> None:
    section = DOCUMENT.read_text(encoding="utf-8").split("## Contracts")[1]
    named = set(re.findall(r"^\| `([^`]+)` \|", section, flags=re.M))
    assert named == {"made", *CONTRACTS}


def test_the_document_shows_the_example_as_it_is() -> None:
    (shown,) = blocks("python")
    assert shown.strip() in (EXAMPLES / "lamps.py").read_text(encoding="utf-8")


def test_the_documents_command_runs_outside_the_repository(tmp_path: Path) -> None:
    (command,) = (line for block in blocks("sh") for line in block.splitlines() if "--id lamps:" in line)
    changed = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{EXAMPLES}"}
    bare = command.replace("PYTHONPATH=docs/examples ", "")
    assert bare != command
    done = subprocess.run(bare, shell=True, cwd=tmp_path, env=os.environ | changed, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr


def test_a_policy_is_bootstrapped_and_trained_on_the_example(examples: None) -> None:
    from pipeline.training.module import PolicyGradient
    from tests.trainings import TINY, fit, supervised  # heavy: the suite's other process imports this module

    tiny = {name: settings for name, settings in TINY.items() if name != "environments"}
    config = documented(overlay(tiny, {"environments": {"frozen_lake": None, "webshop": None}}))
    module = fit(PolicyGradient(config, "lamps", "grpo_actfocus", 0, supervised(config)), 1)
    (row,) = module.curve
    assert row["valid_action_rate"] > 0
    assert row["updates"] > 0
    assert np.isfinite(list(row.values())).all()
