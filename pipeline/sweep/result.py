"""What a search has found, as plain data: a row per trial, the best, the baselines, and which settings mattered."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
import pandas as pd
from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState

from pipeline.report.tables import aligned
from pipeline.settings.params import Config
from pipeline.settings.presets import overlay
from pipeline.settings.sweep import Value
from pipeline.sweep.plan import SearchPlan
from pipeline.sweep.queue import FINISHED
from pipeline.workspace.yaml_files import yaml_text

EVALUATORS = {"PED-ANOVA": PedAnovaImportanceEvaluator(), "fANOVA": FanovaImportanceEvaluator(seed=0)}
"""Estimates of how much a setting matters."""


@dataclass(frozen=True)
class SearchResult:
    """The trials of a search."""

    plan: SearchPlan
    trials: Sequence[FrozenTrial]
    """All of them, in order of their numbers."""

    @property
    def complete(self) -> list[FrozenTrial]:
        """Trials that ran to their end."""
        return [trial for trial in self.trials if trial.state == TrialState.COMPLETE]

    @property
    def best(self) -> FrozenTrial | None:
        """The complete trial of the highest success among those that keep all constraints; the earliest of equals."""
        kept = [trial for trial in self.complete if feasible(trial)]
        return max(kept, key=lambda trial: trial.values[0], default=None)

    @property
    def front(self) -> list[FrozenTrial]:
        """Trials that keep all constraints and are beaten by no other in both success and tokens."""
        kept = [trial for trial in self.complete if feasible(trial)]

        def beaten(by: FrozenTrial, trial: FrozenTrial) -> bool:
            (success, tokens), (most, least) = trial.values, by.values
            return bool(most >= success and least <= tokens and by.values != trial.values)

        return [trial for trial in kept if not any(beaten(other, trial) for other in kept)]


def feasible(trial: FrozenTrial) -> bool:
    """Whether a trial keeps all constraints."""
    return all(excess <= 0.0 for excess in trial.constraints.values())


def settings(trial: FrozenTrial) -> dict[str, Value]:
    """A trial's settings by key; empty for one that was killed before it had any."""
    found: dict[str, Value] = trial.user_attrs.get("values", {})
    return found


def trials_table(found: Sequence[SearchResult]) -> pd.DataFrame:
    """A row per trial of every search.

    Columns: method, number, slot, state, score, tokens (if they are an objective), baseline, retry_of, failure,
    iterations (that it was given), seconds, feasible, what exceeds each constraint, and one column per setting.
    """
    rows = []
    for search in found:
        fewer = search.plan.config.sweep.fewer_tokens
        for trial in search.trials:
            last = max(trial.intermediate_values, default=None)
            values = trial.values or ([] if last is None else [trial.intermediate_values[last]])
            rows.append(
                {
                    "method": search.plan.method,
                    "number": trial.number,
                    "slot": trial.user_attrs["slot"],
                    "state": trial.state.name,
                    "score": values[0] if values else None,
                    **({"tokens": values[1] if len(values) > 1 else None} if fewer else {}),
                    "baseline": trial.user_attrs.get("baseline"),
                    "retry_of": trial.user_attrs.get("retry_of"),
                    "failure": trial.user_attrs.get("failure"),
                    "iterations": last,
                    "seconds": None if trial.duration is None else round(trial.duration.total_seconds(), 1),
                    "feasible": feasible(trial) if trial.state == TrialState.COMPLETE else None,
                    **{f"exceeds_{name}": excess for name, excess in trial.constraints.items()},
                    **settings(trial),
                }
            )
    return pd.DataFrame(rows).astype({"retry_of": "Int64", "iterations": "Int64"})


def summary(found: SearchResult) -> dict[str, Any]:
    """The outcome of one search, ready to be written as JSON."""
    plan, best = found.plan, found.best
    named = {t.user_attrs["baseline"]: t for t in found.complete if "baseline" in t.user_attrs}
    result: dict[str, Any] = {
        "study": plan.study,
        "name": plan.name,
        "method": plan.method,
        "environment": plan.environment,
        "score": plan.config.sweep.score,
        "seeds": plan.config.sweep.seeds,
        **_budget(plan.config),
        "trials": dict(Counter(trial.state.name for trial in found.trials)),
        "infeasible": sum(not feasible(trial) for trial in found.complete),
        "best": None if best is None else _point(best),
        "baselines": {name: _point(trial) for name, trial in named.items()},
        "importance": importances(found),
    }
    if plan.config.sweep.fewer_tokens:
        result["front"] = [_point(trial) for trial in found.front]
    return result


