"""Training in this process: bootstrap, one iteration, the update, learning, and pretrained policies."""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import lightning.pytorch as lightning
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from pipeline.bootstrap.supervision import bootstrap
from pipeline.energy.annotate import annotate, annotate_part
from pipeline.environments import split_of
from pipeline.evaluation.evaluate import episode_results, evaluate
from pipeline.model.loading import load_policy, load_trained
from pipeline.model.policy import Policy
from pipeline.objective.batch import token_batch
from pipeline.objective.methods import entropy_terms, select_groups, shape_rewards, token_advantages, token_weights
from pipeline.progress.timing import Phases
from pipeline.rollout.collector import collect
from pipeline.rollout.slices import sample_slices
from pipeline.rollout.specs import iteration_specs
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.settings.params import Config
from pipeline.settings.presets import overlay
from pipeline.training.collection import Collection
from pipeline.training.iteration import Iteration, run_iteration, shuffled
from pipeline.training.module import PolicyGradient
from pipeline.training.seed_key import table_slice
from pipeline.training.tokens import TokenTable
from pipeline.training.update import Learner, averages
from pipeline.trajectories.table import write
from pipeline.trajectories.trajectory import CUT_OFF, RESPONSE_ROLES, Role, Trajectories, concatenate
from pipeline.workspace.randomness import generator
from tests.trainings import LAKE, configured, fit, quiet, same, standing, supervised, unmoved, updated, weights

# A user's own environment, outside the package: a gymnasium.Env with a few attributes, and an expert beside it.


class Letter(gymnasium.Env[str, str]):
    """One turn: say a letter. Reward 1 for ``rewarded``."""

    observation_space = gymnasium.spaces.Text(max_length=20)
    action_space = gymnasium.spaces.Text(max_length=1)
    instructions = "Say A or B."

    def __init__(self, rewarded: str = "A") -> None:
        self.rewarded, self.done, self.success = rewarded, True, False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        state_seed = (options or {}).get("state_seed", seed)
        self.item, self.done, self.success = int(np.random.default_rng(state_seed).integers(1000)), False, False
        return f"item {self.item}", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.done:
            raise RuntimeError("step called after the episode's end: call reset")
        self.done, self.success = True, action == self.rewarded
        return f"item {self.item}", float(self.success), True, False, {}

    def parse_action(self, text: str) -> str | None:
        return text if text in ("A", "B") else None

    @property
    def state_key(self) -> str:
        return f"item {self.item}"


class LetterExpert:
    """Says A or B, whichever; the policy that learns from it knows the format and nothing else."""

    def act(self, environment: Letter, draws: np.random.Generator) -> str:
        return "AB"[int(draws.integers(2))]

    def random_action(self, environment: Letter, draws: np.random.Generator) -> str:
        return "AB"[int(draws.integers(2))]

    def reason(self, environment: Letter, words: int, draws: np.random.Generator) -> str:
        return " ".join(["hm"] * words)


expert = LetterExpert
gymnasium.register(id="actfocus_test/Letter-v0", entry_point=Letter, disable_env_checker=True)
LETTER = {
    "id": "actfocus_test/Letter-v0",
    "max_turns": 1,
    "response_tokens": 12,
    "context_tokens": 64,
    "format_penalty": 0.0,
}


# -------------------------------------------------------------------------------------------------------------- helpers


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


def prepared(config: Config, method: str, policy: Policy, estimate: Any = None) -> Iteration:
    return unmoved(PolicyGradient(config, LAKE, method, 0, policy), estimate)


def token_number(sequences: Any, wanted: Any) -> dict[str, Tensor]:
    """Stands in for a critic: values that differ from token to token."""
    return {"value": torch.cat([torch.arange(int(mask.sum())) / 10 for mask in wanted])}


# ------------------------------------------------------------------------------------------------------------ bootstrap


def test_a_bootstrapped_policy_is_reproducible_and_reloads(policy: Policy, directory: Path) -> None:
    losses: list[float] = []
    config = configured()
    assert config.policy.kind == "scratch"
    again = bootstrap(config.policy, config.environments, lambda step, total, loss: losses.append(loss))
    assert len(losses) == 60
    assert losses[-1] < 0.7 * losses[0]
    assert not again.model.training
    assert same(weights(again.model), weights(policy.model))
    text = "<think>player at 0 1</think><answer>Left</answer> √"
    assert again.tokenizer(text)["input_ids"] == policy.tokenizer(text)["input_ids"]
    assert policy.tokenizer.decode(policy.tokenizer(text)["input_ids"]) == text
    ids = torch.tensor([policy.tokenizer(text)["input_ids"]])
    assert torch.equal(again.model(input_ids=ids).logits, policy.model(input_ids=ids).logits)


