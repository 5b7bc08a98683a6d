"""Questions of reasoning-gym's datasets: one question, one answer, the dataset's own score."""

import copy
import functools
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np

from pipeline.environments.draws import one_of
from pipeline.environments.episodic import Episodic, Expert
from pipeline.environments.foreign import Enclosure, check_known, free_text


@contextmanager
def _without_matplotlib() -> Iterator[None]:
    """Imports inside find empty modules in its place: cellpylib, of two datasets, wants it for plots only."""
    names = [f"matplotlib{part}" for part in ("", ".animation", ".collections", ".pyplot")]
    names += ["mpl_toolkits", "mpl_toolkits.mplot3d"]
    absent = [name for name in names if name not in sys.modules] if names[0] not in sys.modules else []
    for name in absent:
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name])["Axes3D"] = None
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


with _without_matplotlib():
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import DATASETS, create_dataset

UNSTABLE = ("codeio", "isomorphic_strings", "polynomial_multiplication", "ransom_note")
"""Datasets in 0.1.25 whose items follow the order of sets, and so PYTHONHASHSEED: processes do not agree on them."""

EVALUATED = (
    "binary_matrix",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
)
"""Datasets in 0.1.25 that score an answer by running it: they pass it to ``eval`` or sympy."""

UNKNOWN = "unknown"
"""What the expert says where an item has no answer of its own."""


class ReasoningTask(Episodic):
    """Answer a question, once. The reward is the dataset's score, from 0 to 1; success is a score of 1.

    Args:
        dataset: its name in reasoning-gym; ``composite`` mixes several.
        config: keyword arguments of the dataset. No ``seed``: ``state_seed`` decides about the item.
        run_answers: allow datasets that run what the policy writes, with your rights and no limit of time.

    Raises:
        ValueError: a dataset that is unknown or ``UNSTABLE``, one that is ``EVALUATED`` without ``run_answers``, or a
            config that it refuses.
    """

    observation_space = gymnasium.spaces.Text(max_length=100_000)
    action_space = gymnasium.spaces.Text(max_length=10_000)
    allowed = "an answer's text"

    def __init__(
        self, dataset: str = "chain_sum", config: dict[str, Any] | None = None, run_answers: bool = False
    ) -> None:
        config = config or {}
        check_known("dataset", dataset, "reasoning-gym", DATASETS)
        asked = {dataset, *(spec["name"] for spec in config.get("datasets", []))}
        for name in sorted(asked.intersection(UNSTABLE)):
            raise ValueError(f"dataset {name!r} cannot be used: its items change with PYTHONHASHSEED")
        for name in sorted(() if run_answers else asked.intersection(EVALUATED)):
            raise ValueError(
                f"dataset {name!r} scores an answer by running it as code; in a container of its own, set run_answers to "
                "true"
            )
        if "seed" in config:
            raise ValueError("config must not have a seed: state_seed decides about the item")
        self.dataset, self.config = dataset, json.dumps(config)
        try:
            _dataset(self.dataset, self.config)
        except (AssertionError, AttributeError) as error:
            raise ValueError(f"config of {dataset!r}: {error}") from error
        self.item: dict[str, Any] = {"question": "", "answer": None}

    def _begin(self, state_seed: int | None) -> str:
        state_seed = int(self.np_random.integers(2**31)) if state_seed is None else state_seed
        self.item = _item(self.dataset, self.config, state_seed)
        return str(self.item["question"])

    def _act(self, answer: str) -> tuple[str, float, bool]:
        score = self.score(answer)
        self.success = score == 1
        reward = min(max(score, 0.0), 1.0)  # sums of parts can come out a rounding error above 1
        return f"score {reward:g}", reward, True

    def parse_action(self, text: str) -> str | None:
        """Any text, line breaks included, without the space around it (see ``free_text``)."""
        return free_text(text, self.action_space.max_length)

    def score(self, answer: str) -> float:
        """The dataset's score of an answer; 0 for one that its scoring cannot read."""
        try:
            with Enclosure(0).entered():
                return float(_dataset(self.dataset, self.config).score_answer(answer, self.item))
        except Exception:
            return 0.0

    @property
    def answer(self) -> str | None:
        """The item's own answer if it is an allowed action and scores 1, else None."""
        own = self.parse_action(self.item["answer"] or "")
        return own if own is not None and self.score(own) == 1 else None

    @property
    def state_key(self) -> str:
        """The question."""
        return str(self.item["question"])

    @property
    def instructions(self) -> str:
        """Task, actions and limits; what is asked is in the observation."""
        return (
            f"You are answering a question of the dataset {self.dataset} of reasoning-gym. Your answer gets a score from "
            "0 to 1.\n"
            "Actions: the answer alone, in the form that the question asks for. You have 1 action."
        )


@functools.cache
def _dataset(name: str, config: str) -> Any:
    """A dataset; some hold whole books, so a process has one for all its environments."""
    settings = json.loads(config)
    if name == "composite":
        settings["datasets"] = [DatasetSpec(**spec) for spec in settings.get("datasets", [])]
    return create_dataset(name, seed=0, **settings)


@functools.lru_cache(maxsize=1024)
def _item(name: str, config: str, state_seed: int) -> dict[str, Any]:
    """The item of a state: most datasets draw it from seed and index, some have drawn a part for each index before."""
    draws = np.random.default_rng([state_seed, 1])
    dataset = copy.copy(_dataset(name, config))
    dataset.seed = int(draws.integers(2**31))
    with Enclosure(dataset.seed).entered():
        item: dict[str, Any] = dataset[int(draws.integers(len(dataset)))]
    return item


class ReasoningExpert(Expert):
    """Knows the items' own answers, and says words of the question that never hold one."""

    def act(self, task: ReasoningTask, draws: np.random.Generator) -> str:
        """The item's own answer, or ``UNKNOWN``; nothing is left to ``draws``."""
        return task.answer or UNKNOWN

    def random_action(self, task: ReasoningTask, draws: np.random.Generator) -> str:
        """The answer of another item, or ``UNKNOWN``."""
        other = _item(task.dataset, task.config, int(draws.integers(2**31)))
        return task.parse_action(other["answer"] or "") or UNKNOWN

    def solvable(self, task: ReasoningTask) -> bool:
        """Whether the item has an answer of its own: a few datasets only check one."""
        return task.answer is not None

    def _facts(self, task: ReasoningTask, draws: np.random.Generator) -> list[str]:
        said = ["hmm", "so", "let me think", "step by step", "what is asked"]
        asked = re.findall(r"[a-z]+", task.state_key.lower())
        said += [one_of(asked, draws) for _ in asked[:5]]
        answer = str(task.item["answer"] or "\n").lower()
        return [fact for fact in said if answer not in fact and not {*fact.split()} & {*answer.split()}] or ["hmm"]


expert = ReasoningExpert
