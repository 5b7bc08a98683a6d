"""NaN, infinity and a learning rate of 1000, planted where trainings meet them: each is named, counted, alarmed of."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.bootstrap.supervision import supervision_alarm
from pipeline.energy.annotate import annotate, annotate_own
from pipeline.evaluation.evaluate import EvaluationTask, evaluate_policy
from pipeline.model.loading import load_policy
from pipeline.model.policy import Policy
from pipeline.rollout.collector import collect
from pipeline.rollout.specs import iteration_specs
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.settings.params import Config
from pipeline.training import iteration
from pipeline.training.alarms import raised
from pipeline.training.iteration import Iteration, run_iteration
from pipeline.training.run import TrainingJob, train_one
from pipeline.training.seed_key import training_task
from pipeline.training.update import Learner
from pipeline.trajectories.table import read, write
from pipeline.trajectories.trajectory import Trajectories, TrajectoryError
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import CHECKSUM, read_json
from pipeline.workspace.finite import NumericsError
from tests.test_numerics import at_rate, slowed
from tests.trainings import LAKE, configured, quiet, supervised

BAD = (float("nan"), float("inf"))
SOMEWHERE = r"at token \d+ of episode \S+"


def job(config: Config, directory: Path, cache: Path, method: str = "grpo", table: Path | None = None) -> TrainingJob:
    return TrainingJob(training_task(config, LAKE, method, 0, directory, cache), table, None)


def sampled(policy: Policy) -> Trajectories:
    """The episodes of a training's first iteration."""
    config, engine = configured(), TransformersEngine(policy)
    return collect(engine, policy.tokenizer, config, LAKE, iteration_specs(config, LAKE, 0, 0), 1.0)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("bad", BAD)
def test_a_stored_weight_that_is_no_number_is_named_before_anything_is_played(
    directory: Path, tmp_path: Path, bad: float
) -> None:
    spoilt = tmp_path / "policy"
    shutil.copytree(directory, spoilt)
    tensors = load_file(spoilt / "model.safetensors")
    tensors["model.norm.weight"][3] = bad
    save_file(tensors, spoilt / "model.safetensors", {"format": "pt"})
    named = "model.norm.weight holds numbers that are not finite"
    with pytest.raises(UserError, match=named):
        evaluate_policy(EvaluationTask(configured(), LAKE, "grpo", 0, spoilt, 0.5), quiet)
    with pytest.raises(UserError, match=named):
        train_one(job(configured(), spoilt, tmp_path / "cache"), quiet)


@pytest.fixture(scope="module")
def annotated(directory: Path) -> Trajectories:
    """The episodes of a training's first iteration, as the stage leaves them."""
    reference = load_policy(directory)
    return annotate_own(sampled(reference), reference, 1.0, 4096)


def spoilt_table(made: Trajectories, column: str, bad: float, table: Path) -> str:
    """Write episodes with a number that is none in a column; returns where it is."""
    first, second = made.episodes["episode_id"][:2]
    if column == "return":
        write(replace(made, episodes={**made.episodes, column: [0.0, bad, *made.episodes[column][2:]]}), table)
        return f"episode {second}"
    if column == "turns.reward":
        write(replace(made, turns={**made.turns, "reward": [bad, *made.turns["reward"][1:]]}), table)
        return f"turn 0 of episode {first}"
    values, token = getattr(made, column).copy(), int(np.flatnonzero(made.sampled)[2])
    values[token] = bad
    write(replace(made, **{column: values}), table)
    return f"token {token} of episode {first}"


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("column", ["logprob", "entropy", "energy", "ref_logprob", "return", "turns.reward"])
def test_a_number_of_a_stored_table_is_named_with_column_and_episode(
    annotated: Trajectories, tmp_path: Path, column: str, bad: float
) -> None:
    where = spoilt_table(annotated, column, bad, tmp_path / "table.parquet")
    with pytest.raises(TrajectoryError) as error:
        read(tmp_path / "table.parquet")
    assert str(error.value) == f"{tmp_path / 'table.parquet'}: column {column} is {bad} at {where}"


def test_a_training_does_not_begin_with_a_table_that_is_spoilt(
    annotated: Trajectories, directory: Path, tmp_path: Path
) -> None:
    table = tmp_path / "table.parquet"
    where = spoilt_table(annotated, "energy", float("nan"), table)
    with pytest.raises(TrajectoryError, match=f"column energy is nan at {where}$"):
        train_one(job(configured(), directory, tmp_path / "cache", table=table), quiet)


def test_entropies_that_no_engine_has_told_are_no_fault_until_the_table_is_annotated(
    annotated: Trajectories, tmp_path: Path
) -> None:
    untold = replace(annotated, entropy=np.where(annotated.sampled, np.nan, 0.0).astype(np.float32))
    write(replace(untold, energy=None, ref_logprob=None, ref_entropy=None), tmp_path / "plain.parquet")
    assert np.isnan(read(tmp_path / "plain.parquet").entropy).sum() == annotated.sampled.sum()
    write(untold, tmp_path / "annotated.parquet")
    with pytest.raises(TrajectoryError, match="column entropy is nan"):
        read(tmp_path / "annotated.parquet")


