"""Trainings that two real processes do together: what is computed does not depend on how many they are."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline.model.loading import load_policy
from pipeline.settings.processes import Processes
from pipeline.training.run import TrainingJob, train_one
from pipeline.training.seed_key import TrainingTask, training_task
from pipeline.training.team import ALONE, Team, join
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import read_json
from pipeline.workspace.processes import run_in_processes, run_together
from pipeline.workspace.stopping import Stopped
from tests.team_cases import METHODS, Trained, difference, numbers, team_config, trained
from tests.trainings import LAKE, configured, quiet

CLOSE = 1e-5
"""Of the largest number; what is computed is float32."""
DDP, FSDP2 = ({"number": 2, "strategy": strategy} for strategy in ("ddp", "fsdp2"))
pytestmark = pytest.mark.xdist_group("team")

# ------------------------------------------------------------------------------------------------- one training, or two


@pytest.fixture(scope="module")
def found(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Trained]]:
    """What trainings of all methods leave under a strategy: of one process, or of one pair of them for all methods."""
    config, kept = team_config(), dict[str, dict[str, Trained]]()

    def all_methods(team: Team) -> dict[str, Trained]:
        folder = tmp_path_factory.getbasetemp()
        return {name: trained(config, name, load_policy(directory), folder, team) for name in METHODS}

    def of(strategy: str) -> dict[str, Trained]:
        if strategy not in kept and strategy == "auto":
            kept[strategy] = all_methods(ALONE)
        elif strategy not in kept:
            plan = Processes.model_validate({"number": 2, "strategy": strategy})
            meeting = tmp_path_factory.mktemp("met") / "meeting"
            kept[strategy] = run_together(lambda rank: all_methods(join(rank, plan, meeting)), 2)
        return kept[strategy]

    return of


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one_does(
    found: Callable[[str], dict[str, Trained]], method: str, strategy: str
) -> None:
    alone, together = found("auto")[method], found(strategy)[method]
    assert together.tokens == alone.tokens
    assert len(together.gradients) == len(alone.gradients) >= 2
    for two, one in zip(together.gradients, alone.gradients, strict=True):
        assert any(bool(value.any()) for value in one.values())
        assert difference(two, one) < CLOSE
    assert difference(together.weights, alone.weights) < CLOSE
    (row,), (expected,) = (map(numbers, x.curve) for x in (together, alone))
    assert row.keys() == expected.keys()
    for name, number in expected.items():
        torch.testing.assert_close(row[name], number, rtol=1e-4, atol=1e-6, msg=name)


# --------------------------------------------------------------------------------------- another number in the middle


def killed_in_its_second_iteration(task: TrainingTask) -> None:
    """The process that reports ends by SIGKILL; what it had done before is in a checkpoint."""
    told = []

    def report(done: int, total: int, text: str = "") -> None:
        told.append(done)
        if len(told) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(BrokenProcessPool):
        run_together(lambda _: train_one(TrainingJob(task, None, None), report), 1)


@pytest.mark.parametrize(("first", "last"), [("ddp", "fsdp2"), ("fsdp2", "ddp")])
def test_a_training_that_goes_on_with_another_number_of_processes_ends_as_an_uninterrupted_one(
    first: str, last: str, directory: Path, tmp_path: Path
) -> None:
    def task(cache: str, processes: dict[str, Any]) -> TrainingTask:
        train = {"iterations": 4, "processes": processes, "validate_every": 2}
        return training_task(configured({"train": train}), LAKE, "ppo", 0, directory, tmp_path / cache)

    straight = task("straight", {})
    train_one(TrainingJob(straight, None, None), quiet)
    killed = task("killed", {"number": 2, "strategy": first})
    assert killed.key == straight.key
    killed_in_its_second_iteration(killed)
    killed_in_its_second_iteration(task("killed", {}))
    assert not killed.finished
    train_one(TrainingJob(task("killed", {"number": 2, "strategy": last}), None, None), quiet)
    assert (killed.cache / "begun.log").read_text().split() == ["0", "1", "1", "2", "2", "3"]
    names = sorted(path.name for path in straight.result.rglob("*"))
    assert sorted(path.name for path in killed.result.rglob("*")) == names
    one, other = (load_file(x.result / "policy" / "model.safetensors") for x in (straight, killed))
    assert difference(other, one) < CLOSE
    for row, expected in zip(*(read_json(x.result / "curves.json") for x in (killed, straight)), strict=True):
        assert row.keys() == expected.keys()
        for name, number in numbers(expected).items():
            torch.testing.assert_close(numbers(row)[name], number, rtol=1e-3, atol=1e-5, msg=name)


def test_processes_that_are_asked_to_stop_have_all_made_the_same_iterations(directory: Path, tmp_path: Path) -> None:
    train = {"iterations": 500, "processes": {"number": 2}, "validate_every": 500}
    task = training_task(configured({"train": train}), LAKE, "grpo", 0, directory, tmp_path)
    begun, child = task.cache / "begun.log", os.fork()
    if not child:
        with contextlib.suppress(Stopped):
            run_in_processes(train_one, {"seed": TrainingJob(task, None, None)}, 1, "train", saved="iterations")
        os._exit(0 if (task.cache / "checkpoint.ckpt").exists() else 1)
    deadline = time.monotonic() + 300
    while not (begun.exists() and "1" in begun.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    saved = torch.load(task.cache / "checkpoint.ckpt", weights_only=True)["curve"]
    assert [str(int(row["iteration"])) for row in saved] == begun.read_text().split()


# ------------------------------------------------------------------------------------------------------ what it is made of


sizes = st.lists(st.integers(1, 500), min_size=1, max_size=40)


@given(sizes, st.integers(1, 5))
def test_every_row_is_dealt_to_one_process_and_no_process_has_much_more_than_another(
    own: list[int], count: int
) -> None:
    shares = Team(count=count).shares(own)
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(own)))
    loads = [sum(own[row] for row in share) for share in shares]
    assert max(loads) - min(loads) <= max(own)


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 5))
def test_every_group_is_sampled_by_one_process_in_order(groups: int, size: int, count: int) -> None:
    names = [f"group {group}" for group in range(groups) for _ in range(size)]
    rows = [Team(rank, count).own_rows(names) for rank in range(count)]
    assert [row for own in rows for row in own] == list(range(len(names)))
    assert all(len(own) % size == 0 for own in rows)
    assert max(map(len, rows)) - min(map(len, rows)) <= size


def test_gradients_are_summed_also_where_only_some_processes_have_one(tmp_path: Path) -> None:
    def summed(rank: int) -> list[Any]:
        team = join(rank, Processes(number=2, strategy="ddp"), tmp_path / "meeting")
        weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
        weights[0].grad = torch.tensor([1.0, 2.0]) * (1 + rank)
        weights[1].grad = torch.tensor([5.0, 7.0]) if rank else None
        team.sum_gradients(weights)
        return [weight.grad if weight.grad is None else weight.grad.tolist() for weight in weights]

    assert run_together(summed, 2) == [[3.0, 6.0], [5.0, 7.0], None]


def test_what_one_process_raises_ends_the_others_which_wait_for_it(tmp_path: Path) -> None:
    def fails(rank: int) -> None:
        team = join(rank, Processes(number=2, strategy="ddp"), tmp_path / "meeting")
        if rank == 1:
            raise ValueError("no room for this one")
        team.summed({"never": 1.0})

    with pytest.raises(ValueError, match="no room for this one"):
        run_together(fails, 2)


# ------------------------------------------------------------------------------------------------------------- refused


def refused(changes: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        configured(changes)
    (line,) = str(error.value).splitlines()
    return line


def test_processes_that_cannot_train_together_are_refused_in_one_line() -> None:
    for processes, said in (
        ({"number": 2}, "number is 2; allowed: ddp, fsdp2"),
        ({"strategy": "ddp"}, "has no effect with one process; allowed: auto"),
        ({"number": 2, "strategy": "fsdp"}, "fsdp2"),
        ({"number": 3, "strategy": "ddp"}, "more than workers (2)"),
    ):
        line = refused({"train": {"processes": processes}})
        assert line.startswith("params.yaml: train.processes")
        assert said in line
    line = refused({"train": {"processes": {"number": 3, "strategy": "ddp"}}, "workers": 3})
    assert "train.processes.number: 3 processes are more than rollout.groups (2)" in line
    line = refused({"train": {"processes": FSDP2, "lora": {"rank": 4}}})
    assert "train.processes.strategy: 'fsdp2' is not allowed with train.lora" in line
    configured({"train": {"processes": DDP, "lora": {"rank": 4}}})


def test_more_processes_than_cores_are_refused_in_one_line(directory: Path, tmp_path: Path) -> None:
    number = 4096
    changes = {
        "train": {"processes": {"number": number, "strategy": "ddp"}},
        "workers": number,
        "rollout": {"groups": number},
        "bottleneck": {"groups": number},
    }
    task = training_task(configured(changes), LAKE, "grpo", 0, directory, tmp_path)
    with pytest.raises(
        UserError, match=r"^params.yaml: train.processes.number: 4096 processes are more than this machine's"
    ):
        train_one(TrainingJob(task, None, None), quiet)
