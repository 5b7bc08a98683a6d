"""Environments of optional packages: questions of reasoning-gym, games of TextArena, and what their adapters share."""

from __future__ import annotations

import importlib.util
import random
import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.contracts.environment import check_environment
from pipeline.environments import initial_states, make
from pipeline.environments.foreign import Enclosure, free_text
from pipeline.environments.making import EXTRAS, OURS
from pipeline.settings.params import Environment, parse
from pipeline.settings.presets import overlay
from pipeline.workspace.errors import UserError
from pipeline.workspace.yaml_files import read_yaml

ROOT = Path(__file__).parents[1]
REASONING, ARENA = EXTRAS


def installed(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def section(name: str, **settings: Any) -> Environment:
    return Environment(id=name, settings=settings)


def started(name: str, state: int = 0, seed: int = 0, **settings: Any) -> Any:
    environment = make(section(name, **settings))
    environment.reset(seed=seed, options={"state_seed": state})
    return environment


# ------------------------------------------------------------------------------------------------------- the packages


def test_a_package_that_is_not_there_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, (_, extra) in EXTRAS.items():
        with pytest.raises(UserError) as caught:
            make(Environment(id=name))
        said = f"environments: id {name!r} needs the package {extra}: pip install -e '.[{extra}]'"
        assert str(caught.value) == said


def test_the_packages_are_imported_when_their_environments_are_made() -> None:
    program = "import sys, pipeline.environments as e; print({'reasoning_gym', 'textarena', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert not set(OURS) & set(EXTRAS)


def normal(requirement: str) -> str:
    return re.split(r"[ ;<>=!~\[(]", requirement)[0].lower().replace("_", "-")


def pinned() -> set[str]:
    return {normal(line) for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]}


def test_every_extra_can_be_installed_by_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for _, extra in EXTRAS.values():
        assert [normal(requirement) for requirement in project["optional-dependencies"][extra]] == [extra]
        assert extra in pinned()


