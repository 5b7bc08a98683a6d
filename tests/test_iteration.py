"""One iteration of training: its table of tokens, its rounds, its minibatches."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.energy.annotate import annotate_part
from pipeline.model.loading import load_trained
from pipeline.model.policy import Policy
from pipeline.objective.batch import token_batch
from pipeline.objective.methods import entropy_terms, select_groups, shape_rewards, token_advantages, token_weights
from pipeline.progress.timing import Phases
from pipeline.rollout.slices import SlicesTask, sample_slices
from pipeline.rollout.specs import iteration_specs
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.settings.params import Config
from pipeline.training.collection import Collection
from pipeline.training.iteration import run_iteration, shuffled
from pipeline.training.module import PolicyGradient
from pipeline.training.seed_key import table_slice
from pipeline.training.tokens import TokenTable
from pipeline.trajectories.table import write
from pipeline.trajectories.trajectory import CUT_OFF, Trajectories, concatenate
from pipeline.workspace.randomness import generator
from tests.training_cases import prepared, token_number
from tests.trainings import LAKE, configured, fit, quiet, unmoved


def collection(
    config: Config, method: str, policy: Policy, seed: int = 0, first: Trajectories | None = None
) -> Collection:
    """What samples a training's episodes, with the policy as it is for its own reference."""
    branching = config.methods[method].branching
    return Collection(
        config, LAKE, seed, branching, TransformersEngine(policy), policy, policy.frozen_copy(), Phases(), first
    )


def collected(source: Collection, number: int = 0) -> Trajectories:
    """The annotated episodes of an iteration that has one round."""
    (waves,) = source.collect(number)
    return source.annotate(waves)


# -------------------------------------------------------------------------------------------------------- one iteration


def test_one_iteration_reads_on_one_screen() -> None:
    """Six calls in their order, in one function of at most sixty lines."""
    lines, _ = inspect.getsourcelines(run_iteration)
    assert len(lines) <= 60
    calls = [node.func for node in ast.walk(ast.parse("".join(lines))) if isinstance(node, ast.Call)]
    named = [(f.lineno, f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "")) for f in calls]
    six = ("collect", "annotate", "select_groups", "token_advantages", "token_weights", "update")
    assert [name for _, name in sorted(named) if name in six] == list(six)


@pytest.mark.parametrize("method", ["grpo", "grpo_actfocus", "ppo_actfocus"])
def test_the_table_holds_the_flat_batch_of_what_passed_the_filter(policy: Policy, method: str) -> None:
    """Advantages and weights are those of the flat batch, which are 0 outside trainable tokens."""
    config = configured({"methods": {method: {"filter": {"kind": "reward_variance", "keep": 0.5}}}})
    slots = config.methods[method]
    values = token_number if slots.advantage.kind == "gae" else None
    iteration = prepared(config, method, policy, values)
    everything = token_batch(iteration.episodes, generator(0, "slots", 0))
    kept = select_groups(slots, everything)
    table = iteration.table
    assert iteration.metrics["kept_trajectories"] == len(table) == int(kept.sum()) == 4
    selected = iteration.episodes.select(np.flatnonzero(kept))
    batch = shape_rewards(slots, token_batch(selected, generator(0, "slots", 0)))
    estimated = torch.zeros(len(batch.role))
    if values:
        for episode in range(len(selected)):
            own = (batch.trajectory == episode) & batch.trainable
            estimated[own] = token_number(None, [own])["value"]
    estimate = token_advantages(slots, batch, {"value": estimated} if values else {})
    batch = replace(batch, advantage=estimate.advantage)
    flat = {
        "role": batch.role,
        "logprob_old": batch.logprob,
        "ref_logprob": batch.ref_logprob,
        "advantage": estimate.advantage,
        "weight": token_weights(slots, batch),
        "entropy_terms": torch.stack(entropy_terms(slots, batch)[0], dim=-1),
        "noise": batch.noise,
    }
    heads = {}
    if values:
        target, mask = estimate.targets["value"]
        heads = {"value": estimated, "value_target": target, "value_mask": mask.float()}
        assert not bool(target[~batch.trainable].any())
    outside = ~batch.trainable
    assert not bool(flat["advantage"][outside].any() | flat["weight"][outside].any())
    assert bool(flat["advantage"].any())
    assert set(table.columns) == {*flat, *heads, "ids", "trainable", "place"}
    for name, column in {**flat, **heads}.items():
        assert torch.equal(table[name], column[batch.trainable]), name
    assert np.array_equal(table.lengths, selected.lengths)
    assert np.array_equal(table.columns["ids"], selected.input_ids)
    assert np.array_equal(table.columns["trainable"], selected.sampled)
    assert np.array_equal(iteration.episodes.input_ids[table.columns["place"]], selected.input_ids)


