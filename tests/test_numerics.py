"""Precision, numbers that are not finite, and an engine that is not the policy: what a training notices, and when."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.commands.cli import run
from pipeline.energy.annotate import annotate
from pipeline.evaluation import evaluate as evaluation
from pipeline.model.loading import load_policy
from pipeline.model.policy import Policy
from pipeline.rollout.collector import collect
from pipeline.rollout.specs import iteration_specs
from pipeline.rollout.transformers_engine import TransformersEngine, sample
from pipeline.training.checks import recomputed
from pipeline.training.collection import Collection
from pipeline.training.iteration import Iteration, run_iteration
from pipeline.training.module import PolicyGradient
from pipeline.training.run import TrainingJob, train_one, train_until
from pipeline.training.seed_key import training_task
from pipeline.training.tokens import TokenTable
from pipeline.training.update import Learner
from pipeline.workspace import files
from pipeline.workspace.errors import UserError
from pipeline.workspace.finite import NumericsError
from pipeline.workspace.randomness import generator
from tests.trainings import LAKE, configured, fit, left, quiet, same, standing, supervised, unmoved, updated, weights

PRECISIONS = ("float32", "bfloat16")
ROWS: dict[str, Any] = {
    "critic": {"advantage": {"kind": "gae", "critic": {"kind": "model"}}},
    "soft": {"advantage": {"kind": "soft_q", "q": {"kind": "model"}}, "surrogate": {"kind": "soft_q"}},
}


def at_rate(rate: float, **changes: Any) -> Any:
    return configured({"method_defaults": {"learning_rate": rate}, "methods": ROWS, **changes})


def slowed(config: Any, method: str, rate: float, section: str | None = None) -> Any:
    """With a learning rate, of the method or of a head, that params.yaml may not have: some models have larger weights."""
    row = config.methods[method]
    if section is None:
        row = row.model_copy(update={"learning_rate": rate})
    else:
        head = getattr(row.advantage, section).model_copy(update={"learning_rate": rate})
        row = row.model_copy(update={"advantage": row.advantage.model_copy(update={section: head})})
    return config.model_copy(update={"methods": {**config.methods, method: row}})


def begun(directory: Path, rate: float, dtype: str = "float32", method: str = "grpo") -> PolicyGradient:
    """A training that stands before its first update."""
    config = at_rate(rate)
    return standing(PolicyGradient(config, LAKE, method, 0, load_policy(directory, dtype=dtype)))


def table(module: PolicyGradient) -> TokenTable:
    return unmoved(module).table


def flat(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().float().flatten() for p in module.parameters()])


# -------------------------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_policy_goes_as_far_in_low_precision_as_in_float32(directory: Path, dtype: str) -> None:
    """Steps below the rounding of most weights, the same way each time: they must add up."""
    moved = {}
    for kind in ("float32", dtype):
        module = begun(directory, 2e-4, kind)
        before, own = flat(module.model), table(begun(directory, 2e-4))
        for _ in range(12):
            updated(module, own)
        moved[kind] = flat(module.model) - before
    share = float(moved[dtype] @ moved["float32"] / moved["float32"].square().sum())
    assert 0.9 < share < 1.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_target_network_follows_in_low_precision(directory: Path, dtype: str) -> None:
    """By half a percent of the distance at a time."""
    followed = {}
    for kind in ("float32", dtype):
        head: Any = begun(directory, 1e-4, kind, "soft").heads[0]
        start = flat(head.target_trunk)
        with torch.no_grad():
            for number, parameter in enumerate(head.trunk.parameters()):
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        for _ in range(20):
            head.after_step()
        followed[kind] = flat(head.target_trunk) - start
    share = float(followed[dtype] @ followed["float32"] / followed["float32"].square().sum())
    assert 0.9 < share < 1.1


def test_small_steps_move_the_weights_of_a_bfloat16_policy(directory: Path) -> None:
    """At a rate at which bfloat16 would round nearly all of them away."""
    module = begun(directory, 1e-6, "bfloat16")
    before, own = flat(module.model), table(module)
    first = updated(module, own)
    later = [updated(module, own) for _ in range(11)]
    assert float((flat(module.model) != before).double().mean()) > 0.99
    assert first["weights_moved"] > 0.99
    assert not any("weights_moved" in row for row in later)


def test_weights_that_steps_do_not_move_are_refused_with_their_share(directory: Path) -> None:
    """As if what is trained had been left in bfloat16."""
    module = begun(directory, 1e-6, "bfloat16")
    own = table(module)
    module.model.bfloat16()
    with pytest.raises(UserError, match=r"learning_rate: a step of 1e-06 moves 0\.\d+ % of the weights") as raised:
        updated(module, own)
    assert "to bfloat16; allowed: " in str(raised.value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_trained_weights_are_float32_and_reference_and_sampler_are_not(directory: Path, dtype: str) -> None:
    module = fit(training_at(directory, dtype, 1e-3, "soft"), 2)
    low = getattr(torch, dtype)
    assert {value.dtype for value in module.state_dict().values()} == {torch.float32}
    reference = module.learner.reference.model
    assert {p.dtype for policy in (reference, module.sampled.model) for p in policy.parameters()} == {low}
    assert same(weights(reference), weights(load_policy(directory, dtype=dtype).model))
    rounded = {name: value.to(low) for name, value in weights(module.model).items()}
    assert same(weights(module.result().model), rounded)
    assert not same(rounded, weights(reference))


def test_ratios_begin_at_one_whatever_the_sampler_computes_in(directory: Path) -> None:
    module = training_at(directory, "bfloat16")
    done = unmoved(standing(module))
    own = done.table
    scored = module.collection.now(done.episodes)[0][own["place"].numpy()]
    np.testing.assert_allclose(own["logprob_old"].numpy(), scored, atol=1e-5)
    difference = np.abs(done.episodes.logprob[own["place"].numpy()] - scored)
    assert difference.mean() > 1e-4
    assert done.metrics["sampler_difference"] == pytest.approx(difference.mean(), abs=1e-5)
    assert done.metrics["sampler_difference_largest"] == pytest.approx(difference.max(), abs=1e-5)
    assert "sampler_difference" not in unmoved(standing(training_at(directory, "float32"))).metrics


def test_losses_in_bfloat16_are_those_of_float32(directory: Path) -> None:
    """Over 20 iterations at the smoke preset's sizes, each trained on the same episodes."""
    rows, collected = dict[str, list[dict[str, float]]](), list[Any]()
    for dtype in PRECISIONS:
        module = standing(training_at(directory, dtype, 1e-4))
        for number in range(20):
            if dtype == "float32":
                collected.append([*module.collection.collect(number)])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Collection, "collect", lambda _, number: collected[number])
                patch.setattr("pipeline.training.iteration._sampling_error", lambda *_: 0.0)
                done = run_iteration(module.collection, module.learner, module.optimizers(), {}, module.curve)
            module.curve.append({**done.metrics})
        rows[dtype] = module.curve
    for name in ("loss", "policy_entropy"):
        exact, found = (np.array([row[name] for row in rows[dtype]]) for dtype in PRECISIONS)
        assert 0 < np.abs(found - exact).sum() < 0.01 * np.abs(exact).sum()


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_steps_that_vanish_are_refused_after_the_first_update(directory: Path, dtype: str) -> None:
    module = PolicyGradient(slowed(at_rate(1e-4), "grpo", 1e-12), LAKE, "grpo", 0, load_policy(directory, dtype=dtype))
    with pytest.raises(
        UserError, match=re.escape("params.yaml: methods.grpo.learning_rate: a step of 1e-12")
    ) as raised:
        fit(module, 1)
    assert "allowed: " in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(module.curve) == 0