def importances(found: SearchResult) -> dict[str, Any]:
    """Importance of each setting for success by both estimates, PED-ANOVA's and fANOVA's, and the trials behind them.

    The two may disagree completely: they answer different questions, from few trials. Empty for a single setting, or
    fewer than four complete trials.
    """
    if len(found.plan.search.space) < 2 or len(found.complete) < 4:
        return {}
    study = short_study(found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importance = optuna.importance.get_param_importances
        by_name = {name: importance(study, evaluator=evaluator) for name, evaluator in EVALUATORS.items()}
    rounded = {
        name.lower().replace("-", "_"): {key: round(float(value), 4) for key, value in values.items()}
        for name, values in by_name.items()
    }
    return {**rounded, "trials": len(found.complete)}


def short_study(found: SearchResult, tokens: bool = False) -> optuna.Study:
    """The finished trials as a study in memory whose settings go by their short names, for importances and figures.

    Args:
        found: the search.
        tokens: keep the second objective. Without it success alone is what is maximised: of two objectives PED-ANOVA
            would take any that it is given for one to be small.
    """
    names = short_names(list(found.plan.search.space))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["maximize", "minimize"] if tokens else ["maximize"])
    for trial in found.trials:
        if trial.state in FINISHED and len(trial.params) == len(names):
            study.add_trial(
                optuna.trial.create_trial(
                    state=trial.state,
                    values=trial.values if tokens or trial.values is None else trial.values[:1],
                    params={names[key]: value for key, value in trial.params.items()},
                    distributions={names[key]: value for key, value in trial.distributions.items()},
                    intermediate_values=trial.intermediate_values,
                    system_attrs={k: v for k, v in trial.system_attrs.items() if k.startswith("constraints")},
                )
            )
    return study


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted key where no other key ends so, else the whole key."""
    ends = [key.rsplit(".", 1)[-1] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def best_overlay(found: Sequence[SearchResult]) -> str:
    """An overlay of params.yaml, as YAML, with the best settings of every search.

    ``presets/<name>/overlay.yaml`` is where it takes effect: params.yaml stays the source of truth.
    """
    merged: dict[str, Any] = {"comparison": f"{found[0].plan.config.comparison}_{found[0].plan.study}"}
    for search in found:
        if search.best is not None:
            merged = overlay(merged, search.plan.overlay(settings(search.best)))
    study = found[0].plan.study
    return (
        f"# Best settings of the sweep {study}, by validation success. To use them: make presets/tuned/ and copy this file\n"
        f"# there as overlay.yaml, then `make repro PRESET=tuned`.\n{yaml_text(merged)}"
    )


def report_text(found: Sequence[SearchResult]) -> str:
    """The outcome in a few lines for a terminal."""
    lines = []
    for search in found:
        outcome, best = summary(search), search.best
        states = ", ".join(f"{count} {state.lower()}" for state, count in sorted(outcome["trials"].items()))
        seeds = len(outcome["seeds"])
        lines.append(
            f"{outcome['environment']}, {outcome['method']}: {states} trials of {seeds} seed{'s' * (seeds > 1)}; "
            f"score: validation success, {outcome['score']}, mean over seeds; {outcome['infeasible']} broke a constraint"
        )
        points = [[name, f"{p['score']:.3f}", _written(p["settings"])] for name, p in outcome["baselines"].items()]
        if best is not None:
            points.append(["best", f"{best.values[0]:.3f}", f"{_written(settings(best))}  (trial {best.number})"])
        lines += [f"  {line}" for line in aligned(points).splitlines()]
        lines += ["  no trial kept all constraints"] if best is None else []
        named = outcome["baselines"] | ({} if best is None else {"best": outcome["best"]})
        lines += [
            f"  ALARM, {name}, seed {seed}: {text}"
            for name, point in named.items()
            for seed, text in point.get("alarms", {}).items()
        ]
        lines += [
            f"  importance, {name}, {outcome['importance']['trials']} trials: {_written(values)}"
            for name, values in outcome["importance"].items()
            if name != "trials"
        ]
    lines.append(
        "The best is the highest of many noisy scores and flattered by that; `make sweep-confirm` trains it and the "
        "baselines on fresh seeds."
    )
    return "\n".join(lines) + "\n"


def _budget(config: Config) -> dict[str, int]:
    """What a seed's training may spend: sampled ``tokens`` where they are budgeted, else ``episodes``."""
    if config.train.tokens is not None:
        return {"tokens": config.train.tokens}
    return {"episodes": config.train.iterations * config.rollout.groups * config.rollout.group_size}


def _point(trial: FrozenTrial) -> dict[str, Any]:
    tokens = {"tokens": trial.values[1]} if len(trial.values) > 1 else {}
    alarmed = {"alarms": trial.user_attrs["alarms"]} if "alarms" in trial.user_attrs else {}
    return {"number": trial.number, "score": trial.values[0], **tokens, "settings": settings(trial), **alarmed}


def _written(values: Mapping[str, Any]) -> str:
    names = short_names(list(values))
    return ", ".join(
        f"{names[key]} {value:.3g}" if isinstance(value, float) else f"{names[key]} {value}"
        for key, value in values.items()
    )
