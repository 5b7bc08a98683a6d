"""Kinds of reasoning in demonstrations, and the intervention that shows whether a policy uses its reasoning."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from pipeline.analysis.interventions import intervention
from pipeline.bootstrap.demonstrations import Demonstration, demonstrate, expert_of
from pipeline.bootstrap.tokenizer import train_tokenizer
from pipeline.environments import make
from pipeline.environments.bandit import RISKY, SAFE
from pipeline.evaluation.evaluate import evaluation_specs
from pipeline.evaluation.interventions import WAYS, played, success_by_state, thoughts_of
from pipeline.model.policy import Policy
from pipeline.rollout.collector import collect
from pipeline.rollout.engine import Continuation, Follow, Request, Sampling
from pipeline.settings.params import Config, Environment
from pipeline.settings.policy import Phase, Reasoning
from pipeline.trajectories.trajectory import Role, Trajectories
from pipeline.workspace.errors import UserError
from tests.letters import LETTER, Letter
from tests.test_environments import config_with
from tests.trainings import configured

SECTIONS: dict[str, dict[str, Any]] = {
    "frozen_lake": {
        "id": "actfocus/FrozenLake-v1",
        "settings": {"grid": "first", "frozen": 0.8},
        "max_turns": 8,
    },
    "sokoban": {"id": "actfocus/Sokoban-v1", "settings": {"grid": "never", "max_actions": 8}, "max_turns": 8},
    "sudoku": {"id": "actfocus/Sudoku-v1", "settings": {"givens": 11, "max_actions": 6}, "max_turns": 6},
    "bandit": {"id": "actfocus/Bandit-v1", "max_turns": 2},
    "webshop": {
        "id": "actfocus/WebShop-v1",
        "settings": {"generated_products": 100, "max_actions": 9},
        "max_turns": 9,
    },
}


def reread(name: str, plan: str) -> str:
    """The action that a plan names, by its words alone."""
    if name == "frozen_lake":
        return plan.split()[1]
    if name == "sokoban":
        return plan.split()[-1]
    if name == "sudoku":
        row, column, *_, digit = re.findall(r"\d", plan)
        return f"{row},{column},{digit}"
    if name == "bandit":
        return plan.removeprefix("the bold one is ")
    aim, named = re.fullmatch("(they want|all is chosen|not here|this fits|still to choose) (.*)", plan, re.S).groups()  # type: ignore[union-attr]
    return f"{'search' if aim == 'they want' else 'click'}[{named}]"


def shown(
    name: str, reasoning: Reasoning, phase: Phase, episodes: int, actions: int = 1, seed: int = 0
) -> list[Demonstration]:
    section = Environment(**SECTIONS[name], actions_per_turn=actions)
    environment, draws = make(section), np.random.default_rng(seed)
    expert = expert_of(environment, reasoning)
    return [demonstrate(environment, expert, state, phase, draws, section, reasoning) for state in range(episodes)]


def turns(demonstrations: list[Demonstration]) -> list[Any]:
    return [turn for demonstration in demonstrations for turn in demonstration.turns]


# -------------------------------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize(
    ("name", "actions", "expected"),
    [
        ("frozen_lake", 1, "cd37eb157d115f1e"),
        ("frozen_lake", 2, "43fa66d044b5beac"),
        ("sokoban", 1, "4490c4b5976c4d35"),
        ("sokoban", 2, "a5de651d9990d878"),
        ("sudoku", 1, "806786f68c5e881d"),
        ("sudoku", 2, "ab4d51602d289848"),
        ("bandit", 1, "84f4d4e503eb1393"),
        ("webshop", 1, "5a214a8f781b5f6f"),
        ("webshop", 2, "f2e916d51846be2a"),
    ],
)
def test_demonstrations_with_facts_are_what_they_were_before_there_were_plans(
    name: str, actions: int, expected: str
) -> None:
    made = shown(name, "facts", Phase(steps=1, reasoning_words=(0, 6), action_noise=0.3), 12, actions)
    said = repr([(d.instructions, [vars(turn) for turn in d.turns]) for d in made])
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == expected


@pytest.mark.parametrize("name", SECTIONS)
def test_a_plan_names_the_action_that_it_is_for(name: str) -> None:
    environment = make(Environment(**SECTIONS[name]))
    expert, draws = expert_of(environment, "plan"), np.random.default_rng(1)
    named = set()
    for state in range(25):
        environment.reset(seed=state, options={"state_seed": state})
        while not environment.done:
            before = environment.state_key
            for choose in (expert.act, expert.random_action, expert.random_action):
                action = choose(environment, draws)
                plan = expert.plan(environment, action, draws)
                assert reread(name, plan) == action, plan
                assert plan == " ".join(plan.split())
                named.add(plan)
            assert environment.state_key == before
            environment.step(action if draws.random() < 0.3 else expert.act(environment, draws))
    assert len(named) > 20


@pytest.mark.parametrize("name", SECTIONS)
def test_without_noise_on_actions_every_action_is_the_one_that_was_planned(name: str) -> None:
    phase = Phase(steps=1, reasoning_words=(0, 0), action_noise=0.0, plan_noise=0.5)
    made = turns(shown(name, "plan", phase, 20))
    assert [reread(name, turn.reasoning) for turn in made] == [turn.action for turn in made]


@pytest.mark.parametrize("name", SECTIONS)
def test_misleading_reasoning_plans_another_action_than_the_one_that_follows(name: str) -> None:
    phase = Phase(steps=1, reasoning_words=(0, 0), action_noise=0.2)
    made = [turn for turn in turns(shown(name, "misleading", phase, 20)) if turn.reasoning]
    assert len(made) > 15
    assert not any(reread(name, turn.reasoning) == turn.action for turn in made)


def test_a_misleading_expert_acts_as_well_as_one_that_plans() -> None:
    phase = Phase(steps=1, reasoning_words=(0, 0), action_noise=0.0)
    lakes = shown("frozen_lake", "misleading", phase, 40)
    assert len(turns(lakes)) == len(turns(shown("frozen_lake", "plan", phase, 40)))


def test_facts_come_before_a_plan_as_many_words_as_the_phase_says() -> None:
    phase = Phase(steps=1, reasoning_words=(3, 3), action_noise=0.0)
    assert all(turn.reasoning.split()[3] == "way" for turn in turns(shown("frozen_lake", "plan", phase, 10)))


def test_each_action_of_a_turn_has_its_plan() -> None:
    phase = Phase(steps=1, reasoning_words=(0, 0), action_noise=0.1)
    made = turns(shown("sokoban", "plan", phase, 20, actions=2))
    lengths = {len(turn.action.split(" || ")) for turn in made}
    assert lengths == {1, 2}
    assert all(len(turn.reasoning.split(" then ")) == len(turn.action.split(" || ")) for turn in made)


@pytest.mark.parametrize(("action_noise", "plan_noise"), [(0.0, 0.6), (0.6, 0.0), (0.4, 0.4)])
def test_noise_on_plans_and_noise_on_actions_are_the_shares_that_the_phase_says(
    action_noise: float, plan_noise: float
) -> None:
    """Of a random arm every second one is low."""
    phase = Phase(steps=1, reasoning_words=(0, 0), action_noise=action_noise, plan_noise=plan_noise)
    low = {f"{adjective} {noun}" for adjective in SAFE[0] for noun in SAFE[1]}
    made = turns(shown("bandit", "plan", phase, 2000))
    planned = [reread("bandit", turn.reasoning) for turn in made]
    assert np.mean([arm in low for arm in planned]) == pytest.approx(plan_noise / 2, abs=0.03)
    parted = [turn.action != arm for turn, arm in zip(made, planned, strict=True)]
    assert np.mean(parted) == pytest.approx(action_noise / 2, abs=0.03)


def demonstrated(**changes: Any) -> Config:
    return configured({"policy": {"demonstrations": changes}})


@pytest.mark.parametrize("reasoning", ["facts", "misleading"])
def test_noise_on_plans_is_refused_where_no_plan_is_followed(reasoning: str) -> None:
    phases = [{"steps": 1, "reasoning_words": [0, 0], "action_noise": 0.0, "plan_noise": noise} for noise in (0, 0.1)]
    with pytest.raises(UserError) as refusal:
        demonstrated(reasoning=reasoning, phases=phases)
    assert str(refusal.value) == (
        f"params.yaml: policy.demonstrations: phases.1.plan_noise has no effect while reasoning is {reasoning}"
    )
    assert demonstrated(reasoning="plan", phases=phases).policy.kind == "scratch"


@pytest.mark.parametrize("reasoning", ["plan", "misleading"])
def test_an_expert_that_does_not_plan_is_refused_in_one_line(reasoning: Reasoning) -> None:
    environment = make(Environment(**LETTER))
    assert isinstance(environment, Letter)
    assert expert_of(environment, "facts")
    with pytest.raises(UserError) as refusal:
        expert_of(environment, reasoning)
    assert re.fullmatch(
        rf"policy\.demonstrations\.reasoning: {reasoning} needs an expert that plans, and that of "
        r"'actfocus_test/Letter-v0' does not; set it to facts, or write `plan` .*",
        str(refusal.value),
    )


# -------------------------------------------------------------------------------------------------------- intervention

ARMS = [f"{adjective} {noun}" for words in (SAFE, RISKY) for adjective in words[0] for noun in words[1]]
TOKENIZER = train_tokenizer([f"arms: {arm}, {arm}\nthe bold one is {arm}" for arm in ARMS], 400)


class Choosing:
    """An engine that thinks of the bold arm, and then answers by what it is given: the prompt, and its thoughts so far."""

    policy_version = 0

    def __init__(self, answer: Callable[[str, str], str]) -> None:
        self.answer = answer

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, follow: Follow | None = None
    ) -> list[Continuation]:
        last = []
        for number, first in enumerate(requests):
            request: Request | None = first
            while request is not None:
                answer = self._say(request)
                request = follow(number, answer) if follow else None
            last.append(answer)
        return last

    def forget(self) -> None: ...

    def sync(self, policy: Policy, version: int) -> None: ...

    def _say(self, request: Request) -> Continuation:
        border = len(request.ids) - request.forced
        prompt, begun = (TOKENIZER.decode(list(ids)) for ids in (request.ids[:border], request.ids[border:]))
        said = begun
        if "</think>" not in said:
            said = f"<think>the bold one is {bold(prompt)}</think><answer>"
        text = f"{said}{self.answer(prompt, said)}</answer>".removeprefix(begun)
        ids = TOKENIZER(text)["input_ids"]
        assert len(ids) <= len(request.uniforms)
        return Continuation(ids, [-1.0] * len(ids), [1.0] * len(ids), "stop", 0)


def bold(prompt: str) -> str:
    arms = re.findall(r"arms: (\w+ \w+), (\w+ \w+)", prompt)[-1]
    return next(arm for arm in arms if arm.split()[0] in RISKY[0])


def by_reasoning(prompt: str, said: str) -> str:
    found = re.search("the bold one is (.*)</think>", said)
    return found[1] if found else "no idea"


def by_state(prompt: str, said: str) -> str:
    return bold(prompt)


def bandit_config(**rollout: Any) -> Config:
    config = config_with(Environment(**SECTIONS["bandit"], response_tokens=48, context_tokens=400))
    evaluation = config.evaluation.model_copy(update={"states": 12, "rollouts": 2})
    return config.model_copy(update={"evaluation": evaluation, "rollout": config.rollout.model_copy(update=rollout)})


def ways(answer: Callable[[str, str], str], config: Config) -> dict[Any, Trajectories]:
    return played(Choosing(answer), TOKENIZER, config, next(iter(config.environments)), 1.0)


@pytest.mark.parametrize("prefill", ["", "<think>"])
def test_without_its_reasoning_a_policy_that_copies_from_it_fails_and_one_that_does_not_goes_on(prefill: str) -> None:
    config = bandit_config(prefill=prefill)
    copying, ignoring = (
        {way: success_by_state(made, 2) for way, made in ways(answer, config).items()}
        for answer in (by_reasoning, by_state)
    )
    assert list(copying) == list(WAYS)
    assert {way: found.shape for way, found in copying.items()} == dict.fromkeys(WAYS, (12,))
    assert copying["own"].mean() == 1.0
    assert copying["none"].mean() == 0.0
    assert copying["other"].mean() < 0.2
    assert all(found.mean() == 1.0 for found in ignoring.values())
    assert intervention("bandit", "plan", {1.0: copying})["used"] is True
    assert intervention("bandit", "facts", {1.0: ignoring})["used"] is False


@pytest.mark.parametrize("prefill", ["", "<think>"])
def test_forced_tokens_open_the_response_are_not_sampled_and_are_thoughts_of_another_state(prefill: str) -> None:
    config = bandit_config(prefill=prefill)
    made = ways(by_state, config)
    texts = {way: responses(found) for way, found in made.items()}
    assert all(text.startswith("<think></think><answer>") for _, text, _ in texts["none"])
    thoughts = {thought.ids: thought.group_id for thought in thoughts_of(made["own"])}
    assert len(thoughts) > 8
    for group, text, sampled in texts["other"]:
        found = re.fullmatch("<think>(.*)</think><answer>(.*)</answer>", text)
        assert found
        assert sampled == f"{found[2]}</answer>"
        owners = [owner for ids, owner in thoughts.items() if TOKENIZER.decode(list(ids)) == found[1]]
        assert owners
        assert owners != [group]
    assert len({text for _, text, _ in texts["other"]}) > 5


def responses(made: Trajectories) -> list[tuple[str, str, str]]:
    """Group, text and sampled text of each episode's first response."""
    found = []
    for episode, group in enumerate(made.episodes["group_id"]):
        turn = made.turn_offsets[episode]
        span = slice(*(made.offsets[episode] + made.turns[end][turn] for end in ("start", "end")))
        ids, sampled = made.input_ids[span], made.sampled[span]
        roles = made.role[span][~sampled]
        assert not np.isin(roles, (Role.PROMPT, Role.OBSERVATION, Role.OTHER)).any()
        found.append((group, TOKENIZER.decode(ids.tolist()), TOKENIZER.decode(ids[sampled].tolist())))
    return found


