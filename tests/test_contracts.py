"""The contract suite over every registered environment and the worked example, and over environments that break it.

Each broken environment is ``Walk`` with one thing wrong; the suite has to report that contract and no other.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from ruamel.yaml import YAML

from pipeline.contracts import environment as contracts
from pipeline.contracts.environment import CONTRACTS, Bounds, Seen, check_environment, proceed
from pipeline.environments import make, registry
from pipeline.environments.registry import OURS
from pipeline.settings.params import Config, Environment, parse
from pipeline.settings.presets import overlay
from pipeline.workspace.errors import UserError
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


class Walk(gymnasium.Env[str, str]):
    """Walk along nine cells to the goal; now and then a foot slips. It keeps every contract."""

    observation_space = gymnasium.spaces.Text(max_length=60)
    action_space = gymnasium.spaces.Text(max_length=10)
    instructions = "Walk to the goal. Actions: left, right."
    limit = 12

    def __init__(self) -> None:
        self.done, self.success, self.cell, self.goal = True, False, [0], 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.draw_state((options or {}).get("state_seed", seed))
        self.actions_left, self.done, self.success = self.limit, False, False
        return self.observe(), {}

    def draw_state(self, seed: int) -> None:
        start, self.goal = map(int, np.random.default_rng(seed).permutation(9)[:2])
        self.cell = [start]

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.done:
            raise RuntimeError("step called after the episode's end: call reset")
        if not self.slips():
            self.cell[0] = min(8, max(0, self.cell[0] + (1 if action == "right" else -1)))
        self.actions_left -= 1
        self.success = self.cell[0] == self.goal
        self.done = self.success or self.actions_left <= 0
        return self.observe(), self.reward(action), self.success, self.done and not self.success, {}

    def slips(self) -> bool:
        return bool(self.np_random.random() < 0.2)

    def reward(self, action: str) -> float:
        return float(self.success)

    def observe(self) -> str:
        return f"cell {self.cell[0]} goal {self.goal}"

    @property
    def state_key(self) -> str:
        return f"{self.cell[0]} {self.goal}"

    def parse_action(self, text: str) -> str | None:
        action = text.strip().lower()
        return action if action in ("left", "right") else None


class WalkExpert:
    """Walks towards the goal."""

    def act(self, walk: Walk, draws: np.random.Generator) -> str:
        return "right" if walk.goal > walk.cell[0] else "left"

    def random_action(self, walk: Walk, draws: np.random.Generator) -> str:
        return ("left", "right")[int(draws.integers(2))]

    def reason(self, walk: Walk, words: int, draws: np.random.Generator) -> str:
        return " ".join(["hm"] * words)


# ------------------------------------------------------------------------------------------- one contract broken by each

BROKEN: dict[str, str] = {}
"""Class to the contract that it breaks."""


def breaks(contract: str) -> Any:
    def register(broken: type[Walk]) -> type[Walk]:
        BROKEN[broken.__name__] = contract
        gymnasium.register(id=f"{broken.__name__}-v0", entry_point=broken, disable_env_checker=True)
        return broken

    return register


gymnasium.register(id="Walk-v0", entry_point=Walk, disable_env_checker=True)


@breaks("made")
class RefusesToBeMade(Walk):
    def __init__(self) -> None:
        raise ValueError("no")


@breaks("form")
class ResetReturnsTextAlone(Walk):
    def reset(self, **given: Any) -> Any:
        return super().reset(**given)[0]


@breaks("form")
class AnotherKindOfSpace(Walk):
    observation_space: Any = gymnasium.spaces.Discrete(9)


@breaks("form")
class SucceedsBeforeItStarts(Walk):
    def reset(self, **given: Any) -> Any:
        started = super().reset(**given)
        self.success = True
        return started


@breaks("actions")
class AllowsNothing(Walk):
    def parse_action(self, text: str) -> str | None:
        return None


@breaks("actions")
class AllowsWhatSeparatesActions(Walk):
    def parse_action(self, text: str) -> str | None:
        return "left||right" if text.strip() else None


@breaks("step")
class FourResults(Walk):
    def step(self, action: str) -> Any:
        observation, reward, terminated, truncated, _ = super().step(action)
        return observation, reward, terminated or truncated, {}


@breaks("step")
class RewardsAreNotFinite(Walk):
    def reward(self, action: str) -> float:
        return float("nan")


@breaks("step")
class RewardsAreText(Walk):
    def reward(self, action: str) -> Any:
        return str(float(self.success))


@breaks("step")
class FlagsAreNumbers(Walk):
    def step(self, action: str) -> Any:
        observation, reward, terminated, truncated, information = super().step(action)
        return observation, reward, int(terminated), truncated, information


@breaks("step")
class InformationIsMissing(Walk):
    def step(self, action: str) -> Any:
        return *super().step(action)[:4], None


@breaks("step")
class SuccessIsANumber(Walk):
    def step(self, action: str) -> Any:
        stepped = super().step(action)
        self.success: Any = int(self.success)
        return stepped


@breaks("form")
class KnowsNoLargeSeeds(Walk):
    """Like an index into a list of levels."""

    def draw_state(self, seed: int) -> None:
        super().draw_state(range(10**6)[seed])


@breaks("texts")
class ObservationsOutgrowTheirSpace(Walk):
    def observe(self) -> str:
        return super().observe() + "!" * 60 * (self.actions_left < 9 if hasattr(self, "actions_left") else 0)


@breaks("texts")
class SaysNothingAfterTheStart(Walk):
    def step(self, action: str) -> Any:
        return "", *super().step(action)[1:]


@breaks("same seed")
class DrawsFromNowhere(Walk):
    def draw_state(self, seed: int) -> None:
        super().draw_state(int(np.random.default_rng().integers(1000)))


@breaks("same seed")
class KeyNamesTheInstance(Walk):
    @property
    def state_key(self) -> str:
        return f"{id(self)} {super().state_key}"


@breaks("another process")
class HashesItsSeed(Walk):
    def draw_state(self, seed: int) -> None:
        super().draw_state(hash(str(seed)) % 2**31)


@breaks("another process")
class HashesItsActions(Walk):
    def slips(self) -> bool:
        return hash(f"{self.cell[0]} {self.goal} {self.actions_left}") % 2 == 0


@breaks("seed used")
class IgnoresItsSeeds(Walk):
    def draw_state(self, seed: int) -> None:
        super().draw_state(0)


@breaks("seed used")
class KeyIsAlwaysTheSame(Walk):
    """All states would fall into one split."""

    state_key: Any = "somewhere"


@breaks("state_key")
class KeyForgetsTheCell(Walk):
    @property
    def state_key(self) -> str:
        return f"goal {self.goal}"


@breaks("group")
class WordsItsPromptByTheNoise(Walk):
    def reset(self, **given: Any) -> Any:
        super().reset(**given)
        self.instructions = ("Go. ", "Please go. ")[int(self.np_random.integers(2))] + Walk.instructions
        return self.observe(), {}


@breaks("group")
class StartsByTheNoise(Walk):
    """Like 11 distinct prompts inside one group of a Bandit."""

    def reset(self, **given: Any) -> Any:
        super().reset(**given)
        self.cell = [int(self.np_random.choice([cell for cell in range(9) if cell != self.goal]))]
        return self.observe(), {}


@breaks("group")
class LimitsByTheNoise(Walk):
    """The published layout states in the prompt how many actions are left."""

    def reset(self, **given: Any) -> Any:
        started = super().reset(**given)
        self.actions_left = int(self.np_random.integers(8, 13))
        return started


@breaks("replay")
class SlipsByAGeneratorOfItsOwn(Walk):
    noise = np.random.default_rng(0)

    def slips(self) -> bool:
        return bool(self.noise.random() < 0.5)


class Slippery(Walk):
    """Draws whether a foot slips from a generator of its own."""

    def slips(self) -> bool:
        return bool(self.luck().random() < 0.3)

    def luck(self) -> Any:
        raise NotImplementedError


@breaks("noise")
class SlipsByItsState(Slippery):
    def reset(self, **given: Any) -> Any:
        started = super().reset(**given)
        self.held = {"luck": [np.random.default_rng(self.cell)]}
        return started

    def luck(self) -> Any:
        return self.held["luck"][0]


@breaks("noise")
class SlipsByAConstant(Slippery):
    def reset(self, **given: Any) -> Any:
        started = super().reset(**given)
        self.np_random = np.random.default_rng(5)
        return started

    def luck(self) -> Any:
        return self.np_random


@breaks("noise")
class SlipsByTheGlobalGeneratorOfNumPy(Slippery):
    def reset(self, **given: Any) -> Any:
        np.random.seed(0)
        return super().reset(**given)

    def luck(self) -> Any:
        return np.random


@breaks("noise")
class SlipsByTheGlobalGeneratorOfPython(Slippery):
    def reset(self, **given: Any) -> Any:
        random.seed("luck")
        return super().reset(**given)

    def luck(self) -> Any:
        return random


@breaks("noise")
class SlipsByTheNumberOfTheAction(Slippery):
    """No generator lasts longer than a step."""

    def luck(self) -> Any:
        return np.random.default_rng([3, self.actions_left])


@breaks("noise")
class PaysByItsState(Walk):
    """One action, as in a Bandit: nothing is ever met twice."""

    limit = 1

    def reset(self, **given: Any) -> Any:
        started = super().reset(**given)
        self.luck = np.random.RandomState(self.goal)
        return started

    def slips(self) -> bool:
        return False

    def reward(self, action: str) -> float:
        return float(self.luck.random_sample() < 0.5)


@breaks("reading")
class KeyCountsItsReads(Walk):
    reads = 0

    def reset(self, **given: Any) -> Any:
        self.reads = 0
        return super().reset(**given)

    @property
    def state_key(self) -> str:
        self.reads += 1
        return f"{super().state_key} {self.reads}"


@breaks("reading")
class ParsingDraws(Walk):
    def parse_action(self, text: str) -> str | None:
        if hasattr(self, "actions_left"):
            self.np_random.random()
        return super().parse_action(text)


@breaks("copies")
class CopiesShareTheCell(Walk):
    def __deepcopy__(self, memo: Any) -> Any:
        twin = copy.copy(self)
        twin.np_random = copy.deepcopy(self.np_random)
        return twin


@breaks("copies")
class CopiesForgetTheNoise(Walk):
    def __deepcopy__(self, memo: Any) -> Any:
        twin = copy.copy(self)
        twin.cell, twin.np_random = list(self.cell), np.random.default_rng(5)
        return twin


@breaks("copies")
class KeyIsLostInACopy(Walk):
    label = ""

    def reset(self, **given: Any) -> Any:
        self.label = "original"
        return super().reset(**given)

    def __deepcopy__(self, memo: Any) -> Any:
        twin = copy.copy(self)
        twin.cell, twin.label, twin.np_random = list(self.cell), "copy", copy.deepcopy(self.np_random)
        return twin

    @property
    def state_key(self) -> str:
        return f"{super().state_key} {self.label}"


@breaks("redoing")
class PaysForEveryStepToTheRight(Walk):
    def reward(self, action: str) -> float:
        return 1.0 if action == "right" else -0.5


@breaks("redoing")
class PaysForTheSameAgain(Walk):
    """Like 20 overwrites of one Sudoku cell."""

    def reward(self, action: str) -> float:
        return 0.5 * (self.cell[0] in (0, 8)) + float(self.success)


@breaks("ends")
class NeverEnds(Walk):
    def step(self, action: str) -> Any:
        observation, reward, terminated, _, information = super().step(action)
        self.actions_left, self.done = self.limit, terminated
        return observation, reward, terminated, False, information


@breaks("form")
class CountsInHalves(Walk):
    def reset(self, **given: Any) -> Any:
        started = super().reset(**given)
        self.actions_left: Any = 11.5
        return started


@breaks("outcome")
class EndsAsIfItHadBeenCutOff(Walk):
    outcome = "turns"


@breaks("outcome")
class EndsInANumber(Walk):
    @property
    def outcome(self) -> Any:
        return "goal" if self.success else 0


@breaks("actions_left")
class MiscountsItsActions(Walk):
    def reset(self, **given: Any) -> Any:
        started = super().reset(**given)
        self.taken, self.actions_left = 0, 6
        return started

    def step(self, action: str) -> Any:
        self.taken += 1
        self.actions_left = 12 - self.taken + 1
        stepped = super().step(action)
        self.actions_left = max(0, min(6, self.actions_left))
        return stepped


@breaks("after the end")
class GoesOnAfterTheEnd(Walk):
    def step(self, action: str) -> Any:
        self.done = False
        if not hasattr(self, "actions_left"):
            raise RuntimeError("call reset")
        return super().step(action)


@breaks("after the end")
class StartsWithoutAReset(Walk):
    def __init__(self) -> None:
        super().__init__()
        self.done, self.actions_left = False, 12


@breaks("parsing")
class AllowsAnything(Walk):
    def parse_action(self, text: str) -> str | None:
        return "right" if "right" in text else "left"


@breaks("parsing")
class DoesNotParseItsOwnActions(Walk):
    def parse_action(self, text: str) -> str | None:
        return {"left": "go left", "right": "go right"}.get(text.strip())


@pytest.mark.parametrize("name", BROKEN)
def test_exactly_the_broken_contract_is_reported(name: str) -> None:
    (line,) = check_environment(Environment(id=f"{__name__}:{name}-v0"))
    assert line.startswith(f"{BROKEN[name]}: ")
    assert "\n" not in line
    if BROKEN[name] not in ("made", "seed used") and name != "AnotherKindOfSpace":
        assert re.search(r"\(state_seed \d+, seed \d+\)$|\(seed \d+\)$", line), line


WALK = Environment(id=f"{__name__}:Walk-v0")


@pytest.mark.parametrize("expert", [None, WalkExpert()], ids=["without an expert", "with one"])
def test_a_sound_environment_breaks_nothing(expert: Any) -> None:
    assert check_environment(WALK, expert) == []


def registered(kind: type[Walk]) -> type[Walk]:
    gymnasium.register(id=f"{kind.__name__}-v0", entry_point=kind, disable_env_checker=True)
    return kind


@registered
class Deterministic(Walk):
    """Draws nothing, and its key leaves out how many actions are left."""

    def slips(self) -> bool:
        return False


@registered
class DrawsInVain(Walk):
    def slips(self) -> bool:
        return bool(self.np_random.random() < 0)


@registered
class SlipsRarely(Walk):
    def slips(self) -> bool:
        return bool(self.np_random.random() < 0.01)


@registered
class SlipsByItsSeedAndTime(Walk):
    """No generator lasts longer than a step."""

    def reset(self, **given: Any) -> Any:
        self.given = given["seed"]
        return super().reset(**given)

    def slips(self) -> bool:
        return bool(np.random.default_rng([self.given, self.actions_left]).random() < 0.3)


@pytest.mark.parametrize("kind", [Deterministic, DrawsInVain, SlipsRarely, SlipsByItsSeedAndTime])
def test_noise_that_follows_its_seed_is_not_blamed_nor_that_there_is_none(kind: type[Walk]) -> None:
    assert check_environment(Environment(id=f"{__name__}:{kind.__name__}-v0")) == []


NUMBERS = {"int": int, "bool": bool, "np.bool_": np.bool_, "np.float32": np.float32}


@registered
class OtherNumbers(Walk):
    """Rewards and flags of other types than Python's own."""

    def __init__(self, number: str, flag: str) -> None:
        super().__init__()
        self.number, self.flag = NUMBERS[number], NUMBERS[flag]

    def reset(self, **given: Any) -> Any:
        started = super().reset(**given)
        self.actions_left, self.success = np.int64(self.actions_left), self.flag(False)
        return started

    def step(self, action: str) -> Any:
        observation, reward, terminated, truncated, _ = super().step(action)
        self.success = self.flag(self.success)
        return observation, self.number(reward), self.flag(terminated), self.flag(truncated), {}