@pytest.mark.parametrize("package", ["reasoning_gym", "textarena"])
def test_what_an_extra_requires_is_pinned(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    assert {normal(line) for line in requires(package) or [] if "extra ==" not in line} <= pinned()


# -------------------------------------------------------------------------------------------------- what they share


@pytest.mark.parametrize(
    ("text", "action"),
    [
        (" 42\n", "42"),
        ("1 2\n\t3  4 ", "1 2\n\t3  4"),
        ("a | b < c", "a | b < c"),
        ("x" * 50, "x" * 50),
        ("x" * 51, None),
        (" \n", None),
        ("a || b", None),
        ("<answer>4", None),
        ("4\r", "4"),
        ("4\r5", None),
        ("\x00", None),
        ("\ud800", None),
    ],
)
def test_free_text_loses_the_space_around_it_alone(text: str, action: str | None) -> None:
    assert free_text(text, 50) == action


def test_an_enclosure_has_draws_of_its_own_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def drawn(enclosure: Enclosure) -> tuple[float, float]:
        with enclosure.entered():
            print("noise")
            return random.random(), float(np.random.random())

    random.seed(5)
    np.random.seed(5)
    undisturbed = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    one, twin = Enclosure(7), Enclosure(7)
    first, second = drawn(one), drawn(one)
    with pytest.raises(KeyError), one.entered():
        raise KeyError
    assert (random.random(), np.random.random()) == undisturbed
    assert (drawn(twin), drawn(twin)) == (first, second)
    assert len({first, second, drawn(Enclosure(8))}) == 3
    assert capsys.readouterr().out == ""


# ----------------------------------------------------------------------------------------------------- reasoning-gym

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

    played = evaluate(module.engine, module.policy.tokenizer, config, "sums", 0, 1.0)
    annotated = annotate(played, reference, 1.0, config.train.tokens_per_forward)
    assert annotated.energy is not None
    assert np.isfinite(annotated.energy[annotated.sampled]).all()
    results = episode_results(played, environment="sums", method="grpo_actfocus", seed=0, temperature=1.0)
    assert len(results) == 4


# --------------------------------------------------------------------------------------------------------- TextArena


@installed("textarena")
@pytest.mark.parametrize("game", ["GuessTheNumber-v0", "2048-v0-ultra-easy", "FrozenLake-v0-random", "Blackjack-v0"])
def test_a_game_keeps_every_contract(game: str) -> None:
    assert check_environment(section(ARENA, game=game)) == []


@installed("textarena")
def test_a_guess_is_answered_and_the_right_one_wins() -> None:
    environment = started(ARENA, 4)
    secret = environment.game.state.game_state["game_number"]
    assert 1 <= secret <= 20
    asked = 1 if secret > 1 else 2
    hint = "higher" if secret > asked else "lower"
    assert environment.step(f"[{asked}]") == (f"The target number is {hint}.", 0.0, False, False, {})
    assert (environment.success, environment.actions_left, environment.done) == (False, 99, False)
    assert environment.step(f"I say [{secret}]")[1:4] == (1.0, True, False)
    assert (environment.success, environment.actions_left, environment.done) == (True, 98, True)
    with pytest.raises(RuntimeError, match="reset"):
        environment.step("[3]")


@installed("textarena")
def test_an_observation_holds_what_is_new_and_not_the_players_own_words() -> None:
    environment = started(ARENA, 1, game="2048-v0-ultra-easy")
    assert "Valid moves" in environment.opening
    observation = environment.step("up, says the player")[0]
    assert "Valid moves" not in observation
    assert "says the player" not in observation


@installed("textarena")
def test_the_game_itself_counts_invalid_moves() -> None:
    environment = started(ARENA)
    observation, reward, terminated, truncated, _ = environment.step("well")
    assert observation.startswith("You attempted an invalid move.")
    assert (reward, terminated, truncated) == (0.0, False, False)
    observation, reward, terminated, truncated, _ = environment.step("well")
    assert observation.startswith("Invalid Move: ")
    assert (reward, terminated, truncated, environment.success) == (0.0, True, False, False)


@installed("textarena")
def test_an_unfinished_game_is_cut_off_after_max_actions() -> None:
    environment = started(ARENA, max_actions=2, config={"max_number": 1000})
    assert "between 1 and 1000" in environment.opening
    assert "You have 2 actions." in environment.instructions
    assert environment.step("[1]")[1:4] == (0.0, False, False)
    assert environment.step("[2]")[1:4] == (0.0, False, True)
    assert (environment.success, environment.actions_left, environment.done) == (False, 0, True)


@installed("textarena")
def test_the_number_of_a_game_says_nothing_about_what_it_hides() -> None:
    numbers, secrets, twins = [], [], set()
    environment: Any = make(section(ARENA, config={"max_number": 4}))
    for state in range(400):
        environment.reset(seed=0, options={"state_seed": state})
        found = re.match(r"Game (\d+)\.\nYou are Player 0", environment.opening)
        assert found is not None
        numbers.append(int(found[1]))
        secrets.append(environment.game.state.game_state["game_number"])
        twins.add(environment.state_key)
    assert len(set(numbers)) == len(twins) == 400
    assert abs(np.corrcoef(numbers, secrets)[0, 1]) < 4 / 400**0.5
    assert "Game " not in started(ARENA, game="FrozenLake-v0-random").opening


@installed("textarena")
def test_a_groups_members_share_the_start_but_not_what_follows() -> None:
    openings, boards = set(), set()
    for seed in range(8):
        environment = started(ARENA, 2, seed, game="2048-v0-ultra-easy")
        openings.add((environment.opening, environment.state_key))
        for move in ("up", "left", "down"):
            environment.step(move)
        boards.add(environment.state_key)
    assert len(openings) == 1
    assert len(boards) > 4


@installed("textarena")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_actions": 0}, "max_actions must be a whole number from 1 on, got 0"),
        ({"game": "GuessNumber-v0"}, "game must be one of TextArena's, got 'GuessNumber-v0'; did you mean 'Guess"),
        ({"game": "Nim-v0"}, "game 'Nim-v0' cannot be played alone: AssertionError: The number of players has to be 2"),
        ({"game": "MarketEntryGame-v0"}, "game 'MarketEntryGame-v0' is for several players"),
        ({"game": "TowerOfHanoi-v0"}, "game 'TowerOfHanoi-v0' always starts in the same state: there is nothing to"),
        ({"game": "Countdown-v0"}, "game 'Countdown-v0' cannot be played alone: TypeError: "),
        ({"config": {"numbers": 3}}, "game 'GuessTheNumber-v0' cannot be played alone: TypeError: "),
    ],
)
def test_what_cannot_be_played_is_said_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        make(section(ARENA, **settings))
    assert str(caught.value).startswith(f"environments: {ARENA!r} refuses its settings: {said}")
    assert "\n" not in str(caught.value)