@pytest.mark.parametrize(("method", "section"), [("critic", "critic"), ("soft", "q")])
def test_vanishing_steps_of_a_head_are_refused_by_its_key(directory: Path, method: str, section: str) -> None:
    """From the first that moves anything: heads begin at 0, and nothing reaches their trunk before they have moved."""
    config = slowed(at_rate(1e-4), method, 1e-12, section)
    module = standing(PolicyGradient(config, LAKE, method, 0, load_policy(directory)))
    own = table(module)
    updated(module, own)
    torch.nn.init.ones_(module.heads[0].head.weight)  # type: ignore[union-attr, arg-type]
    with pytest.raises(UserError, match=re.escape(f"methods.{method}.advantage.{section}.learning_rate: ")):
        updated(module, own)


def test_the_smallest_rate_that_is_called_allowed_is_allowed(directory: Path) -> None:
    def trained_at(rate: float) -> None:
        fit(PolicyGradient(slowed(at_rate(1e-4), "grpo", rate), LAKE, "grpo", 0, load_policy(directory)), 1)

    with pytest.raises(UserError) as raised:
        trained_at(1e-12)
    trained_at(float(str(raised.value).split()[-3]))


def test_a_step_without_a_gradient_is_no_vanished_one(directory: Path) -> None:
    """Equal returns and no other term, parameters that nothing reaches; the first step that counts is watched then."""
    config = configured({"method_defaults": {"regulariser": {"entropy": 0.0, "kl": 0.0}}})
    module = standing(PolicyGradient(slowed(config, "grpo", 1e-12), LAKE, "grpo", 0, load_policy(directory)))
    own = table(module)
    updated(module, own.with_columns(advantage=torch.zeros_like(own["advantage"])))
    with pytest.raises(UserError, match=r"methods\.grpo\.learning_rate"):
        updated(module, own.with_columns(advantage=torch.linspace(-1, 1, len(own["advantage"]))))


