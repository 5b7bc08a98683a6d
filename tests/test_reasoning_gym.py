"""Questions of reasoning-gym."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from pipeline.contracts.environment import check_environment
from pipeline.environments import initial_states, make
from pipeline.model.memory import tokens_per_forward
from pipeline.settings.params import parse
from pipeline.settings.presets import overlay
from pipeline.workspace.errors import UserError
from pipeline.workspace.yaml_files import read_yaml
from tests.extras import REASONING, ROOT, installed, section, started

MIXTURE = [{"name": name, "weight": 1, "config": {}} for name in ("leg_counting", "word_sorting")]


@installed("reasoning_gym")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dataset": "basic_arithmetic", "config": {"max_terms": 2}},
        {"dataset": "mini_sudoku"},
        {"dataset": "letter_counting"},
        {"dataset": "list_functions"},
        {"dataset": "graph_color"},
        {"dataset": "bf"},
        {"dataset": "composite", "config": {"datasets": MIXTURE}},
    ],
    ids=lambda settings: settings.get("dataset", "default"),
)
def test_a_dataset_keeps_every_contract(settings: dict[str, Any]) -> None:
    assert check_environment(section(REASONING, **settings)) == []


@installed("reasoning_gym")
def test_there_are_as_many_items_as_anyone_wants() -> None:
    for dataset in ("chain_sum", "list_functions", "acre"):
        environment = make(section(REASONING, dataset=dataset, config={"size": 1500} if dataset == "acre" else {}))
        seeds = initial_states(environment, "test", 64, np.random.default_rng(0), distinct=True)
        assert len({started(REASONING, seed, dataset=dataset).state_key for seed in seeds}) > 40


@installed("reasoning_gym")
def test_an_episode_is_a_question_and_an_answer() -> None:
    environment = make(section(REASONING, dataset="spell_backward", config={"min_word_len": 4, "max_word_len": 4}))
    question, _ = environment.reset(seed=0, options={"state_seed": 3})
    word = re.fullmatch(r"Spell this word backward \(example: sun -> nus\): (\w{4})", question)
    assert word is not None
    assert (environment.actions_left, environment.success, environment.state_key) == (1, False, question)
    assert environment.step(f" {word[1][::-1]}\n") == ("score 1", 1.0, True, False, {})
    assert (environment.actions_left, environment.success, environment.state_key) == (0, True, question)
    with pytest.raises(RuntimeError, match="reset"):
        environment.step("a")
    assert "dataset spell_backward of reasoning-gym" in environment.instructions


@installed("reasoning_gym")
def test_without_a_state_seed_the_item_comes_from_the_seed() -> None:
    environment = make(section(REASONING))
    shown = [environment.reset(seed=seed)[0] for seed in range(30)]
    assert shown == [environment.reset(seed=seed)[0] for seed in range(30)]
    assert len(set(shown)) == 30


@installed("reasoning_gym")
def test_a_part_of_an_answer_scores_a_part_and_never_more_than_1() -> None:
    rewards = set()
    for state in range(40):
        environment = started(REASONING, state, dataset="spell_backward")
        _, reward, *_ = environment.step(f"{environment.answer} 1")
        assert not environment.success
        rewards.add(reward)
    assert 0 < min(rewards) < max(rewards) == 1.0  # a rounding error above what it means to give


@installed("reasoning_gym")
def test_line_breaks_reach_the_score() -> None:
    environment = started(REASONING, dataset="mini_sudoku")
    assert environment.answer.count("\n") == 3
    assert environment.score(environment.answer) == 1
    assert environment.score(environment.answer.replace("\n", " ")) < 1


@installed("reasoning_gym")
def test_an_answer_that_the_score_cannot_read_scores_0() -> None:
    environment = started(REASONING, dataset="prime_factorization")
    assert environment.step("(")[:2] == ("score 0", 0.0)
    with pytest.raises(ValueError, match=re.escape("action must be an answer's text, got 'a || b'")):
        started(REASONING).step("a || b")


@installed("reasoning_gym")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dataset": "chainsum"}, "dataset must be one of reasoning-gym's, got 'chainsum'; did you mean 'chain_sum'?"),
        ({"dataset": "ransom_note"}, "dataset 'ransom_note' cannot be used: its items change with PYTHONHASHSEED"),
        (
            {"dataset": "composite", "config": {"datasets": [{"name": "codeio", "weight": 1, "config": {}}]}},
            "dataset 'codeio' cannot be used: its items change with PYTHONHASHSEED",
        ),
        ({"dataset": "countdown"}, "dataset 'countdown' scores an answer by running it as code"),
        ({"config": {"seed": 1}}, "config must not have a seed: state_seed decides about the item"),
        ({"config": {"min_terms": 0}}, "config of 'chain_sum': min_terms must be positive"),
        ({"config": {"terms": 1}}, "ChainSumConfig.__init__() got an unexpected keyword argument 'terms'"),
    ],
)
def test_what_a_dataset_cannot_be_is_said_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        make(section(REASONING, **settings))
    assert str(caught.value).startswith(f"environments: {REASONING!r} refuses its settings: {said}")
    assert "\n" not in str(caught.value)


@installed("reasoning_gym")
def test_a_dataset_that_runs_answers_can_be_allowed() -> None:
    environment = started(REASONING, dataset="countdown", run_answers=True)
    assert environment.score(environment.answer) == 1


@installed("reasoning_gym")
@pytest.mark.parametrize(
    "dataset", ["chain_sum", "word_sorting", "coin_flip", "needle_haystack", "propositional_logic"]
)
def test_the_experts_reasoning_never_holds_the_answer(dataset: str) -> None:
    from pipeline.environments.reasoning_tasks import expert

    player, draws, said = expert(), np.random.default_rng(0), set()
    for state in range(60):
        environment = started(REASONING, state, dataset=dataset)
        for words in (0, 1, 14):
            reasoning = player.reason(environment, words, draws)
            assert len(reasoning.split()) == words
            assert environment.item["answer"] is None or environment.item["answer"].lower() not in reasoning
            said.add(reasoning)
    assert len(said) > 60


@installed("reasoning_gym")
def test_the_expert_knows_the_answer_where_there_is_one_and_errs_by_that_of_another_item() -> None:
    from pipeline.environments.reasoning_tasks import UNKNOWN, expert

    player, draws, right = expert(), np.random.default_rng(0), 0
    for state in range(60):
        environment = started(REASONING, state, dataset="word_sorting")
        assert player.solvable(environment)
        right += environment.score(player.random_action(environment, draws)) == 1
        assert environment.step(player.act(environment, draws))[1] == 1
    assert right == 0
    checked = started(REASONING, dataset="graph_color")
    assert not player.solvable(checked)
    assert player.act(checked, draws) == player.random_action(checked, draws) == UNKNOWN


@installed("reasoning_gym")
def test_matplotlib_can_still_be_imported_afterwards() -> None:
    program = (
        "import sys, pipeline.environments.reasoning_tasks; print('matplotlib' in sys.modules);"
        "import matplotlib.pyplot, mpl_toolkits.mplot3d as m; print(callable(matplotlib.pyplot.plot), m.Axes3D is None)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "False"]


@installed("reasoning_gym")
def test_a_policy_is_bootstrapped_trained_and_evaluated_on_a_dataset() -> None:
    from pipeline.energy.annotate import annotate
    from pipeline.evaluation.evaluate import episode_results, evaluate
    from pipeline.training.module import PolicyGradient
    from tests.trainings import TINY, fit, supervised  # heavy: the suite's other process imports this module

    sums = {
        "id": REASONING,
        "settings": {"dataset": "chain_sum", "config": {"max_terms": 2, "max_digits": 2}},
        "max_turns": 1,
        "response_tokens": 20,
        "context_tokens": 160,
    }
    phases = [{"steps": 150, "reasoning_words": [0, 2], "action_noise": 0.2}]
    changes = {"environments": {"frozen_lake": None, "sums": sums}, "policy": {"demonstrations": {"phases": phases}}}
    tiny = overlay({name: settings for name, settings in TINY.items() if name != "environments"}, changes)
    config = parse(overlay(read_yaml(ROOT / "params.yaml"), tiny))
    policy = supervised(config)
    reference = policy.frozen_copy()
    module = fit(PolicyGradient(config, "sums", "grpo_actfocus", 0, policy), 2)
    assert len(module.curve) == 2
    for row in module.curve:
        assert row["valid_action_rate"] > 0.5
        assert np.isfinite(list(row.values())).all()
    assert sum(row["updates"] for row in module.curve) > 0

    module.result()
    played = evaluate(module.engine, module.policy.tokenizer, config, "sums", 0, 1.0)
    annotated = annotate(played, reference, 1.0, tokens_per_forward(config, reference))
    assert annotated.energy is not None
    assert np.isfinite(annotated.energy[annotated.sampled]).all()
    results = episode_results(played, environment="sums", method="grpo_actfocus", seed=0, temperature=1.0)
    assert len(results) == 4