def test_the_first_iteration_from_the_table_is_the_one_sampled_afresh(directory: Path, tmp_path: Path) -> None:
    """Byte for byte, however the rollout and annotate stages have cut their work."""
    config = configured({"train": {"tokens_per_forward": 700}, "bottleneck": {"groups": 6}})
    slices = sample_slices(SlicesTask(config, LAKE, directory, [0, 1, 2], tmp_path / "slices"), quiet)
    parts = [concatenate([slices[0], slices[1]]), slices[2]]
    table = concatenate([annotate_part((config, directory, part, tmp_path / "annotated"), quiet) for part in parts])
    write(table, tmp_path / "table.parquet")
    for seed in range(3):
        policy = load_trained(directory, config)
        fresh = collected(collection(config, "grpo", policy, seed))
        cut = table_slice(table, config, LAKE, seed)
        assert cut is not None
        write(cut, tmp_path / "cut.parquet")
        write(fresh, tmp_path / "fresh.parquet")
        assert (tmp_path / "cut.parquet").read_bytes() == (tmp_path / "fresh.parquet").read_bytes()
    assert table_slice(table, config, LAKE, 3) is None


def test_a_first_iteration_that_is_given_is_used_and_later_ones_are_sampled(policy: Policy) -> None:
    config = configured()
    given = prepared(config, "grpo", policy).episodes
    source = collection(config, "grpo", policy, first=given)
    assert collected(source) is given
    assert set(collected(source, 1).episodes["iteration"]) == {1}
    rows = fit(PolicyGradient(config, LAKE, "grpo", 0, policy, given), 2).curve
    assert ["recompute_error" in row for row in rows] == [True, False]


TREES = {"branching": {"kind": "positions", "initial": 2, "signal": "entropy", "width": 2}}


@pytest.mark.parametrize(
    ("advantage", "weight"),
    [
        ({"kind": "shared_prefix"}, {"kind": "uniform"}),
        ({"kind": "shared_prefix"}, {"kind": "actfocus"}),
        ({"kind": "prefix_credit"}, {"kind": "uniform"}),
        ({"kind": "candidates"}, {"kind": "actfocus"}),
    ],
    ids=lambda slot: slot["kind"],
)
def test_tokens_of_trees_weigh_as_often_as_they_count(
    policy: Policy, advantage: dict[str, Any], weight: dict[str, Any]
) -> None:
    """Episodes that only tell of others are collected, measured and kept by the filter, and not trained on."""
    config = configured({"methods": {"trees": {**TREES, "advantage": advantage, "weight": weight}}})
    slots, iteration = config.methods["trees"], prepared(config, "trees", policy)
    batch = token_batch(iteration.episodes, generator(0, "slots", 0), temperature=1.0)
    estimate = token_advantages(slots, batch, {})
    assert estimate.times is not None
    counted = batch.per_trajectory(estimate.times) > 0
    own = np.unique(iteration.episodes.token_episode[iteration.table.columns["place"]])
    assert own.tolist() == np.flatnonzero(counted).tolist()
    assert len(iteration.episodes) == 8
    assert bool(counted.all()) == (advantage["kind"] == "shared_prefix")
    if advantage["kind"] == "prefix_credit":
        assert counted.tolist() == (batch.parent < 0).tolist()
    weighed = token_weights(slots, replace(batch, advantage=estimate.advantage)) * estimate.times
    for name, column in {"weight": weighed, "advantage": estimate.advantage, "logprob_old": batch.logprob}.items():
        assert torch.equal(iteration.table[name], column[batch.trainable & (estimate.times > 0)]), name
    assert iteration.metrics["kept_trajectories"] == iteration.metrics["episodes"] == 8
    assert iteration.metrics["tokens"] == float(batch.trainable.sum()) < float(iteration.episodes.sampled.sum())
    assert sum(value for name, value in iteration.metrics.items() if name.startswith("branches_")) == 4
    assert iteration.metrics["recompute_error"] < 1e-4


def test_a_round_before_there_are_branches_has_one_pass(policy: Policy) -> None:
    """And the log-probabilities of what was sampled before the update agree with the reference policy's in the other."""
    branching = {**TREES["branching"], "signal": "branching_score"}
    config = configured({"methods": {"moved": {"branching": branching, "advantage": {"kind": "prefix_credit"}}}})
    minibatches: list[TokenTable] = []

    def move(learner: Any, optimizer: Any, minibatch: TokenTable, *_: Any) -> dict[str, float]:
        minibatches.append(minibatch)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        return {}

    made = unmoved(PolicyGradient(config, LAKE, "moved", 0, policy), instead=move)
    assert [len(one) for one in minibatches] == [4, 4, 4]
    assert len(made.minibatches) == 2
    assert int(minibatches[0].columns["place"].max()) < int(minibatches[1].columns["place"].max())
    assert len(made.episodes) == 8
    assert made.metrics["updates"] == 3
    assert made.metrics["recompute_error"] < 1e-4


