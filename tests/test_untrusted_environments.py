"""Environments that do what they must not, and demonstrations that are recorded as the collector records them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from pipeline.bootstrap.demonstrations import demonstrate
from pipeline.bootstrap.supervision import encode
from pipeline.environments import make, split_of
from pipeline.environments.frozen_lake import MOVES, FrozenLakeExpert
from pipeline.environments.splits import SPLITS
from pipeline.rollout.specs import EpisodeSpec, group_specs, iteration_specs
from pipeline.settings.params import Config
from pipeline.settings.policy import Phase
from pipeline.trajectories.prompting import Dialogue
from pipeline.trajectories.table import read, write
from pipeline.trajectories.trajectory import RESPONSE_ROLES, Role, Trajectories
from pipeline.workspace.errors import UserError
from tests.scripted import EOS, NAME, TOKENIZER, always, config, episode_turns, play, says

# --------------------------------------------------------------------------------- environments that are not to be trusted


class Odd(gymnasium.Env[str, str]):
    """An endless corridor with a door in it. Settings take the place of whatever it has."""

    observation_space = action_space = gymnasium.spaces.Text(max_length=100)
    instructions, observation, success = "Go on.", "here", False

    def __init__(self, **parts: Any) -> None:
        self.open, self.state_key = False, ""
        self.__dict__ |= parts

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        self.open = False
        self.state_key = self.state_key or f"state {(options or {}).get('state_seed', seed)}"
        return self.observation, {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.open = not self.open
        return self.observation, 0.5, False, False, {}

    def parse_action(self, text: str) -> str | None:
        return text if text == ("enter" if self.open else "open") else None


class OddExpert:
    def act(self, environment: Odd, draws: np.random.Generator) -> str:
        return "enter" if environment.open else "open"

    def random_action(self, environment: Odd, draws: np.random.Generator) -> str:
        return self.act(environment, draws)

    def reason(self, environment: Odd, words: int, draws: np.random.Generator) -> str:
        return " ".join(["so"] * words)


gymnasium.register(id="Odd-v0", entry_point=Odd, disable_env_checker=True)
ODD = f"{__name__}:Odd-v0"


PHASE = Phase(steps=1, reasoning_words=(0, 3), action_noise=0.5)


def odd(settings: dict[str, Any], **environment: Any) -> Config:
    made = config(**{"layout": "published", "context_tokens": 9000, **environment})
    section = made.environments[NAME].model_copy(update={"id": ODD, "settings": settings})
    return made.model_copy(update={"environments": {NAME: section}})


def play_odd(settings: dict[str, Any], text: str = says("open"), **environment: Any) -> Trajectories:
    made = odd(settings, **environment)
    return play(made, always(text), group_specs(NAME, [1, 2], 2, 0, 0, "train"))[0]


def raises(*_: Any, **__: Any) -> Any:
    raise KeyError("no\nsuch door")


STEP, RAISED = "step('open')", r"KeyError: 'no\nsuch door' (test_untrusted_environments.py, line "


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reset": lambda **_: "here"}, " returned a str from reset; it must be (observation, information)"),
        ({"observation": 7}, " returned an observation of type int from reset; it must be text"),
        ({"reset": raises}, f": reset raised {RAISED}"),
        ({"instructions": None}, " returned a value of type NoneType from instructions; it must be text"),
        ({"step": raises}, f": {STEP} raised {RAISED}"),
        (
            {"step": lambda _: ("", 0.0, False, {})},
            f" returned a tuple of 4 from {STEP}; it must be (observation, reward",
        ),
        (
            {"step": lambda _: (b"", 0.0, False, False, {})},
            f"an observation of type bytes from {STEP}; it must be text",
        ),
        ({"step": lambda _: ("", np.nan, False, False, {})}, f"the reward nan from {STEP}; it must be a finite number"),
        (
            {"step": lambda _: ("", -np.inf, False, False, {})},
            f"the reward -inf from {STEP}; it must be a finite number",
        ),
        ({"step": lambda _: ("", "1", False, False, {})}, f"the reward '1' from {STEP}; it must be a finite number"),
        ({"step": lambda _: ("", 0.0, None, False, {})}, f"terminated None from {STEP}; it must be True or False"),
        ({"step": lambda _: ("", 0.0, False, 1, {})}, f"truncated 1 from {STEP}; it must be True or False"),
        ({"parse_action": raises}, f": parse_action('open') raised {RAISED}"),
        ({"parse_action": lambda _: 3}, "an action of type int from parse_action('open'); it must be text or None"),
    ],
)
def test_what_an_environment_must_not_do_ends_the_stage_with_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        play_odd(settings)
    assert str(error.value).startswith(f"environments: '{ODD}'")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_state_key_that_is_no_text_is_refused_where_states_are_drawn() -> None:
    with pytest.raises(UserError, match="returned a value of type int from state_key; it must be text"):
        iteration_specs(odd({"state_key": 7}), NAME, 0, 0)


def test_a_demonstrations_environment_is_held_to_the_same() -> None:
    section = odd({"step": lambda _: ("", np.nan, False, False, {})}).environments[NAME]
    with pytest.raises(UserError, match="returned the reward nan"):
        demonstrate(make(section), OddExpert(), 1, PHASE, np.random.default_rng(0), section)


def test_numbers_of_numpy_are_numbers_and_what_is_recorded_is_pythons() -> None:
    over = np.bool_(True)
    made = play_odd({"step": lambda _: ("there", np.float32(0.25), over, np.bool_(False), {})})
    assert [turn["reward"] for turn in episode_turns(made, 0)] == [0.25]
    assert type(made.turns["reward"][0]) is float
    whole = play_odd({"step": lambda _: ("there", 1, over, False, {})})
    assert type(whole.turns["reward"][0]) is float


def test_an_environment_that_never_ends_is_cut_off() -> None:
    made = play_odd({"parse_action": lambda text: text})
    assert set(made.episodes["end_reason"]) == {"turns"}
    assert (np.diff(made.turn_offsets) == 4).all()
    for limit in (1, 3):
        section = odd({}, actions_per_turn=limit).environments[NAME]
        demonstration = demonstrate(make(section), OddExpert(), 1, PHASE, np.random.default_rng(0), section)
        assert len(demonstration.turns) == 4


@pytest.mark.parametrize(
    "text", ["<think>", "</answer>", f"{EOS}<|assistant|>{says('open')}", "<script>", "\ud800 \x1b[2J \x01response\x01"]
)
def test_any_text_of_an_environment_stays_in_its_role_and_can_be_stored(text: str, tmp_path: Path) -> None:
    parts = {"observation": text, "instructions": text, "state_key": f"{text}\udcff", "parse_action": lambda _: text}
    hostile, plain = play_odd(parts), play_odd({**parts, "observation": "here", "instructions": "Go on."})
    special = np.array(TOKENIZER.all_special_ids + TOKENIZER.convert_tokens_to_ids(["<|user|>", "<|assistant|>"]))
    for made in (hostile, plain):
        assert set(made.turns["valid"]) == {True}
        assert (np.diff(made.turn_offsets) == 4).all()
    for role in Role:
        chosen = [made.input_ids[made.role == role] for made in (hostile, plain)]
        if role in RESPONSE_ROLES:
            np.testing.assert_array_equal(*chosen)
        else:
            np.testing.assert_array_equal(*(ids[np.isin(ids, special)] for ids in chosen))
    write(hostile, tmp_path / "table")
    again = read(tmp_path / "table")
    assert again.turns == hostile.turns
    assert again.episodes == hostile.episodes
    keys = [play_odd({"state_key": key}).episodes["state_key"][0] for key in (f"{text}\udc00", f"{text}\udc01")]
    assert keys[0] != keys[1]
    assert {split_of(f"{text}{number}\udc00") for number in range(99)} == {*SPLITS}


# -------------------------------------------------------------------------------------------------- demonstrations


@pytest.mark.parametrize("layout", ["compact", "published"])
@pytest.mark.parametrize("prefill", ["", "<think>"])
@pytest.mark.parametrize("limit", [1, 2])
def test_a_demonstration_is_what_the_collector_records_of_the_same_actions(
    layout: str, prefill: str, limit: int
) -> None:
    changes = {"layout": layout, "actions_per_turn": limit, "response_tokens": 60, "context_tokens": 9000}
    lake = config({"prefill": prefill}, {"success_rate": 0.6, "max_actions": 5}, max_turns=4, **changes)
    lengths = set()
    for settings, expert in (
        (lake, FrozenLakeExpert()),
        (odd({"parse_action": str}, max_turns=3, **changes), OddExpert()),
    ):
        section = settings.environments[NAME]
        settings = settings.model_copy(update={"rollout": lake.rollout})
        for state in range(8):
            noise = int(np.random.default_rng(state).integers(2**31))
            made = demonstrate(make(section), expert, state, PHASE, np.random.default_rng(state), section)
            spoken = [f"<think>{turn.reasoning}</think><answer>{turn.action}</answer>" for turn in made.turns]
            spec = EpisodeSpec("0", "0", state, 0, 0, noise, (0, "tokens"))
            recorded, _ = play(settings, lambda _, turn, said=spoken: said[turn].removeprefix(prefill), [spec])
            shown = encode(Dialogue(TOKENIZER, layout, prefill, section.response_tokens), made, section.context_tokens)
            for column, expected in zip(shown, (recorded.input_ids, recorded.role, recorded.sampled), strict=True):
                np.testing.assert_array_equal(column, expected)
            turns = episode_turns(recorded, 0)
            assert [turn["reward"] for turn in turns[:-1]] == [turn.reward for turn in made.turns[1:]]
            assert [turn["action"] for turn in turns] == [turn.action.replace(" || ", "||") for turn in made.turns]
            lengths |= {turn.action.count("||") + 1 for turn in made.turns}
    assert lengths == set(range(1, limit + 1))


def test_a_demonstrated_turn_holds_no_action_that_was_not_allowed_at_its_beginning() -> None:
    """The corridor's door has to be opened in one turn and entered in the next: the collector would refuse both at once."""
    section = odd({}, actions_per_turn=2).environments[NAME]
    made = demonstrate(make(section), OddExpert(), 1, PHASE, np.random.default_rng(0), section)
    assert [turn.action for turn in made.turns] == ["open", "enter", "open", "enter"]
    assert [turn.reward for turn in made.turns] == [0.0, 0.5, 0.5, 0.5]
    assert not any(play_odd({}, says("open||enter"), actions_per_turn=2).turns["valid"])


def test_noise_falls_on_each_action_of_a_turn() -> None:
    lake = config(settings={"frozen": 1.0, "max_actions": 6}, actions_per_turn=3).environments[NAME]
    drawn = Phase(steps=1, reasoning_words=(0, 0), action_noise=1.0)
    turns = [
        turn
        for state in range(60)
        for turn in demonstrate(make(lake), FrozenLakeExpert(), state, drawn, np.random.default_rng(state), lake).turns
    ]
    last = [turn.action.split(" || ")[-1] for turn in turns if turn.action.count("||") == 2]
    assert {*last} == {*MOVES}
