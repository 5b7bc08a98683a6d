"""What a finished search leaves: tables, the best, an overlay, figures, and the comparison that confirms it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.exceptions import TrialPruned
from optuna.trial import Trial, TrialState
from ruamel.yaml import YAML

from pipeline.settings.params import parse
from pipeline.settings.presets import overlay
from pipeline.sweep.confirm import confirmation, confirmation_text
from pipeline.sweep.figures import drawings, write_figures
from pipeline.sweep.plan import SearchPlan
from pipeline.sweep.result import SearchResult, best_overlay, importances, report_text, settings, summary, trials_table
from pipeline.sweep.space import current, from_value
from pipeline.sweep.trial import Outcome, run_trial
from pipeline.workspace.errors import UserError
from pipeline.workspace.processes import Tell
from pipeline.workspace.yaml_files import read_yaml
from tests.searches import ALPHA, BETA, ROOT, TAU, searches


@dataclass(frozen=True)
class Row:
    """A trial made by hand: its point, what it reached, and how it ended."""

    point: tuple[float, ...]
    success: float
    kl: float = -0.1
    tokens: float | None = None
    pruned: bool = False
    baseline: str | None = None
    alarm: float | None = None


def found(plan: SearchPlan, rows: Sequence[Row]) -> SearchResult:
    """A search with these trials, after one whose worker was killed while it began."""
    two = plan.config.sweep.fewer_tokens
    study = optuna.create_study(directions=["maximize", "minimize"] if two else ["maximize"])
    study.enqueue_trial({}, user_attrs={"slot": 0, "failure": "its worker was killed"})
    study.tell(study.ask(), state=TrialState.FAIL)
    for slot, row in enumerate(rows):
        spaces = plan.search.space
        point = {key: from_value(spaces[key], value) for key, value in zip(spaces, row.point, strict=True)}
        named = {} if row.baseline is None else {"baseline": row.baseline}
        study.enqueue_trial(point, user_attrs={"slot": slot, **({"retry_of": 0} if slot == 0 else {}), **named})
        trial = study.ask()
        state = TrialState.PRUNED if row.pruned else TrialState.COMPLETE
        outcome = None
        with contextlib.suppress(TrialPruned):
            outcome = run_trial(trial, plan, ending(row), lambda done, total, text="": None)
        study.tell(trial, None if outcome is None else outcome.values, state)
    return SearchResult(plan, study.trials)


def ending(row: Row) -> Any:
    def objective(trial: Trial, values: Any, report: Tell) -> Outcome:
        if row.tokens is None:
            trial.report(row.success, 10)
        if row.pruned:
            raise TrialPruned
        curves = {} if row.alarm is None else {100: [{"success": 0.5}, {"success": 0.1, "alarm_kl": row.alarm}]}
        return Outcome((row.success, *(() if row.tokens is None else (row.tokens,))), {"kl": row.kl}, curves)

    return objective


ROWS = [
    Row((1.0, 0.0, 1.0), 0.50, baseline="uniform"),
    Row((0.1, 0.5, 1.0), 0.55, baseline="paper"),
    Row((0.000123457, 1.25, 0.2), 0.61),
    Row((0.3, 1.9, 5.0), 0.20, pruned=True),
    Row((0.02, 0.7, 2.0), 0.90, kl=0.01),
    Row((0.05, 1.1, 3.0), 0.61, kl=0.0),
]
BEST = {ALPHA: 0.000123457, BETA: 1.25, TAU: 0.2}


@pytest.fixture
def plan(tmp_path: Path) -> SearchPlan:
    return searches(tmp_path)[0]


# ---------------------------------------------------------------------------------------------------------- plain results


def test_the_best_is_the_earliest_of_equals_among_those_that_keep_the_constraints(plan: SearchPlan) -> None:
    outcome = summary(found(plan, ROWS))
    assert outcome["best"] == {"number": 3, "score": 0.61, "settings": BEST}
    assert outcome["trials"] == {"FAIL": 1, "COMPLETE": 5, "PRUNED": 1}
    assert outcome["infeasible"] == 1
    assert {name: (p["number"], p["score"], p["settings"]) for name, p in outcome["baselines"].items()} == {
        "uniform": (1, 0.5, {ALPHA: 1.0, BETA: 0.0, TAU: 1.0}),
        "paper": (2, 0.55, {ALPHA: 0.1, BETA: 0.5, TAU: 1.0}),
    }
    assert outcome["episodes"] == plan.config.train.iterations * 8 * 16
    assert json.loads(json.dumps(outcome)) == outcome


def test_a_budget_of_tokens_is_told_instead_of_episodes(tmp_path: Path) -> None:
    search = found(searches(tmp_path, "actfocus", {"train": {"tokens": 50000}}, pruner={"kind": "none"})[0], ROWS)
    outcome = summary(search)
    assert (outcome["tokens"], "episodes" in outcome) == (50000, False)
    assert "complete trials of 2 seeds, 50000 tokens a seed; success" in drawings(search)[0].caption


def test_the_table_has_a_row_per_trial(plan: SearchPlan) -> None:
    table = trials_table([found(plan, ROWS)]).set_index("number")
    assert list(table["state"]) == ["FAIL", *["COMPLETE"] * 3, "PRUNED", "COMPLETE", "COMPLETE"]
    assert table.loc[0, "failure"] == "its worker was killed"
    assert table.loc[1, "retry_of"] == 0
    assert (table.loc[1, "baseline"], table.loc[2, "baseline"]) == ("uniform", "paper")
    assert (table.loc[4, "score"], table.loc[4, "iterations"]) == (0.2, 10)
    assert table["feasible"].tolist() == [None, True, True, True, None, False, True]
    assert table.loc[5, "exceeds_kl"] == 0.01
    assert table.loc[3, [ALPHA, BETA, TAU]].to_dict() == BEST
    assert table["score"].isna().tolist() == [True, *[False] * 6]


def test_without_a_trial_that_keeps_the_constraints_there_is_no_best(plan: SearchPlan) -> None:
    search = found(plan, [replace(row, kl=0.2) for row in ROWS])
    assert summary(search)["best"] is None
    assert "no trial kept all constraints" in report_text([search])
    assert "methods" not in YAML(typ="safe").load(best_overlay([search]))
    with pytest.raises(UserError, match="no trial of grpo_actfocus kept all constraints, nothing to confirm"):
        confirmation([plan], [summary(search)], "out", ".")


def test_what_the_best_and_the_baselines_have_alarmed_of_is_said(plan: SearchPlan) -> None:
    rows = [replace(row, alarm=alarm) for row, alarm in zip(ROWS, (None, 3.0, 7.5, None, 9.0, None), strict=True)]
    outcome, text = summary(found(plan, rows)), report_text([found(plan, rows)])
    assert outcome["best"]["alarms"] == {"100": "KL rose to 7.5 nats per token (iteration 1)"}
    assert [line for line in text.splitlines() if "ALARM" in line] == [
        "  ALARM, paper, seed 100: KL rose to 3 nats per token (iteration 1)",
        "  ALARM, best, seed 100: KL rose to 7.5 nats per token (iteration 1)",
    ]
    assert "ALARM" not in report_text([found(plan, ROWS)])


def test_the_text_names_baselines_best_and_both_importances(plan: SearchPlan) -> None:
    lines = report_text([found(plan, ROWS)]).splitlines()
    assert lines[0].startswith("frozen_lake, grpo_actfocus: 5 complete, 1 fail, 1 pruned trials of 2 seeds; ")
    assert [line.split()[:2] for line in lines[1:4]] == [["uniform", "0.500"], ["paper", "0.550"], ["best", "0.610"]]
    assert lines[3].endswith(
        "reasoning_downweight 0.000123, redistribution_strength 1.25, redistribution_temperature 0.2  (trial 3)"
    )
    assert [line.split(":")[0] for line in lines[4:6]] == [
        "  importance, ped_anova, 5 trials",
        "  importance, fanova, 5 trials",
    ]


def test_importances_are_of_complete_trials_and_sum_to_one(plan: SearchPlan, tmp_path: Path) -> None:
    outcome = importances(found(plan, ROWS))
    assert set(outcome) == {"ped_anova", "fanova", "trials"}
    assert outcome["trials"] == 5
    two = searches(tmp_path, fewer_tokens=True, pruner={"kind": "none"})[0]
    assert importances(found(two, [replace(row, tokens=1.0, pruned=False) for row in ROWS])) == importances(
        found(plan, [replace(row, pruned=False) for row in ROWS])
    ), "tokens, or small success, were taken for what is wanted"
    short = {"reasoning_downweight", "redistribution_strength", "redistribution_temperature"}
    for name in ("ped_anova", "fanova"):
        assert set(outcome[name]) == short
        assert sum(outcome[name].values()) == pytest.approx(1.0, abs=1e-3)
    assert importances(found(plan, ROWS[:3])) == {}


def test_of_two_objectives_the_front_is_what_nothing_beats_in_both(tmp_path: Path) -> None:
    plan = searches(tmp_path, fewer_tokens=True, pruner={"kind": "none"})[0]
    rows = [
        Row((1.0, 0.0, 1.0), 0.5, tokens=20.0, baseline="uniform"),
        Row((0.1, 0.5, 1.0), 0.6, tokens=30.0, baseline="paper"),
        Row((0.2, 0.5, 1.0), 0.6, tokens=25.0),
        Row((0.3, 0.6, 1.0), 0.4, tokens=22.0),
        Row((0.4, 0.7, 1.0), 0.9, tokens=10.0, kl=1.0),
        Row((0.5, 0.8, 1.0), 0.3, tokens=12.0),
    ]
    search = found(plan, rows)
    outcome = summary(search)
    assert [point["number"] for point in outcome["front"]] == [1, 3, 6]
    assert (outcome["best"]["number"], outcome["best"]["tokens"]) == (2, 30.0)
    assert trials_table([search])["tokens"].tolist()[1:] == [20.0, 30.0, 25.0, 22.0, 10.0, 12.0]
    write_figures([search], tmp_path)
    assert (tmp_path / "grpo_actfocus-front.png").stat().st_size > 5000


def test_the_overlay_gives_exactly_the_best_settings(tmp_path: Path) -> None:
    plan = searches(tmp_path / "one")[0]
    text = best_overlay([found(plan, ROWS)])
    assert not set("&*") & set(text)
    values = YAML(typ="safe").load(text)
    config = parse(overlay(read_yaml(ROOT / "params.yaml"), values))
    assert {key: current(config, plan.method, key) for key in BEST} == BEST
    assert config.comparison == "default_actfocus"

    several = searches(tmp_path / "several", "learning_rates")
    rates = {plan.method: 1e-4 + 1.23457e-5 * index for index, plan in enumerate(several)}
    made = [found(plan, [Row((5e-4,), 0.5), Row((round(rates[plan.method], 10),), 0.6)]) for plan in several]
    config = parse(overlay(read_yaml(ROOT / "params.yaml"), YAML(typ="safe").load(best_overlay(made))))
    for search in made:
        assert search.best is not None
        rate = config.methods[search.plan.method].learning_rate
        assert (
            rate == settings(search.best)["method.learning_rate"] == pytest.approx(rates[search.plan.method], rel=1e-5)
        )


# ---------------------------------------------------------------------------------------------------------------- figures


def test_every_figure_is_there_for_the_report_and_for_documents(plan: SearchPlan, tmp_path: Path) -> None:
    search = found(plan, ROWS)
    write_figures([search], tmp_path / "figures")
    written = json.loads((tmp_path / "figures" / "figures.json").read_text(encoding="utf-8"))
    assert (written["name"], written["summary"]) == ("actfocus", report_text([search]))
    names = [drawing.name for drawing in drawings(search)]
    assert len(names) == 2 + 3 + 1 + 2
    episodes = search.plan.config.train.iterations * 8 * 16
    assert {path.name for path in (tmp_path / "figures").glob("*.png")} == {f"grpo_actfocus-{n}.png" for n in names}
    assert len(written["figures"]) == len(names)
    for figure in written["figures"]:
        assert figure["title"].startswith("grpo_actfocus: ")
        assert (
            f"frozen_lake, grpo_actfocus: 5 complete trials of 2 seeds, {episodes} episodes a seed" in figure["caption"]
        )
        assert figure["plotly"]["data"]
    slices = next(f for f in written["figures"] if f["title"].endswith("slices"))["plotly"]["layout"]
    assert {"0", "0.01", "0.1", "1"} <= set(slices["xaxis"]["ticktext"])
    places = [from_value(plan.search.space[ALPHA], float(text)) for text in slices["xaxis"]["ticktext"]]
    assert slices["xaxis"]["tickvals"] == pytest.approx(places)
    assert "0.1" in slices["xaxis3"]["ticktext"]


def test_a_single_setting_has_neither_contour_nor_importance_and_few_trials_no_figure(tmp_path: Path) -> None:
    plan = searches(tmp_path, "learning_rates")[1]
    rows = [Row((rate,), 0.5 + rate) for rate in (5e-4, 1e-3, 2e-4, 3e-3)]
    assert [drawing.name for drawing in drawings(found(plan, rows))] == ["history", "slice"]
    assert drawings(found(plan, rows[:3])) == []
    write_figures([found(plan, rows[:3])], tmp_path / "few")
    assert json.loads((tmp_path / "few" / "figures.json").read_text())["figures"] == []


# ----------------------------------------------------------------------------------------------------------- confirmation


def test_a_confirmation_compares_the_best_with_the_baselines_on_fresh_seeds(plan: SearchPlan) -> None:
    search = found(plan, ROWS)
    raw = confirmation([plan], [summary(search)], "sweeps/confirm_actfocus", "../..")
    config, before = parse(raw), plan.config
    assert config.seeds == before.sweep.confirm_seeds
    assert not set(config.seeds) & {*before.seeds, *before.sweep.seeds}
    assert list(config.methods) == ["uniform", "paper", "best"]
    for name, point in {**plan.baselines, "best": BEST}.items():
        assert config.methods[name] == plan.configured(point).methods[plan.method]
    assert config.compare.control == {"best": "uniform"}
    assert config.compare.uniform == {"best": "paper"}
    assert (config.compare.primary, config.compare.family) == ("best", "holm")
    assert (config.evaluation, config.train, config.rollout, config.environments, config.policy) == (
        before.evaluation,
        before.train,
        before.rollout,
        before.environments,
        before.policy,
    )
    assert (config.root, config.out, config.params_file) == (
        "../..",
        "sweeps/confirm_actfocus",
        "sweeps/confirm_actfocus/params.yaml",
    )
    assert (config.comparison, config.sweep.studies) == ("default_confirm_actfocus", {})


def test_of_several_methods_each_is_confirmed_beside_itself_at_the_baseline(tmp_path: Path) -> None:
    found_plans = searches(tmp_path, "learning_rates")
    outcomes = [summary(found(plan, [Row((5e-4,), 0.5), Row((1e-3,), 0.6)])) for plan in found_plans]
    extra = {**outcomes[0], "name": "another"}
    config = parse(confirmation(found_plans, [extra, *reversed(outcomes)], "out", "."))
    names = [name for name, method in found_plans[0].config.methods.items() if method.matched_to is None]
    assert sorted(config.methods) == sorted([*names, *(f"{name}_params" for name in names)])
    for name in names:
        assert config.methods[name].learning_rate == 1e-3
        assert config.methods[f"{name}_params"] == found_plans[0].config.methods[name]
    assert config.compare.control == {name: f"{name}_params" for name in names}
    assert config.compare.uniform == found_plans[0].config.compare.uniform


def test_an_outcome_of_other_settings_is_refused(tmp_path: Path) -> None:
    outcome = summary(found(searches(tmp_path / "a")[0], ROWS))
    plan = searches(tmp_path / "b", "actfocus", {"train": {"iterations": 20}})[0]
    with pytest.raises(UserError, match="grpo_actfocus has not been searched with these settings; run `make sweep`"):
        confirmation([plan], [outcome], "out", ".")


def test_settings_outside_methods_are_confirmed_if_they_are_all_the_same(tmp_path: Path) -> None:
    searched = {"train.minibatch": {"kind": "choice", "values": [16, 32]}}
    space = dict.fromkeys((ALPHA, BETA, TAU)) | searched
    baselines = {"uniform": None, "paper": None, "mine": {"train.minibatch": 16}}
    plan = searches(tmp_path, studies={"actfocus": {"space": space, "baselines": baselines}})[0]
    same = confirmation([plan], [summary(found(plan, [Row((16,), 0.5)]))], "out", ".")
    assert parse(same).train.minibatch == 16
    with pytest.raises(UserError, match="its best and baselines differ in settings outside methods"):
        confirmation([plan], [summary(found(plan, [Row((32,), 0.5)]))], "out", ".")


def row(method: str, kind: str | None, difference: tuple[float, float, float], **more: Any) -> dict[str, Any]:
    """A row of a comparison of eight seeds, with a difference to its control."""
    names = ("difference_to_control", "difference_to_control_ci_low", "difference_to_control_ci_high")
    tested = ("_p", "_p_adjusted", "_verdict")
    return {
        **{f"difference_to_uniform{part}": None for part in ("", "_ci_low", "_ci_high", "_by_seed", *tested)},
        **{f"difference_to_control{part}": None for part in tested},
        "difference_to_control_by_seed": [difference[0]] * 8,
        "environment": "lake",
        "method": method,
        "temperature": 0.5,
        "headline": True,
        "success_mean": 0.6,
        "states": 64,
        "control": kind,
        "uniform": None,
        **dict(zip(names, difference, strict=True)),
        **more,
    }


@pytest.mark.parametrize(
    ("difference", "told"),
    [
        ((0.05, 0.01, 0.09), "better"),
        ((0.05, -0.01, 0.09), "undecided"),
        ((-0.05, -0.09, -0.01), "worse"),
    ],
)
def test_a_verdict_says_whether_the_best_is_better(difference: tuple[float, float, float], told: str) -> None:
    judged = {"difference_to_control_p_adjusted": 0.0123, "difference_to_control_verdict": told}
    rows = [
        row("uniform", None, (0.0, 0.0, 0.0)),
        row("best", "uniform", difference, **judged),
        row("best", "uniform", (9.0, 9.0, 9.0), temperature=1.0, headline=False),
    ]
    value, low, high = difference
    assert confirmation_text({"rows": rows, "family": {"size": 2}}) == (
        "lake: best (0.600) − uniform, 8 fresh seeds and 64 test states at temperature 0.5: "
        f"{value:+.3f} [{low:+.3f}, {high:+.3f}] p_adj 0.012: {told}"
    )


def test_where_too_few_fresh_seeds_give_no_verdict_the_key_to_one_is_named() -> None:
    few = {"difference_to_control_p_adjusted": 0.25, "difference_to_control_by_seed": [0.02, 0.03, 0.05, 0.1]}
    rows = [row("best", "uniform", (0.05, 0.01, 0.09), **few)]
    assert confirmation_text({"rows": rows, "family": {"size": 2}}) == (
        "lake: best (0.600) − uniform, 4 fresh seeds and 64 test states at temperature 0.5: +0.050 [+0.010, +0.090] p_adj "
        "0.250; no verdict below 7 paired seeds: give `sweep.confirm_seeds` 7 or more"
    )


# --------------------------------------------------------------------------------------------------------------- pipelines


def test_plain_repro_starts_no_sweep_and_a_sweep_depends_on_all_that_trains() -> None:
    stages = read_yaml(ROOT / "dvc.yaml")["stages"]
    text = json.dumps(stages)
    assert "stages.sweep" not in text
    assert "actfocus" not in text
    assert "reports/sweep" not in text, "an output of a sweep that plain repro needs would start it"
    stage = read_yaml(ROOT / "sweeps" / "dvc.yaml")["stages"]["sweep"]
    code = {dep for dep in stages["train"]["deps"] if dep.startswith("pipeline/")}
    assert code < set(stage["deps"])
    trained = stages["train"]["params"][0]["${params_file}"]
    shared = {key for key in trained if "item" not in key and "key" not in key}
    assert {key.split(".")[0] for key in shared} - {"seeds", "bottleneck", "tracking", "comparison"} <= {
        key.split(".")[0] for key in stage["params"][0]["${params_file}"]
    }
