"""Real trainings as trials: in rungs, stopped together, killed and gone on with."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.exceptions import TrialPruned
from optuna.trial import TrialState

from pipeline.settings.params import parse
from pipeline.sweep.plan import SearchPlan, plans
from pipeline.sweep.trial import Outcome, TrainingObjective, success, violations
from pipeline.training.run import TrainingJob, train_one
from pipeline.training.seed_key import training_task
from pipeline.workspace.layout import Cache
from pipeline.workspace.yaml_files import read_yaml
from tests.searches import SMOKE, awaited, begin, kill_all, params, run, trials_asked_for, trials_of
from tests.trainings import quiet, supervised

pytestmark = [pytest.mark.dag, pytest.mark.xdist_group("sweep")]
ITERATIONS = 4


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke preset's reference policy."""
    folder = tmp_path_factory.mktemp("models")
    config = parse(read_yaml(params(folder, read_yaml(SMOKE))))
    supervised(config).save(folder / "policy")
    return folder / "policy"


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SWEEP_STORAGE", raising=False)


def plan_of(folder: Path, policy: Path, tokens: int | None = None, **sweep: Any) -> SearchPlan:
    train = {"iterations": ITERATIONS, "tokens": tokens, "validate_every": 2}
    changes = {"train": train, "sweep": {"seeds": [100, 101], **sweep}}
    return plans(params(folder, read_yaml(SMOKE), changes), "actfocus", policy)[0]


def ran(plan: SearchPlan, trial: optuna.Trial, values: Any, report: Any = quiet) -> Outcome:
    return TrainingObjective(plan)(trial, values, report)


def results(cache: Path) -> dict[str, str]:
    """Hashes of what trainings left, by key and name, but for times."""
    return {
        path.relative_to(cache).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(cache.glob("train/*/result/**/*"))
        if path.is_file() and path.name not in ("timings.json", "runs.json")
    }


def begun(cache: Path) -> dict[str, list[str]]:
    """Iterations that each training has begun, by its key."""
    return {path.parent.name: path.read_text().split() for path in cache.glob("train/*/begun.log")}