@pytest.mark.parametrize(("kind", "name"), [("gae", "value"), ("soft_q", "soft_value")])
def test_what_is_behind_a_cut_off_episode_is_what_the_head_says_where_the_next_response_begins(
    policy: Policy, kind: str, name: str
) -> None:
    """Read off the last token of the observation that was not answered; 0 behind a true end; values elsewhere stay."""
    row = {"advantage": {"kind": kind, "cut_off": "bootstrap"}, "surrogate": {"kind": "soft_q"}}
    lake = {
        "settings": {"size": 3, "least_distance": 1, "frozen": 0.6, "max_actions": 8, "grid": "first"},
        "max_turns": 2,
    }
    config = configured(
        {
            "methods": {"cut": row if kind == "soft_q" else {"advantage": row["advantage"]}},
            "environments": {LAKE: lake},
            "train": {"tokens_per_forward": 200},
        }
    )
    module = PolicyGradient(config, LAKE, "cut", 0, policy)
    for parameter in module.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    episodes = collected(module.collection)
    cut = np.isin(episodes.episodes["end_reason"], CUT_OFF)
    assert {True, False} == set(cut.tolist())
    columns, found = module.learner.estimates(episodes)
    advantage = module.learner.method.advantage.model_copy(update={"cut_off": "end"})
    without = module.learner.method.model_copy(update={"advantage": advantage})
    plain, nothing = replace(module.learner, method=without).estimates(episodes)
    assert nothing == {}
    assert found.keys() == {f"{name}_behind"}
    for column in plain:
        torch.testing.assert_close(columns[column], plain[column], atol=1e-5, rtol=0)
    for e, behind in enumerate(found[f"{name}_behind"].tolist()):
        assert (behind != 0) == cut[e]
        if cut[e]:
            ids = episodes.input_ids[episodes.offsets[e] : episodes.offsets[e + 1]]
            assert not episodes.sampled[episodes.offsets[e + 1] - 1]
            longer, wanted = np.append(ids, 0), np.arange(len(ids) + 1) == len(ids)
            assert behind == pytest.approx(float(module.learner.estimate([longer], [wanted])[name]), abs=1e-5)
    table = unmoved(module).table
    ends = token_batch(episodes, generator(0, "slots", 0))
    head = "q" if kind == "soft_q" else "value"
    gamma = 0.99 if kind == "soft_q" else 1.0
    for e in range(len(table)):
        reward = float(ends.reward[(ends.trajectory == e) & ends.trainable][-1])
        expected = reward + gamma * float(found[f"{name}_behind"][e])
        assert float(table.select([e])[f"{head}_target"][-1]) == pytest.approx(expected, abs=1e-5)


def test_every_method_meets_the_same_states_and_noise() -> None:
    config = configured()
    for iteration in (0, 3):
        one, other = iteration_specs(config, LAKE, 0, iteration), iteration_specs(config, LAKE, 1, iteration)
        assert one == iteration_specs(config, LAKE, 0, iteration)
        assert {spec.noise for spec in one}.isdisjoint(spec.noise for spec in other)
        assert {spec.draws for spec in one}.isdisjoint(spec.draws for spec in other)


# ---------------------------------------------------------------------------------------------------------- minibatches


@pytest.mark.parametrize(("count", "size"), [(8, 4), (8, 3), (7, 4), (5, 4), (9, 2), (3, 4), (1, 4), (0, 4)])
def test_each_pass_visits_every_trajectory_once(count: int, size: int) -> None:
    config = configured({"train": {"minibatch": size, "passes": 3}})
    batches = shuffled(count, config.train, seed=0, iteration=2)
    visits = [row for batch in batches for row in batch.tolist()]
    passes = [visits[start : start + count] for start in range(0, len(visits), max(1, count))]
    assert [sorted(one) for one in passes] == [list(range(count))] * (3 if count else 0)
    assert all(size / 2 <= len(batch) < 1.5 * size for batch in batches if count >= size / 2)


def test_minibatches_depend_on_their_name_alone() -> None:
    config = configured({"train": {"minibatch": 4, "passes": 2}})

    def drawn(seed: int, iteration: int) -> list[list[int]]:
        return [rows.tolist() for rows in shuffled(16, config.train, seed, iteration)]

    first = drawn(0, 1)
    np.random.seed(5)
    torch.manual_seed(5)
    assert drawn(0, 1) == first
    assert drawn(0, 2) != first
    assert drawn(1, 1) != first
    assert first[:4] != first[4:]
