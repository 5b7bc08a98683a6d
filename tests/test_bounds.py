"""Whatever passes the schema runs: random params within its bounds, at toy size, through every stage's own functions."""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import os
import random
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest

from pipeline.analysis.bottleneck import bottleneck
from pipeline.bootstrap.scratch import bootstrap
from pipeline.energy.annotate import annotate
from pipeline.environments.making import OURS, make
from pipeline.environments.playing import reset
from pipeline.evaluation.evaluate import EvaluationTask, evaluate_policy
from pipeline.model.loading import load_policy
from pipeline.model.memory import tokens_per_forward
from pipeline.rollout.slices import SlicesTask, sample_slices
from pipeline.settings.custom import Custom
from pipeline.settings.method import Method
from pipeline.settings.params import Config, Environment, parse
from pipeline.settings.policy import ScratchPolicy
from pipeline.settings.presets import overlay
from pipeline.settings.section import Section
from pipeline.training.run import TrainingJob, train_one
from pipeline.training.seed_key import training_task
from pipeline.workspace.errors import UserError
from pipeline.workspace.yaml_files import read_yaml
from tests.trainings import LAKE, TINY, quiet

ROOT = Path(__file__).parents[1]
DRAWS = int(os.environ.get("BOUNDS_DRAWS", "12"))
"""How many params files are drawn."""

# What costs time is drawn up to here only.
TOY: dict[str, Any] = {
    "max_turns": 3,
    "actions_per_turn": 3,
    "response_tokens": 24,
    "groups": 3,
    "group_size": 6,
    "iterations": 2,
    "passes": 2,
    "states": 2,
    "rollouts": 2,
    "validation_states": 2,
    "validation_rollouts": 2,
    "temperatures": 2,
    "phases": 2,
    "steps": 4,
    "demonstrations.episodes": 40,
    "reasoning_words": 20,
    "hidden_size": 64,
    "layers": 2,
    "heads": 4,
    "vocabulary": 5000,
    "demonstrations.batch_episodes": 60,
    "resamples": 200,
}


class Draw:
    """Values of the schema's own types and bounds, its ends among them."""

    def __init__(self, seed: int) -> None:
        self.draws = random.Random(seed)

    def section(self, section: type[Section], path: str = "") -> dict[str, Any]:
        """Half of the settings that have a default keep it; adapters, engines and workers have tests of their own."""
        found = {}
        for name, field in section.model_fields.items():
            if name in ("id", "settings", "lora", "workers", "cache_gigabytes", "engine", "correction"):
                continue
            if field.is_required() or self.draws.random() < 0.5:
                found[name] = self.value(field.annotation, field.metadata, f"{path}.{name}")
        return found

    def value(self, annotation: Any, metadata: list[Any], path: str) -> Any:
        options, origin = get_args(annotation), get_origin(annotation)
        if origin is Literal:
            return self.draws.choice(options)
        if isinstance(annotation, type) and issubclass(annotation, Section):
            return self.section(annotation, path)
        if hasattr(annotation, "__metadata__"):
            notes = [getattr(note, "metadata", [note]) for note in annotation.__metadata__]
            return self.value(options[0], [*metadata, *itertools.chain(*notes)], path)
        if origin is tuple:
            return sorted(self.value(option, [], path) for option in options)
        if origin is list:
            return [self.value(options[0], [], path) for _ in range(self.draws.randint(1, most(path, 3)))]
        if origin is not None:  # a union
            ours = [o for o in options if not (isinstance(o, type) and issubclass(o, Custom))]
            return self.value(self.draws.choice(ours), metadata, path)
        if annotation is type(None):
            return None
        if annotation is bool:
            return self.draws.random() < 0.5
        return self.number(annotation, metadata, path)

    def number(self, kind: type, metadata: list[Any], path: str) -> float:
        low, high = -math.inf, math.inf
        for bound in metadata:
            low = max(low, getattr(bound, "ge", low), getattr(bound, "gt", low) + 1e-9 * hasattr(bound, "gt"))
            high = min(high, getattr(bound, "le", high), getattr(bound, "lt", high) - 1e-9 * hasattr(bound, "lt"))
        high = min(high, most(path, high))
        assert math.isfinite(low + high), f"{path}: no bounds"
        if kind is int:
            return self.draws.choice([int(low), int(high), self.draws.randint(int(low), int(high))])
        span = math.exp(self.draws.uniform(math.log(max(low, 1e-6)), math.log(max(high, 1e-6))))
        return self.draws.choice([low, high, min(max(span, low), high), self.draws.uniform(low, min(high, 2.0))])


def loaded(name: str) -> Any:
    """An environment's class."""
    module, _, own = OURS[f"actfocus/{name}-v1"].partition(":")
    return getattr(importlib.import_module(module), own)