@pytest.mark.parametrize(("number", "flag"), [("int", "bool"), ("np.float32", "np.bool_"), ("np.bool_", "bool")])
def test_the_suite_and_the_pipeline_take_the_same_numbers_and_flags(number: str, flag: str) -> None:
    section = Environment(id=f"{__name__}:OtherNumbers-v0", settings={"number": number, "flag": flag})
    assert check_environment(section, WalkExpert()) == []
    environment = make(section)
    registry.reset(environment, 0, 0)
    _, reward, over = registry.step(environment, "left")
    taken = (reward, over, registry.success_of(environment), registry.actions_left_of(environment))
    assert [type(value) for value in taken] == [float, bool, bool, int]


WRONG: list[tuple[Any, str]] = [
    (("", np.float32("nan"), False, False, {}), r"the reward np\.float32\(nan\)"),
    (("", float("inf"), False, False, {}), "the reward inf"),
    (("", 10**400, False, False, {}), "the reward 10+"),
    (("", "1", False, False, {}), "the reward '1'"),
    (("", 1j, False, False, {}), "the reward 1j"),
    (("", np.ones(1), False, False, {}), "the reward array"),
    (("", 1, 0, False, {}), "terminated 0"),
    (("", 1, False, None, {}), "truncated None"),
    ((b"", 1, False, False, {}), "an observation of type bytes"),
    (("", 1, False, False, None), "information of type NoneType"),
    (["", 1, False, False, {}], "a list"),
]
"""What a step returns, and what is said of it."""