def test_the_policys_own_way_is_what_the_collector_plays_and_all_ways_begin_alike() -> None:
    config = bandit_config()
    name, made = next(iter(config.environments)), ways(by_reasoning, config)
    states = {way: found.episodes["state_key"] for way, found in made.items()}
    assert states["own"] == states["none"] == states["other"]
    assert len(set(states["own"])) == 12
    specs = evaluation_specs(config, name, "test", 12, 2, 0, "intervention at 1")
    plain = collect(Choosing(by_reasoning), TOKENIZER, config, name, specs, 1.0)
    np.testing.assert_array_equal(made["own"].input_ids, plain.input_ids)
    again = ways(by_reasoning, config)
    for way in WAYS:
        np.testing.assert_array_equal(made[way].input_ids, again[way].input_ids)


def test_success_is_averaged_over_the_episodes_of_a_state_and_states_are_the_units() -> None:
    draws = np.random.default_rng(0)
    own = draws.integers(0, 5, size=40) / 4
    fallen = np.clip(own - draws.uniform(0.2, 0.6, size=40), 0, 1)
    found = intervention(
        "lake", "plan", {0.5: {"own": own, "none": fallen, "other": own}, 1.0: dict.fromkeys(WAYS, own)}
    )
    row, flat = found["temperatures"]
    assert (found["environment"], found["reasoning"], row["temperature"], flat["temperature"]) == (
        "lake",
        "plan",
        0.5,
        1,
    )
    difference = row["none_minus_own"]
    assert difference["value"] == pytest.approx((fallen - own).mean(), abs=1e-6)
    half = 2.022691 * (fallen - own).std(ddof=1) / 40**0.5  # the 97.5 % point of Student's t with 39 degrees of freedom
    assert difference["ci_low"] == pytest.approx(difference["value"] - half, abs=2e-6)
    assert difference["ci_high"] == pytest.approx(difference["value"] + half, abs=2e-6)
    assert flat["none_minus_own"] == {"value": 0.0, "ci_low": 0.0, "ci_high": 0.0}
    assert found["used"] is False, "another's reasoning does as well"
    swapped = intervention("lake", "plan", {0.5: {"own": own, "none": fallen, "other": fallen}})
    assert swapped["used"] is True
    assert swapped["verdict"].startswith("Reasoning is used: at temperature 0.5 success is ")
    (single,) = intervention("lake", None, {1.0: dict.fromkeys(WAYS, np.ones(1))})["temperatures"]
    assert single["own"] == {"success": 1.0, "ci_low": None, "ci_high": None}


@pytest.mark.parametrize("fall", [0.1, 0.19])
def test_a_small_fall_is_not_called_used_however_sure_it_is(fall: float) -> None:
    own = np.full(64, 0.9)
    assert not intervention("lake", "facts", {1.0: {"own": own, "none": own - fall, "other": own - fall}})["used"]