def test_a_number_that_is_missing_in_a_file_is_as_bad(annotated: Trajectories, tmp_path: Path) -> None:
    write(annotated, tmp_path / "whole.parquet")
    table = pq.read_table(tmp_path / "whole.parquet")
    place = table.schema.get_field_index("return")
    spoilt = table.set_column(place, "return", [[None, *table["return"].to_pylist()[1:]]])
    version = {key: value for key, value in table.schema.metadata.items() if key != CHECKSUM.encode()}
    pq.write_table(spoilt.replace_schema_metadata(version), tmp_path / "holed.parquet")
    with pytest.raises(TrajectoryError, match=r"holed\.parquet: column return is nan at episode \S+$"):
        read(tmp_path / "holed.parquet")


@pytest.mark.parametrize("bad", BAD)
def test_logits_that_are_no_numbers_are_named_with_episode_and_token(policy: Policy, bad: float) -> None:
    torch.nn.init.constant_(policy.model.model.norm.weight, bad)
    with pytest.raises(NumericsError, match=rf"^the policy's largest logit is \S+ {SOMEWHERE}"):
        sampled(policy)


@pytest.mark.parametrize("bad", BAD)
def test_a_score_of_the_reference_policy_is_named_with_episode_and_token(policy: Policy, bad: float) -> None:
    played = sampled(policy)
    torch.nn.init.constant_(policy.model.model.norm.weight, bad)
    with pytest.raises(NumericsError, match=rf"^logprob of a token under the policy that scores it is \S+ {SOMEWHERE}"):
        annotate(played, policy, 1.0, 4096)


# ----------------------------------------------------------------------------------------------------- a function's own

MODULE = "planted_functions"


@pytest.fixture
def own() -> Iterator[Any]:
    module = sys.modules[MODULE] = types.ModuleType(MODULE)
    yield module
    del sys.modules[MODULE]


def with_function(slot: str, **train: Any) -> Config:
    row = {slot: {"kind": "custom", "function": f"{MODULE}:function"}}
    return configured({"methods": {"own": row}, "train": {"iterations": 3, **train}})


@pytest.mark.parametrize(
    ("slot", "bad"),
    [("weight", BAD[1]), *((slot, BAD[0]) for slot in ("reward", "advantage", "weight", "regulariser"))],
)
def test_what_a_function_returns_is_named_with_episode_and_token(
    own: Any, directory: Path, tmp_path: Path, slot: str, bad: float
) -> None:
    def function(batch: Any) -> torch.Tensor:
        values = torch.where(batch.trainable, 1.0, 0.0)
        values[batch.trainable.nonzero()[5]] = bad
        return values

    own.function = function
    said = (
        rf"{slot}\.function: '{MODULE}:function' returned {bad} for token \d+ of episode \S+; allowed: finite numbers"
    )
    with pytest.raises(UserError, match=said):
        train_one(job(with_function(slot), directory, tmp_path, "own"), quiet)


@pytest.mark.parametrize("bad", BAD)
def test_a_loss_that_is_no_number_costs_its_update_and_so_many_in_a_row_the_training(
    own: Any, directory: Path, tmp_path: Path, bad: float
) -> None:
    own.function = lambda tokens: torch.where(torch.arange(len(tokens.logprob)) == 7, bad, -tokens.logprob)
    with pytest.raises(NumericsError) as error:
        train_one(job(with_function("surrogate", non_finite_updates=3), directory, tmp_path, "own"), quiet)
    said = str(error.value)
    assert said.startswith(f"frozen_lake-own, seed 0: iteration 0: surrogate of a token is {bad} at token ")
    assert "3 updates in a row had to be left out, which ends a training (train.non_finite_updates)" in said
    assert "\n" not in said


# ------------------------------------------------------------------------------------------------------------ a gradient


def with_spoilt_gradients(bad: float, spoilt: Callable[[int, int], bool]) -> Callable[..., Iteration]:
    """``run_iteration``, in which a weight's gradient is no number where an iteration and an update of it are spoilt."""

    def run(collection: Any, learner: Learner, optimizer: Any, memory: Any, curve: Any) -> Iteration:
        weight, updates = learner.policy.model.model.layers[0].mlp.up_proj.weight, iter(range(100))
        own_update = iteration.update
        now = [-1]

        def counted(*arguments: Any) -> dict[str, float]:
            now[0] = next(updates)
            return own_update(*arguments)

        hook = weight.register_hook(lambda grad: grad * bad if now[0] >= 0 and spoilt(len(curve), now[0]) else grad)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pipeline.training.iteration.update", counted)
            done = run_iteration(collection, learner, optimizer, memory, curve)
        hook.remove()
        return done

    return run