@registered
class ReturnsWrong(Walk):
    def __init__(self, case: int) -> None:
        super().__init__()
        self.case = case

    def step(self, action: str) -> Any:
        return WRONG[self.case][0]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_the_suite_and_the_pipeline_refuse_the_same(case: int) -> None:
    section = Environment(id=f"{__name__}:ReturnsWrong-v0", settings={"case": case})
    (line,) = check_environment(section, WalkExpert())
    environment = make(section)
    registry.reset(environment, 0, 0)
    with pytest.raises(UserError, match=f"returned {WRONG[case][1]}") as caught:
        registry.step(environment, "left")
    words = str(caught.value).removeprefix("environments: ")
    assert line.replace("'right'", "'left'").startswith(f"step: {words} (state_seed 0, ")


def test_a_board_that_cannot_be_drawn_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "drawn_walk.py").write_text(
        "import gymnasium\nfrom tests.test_contracts import Walk\n"
        "def board(key): return [['x'] * 9, ['x'] * int(key.split()[0])]\n"
        "class Drawn(Walk): ...\ngymnasium.register(id='Drawn-v0', entry_point=Drawn)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (line,) = check_environment(Environment(id="drawn_walk:Drawn-v0"))
    assert re.match(r"board: 'drawn_walk:Drawn-v0' returned .* from board\('\d \d'\); it must be rows of text", line)


def test_a_plotting_library_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plotting_walk.py").write_text(
        "import gymnasium, matplotlib\nfrom tests.test_contracts import Walk\n"
        "class Plotting(Walk): ...\ngymnasium.register(id='Plotting-v0', entry_point=Plotting)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (line,) = check_environment(Environment(id="plotting_walk:Plotting-v0"))
    assert line == "imports: importing plotting_walk imports matplotlib"


class Lazy(WalkExpert):
    """Fails where the goal is far."""

    def act(self, walk: Walk, draws: np.random.Generator) -> str:
        near = abs(walk.goal - walk.cell[0]) < 3
        return super().act(walk, draws) if near else "left" if walk.goal > walk.cell[0] else "right"


class Choosy(Lazy):
    """Says where it fails."""

    def solvable(self, walk: Walk) -> bool:
        return abs(walk.goal - walk.cell[0]) < 3


class Mumbling(WalkExpert):
    def act(self, walk: Walk, draws: np.random.Generator) -> str:
        return super().act(walk, draws).upper()


class Stumbling(WalkExpert):
    def random_action(self, walk: Walk, draws: np.random.Generator) -> str:
        return super().random_action(walk, draws).upper()


class Flying(WalkExpert):
    def random_action(self, walk: Walk, draws: np.random.Generator) -> str:
        return "fly"


class Meddling(WalkExpert):
    def reason(self, walk: Walk, words: int, draws: np.random.Generator) -> str:
        walk.cell[0] = 8 - walk.cell[0]
        return ""


@pytest.mark.parametrize(
    ("expert", "reported"),
    [
        (Lazy(), r"expert: solves \d+ of 12 instances in 20 attempts, less than 100%; not \(state_seed [\d, ]+\)"),
        (Mumbling(), r"expert: act gives '(LEFT|RIGHT)', which is not allowed .*"),
        (Stumbling(), r"expert: random_action gives '(LEFT|RIGHT)', which is not allowed .*"),
        (Flying(), r"actions: parse_action allows nothing that the expert does .*"),
        (Meddling(), r"expert: the expert changes the state by looking at it .*"),
    ],
)
def test_a_bad_expert_is_reported(expert: Any, reported: str) -> None:
    (line,) = check_environment(WALK, expert)
    assert re.fullmatch(reported, line), line


def test_an_expert_is_asked_for_what_it_calls_solvable_and_for_no_more_than_the_threshold() -> None:
    assert check_environment(WALK, Choosy()) == []
    assert check_environment(WALK, Lazy(), Bounds(solved=0.1)) == []


def test_every_contract_is_broken_by_something_here() -> None:
    assert {*BROKEN.values(), "board", "expert", "imports"} == {"made", *CONTRACTS}


# ------------------------------------------------------------------------------------------ environments that are sound


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
    program = (
        "import json, sys; from tests.test_contracts import shown; print(json.dumps([shown(), 'torch' in sys.modules]))"
    )
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
    bare = command.removeprefix("PYTHONPATH=docs/examples actfocus ")
    assert bare != command
    bare = f"python -m pipeline.commands.app {bare}"
    done = subprocess.run(bare, shell=True, cwd=tmp_path, env=os.environ | changed, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["--id", f"{__name__}:IgnoresItsSeeds-v0"], f"{__name__}:IgnoresItsSeeds-v0: seed used: "),
        (["--id", "nowhere:Nothing-v0"], "nowhere:Nothing-v0: made: environments: id 'nowhere:Nothing-v0' cannot"),
        (["--params", "nothing.yaml"], "nothing.yaml: no such file"),
    ],
)
def test_the_command_prints_what_is_broken(
    arguments: list[str], printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["contracts", *arguments])
    assert contracts.main() == 1
    assert capsys.readouterr().out.startswith(printed)


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