def test_a_policys_rotary_base_is_the_one_that_was_set_also_when_it_was_saved(policy: Policy, tmp_path: Path) -> None:
    slow = supervised(configured({"policy": {"rope_theta": 1e6}}))
    slow.save(tmp_path / "slow")
    for made, base in ((policy, 1e4), (slow, 1e6), (load_policy(str(tmp_path / "slow")), 1e6)):
        pairs = torch.arange(8) / 8  # heads are 16 wide
        torch.testing.assert_close(made.model.model.rotary_emb.inv_freq, base**-pairs)


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
    slices = sample_slices((config, LAKE, directory, [0, 1, 2]), quiet)
    parts = [concatenate([slices[0], slices[1]]), slices[2]]
    table = concatenate([annotate_part((config, directory, part), quiet) for part in parts])
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
        ({"kind": "siblings", "scope": "token"}, {"kind": "actfocus"}),
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
        assert torch.equal(iteration.table[name], column[batch.trainable & counted[batch.trajectory]]), name
    assert iteration.metrics["kept_trajectories"] == iteration.metrics["episodes"] == 8
    assert iteration.metrics["tokens"] == float(batch.trainable.sum()) < float(iteration.episodes.sampled.sum())
    assert sum(value for name, value in iteration.metrics.items() if name.startswith("branches_")) == 4
    assert iteration.metrics["recompute_error"] < 1e-4


def test_a_round_before_there_are_branches_has_one_pass(policy: Policy) -> None:
    """And the log-probabilities of what was sampled before the update agree with the reference policy's in the other."""
    branching = {**TREES["branching"], "signal": "branching_score"}
    config = configured({"methods": {"moved": {"branching": branching, "advantage": {"kind": "prefix_credit"}}}})
    minibatches: list[TokenTable] = []

    def move(learner: Any, optimizer: Any, minibatch: TokenTable, number: int) -> dict[str, float]:
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


# ------------------------------------------------------------------------------------------------------------ an update