def most(path: str, otherwise: Any) -> Any:
    """The toy size of a setting, by the longest end of its path that has one."""
    parts = path.split(".")
    return next((TOY[".".join(parts[i:])] for i in range(len(parts)) if ".".join(parts[i:]) in TOY), otherwise)


KEPT = ("evaluation.states", "evaluation.rollouts", "evaluation.validation_states", "evaluation.validation_rollouts")


def drawn(seed: int) -> Config:
    """The first params file of a seed that the schema takes; of every slot a kind is as likely as another."""
    draw, base = Draw(seed), overlay(read_yaml(ROOT / "params.yaml"), TINY)
    sections = ("seeds", "rollout", "train", "evaluation")
    for _ in range(20_000):
        fields = {name: Config.model_fields[name] for name in sections}
        raw = base | {name: draw.value(field.annotation, field.metadata, name) for name, field in fields.items()}
        for key in KEPT:
            raw["evaluation"][key.split(".")[1]] = 2
        groups = raw["rollout"].setdefault("groups", 2)
        raw["rollout"].setdefault("group_size", 4)
        raw["train"] |= {"iterations": draw.draws.randint(1, 2), "minibatch": draw.draws.randint(1, 8)}
        raw["bottleneck"] = {"groups": groups * draw.draws.randint(1, 2), "resamples": 100}
        raw["environments"] = {
            LAKE: {**base["environments"][LAKE], **draw.section(Environment, "environment"), "context_tokens": 1000}
        }
        slots = {
            name: field for name, field in Method.model_fields.items() if name not in ("source", "status", "matched_to")
        }
        method = {name: draw.value(field.annotation, field.metadata, name) for name, field in slots.items()}
        raw |= {"methods": {"drawn": method}, "compare": {}, "report": {"states": 0}}
        try:
            return parse(raw)
        except UserError:
            continue
    raise AssertionError("the schema takes nothing")


@pytest.mark.parametrize("seed", range(DRAWS))
def test_a_drawn_params_file_rolls_out_annotates_trains_and_evaluates(
    seed: int, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = drawn(seed)
    print(
        config.model_dump(include={"seeds", "rollout", "train", "evaluation", "environments"}), config.methods["drawn"]
    )
    (table,) = sample_slices(SlicesTask(config, LAKE, directory, [0], tmp_path / "slices"), quiet).values()
    reference = load_policy(directory)
    annotated = annotate(table, reference, config.rollout.temperature, tokens_per_forward(config, reference))
    assert np.isfinite(annotated.energy[annotated.sampled]).all()
    bottleneck(annotated, 100)
    task = training_task(config, LAKE, "drawn", config.seeds[0], directory, tmp_path)
    result = train_one(TrainingJob(task, None, None), quiet)
    for temperature in config.evaluation.temperatures:
        played = evaluate_policy(
            EvaluationTask(config, LAKE, "drawn", config.seeds[0], result / "policy", temperature), quiet
        )
        assert len(played) == config.evaluation.states * config.evaluation.rollouts


@pytest.mark.parametrize("seed", range(DRAWS // 4))
def test_a_drawn_policy_from_scratch_is_supervised(seed: int) -> None:
    draw, base = Draw(seed), overlay(read_yaml(ROOT / "params.yaml"), TINY)
    while True:
        raw = {**base, "policy": {**draw.section(ScratchPolicy, "policy"), "kind": "scratch"}}
        try:
            config = parse(raw)
            break
        except UserError:
            continue
    assert config.policy.kind == "scratch"
    print(config.policy)
    policy = bootstrap(config.policy, config.environments, quiet)
    assert all(bool(weights.isfinite().all()) for weights in policy.model.parameters())


ODD = (True, False, math.nan, math.inf, -math.inf, 2.5, 1e300, -1, 0, 10**12, "4", [], None)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        (name, setting)
        for name in ("FrozenLake", "Sokoban", "Sudoku", "Bandit", "WebShop")
        for setting, parameter in inspect.signature(loaded(name)).parameters.items()
        if "int" in str(parameter.annotation) or "float" in str(parameter.annotation)
    ],
)
def test_a_number_of_an_environments_settings_is_refused_in_a_line_or_plays(name: str, setting: str) -> None:
    for value in ODD:
        section = Environment(id=f"actfocus/{name}-v1", settings={setting: value})
        refusal = None
        try:
            environment = make(section)
        except UserError as error:
            refusal = str(error)
        if refusal is not None:
            assert refusal.startswith(f"environments: 'actfocus/{name}-v1' refuses its settings: "), value
            assert "\n" not in refusal
            continue
        assert not isinstance(value, bool | str | list)
        assert isinstance(value, int) or value is None or math.isfinite(value)
        reset(environment, 0, 0)
