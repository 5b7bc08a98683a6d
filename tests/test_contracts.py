"""The suite of contracts over environments that break one each.

Each broken environment is ``Walk`` with one thing wrong; the suite has to report that contract and no other.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tests.broken_seeds  # noqa: F401  (registers its walks)
from pipeline.contracts.environment import CONTRACTS, Bounds, check_environment
from pipeline.environments import make, playing
from pipeline.settings.params import Environment
from pipeline.workspace.errors import UserError
from tests.broken_play import AnotherKindOfSpace
from tests.walks import BROKEN, Walk, WalkExpert, registered, section


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_exactly_the_broken_contract_is_reported(kind: type[Walk]) -> None:
    (line,) = check_environment(section(kind))
    assert line.startswith(f"{BROKEN[kind]}: ")
    assert "\n" not in line
    if BROKEN[kind] not in ("made", "seed used") and kind is not AnotherKindOfSpace:
        assert re.search(r"\(state_seed \d+, seed \d+\)$|\(seed \d+\)$", line), line


WALK = section(Walk)


@pytest.mark.parametrize("expert", [None, WalkExpert()], ids=["without an expert", "with one"])
def test_a_sound_environment_breaks_nothing(expert: Any) -> None:
    assert check_environment(WALK, expert) == []


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
    assert check_environment(section(kind)) == []


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
    walk = section(OtherNumbers, number=number, flag=flag)
    assert check_environment(walk, WalkExpert()) == []
    environment = make(walk)
    playing.reset(environment, 0, 0)
    _, reward, over = playing.step(environment, "left")
    taken = (reward, over, playing.success_of(environment), playing.actions_left_of(environment))
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
    walk = section(ReturnsWrong, case=case)
    (line,) = check_environment(walk, WalkExpert())
    environment = make(walk)
    playing.reset(environment, 0, 0)
    with pytest.raises(UserError, match=f"returned {WRONG[case][1]}") as caught:
        playing.step(environment, "left")
    words = str(caught.value).removeprefix("environments: ")
    assert line.replace("'right'", "'left'").startswith(f"step: {words} (state_seed 0, ")


def test_a_board_that_cannot_be_drawn_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "drawn_walk.py").write_text(
        "import gymnasium\nfrom tests.walks import Walk\n"
        "def board(key): return [['x'] * 9, ['x'] * int(key.split()[0])]\n"
        "class Drawn(Walk): ...\ngymnasium.register(id='Drawn-v0', entry_point=Drawn)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (line,) = check_environment(Environment(id="drawn_walk:Drawn-v0"))
    assert re.match(r"board: 'drawn_walk:Drawn-v0' returned .* from board\('\d \d'\); it must be rows of text", line)


def test_a_plotting_library_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plotting_walk.py").write_text(
        "import gymnasium, matplotlib\nfrom tests.walks import Walk\n"
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