def curve_of(checkpoint: Path) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = torch.load(checkpoint, weights_only=True)["curve"]
    return rows


@pytest.mark.parametrize("bad", BAD)
def test_a_gradient_that_is_no_number_is_left_out_counted_and_alarmed_of(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    """Of four updates of the second iteration the first one."""
    monkeypatch.setattr(
        "pipeline.training.module.run_iteration", with_spoilt_gradients(bad, lambda i, u: (i, u) == (1, 0))
    )
    config, texts = configured({"train": {"iterations": 3}}), list[str]()
    result = train_one(job(config, directory, tmp_path), lambda done, total, text="": texts.append(text))
    rows = read_json(result / "curves.json")
    assert [row["non_finite_losses"] for row in rows] == [0, 1, 0]
    assert [raised(row) for row in rows] == [{}, {"skipped": 0.25}, {}]
    assert not any("skipped_in_a_row" in row for row in rows)
    assert [text.startswith("ALARM: 0.25 of the updates were left out") for text in texts if "success" in text] == [
        False, True, True,
    ]  # fmt: skip


def test_gradients_that_are_no_numbers_end_a_training_at_the_last_good_checkpoint(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are counted over the ends of iterations: the four of the second, and two of the third."""
    monkeypatch.setattr(
        "pipeline.training.module.run_iteration", with_spoilt_gradients(float("nan"), lambda i, _: i > 0)
    )
    config = configured({"train": {"iterations": 4, "non_finite_updates": 6}})
    planted = job(config, directory, tmp_path)
    for _ in range(2):
        with pytest.raises(NumericsError) as error:
            train_one(planted, quiet)
        assert str(error.value).startswith(
            "frozen_lake-grpo, seed 0: iteration 2: the gradient of model.model.layers.0.mlp.up_proj.weight is not finite: "
            "6 updates in a row had to be left out"
        )
    rows = curve_of(planted.task.cache / "checkpoint.ckpt")
    assert [row.get("skipped_in_a_row", 0) for row in rows] == [0, 4]
    monkeypatch.undo()
    assert len(read_json(train_one(planted, quiet) / "curves.json")) == 4


# --------------------------------------------------------------------------------------------- a learning rate of 1000


def with_adapters_at(rate: float) -> Config:
    return configured(
        {"method_defaults": {"learning_rate": 1e-4}, "train": {"lora": {"learning_rate_factor": rate / 1e-4}}}
    )


RUINED: dict[str, tuple[Callable[[], Config], str, set[str]]] = {
    "a method's": (lambda: slowed(at_rate(1e-4), "grpo", 1e3), "grpo", {"kl", "skipped"}),
    "a method's with weights": (
        lambda: slowed(at_rate(1e-4), "grpo_actfocus", 1e3),
        "grpo_actfocus",
        {"kl", "skipped"},
    ),
    "of PPO's policy": (lambda: slowed(at_rate(1e-4), "critic", 1e3), "critic", {"kl", "skipped"}),
    "a critic's": (lambda: slowed(at_rate(1e-4), "critic", 1e3, "critic"), "critic", {"heads"}),
    "a Q function's": (lambda: slowed(at_rate(1e-4), "soft", 1e3, "q"), "soft", {"heads"}),
    "adapters'": (lambda: with_adapters_at(1e3), "grpo", {"kl"}),
}


@pytest.mark.parametrize("name", RUINED)
def test_a_learning_rate_of_1000_does_not_end_without_a_word(directory: Path, tmp_path: Path, name: str) -> None:
    made, method, least = RUINED[name]
    config = made()
    config = config.model_copy(update={"train": config.train.model_copy(update={"iterations": 3})})
    texts: list[str] = []
    result = train_one(job(config, directory, tmp_path, method), lambda done, total, text="": texts.append(text))
    found = [set(raised(row)) for row in read_json(result / "curves.json")]
    assert least <= set().union(*found)
    assert any(found)
    assert texts[-1].startswith("ALARM: ")


def test_a_supervision_does_not_end_without_a_word_either() -> None:
    """At a rate of 1000 its losses are no numbers; at one that is only too high they end worse than a guess."""
    config = configured()
    plan = config.policy.demonstrations.model_copy(update={"learning_rate": 1e3})
    ruined = config.model_copy(update={"policy": config.policy.model_copy(update={"demonstrations": plan})})
    with pytest.raises(NumericsError, match=r"policy\.demonstrations: the loss of step \d+ is nan"):
        supervised(ruined)
    guess = np.log(320)
    assert supervision_alarm([guess, *[9.0] * 20, *[guess - 0.1] * 10], 320) == ""
    assert supervision_alarm([guess, *[1.0] * 20, *[41.2] * 10], 320).startswith(
        "ALARM: the loss of policy.demonstrations ended at 41.2 nats, and a guess has 5.77: "
    )