def test_a_trial_in_rungs_ends_in_the_bytes_of_one_without_and_of_a_plain_training(
    tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress: list[tuple[int, int]] = []
    left = {}
    for name, pruner in (("rungs", {"kind": "median", "after_trials": 100}), ("whole", {"kind": "none"})):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        plan = plan_of(tmp_path / name, policy, pruner=pruner)
        trial = optuna.create_study(direction="maximize").ask()
        outcome = ran(plan, trial, plan.baselines["paper"], lambda done, total, text="": progress.append((done, total)))
        left[name] = results(Cache().sweep)
        assert {len(curve) for curve in outcome.curves.values()} == {ITERATIONS}
        assert outcome.values == (success(outcome.curves, "final"),)
        assert outcome.violations == violations(outcome.curves, plan.config.sweep.constraints)
        steps = trial.study.trials[0].intermediate_values
        assert list(steps) == ([2, 4] if name == "rungs" else [4])
        assert steps[4] == outcome.values[0]
        assert not Path(".cache/train").exists(), "the comparison's own cache was used"
    assert progress == 2 * [(done, 2 * ITERATIONS) for done in range(1, 2 * ITERATIONS + 1)]
    assert left["rungs"] == left["whole"]
    assert sorted({Path(name).name for name in left["rungs"]}) == ["curves.json", "episodes.parquet"]

    config = plan.configured(plan.baselines["paper"])
    for seed in config.sweep.seeds:
        task = training_task(config, plan.environment, plan.method, seed, policy, tmp_path / "plain")
        train_one(TrainingJob(task, None, None), quiet)
    plain = results(tmp_path / "plain")
    assert {name: digest for name, digest in plain.items() if "/policy/" not in name} == left["whole"]


def test_seeds_of_a_trial_with_a_budget_of_tokens_end_where_theirs_are_spent(
    tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plan_of(tmp_path, policy, pruner={"kind": "none"})
    curves = ran(whole, optuna.create_study().ask(), whole.baselines["paper"]).curves
    spent = [sum(row["tokens"] for row in curve[:2]) for curve in curves.values()]
    (tmp_path / "budget").mkdir()
    monkeypatch.chdir(tmp_path / "budget")
    plan = plan_of(tmp_path / "budget", policy, round(sum(spent) / 2), pruner={"kind": "none"})
    told: list[tuple[int, int]] = []
    trial = optuna.create_study(direction="maximize").ask()
    outcome = ran(plan, trial, plan.baselines["paper"], lambda done, total, text="": told.append((done, total)))
    lengths = [len(curve) for curve in outcome.curves.values()]
    assert max(lengths) < ITERATIONS
    assert told[-1] == (sum(row["tokens"] for c in outcome.curves.values() for row in c), 2 * plan.config.train.tokens)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert trial.study.trials[0].intermediate_values == {max(lengths): outcome.values[0]}
    assert len(list(Cache().sweep.glob("train/*/result"))) == 2


def test_seeds_of_a_trial_are_stopped_together(tmp_path: Path, policy: Path) -> None:
    plan = plan_of(tmp_path, policy)
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(1, 0))
    better = optuna.trial.create_trial(value=2.0, intermediate_values={2: 2.0, 4: 2.0})
    study.add_trial(better)
    trial = study.ask()
    with pytest.raises(TrialPruned, match="stopped after 2 iterations"):
        ran(plan, trial, plan.baselines["paper"])
    assert list(begun(Cache().sweep).values()) == [["0", "1"]] * 2
    assert list(trial.study.trials[1].intermediate_values) == [2]
    left = {path.name for path in Cache().sweep.glob("train/*/*")}
    assert left.isdisjoint({"result", "checkpoint.ckpt"})


def test_a_trial_whose_training_diverges_is_stopped_and_the_search_goes_on(
    tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, study = plan_of(tmp_path, policy), optuna.create_study(direction="maximize")
    monkeypatch.setattr("pipeline.training.iteration.UpdateKL.after_update", lambda *_: {"distance": float("nan")})
    with pytest.raises(TrialPruned, match="iteration 0: distance is nan"):
        ran(plan, study.ask(), plan.baselines["paper"])
    study.tell(0, None, TrialState.PRUNED)


def test_killed_in_the_middle_a_search_ends_with_its_trials_and_computes_next_to_nothing_twice(
    tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path, policy, trials=5, startup_trials=3, pruner={"kind": "none"})
    objective = TrainingObjective(plan)
    process = begin(plan, objective)

    def in_the_middle() -> bool:
        finished = [path.parent.name for path in Cache().sweep.glob("train/*/result")]
        open_ones = [log for key, log in begun(Cache().sweep).items() if key not in finished]
        return len(finished) >= 4 and any(log and log[-1] == "2" for log in open_ones)

    awaited(in_the_middle, 120)
    kill_all(process)
    running = [t for t in trials_of(plan) if t.state == TrialState.RUNNING]
    assert running
    before = begun(Cache().sweep)
    run(plan, objective, seconds=200)
    trials = trials_asked_for(plan)
    assert {t.number for t in trials if t.state == TrialState.FAIL} == {t.number for t in running}
    logs = begun(Cache().sweep)
    assert len(logs) == 2 * plan.trials
    for key, log in logs.items():
        assert set(log) == {str(i) for i in range(ITERATIONS)}
        assert len(log) <= ITERATIONS + (key in before), "more than one iteration was computed twice"
        assert log[: len(before.get(key, []))] == before.get(key, [])
    assert not list(Cache().sweep.glob("train/*/result/policy"))
    assert not list(Cache().sweep.glob("train/*/checkpoint.ckpt"))

    killed = results(Cache().sweep)
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    again = next(t for t in trials if t.user_attrs.get("retry_of") == running[0].number)
    outcome = ran(plan, optuna.create_study().ask(), again.user_attrs["values"])
    assert results(Cache().sweep).items() <= killed.items()
    assert outcome.values == tuple(again.values)