@pytest.mark.parametrize("method", ["grpo", "ppo_actfocus", "planned"])
def test_gradient_accumulation_is_exact(policy: Policy, method: str) -> None:
    """With plain SGD at rate 1 the parameters' difference is the gradients'; Adam would hide a factor.

    ``planned``: trajectories leave the mean, and what the others then weigh is of the whole minibatch.
    """
    trained, pieces = {}, {}
    rows = {"planned": {"surrogate": {"kind": "procedure_clip", "dual": 1.1, "half_life": 4.0}}}
    whole = configured({"methods": rows})
    for budget in (64, 1_000_000):
        config = configured({"train": {"tokens_per_forward": budget}, "methods": rows})
        module = PolicyGradient(config, LAKE, method, 0, Policy(copy.deepcopy(policy.model), policy.tokenizer))
        standing(module, torch.optim.SGD(module.parameters(), lr=1.0))
        scored: list[int] = []

        def counted(
            learner: Any,
            piece: TokenTable,
            *rest: Any,
            loss: Callable[..., Any] = Learner.loss,
            scored: list[int] = scored,
        ) -> Any:
            scored.append(len(piece))
            return loss(learner, piece, *rest)

        table = prepared(whole, method, policy, token_number if len(module.heads) else None).table
        table = table.with_columns(logprob_old=table["logprob_old"] + 0.4 * (0.5 - table["noise"]))
        if method == "planned":
            planned = module.learner.planned(table)
            assert {bool(planned.select([e])["plan"].any()) for e in range(len(table))} == {True, False}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Learner, "loss", counted)
            assert updated(module, table)["gradient_norm"] > 0
        trained[budget], pieces[budget] = weights(module), scored
    assert pieces == {64: [1] * 8, 1_000_000: [8]}
    moved = max(
        float((trained[64][n] - w).abs().max())
        for n, w in weights(PolicyGradient(config, LAKE, method, 0, policy)).items()
    )
    assert moved > 1e-3
    for name, value in trained[64].items():
        torch.testing.assert_close(value, trained[1_000_000][name], atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_update_is_skipped_and_counted(policy: Policy, bad: float) -> None:
    module = standing(PolicyGradient(configured(), LAKE, "grpo", 0, policy))
    good = prepared(module.config, "grpo", policy).table
    spoilt = good.with_columns(advantage=torch.where(good.trajectory == 0, bad, good["advantage"]))
    before, first = weights(module.model), updated(module, spoilt)
    assert same(weights(module.model), before)
    assert first == {"non_finite_losses": 1.0, "skipped_steps": 0.0}
    both = averages([first, updated(module, good)])
    after = weights(module.model)
    assert not same(after, before)
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert both["non_finite_losses"] == 1.0
    assert np.isfinite(list(both.values())).all()


def critic_config(**settings: Any) -> Config:
    return configured({"methods": {"ppo": {"advantage": {"critic": {"learning_rate": 0.01, **settings}}}}})


@pytest.mark.parametrize("kind", ["trunk", "model"])
def test_a_critic_learns_its_targets(policy: Policy, kind: str) -> None:
    config = critic_config(kind=kind)
    module = standing(PolicyGradient(config, LAKE, "ppo", 0, policy))
    assert (module.heads[0].trunk is not None) == (kind == "model")
    table = prepared(config, "ppo", policy, token_number).table
    table = table.with_columns(value_target=(table["role"] == Role.ACTION).float())
    losses = [updated(module, table)["value_loss"] for _ in range(30)]
    assert losses[-1] < 0.4 * losses[0]  # whether an answer will be closed, and so be an action, cannot all be known


@pytest.mark.parametrize("kind", ["trunk", "model"])
def test_while_the_critic_warms_up_the_policy_stands_still(policy: Policy, kind: str) -> None:
    module = standing(PolicyGradient(critic_config(kind=kind, warmup_iterations=2), LAKE, "ppo", 0, policy))
    table = prepared(module.config, "ppo", policy, token_number).table
    before, critic = weights(module.model), weights(module.heads)
    for iteration in (0, 1):  # the head starts at zero: no gradient would reach a shared trunk before the second
        updated(module, table, iteration)
    assert same(weights(module.model), before)
    assert not same(weights(module.heads), critic)
    updated(module, table, 2)
    assert not same(weights(module.model), before)


# ------------------------------------------------------------------------------------------------------------- training


def test_two_equal_trainings_are_equal_and_the_reference_stays_frozen(policy: Policy) -> None:
    before = weights(policy.model)
    runs = []
    for _ in range(2):
        own = Policy(copy.deepcopy(policy.model), policy.tokenizer)
        module = fit(PolicyGradient(configured(), LAKE, "ppo_actfocus", 0, own), 2)
        assert same(weights(module.learner.reference.model), before)
        runs.append((weights(module.model), module.curve))
    assert same(runs[0][0], runs[1][0])
    assert not same(runs[0][0], before)
    assert runs[0][1] == runs[1][1]
    assert [row["iteration"] for row in runs[0][1]] == [0, 1]
    assert runs[0][1][0]["recompute_error"] < 1e-4
    assert [row["updates"] for row in runs[0][1]] == [4, 4]


def test_the_kl_of_an_iteration_is_that_of_its_last_minibatch_after_all_of_its_updates(policy: Policy) -> None:
    module = PolicyGradient(configured({"methods": {"grpo": {"learning_rate": 1e-3}}}), LAKE, "grpo", 0, policy)
    iteration = unmoved(module)
    last = iteration.table.select(iteration.minibatches[-1])
    row = fit(module, 1).curve[0]
    assert row["updates"] == len(iteration.minibatches) == 4
    now = []
    for e in range(len(last)):
        ids, trainable = (last.select([e]).columns[name] for name in ("ids", "trainable"))
        rows = torch.log_softmax(policy.model(input_ids=ids[None]).logits[0, :-1], -1)
        now.append(rows[torch.arange(len(ids) - 1), ids[1:]][trainable[1:]].detach())
    shift = torch.cat(now) - last["logprob_old"]
    action = last["role"] == Role.ACTION
    assert row["kl_iteration_action"] == pytest.approx(float((shift.exp() - 1 - shift)[action].mean()), rel=1e-3)
    assert row["kl_iteration_action"] > 1e-6


def letter_config(changes: dict[str, Any] | None = None, **settings: Any) -> Config:
    phases = [{"steps": 150, "reasoning_words": [0, 1], "action_noise": 0.0}]
    toy = {
        "environments": {LAKE: None, "letter": {**LETTER, "settings": settings}},
        "policy": {"demonstrations": {"phases": phases}},
        "rollout": {"groups": 4, "group_size": 8},
        "train": {"minibatch": 16, "iterations": 10},
        "methods": {"grpo": {"learning_rate": 3e-3}},
    }
    return configured(overlay(toy, changes or {}))


def test_grpo_learns_which_letter_is_rewarded() -> None:
    config = letter_config()
    module = fit(PolicyGradient(config, "letter", "grpo", 0, supervised(config)), 10)
    first, last = module.curve[0], module.curve[-1]
    assert first["valid_action_rate"] > 0.9
    assert 0.25 < first["success"] < 0.75
    assert last["success"] > 0.9
    played = evaluate(module.engine, module.policy.tokenizer, config, "letter", 0, 1.0)
    assert np.mean(played.episodes["success"]) > 0.9
    assert {split_of(key) for key in played.episodes["state_key"]} == {"test"}


def test_an_iteration_without_a_group_to_learn_from_is_survived() -> None:
    """Nobody is ever rewarded, every group's returns are equal, and the filter keeps none."""
    config = letter_config({"methods": {"grpo": {"filter": {"kind": "reward_variance"}}}}, rewarded="C")
    policy = supervised(config)
    before = weights(policy.model)
    module = fit(PolicyGradient(config, "letter", "grpo", 0, policy), 2)
    assert same(weights(module.model), before)
    for row in module.curve:
        assert (row["kept_trajectories"], row["updates"], row["episodes"], row["zero_variance_groups"]) == (0, 0, 32, 4)
    assert len(module.curve) == 2


# -------------------------------------------------------------------------------------------------- pretrained policies

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pretrained(kind: str, directory: Path) -> None:
    """A small model with random weights and a tokenizer that knows no tags, as if downloaded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_end|>", "<|im_start|>"] if kind == "qwen2" else ["</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["player 0 1 goal 3 3 holes 1 2", "Left Right Up Down"] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], chat_template=CHAT if kind == "qwen2" else None
    )
    torch.manual_seed(3)
    shape: dict[str, Any] = {
        "vocab_size": len(fast),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": fast.eos_token_id,
    }
    model: Any
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **shape))
    Policy(model, fast).save(directory)


@pytest.mark.parametrize(("kind", "prefill"), [("qwen2", "<think>"), ("llama", "")])
def test_a_pretrained_policy_goes_all_the_way(kind: str, prefill: str, tmp_path: Path) -> None:
    pretrained(kind, tmp_path / "model")
    environment = {"layout": "published", "max_turns": 2, "context_tokens": 1500, "actions_per_turn": 2}
    config = configured(
        {
            "policy": {"kind": "pretrained", "model": str(tmp_path / "model")},
            "environments": {LAKE: environment},
            "rollout": {"prefill": prefill, "temperature": 0.8},
        }
    )
    assert config.policy.kind == "pretrained"
    policy = load_policy(config.policy.model, dtype=config.policy.dtype)
    assert len(policy.tokenizer("<think>", add_special_tokens=False)["input_ids"]) > 1
    specs = iteration_specs(config, LAKE, 0, 0)
    sampled = collect(TransformersEngine(policy), policy.tokenizer, config, LAKE, specs, 0.8)
    annotated = annotate(sampled, policy, 0.8, 4096)
    assert annotated.ref_logprob is not None
    np.testing.assert_allclose(annotated.ref_logprob, annotated.logprob, atol=1e-4)
    forced = ~annotated.sampled & np.isin(annotated.role, RESPONSE_ROLES)
    assert bool(forced.any()) == bool(prefill)

    before = weights(policy.model)
    module = fit(PolicyGradient(config, LAKE, "ppo_actfocus", 0, policy, annotated), 1)
    assert module.curve[0]["recompute_error"] < 1e-4
    assert module.curve[0]["non_finite_losses"] == 0
    assert not same(weights(policy.model), before)

    policy.save(tmp_path / "trained")
    trained = load_trained(tmp_path / "trained", config)
    assert same(weights(trained.model), weights(policy.model))
    played = evaluate(TransformersEngine(trained), trained.tokenizer, config, LAKE, 0, 0.5)
    results = episode_results(played, environment=LAKE, method="ppo_actfocus", seed=0, temperature=0.5)
    assert len(results) == 4
    assert results["rollout"].to_pylist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "slots",
    [
        {"regulariser": {"kind": "entropy_target", "entropy": 0.01, "target": 1.5, "rate": 0.1}},
        {"regulariser": {"kind": "entropy_band", "entropy": 0.01, "penalty": 0.1, "low": 0.99, "high": 1.01}},
        {"advantage": {"kind": "entropy_gae", "budget": 1.5}},
        {"advantage": {"kind": "soft_q", "q": {"polyak": 0.5}}, "surrogate": {"kind": "soft_q"}},
    ],
    ids=lambda slots: next(iter(slots.values()))["kind"],
)
def test_what_a_method_remembers_survives_a_checkpoint(slots: dict[str, Any], policy: Policy, tmp_path: Path) -> None:
    """Adaptive slots and target networks: stopped after two iterations of four and gone on with, nothing differs."""
    config = configured({"methods": {"adaptive": slots}, "train": {"iterations": 4}})

    def trained(iterations: int, checkpoint: Path | None = None) -> tuple[lightning.Trainer, PolicyGradient]:
        own = Policy(copy.deepcopy(policy.model), policy.tokenizer)
        module = PolicyGradient(config, LAKE, "adaptive", 0, own)
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=iterations,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
        return trainer, module

    trainer, stopped = trained(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, straight = trained(4, tmp_path / "half.ckpt")[1], trained(4)[1]
    assert same(weights(resumed), weights(straight))
    assert not same(weights(stopped), weights(straight))
    assert resumed.memory == straight.memory
    assert resumed.curve == straight.curve