# ------------------------------------------------------------------------------------------------------------ not finite


def job(directory: Path, cache: Path, method: str = "critic", dtype: str = "float32") -> TrainingJob:
    policy = {"kind": "pretrained", "model": str(directory), "dtype": dtype}
    config = at_rate(1e-4, train={"iterations": 3}, policy=policy)
    return TrainingJob(training_task(config, LAKE, method, 0, directory, cache), None, None)


Fault = Callable[[Learner, torch.optim.Optimizer], None]


@torch.no_grad()
def spoil_weight(learner: Learner, optimizer: torch.optim.Optimizer) -> None:
    learner.policy.model.model.layers[0].mlp.up_proj.weight[3, 5] = torch.nan


@torch.no_grad()
def spoil_head(learner: Learner, optimizer: torch.optim.Optimizer) -> None:
    learner.heads[0].head.bias[0] = -torch.inf


@torch.no_grad()
def spoil_state(learner: Learner, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[learner.heads[0].head.weight]["exp_avg_sq"][0, 0] = torch.inf


@pytest.mark.parametrize(
    ("fault", "dtype", "named"),
    [
        (spoil_weight, "bfloat16", "model.model.layers.0.mlp.up_proj.weight is nan"),
        (spoil_head, "float32", "heads.0.head.bias is -inf"),
        (spoil_state, "bfloat16", "the optimizer's exp_avg_sq of heads.0.head.weight is inf"),
    ],
    ids=["weight", "head", "state"],
)
def test_a_training_stops_in_the_iteration_in_which_a_number_is_not_finite_and_goes_on_from_the_last_good_one(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, dtype: str, named: str
) -> None:
    """Which is that of before, also below float32: it ends in the bytes of one that nothing has happened to."""
    spoilt = job(directory, tmp_path / "spoilt", dtype=dtype)

    def spoiling(collection: Any, learner: Learner, optimizer: Any, memory: Any, curve: Any) -> Iteration:
        done = run_iteration(collection, learner, optimizer, memory, curve)
        if len(curve) == 1:
            fault(learner, optimizer.optimizer)
        return done

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.module.run_iteration", spoiling)
        for _ in range(2):
            with pytest.raises(NumericsError) as raised:
                train_one(spoilt, quiet)
            assert str(raised.value) == f"frozen_lake-critic, seed 0: iteration 1: {named}"
    checkpoint = torch.load(spoilt.task.cache / "checkpoint.ckpt", weights_only=True)
    assert [row["iteration"] for row in checkpoint["curve"]] == [0]
    assert all(bool(value.isfinite().all()) for value in checkpoint["state_dict"].values())
    good = job(directory, tmp_path / "good", dtype=dtype)
    assert left(train_one(spoilt, quiet)) == left(train_one(good, quiet))


def test_a_metric_that_is_not_finite_ends_a_training(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training.iteration.UpdateKL.after_update", lambda *_: {"distance": float("nan")})
    with pytest.raises(NumericsError, match="iteration 0: distance is nan"):
        train_until(job(directory, tmp_path, "grpo"), 1, quiet)


def test_float16_trains_with_finite_numbers(directory: Path) -> None:
    """Adam's small denominator is 0 in float16."""
    module = fit(PolicyGradient(at_rate(1e-3), LAKE, "critic", 0, load_policy(directory, dtype="float16")), 4)
    assert all(bool(value.isfinite().all()) for value in weights(module).values())
    assert len(module.curve) == 4


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(("bad", "many"), [("nan", 1), ("nan", 7), ("inf", 1), ("-inf", 7)])
def test_nothing_is_sampled_from_logits_that_are_no_numbers(bad: str, many: int, dtype: str) -> None:
    logits = torch.linspace(0, 1, 21).reshape(3, 7).to(getattr(torch, dtype))
    logits[1, :many] = float(bad)
    with pytest.raises(NumericsError, match="logit"):
        sample(logits, 0.7, torch.full((3,), 0.5, dtype=torch.float64))


def test_a_reference_policy_that_gives_no_numbers_annotates_nothing(policy: Policy) -> None:
    config = configured()
    played = collect(
        TransformersEngine(policy), policy.tokenizer, config, LAKE, iteration_specs(config, LAKE, 0, 0), 1.0
    )
    with torch.no_grad():
        policy.model.model.norm.weight[0] = torch.nan
    with pytest.raises(NumericsError, match="is nan"):
        annotate(played, policy, 1.0, 4096)


def test_a_reference_policy_is_not_made_of_what_diverges() -> None:
    phases = [{"steps": 60, "reasoning_words": [0, 2], "action_noise": 0.2}]
    config = configured({"policy": {"demonstrations": {"phases": phases}}})
    beyond = config.policy.demonstrations.model_copy(update={"learning_rate": 1e30})  # more than params.yaml may say
    section = config.policy.model_copy(update={"demonstrations": beyond})
    with pytest.raises(NumericsError, match=r"policy\.demonstrations: the loss of step \d+ is (nan|inf)"):
        supervised(config.model_copy(update={"policy": section}))


def test_an_evaluation_names_the_policy_that_gives_no_numbers(
    directory: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.nn.init.constant_(policy.model.model.norm.weight, torch.nan)
    monkeypatch.setattr(evaluation, "load_trained", lambda *_: policy)
    with pytest.raises(NumericsError, match=r"policy: the policy's largest logit is nan"):
        evaluation.evaluate_policy(evaluation.EvaluationTask(configured(), LAKE, "grpo", 0, directory, 0.5), quiet)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float64("-inf")])
def test_json_with_a_number_that_is_none_is_refused_by_its_key_and_leaves_the_old(value: float, tmp_path: Path) -> None:
    files.write_json(tmp_path / "x.json", {"rows": [1.0]})
    with pytest.raises(NumericsError, match=r"x\.json: rows: 1: loss is"):
        files.write_json(tmp_path / "x.json", {"rows": [{"loss": 1.0}, {"loss": value}]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"rows": [1.0]}


def test_a_stage_says_it_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> str:
        raise NumericsError("frozen_lake-grpo, seed 0: iteration 3: a weight is nan")

    monkeypatch.setattr(sys, "argv", ["stage"])
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "frozen_lake-grpo, seed 0: iteration 3: a weight is nan\n"


# ------------------------------------------------------------------------------------------- an engine unlike the policy


def training_at(directory: Path, dtype: str, rate: float = 1e-3, method: str = "grpo") -> PolicyGradient:
    config = at_rate(rate, methods={**ROWS, "grpo": {"learning_rate": rate}})
    return PolicyGradient(config, LAKE, method, 0, load_policy(directory, dtype=dtype))


def forgotten(module: PolicyGradient) -> None:
    """The cache is kept from one iteration to the next."""
    module.engine.sync = lambda *_: None  # type: ignore[method-assign]


def kept(module: PolicyGradient) -> None:
    """The engine says that it has forgotten, and has not."""
    engine, stored = module.engine, ("_stored", "_idle", "_prompt_logits")
    forget = engine.forget

    def pretend() -> None:
        held = {name: getattr(engine, name) for name in stored}
        forget()
        for name, value in held.items():
            setattr(engine, name, value)

    engine.forget = pretend  # type: ignore[method-assign]


def warmer(module: PolicyGradient) -> None:
    """It samples at another temperature, from the second iteration on."""
    engine = module.engine
    generate = engine.generate

    def generate_warm(requests: Any, sampling: Any, follow: Any = None) -> Any:
        factor = 0.9 if module.current_epoch else 1.0
        return generate(requests, replace(sampling, temperature=sampling.temperature * factor), follow)

    engine.generate = generate_warm  # type: ignore[method-assign]


def left_behind(module: PolicyGradient) -> None:
    """Updates do not reach the head that the engine samples with."""
    policy = Policy(copy.copy(module.policy.model), module.policy.tokenizer)
    own = copy.deepcopy(module.policy.head)
    policy.model.get_output_embeddings = lambda: own
    module.engine.policy = policy


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(
    ("fault", "rate"),
    [(forgotten, 1e-6), (kept, 3e-2), (warmer, 1e-4), (left_behind, 1e-2)],
    ids=["forgotten", "kept", "warmer", "left behind"],
)
def test_an_engine_that_is_not_the_policy_is_noticed_after_the_first_update(
    directory: Path, dtype: str, fault: Callable[[PolicyGradient], None], rate: float
) -> None:
    module = training_at(directory, dtype, rate)
    fault(module)
    with pytest.raises(NumericsError, match=r"^iteration 1: "):
        fit(module, 2)
    assert len(module.curve) == 1


@pytest.mark.parametrize("dtype", [*PRECISIONS, "float16"])
def test_rounding_is_no_fault(directory: Path, dtype: str) -> None:
    """Not in any of some iterations at a rate that changes the policy."""
    module = fit(training_at(directory, dtype, 1e-3), 4)
    assert all(0 < row["sampling_error"] < 0.03 for row in module.curve)


def test_the_check_looks_at_the_longest_episode_and_at_drawn_ones(policy: Policy) -> None:
    config = configured({"rollout": {"groups": 8, "group_size": 16}, "bottleneck": {"groups": 8}})
    specs = iteration_specs(config, LAKE, 0, 0)
    played = collect(TransformersEngine(policy), policy.tokenizer, config, LAKE, specs, 1.0)
    seen: list[str] = []

    def score(some: Any, temperature: float) -> list[np.ndarray]:
        seen.extend(some.episodes["episode_id"])
        return [some.logprob, some.entropy]

    for number in range(4):
        assert recomputed(played, score, generator(0, "recomputed", number)) == (0.0, 0.0)
    longest = played.episodes["episode_id"][int(played.lengths.argmax())]
    assert seen.count(longest) == 4
    assert len(seen) <= 4 * 3
    assert len(set(seen)) > 4
    recomputed(played, score, generator(0, "recomputed", 0), everything=True)
    assert set(seen) == set(played.episodes["episode_id"])
