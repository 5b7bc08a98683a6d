"""What the trajectory viewer is given: records of episodes, which of them, what the update made of them, and boards."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pipeline.environments.making import make
from pipeline.environments.playing import board_of, reset, step
from pipeline.model.loading import load_policy
from pipeline.report.viewer import Played, choose, read_played, viewer_data
from pipeline.settings.params import Environment
from pipeline.training.module import PolicyGradient
from pipeline.trajectories.builder import EpisodeBuilder, build
from pipeline.trajectories.records import episode_records
from pipeline.trajectories.table import write
from pipeline.trajectories.trajectory import Role, Trajectories
from pipeline.workspace.errors import UserError
from tests.test_comparison import configuration
from tests.trainings import LAKE, configured, fit


def byte_tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return SimpleNamespace(backend_tokenizer=made)


def episodes(returns: dict[str, list[float]], text: str = "aü\x1b") -> Trajectories:
    """An episode of one turn per return, by initial state."""
    ids = byte_tokenizer().backend_tokenizer.encode(text).ids
    builders = []
    for state, own in returns.items():
        for member, value in enumerate(own):
            names = {"episode_id": f"{state}-{member}", "group_id": state, "environment": "toy", "state_key": state}
            builder = EpisodeBuilder(**names, seed=5, iteration=2, policy_version=2)
            builder.append_text(ids, Role.PROMPT)
            builder.append_text(ids[:1], Role.THINK_TAG)
            builder.append_sampled(ids, [Role.ACTION] * len(ids), [-0.25] * len(ids), [0.5] * len(ids))
            builder.close_turn(len(ids), value, "left\x1b", True, state)
            builder.finish(value > 0, "goal")
            builders.append(builder)
    return build(builders)


def annotated(trajectories: Trajectories) -> Trajectories:
    ones = np.ones(len(trajectories.input_ids), dtype=np.float32)
    return replace(trajectories, energy=-7.123456 * ones, ref_logprob=-1.25 * ones, ref_entropy=ones)


def test_a_record_holds_texts_by_character_and_numbers_where_there_are_any() -> None:
    found = annotated(episodes({"s": [1.0]}))
    advantage = np.where(found.sampled, 2 / 3, np.nan)
    (record,) = episode_records(found, byte_tokenizer(), {"advantage": advantage})
    assert (record["seed"], record["iteration"], record["return"], record["success"]) == (5, 2, 1.0, True)
    (turn,) = record["turns"]
    assert turn["shown"] == "aü\ufffd"
    assert (turn["action"], turn["valid"], turn["reward"], turn["state"]) == ("left\ufffd", True, 1.0, "s")
    tokens = turn["tokens"]
    assert tokens["text"] == [
        "a",
        "a",
        "ü",
        "",
        "\ufffd",
    ]  # forced, sampled; of the two tokens of a character the first
    assert tokens["role"] == ["think_tag", *["action"] * 4]
    assert tokens["sampled"] == [False, *[True] * 4]
    assert tokens["energy"] == [None, *[-7.1235] * 4]
    assert tokens["shift"] == [None, *[1.0] * 4]
    assert tokens["advantage"] == [None, *[0.66667] * 4]
    assert tokens["weight"] == [None] * 5
    (bare,) = episode_records(episodes({"s": [1.0]}), byte_tokenizer())
    assert bare["turns"][0]["tokens"]["energy"] == [None] * 5


def test_states_that_vary_most_over_the_methods_are_shown_with_their_best_and_worst_episodes() -> None:
    calm, wild = (
        {"a": [1.0] * 4, "b": [0, 1, 1, 1], "c": [0, 1, 0, 1]},
        {"a": [0, 5, 0, 5], "b": [1.0] * 4, "c": [0.0] * 4},
    )
    played = {name: Played(episodes(returns), {}) for name, returns in (("calm", calm), ("wild", wild))}
    assert choose(played, 1, 2) == {"calm": [0, 3], "wild": [1, 2]}  # state a, though it varies in one method only
    assert choose(played, 2, 3)["calm"] == [0, 1, 3, 9, 11, 10]
    assert choose(played, 1, 9)["wild"] == [1, 3, 0, 2]
    assert choose(played, 0, 4) == {"calm": [], "wild": []}


def test_states_have_letters_that_all_methods_of_an_environment_share() -> None:
    config = configuration()
    states = {
        "SFFF/FHFF/FFFG/FFFF@0,0": [1.0, 0.0],
        "SFFF/FFFF/FFFG/FFFF@0,0": [1.0, 0.0],
        "GFFS/FFFF/FFFF/FFFF@0,3": [0.0] * 2,
    }
    played = {("lake", m): Played(annotated(episodes(states)), {}) for m in ("grpo", "grpo_actfocus")}
    found = viewer_data(config, byte_tokenizer(), played)["lake"]
    assert list(found) == ["grpo", "grpo_actfocus"]
    assert [record["letter"] for record in found["grpo"]] == ["A", "A", "B", "B"]
    assert [r["letter"] for r in found["grpo"]] == [r["letter"] for r in found["grpo_actfocus"]]
    assert found["grpo"][0]["turns"][0]["board"][:2] == [["P", "_", "_", "_"], ["_", "O", "_", "_"]]
    none = configuration(report={"states": 0})
    assert viewer_data(none, byte_tokenizer(), played) == {}


@pytest.mark.parametrize("name", ["actfocus/FrozenLake-v1", "actfocus/Sokoban-v1", "actfocus/Sudoku-v1"])
def test_a_board_shows_the_grid_of_the_observation(name: str) -> None:
    environment = make(Environment(id=name))
    for state in range(8):
        observation = reset(environment, 0, state)
        for action in ["", *(["Left", "Down"] if "Sudoku" not in name else ["1,1,1", "2,2,4"])]:
            if action and environment.parse_action(action):
                observation, _, over = step(environment, action)
            rows = board_of(environment, environment.state_key)
            assert rows is not None
            assert observation.startswith("\n".join(" ".join(row) for row in rows))
            if action and over:
                break


def test_an_environment_without_a_board_has_none_and_a_broken_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bandit = make(Environment(id="actfocus/Bandit-v1"))
    assert board_of(bandit, "key") is None
    for broken, said in ((lambda key: [["a"], ["b", "c"]], "rows of text"), (lambda key: 1 / 0, "ZeroDivisionError")):
        monkeypatch.setattr("pipeline.environments.bandit.board", broken, raising=False)
        with pytest.raises(UserError, match=rf"'actfocus/Bandit-v1'.*board\('key'\).*{said}"):
            board_of(bandit, "key")


def test_the_last_iterations_tokens_carry_what_its_update_made_of_them(directory: Path, tmp_path: Path) -> None:
    """Kept: the episodes themselves, with advantage, weight and c of every trained token, and of no other."""
    weight = {"kind": "actfocus", "reasoning_downweight": 0.25}
    mine = {"filter": {"kind": "reward_variance", "keep": 0.5}, "weight": weight}
    config = configured({"methods": {"mine": mine}, "train": {"passes": 1, "minibatch": 2}})
    module = fit(PolicyGradient(config, LAKE, "mine", 0, load_policy(directory)), 1)
    assert module.last_update == {}
    module = fit(PolicyGradient(config, LAKE, "mine", 0, load_policy(directory)), 2)
    episodes, columns = module.last_episodes, module.last_update
    assert episodes is not None
    trained = np.isfinite(columns["advantage"])
    dropped = ~np.isin(np.arange(len(episodes)), np.unique(episodes.token_episode[trained]))
    assert 0 < dropped.sum() < len(episodes)
    assert (trained == (episodes.sampled & ~dropped[episodes.token_episode])).all()
    reasoning = trained & (episodes.role == Role.REASONING)
    assert np.unique(columns["weight"][reasoning]) == pytest.approx([0.25])
    assert (columns["weight"][trained & (episodes.role == Role.ACTION)] > 0.25).all()
    # weight_sum: within a minibatch c is the weight over the sum of weights
    ratio = columns["coefficient"][trained] / columns["weight"][trained]
    assert len(np.unique(np.round(ratio, 9))) <= math.ceil(len(episodes) / config.train.minibatch)

    for name in ("a", "b"):
        write(episodes, tmp_path / name, columns)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = read_played(tmp_path / "a")
    assert again.trajectories.episodes == episodes.episodes
    assert (again.trajectories.input_ids == episodes.input_ids).all()
    assert set(again.columns) == {"advantage", "weight", "coefficient"}
    for name, values in again.columns.items():
        np.testing.assert_array_equal(values, columns[name])
