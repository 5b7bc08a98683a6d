"""Workers on Ray play what an engine here would: to the byte, however many there are, and when they are killed.

One Ray, started here, serves all tests; they run in one process, as it takes seconds to start.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from pipeline.evaluation.evaluate import evaluate
from pipeline.model.loading import load_policy
from pipeline.model.policy import Policy
from pipeline.progress.timing import Phases
from pipeline.rollout.making import make_engine
from pipeline.rollout.ray_pool import TOLD, RayPool, check_workers, connected
from pipeline.rollout.sampler import make_sampler, sample_episodes
from pipeline.rollout.specs import iteration_specs
from pipeline.settings.params import Config, parse
from pipeline.settings.presets import overlay
from pipeline.settings.workers import RayWorkers
from pipeline.training.ahead import Ahead
from pipeline.training.checks import require_recomputed
from pipeline.training.collection import Collection
from pipeline.training.module import PolicyGradient
from pipeline.training.run import TrainingJob, train_until
from pipeline.training.seed_key import TrainingTask, training_task
from pipeline.trajectories.table import to_table
from pipeline.trajectories.trajectory import Trajectories
from pipeline.workspace.errors import UserError
from pipeline.workspace.finite import NumericsError
from pipeline.workspace.randomness import generator
from pipeline.workspace.yaml_files import read_yaml
from tests.trainings import LAKE, ROOT, TINY, configured, left, quiet

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.xdist_group("ray")
MOST, CORES, KILLS, PATIENCE = 4, 8, 10, 120.0
"""Workers of most tests, cores that Ray believes in (some tests have workers beside those), how many workers are killed, and
seconds within which what must happen has happened."""
SIZES = {"groups": 4, "group_size": 4, "unit_episodes": 4}


def working(number: int = MOST, changes: dict[str, Any] | None = None) -> Config:
    """At toy size, played by workers in four units of work an iteration."""
    workers = {"rollout": {**SIZES, "workers": {"kind": "ray", "number": number}}}
    return configured(overlay(workers, changes or {}))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of this process; nothing of it is left at the end."""
    os.environ.update(TOLD)
    ray.init("local", num_cpus=CORES, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    started = processes()
    assert started
    yield
    ray.shutdown()
    await_that(lambda: not any(map(alive, started)))


@pytest.fixture(scope="module")
def pool(cluster: None, directory: Path) -> Iterator[RayPool]:
    """All workers, with the reference policy."""
    made = make_sampler(working(), load_policy(directory))
    assert isinstance(made, RayPool)
    yield made
    made.close()
    await_that(lambda: not workers())


def processes() -> list[psutil.Process]:
    """What this process has started, at whatever depth."""
    return psutil.Process().children(recursive=True)


def alive(process: psutil.Process) -> bool:
    """Whether it runs, which it does not if nobody has yet asked how it ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def workers() -> list[psutil.Process]:
    found = []
    for process in processes():
        try:
            if process.cmdline()[0].startswith("ray::Worker"):
                found.append(process)
        except (psutil.Error, IndexError):
            continue
    return found


def await_that(happens: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.05)


def equal(one: Trajectories, other: Trajectories) -> bool:
    return bool(to_table(one).equals(to_table(other)))


def alone(policy: Policy, number: int, config: Config | None = None) -> Trajectories:
    """What an engine here plays of an iteration."""
    config = config or working()
    engine = make_engine(config, policy)
    engine.sync(policy, number)
    specs = iteration_specs(config, LAKE, 0, number)
    return sample_episodes(engine, policy.tokenizer, config, LAKE, specs, config.rollout.temperature)


def moved(policy: Policy, by: float = 0.02) -> None:
    """Weights as an update might leave them."""
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in policy.model.parameters():
            if weight.requires_grad:
                weight.add_(by * torch.randn(weight.shape, generator=draws).to(weight.dtype))


# --------------------------------------------------------------------------------------------------------- equal bytes


def test_one_two_and_four_workers_play_what_an_engine_here_does(
    pool: RayPool, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs, expected = iteration_specs(pool.config, LAKE, 0, 0), alone(policy, 0)
    pool.sync(policy, 0)
    assert equal(pool.begin(LAKE, specs, 1.0).episodes(), expected)
    actors = list(pool._actors)
    assert len(actors) == MOST
    for number in (1, 2):
        monkeypatch.setattr(pool, "_actors", actors[:number])
        monkeypatch.setattr(pool, "settings", RayWorkers(kind="ray", number=number))
        assert equal(pool.begin(LAKE, specs, 1.0).episodes(), expected)
        assert pool._actors == actors[:number]


def test_an_evaluation_is_the_same(pool: RayPool, policy: Policy) -> None:
    pool.sync(policy, 0)
    config = configured({"rollout": SIZES, "evaluation": {"states": 4, "rollouts": 2}})
    shared = policy.tokenizer, config, LAKE, 1, 0.5
    assert equal(evaluate(pool, *shared), evaluate(make_engine(config, policy), *shared))


def test_episodes_have_the_weights_of_when_they_were_begun(pool: RayPool, policy: Policy) -> None:
    pool.sync(policy, 1)
    before, specs = alone(policy, 1), iteration_specs(pool.config, LAKE, 0, 1)
    begun = pool.begin(LAKE, specs, 1.0)
    moved(policy)
    pool.sync(policy, 2)
    after = pool.begin(LAKE, specs, 1.0).episodes()
    assert equal(begun.episodes(), before)
    assert set(after.episodes["policy_version"]) == {2}
    engine = make_engine(pool.config, policy)
    engine.sync(policy, 2)
    expected = sample_episodes(engine, policy.tokenizer, pool.config, LAKE, specs, 1.0)
    assert equal(after, expected)
    assert not equal(after, before)


def test_of_a_policy_with_adapters_these_alone_are_sent(cluster: None, directory: Path) -> None:
    config = working(1, {"train": {"lora": {"rank": 2, "alpha": 4}}})
    module = PolicyGradient(config, LAKE, "grpo", 0, load_policy(directory))
    moved(module.policy, 0.3)
    pool = module.engine
    assert isinstance(pool, RayPool)
    pool.sync(module.policy, 1)
    sent = ray.get(pool._weights).arrays
    assert sent
    assert all(".lora_" in name for name in sent)
    specs = iteration_specs(config, LAKE, 0, 1)
    played = pool.begin(LAKE, specs, 1.0).episodes()
    module.teardown("fit")
    assert equal(played, alone(module.policy, 1, config))


def test_trainings_and_their_evaluations_leave_the_same_bytes(cluster: None, directory: Path, tmp_path: Path) -> None:
    """Trajectories, weights and curves: the key is the same, too, as workers decide nothing."""
    config = working(2)
    here = configured({"rollout": SIZES})
    tasks = [task(one, directory, tmp_path / name) for one, name in ((config, "workers"), (here, "here"))]
    assert tasks[0].key == tasks[1].key
    for one in tasks:
        train_until(TrainingJob(one, None, None), 2, quiet)
    assert left(tasks[0].result) == left(tasks[1].result)


def task(config: Config, directory: Path, cache: Path) -> TrainingTask:
    return training_task(config, LAKE, "grpo", 0, directory, cache)


# ---------------------------------------------------------------------------------------------- workers that are killed


def test_ten_workers_are_killed_and_the_bytes_are_the_same(pool: RayPool, policy: Policy) -> None:
    """Each at a random moment of a collect; another takes its place, with the weights of the latest sync."""
    moved(policy)
    pool.sync(policy, 3)
    specs, expected, draws = iteration_specs(pool.config, LAKE, 0, 3), alone(policy, 3), generator(0, "kills")
    began = time.monotonic()
    assert equal(pool.begin(LAKE, specs, 1.0).episodes(), expected)
    usual = time.monotonic() - began
    for _ in range(KILLS):
        await_that(lambda: len(workers()) == MOST)
        playing = pool.begin(LAKE, specs, 1.0)
        time.sleep(float(draws.random()) * usual)
        there = workers()
        victim = there[int(draws.integers(len(there)))]
        victim.send_signal(signal.SIGKILL)
        assert equal(playing.episodes(), expected)
        await_that(lambda: not alive(victim))  # noqa: B023
    await_that(lambda: len(workers()) == MOST)


def test_a_worker_that_always_ends_is_one_line(cluster: None, policy: Policy) -> None:
    """An environment that ends the process of whoever plays it."""
    lake = read_yaml(ROOT / "params.yaml")["environments"][LAKE]
    config = working(1, {"environments": {"deadly": {**lake, "id": "tests.deadly:Deadly-v0"}}})
    made = make_sampler(config, policy)
    specs = iteration_specs(config, LAKE, 0, 0)[:4]
    with pytest.raises(UserError, match=r"rollout\.workers: a worker's process has ended, and 3 times again") as caught:
        sample_episodes(made, policy.tokenizer, config, "deadly", specs, 1.0)
    assert len(str(caught.value).splitlines()) == 1


LONE = """
import sys
from pathlib import Path
from pipeline.model.loading import load_policy
from pipeline.rollout.sampler import make_sampler
from pipeline.rollout.specs import iteration_specs
from tests.test_ray_pool import LAKE, working

pool = make_sampler(working(1), load_policy(Path(sys.argv[1])))
pool.begin(LAKE, iteration_specs(pool.config, LAKE, 0, 0), 1.0).first()
print("played", flush=True)
sys.stdin.read()
"""


def test_nothing_outlives_a_process_that_is_killed(directory: Path) -> None:
    """It has started a Ray of its own, which has started a worker."""
    command = [sys.executable, "-c", LONE, str(directory)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as lone:
        assert lone.stdout is not None
        assert lone.stdout.readline() == "played\n"
        children = psutil.Process(lone.pid).children(recursive=True)
        assert any("ray::Worker" in " ".join(child.cmdline()) for child in children)
        lone.kill()
    await_that(lambda: not any(map(alive, children)))


# ------------------------------------------------------------------------------------------------- one iteration ahead


def ahead_of(pool: RayPool, policy: Policy) -> Collection:
    config = working(changes={"train": {"asynchronous": 1, "iterations": 4}})
    branching, reference = config.methods["grpo"].branching, policy.frozen_copy()
    return Collection(config, LAKE, 0, branching, pool, policy, reference, Phases(), ahead=Ahead(pool))


def taken(collection: Collection, number: int) -> Trajectories:
    (waves,) = collection.collect(number)
    return collection.annotate(waves)


def test_the_next_episodes_have_the_weights_before_the_update(pool: RayPool, policy: Policy, directory: Path) -> None:
    """They are what an engine here plays with those; ratios begin with the weights after it."""
    collection = ahead_of(pool, policy)
    first = taken(collection, 0)
    assert equal_played(first, alone(policy, 0))
    assert collection.agreement(first, 0).error < 1e-4
    assert np.array_equal(collection.rescored(first).logprob, first.logprob)
    moved(policy)
    second = taken(collection, 1)
    config, old, specs = collection.config, load_policy(directory), iteration_specs(collection.config, LAKE, 0, 1)
    expected = sample_episodes(make_engine(config, old), old.tokenizer, config, LAKE, specs, 1.0)
    assert set(second.episodes["policy_version"]) == {0}
    assert equal_played(second, expected)
    assert collection.agreement(second, 1).error < 1e-4  # of then
    rescored = collection.rescored(second)
    assert np.allclose(rescored.logprob, collection.now(second)[0], atol=0)
    assert np.abs(rescored.logprob - second.logprob).max() > 1e-3


def equal_played(annotated: Trajectories, played: Trajectories) -> bool:
    return equal(replace(annotated, energy=None, ref_logprob=None, ref_entropy=None), played)


def test_stale_weights_are_noticed_although_sampling_is_ahead(
    pool: RayPool, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers miss a sync. Episodes that they then begin would be trained on in the next iteration: that refuses them."""
    collection = ahead_of(pool, policy)
    collection.agreement(taken(collection, 0), 0)
    moved(policy)
    monkeypatch.setattr(pool, "sync", lambda policy, version: setattr(pool, "policy_version", version))
    good = collection.agreement(taken(collection, 1), 1)
    require_recomputed(good, torch.float32, good.error)
    bad = collection.agreement(taken(collection, 2), 2)
    with pytest.raises(NumericsError, match="the engine samples from other weights"):
        require_recomputed(bad, torch.float32, good.error)


def test_a_training_that_is_ahead_goes_on_where_it_stopped(cluster: None, directory: Path, tmp_path: Path) -> None:
    """In the same bytes; the age of its weights is in the curve."""
    config = working(1, {"train": {"asynchronous": 1, "iterations": 3}})
    whole, parts = (task(config, directory, tmp_path / name) for name in ("whole", "parts"))
    curve = train_until(TrainingJob(whole, None, None), 3, quiet)
    assert [row["weights_age"] for row in curve] == [0, 1, 1]
    assert [row["weights_age_largest"] for row in curve] == [0, 1, 1]
    assert all(row["sampling_error"] < 1e-4 for row in curve)
    assert curve[1]["sampler_difference"] > curve[0]["sampler_difference"] == 0
    train_until(TrainingJob(parts, None, None), 2, quiet)
    train_until(TrainingJob(parts, None, None), 3, quiet)
    assert left(whole.result) == left(parts.result)


# ----------------------------------------------------------------------------------------------------------- bad input


def refused(changes: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse(overlay(overlay(read_yaml(ROOT / "params.yaml"), TINY), changes))
    return str(caught.value)


def test_settings_that_workers_cannot_follow_are_one_line() -> None:
    workers = {"rollout": {"workers": {"kind": "ray", "number": 2}}}
    assert refused({"train": {"asynchronous": 1}}) == (
        "params.yaml: train.asynchronous: 1 needs rollout.workers, which play meanwhile; set these, or leave it at 0"
    )
    ahead = {**workers, "train": {"asynchronous": 1}}
    assert refused(ahead) == (
        "params.yaml: rollout.unit_episodes: with train.asynchronous an update waits for the next iteration's first unit of "
        "work; allowed: at most 4, the episodes of all groups but one"
    )
    corrected = {
        "rollout": {**workers["rollout"], "unit_episodes": 4},
        "train": {"asynchronous": 1, "correction": {"kind": "mask"}},
    }
    assert parse(overlay(overlay(read_yaml(ROOT / "params.yaml"), TINY), corrected)).train.correction is not None
    together = {**workers, "workers": 2, "train": {"processes": {"number": 2, "strategy": "ddp"}}}
    assert refused(together) == (
        "params.yaml: rollout.workers: not allowed with several processes of a training, which sample themselves"
    )
    tree = {"methods": {"arpo": {"branching": {"kind": "entropy_rise", "initial": 2}}}}
    assert refused({**workers, **tree}) == (
        "params.yaml: methods.arpo.branching.kind: 'entropy_rise' is not allowed with rollout.workers, which play whole "
        "episodes; allowed: none"
    )
    for address in ("elsewhere", "host:port", "ray://host:1"):
        assert refused({"rollout": {"workers": {"kind": "ray", "address": address}}}) == (
            f"params.yaml: rollout.workers.address: {address!r} is not allowed; allowed: host:port, or auto"
        )


def test_ray_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError) as caught:
        check_workers(working(), RayWorkers(kind="ray"))
    assert str(caught.value) == (
        "params.yaml: rollout.workers.kind: Ray is not installed; `pip install -c constraints.txt -e '.[ray]'` installs it"
    )


def test_an_address_at_which_nothing_answers_is_one_line() -> None:
    with pytest.raises(UserError) as caught:
        check_workers(working(), RayWorkers(kind="ray", address="127.0.0.1:1"))
    assert str(caught.value) == (
        "params.yaml: rollout.workers.address: nothing answers at 127.0.0.1:1 (Connection refused); `ray start --head` starts "
        "Ray on a machine"
    )


def test_more_workers_than_cores_are_one_line(cluster: None) -> None:
    config = configured({"threads": 2})
    with pytest.raises(UserError) as caught:
        connected(config, RayWorkers(kind="ray", number=5))
    assert str(caught.value) == (
        "params.yaml: rollout.workers.number: 5 workers want 10 cores (threads: 2), and there are 8; allowed: at most 4"
    )
