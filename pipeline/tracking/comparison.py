"""One MLflow run per comparison and environment, in which its trainings are nested."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.settings.params import Config
from pipeline.tracking.datasets import dvc_digest
from pipeline.tracking.noted import noted_runs
from pipeline.tracking.parents import ParentRun, log_parent
from pipeline.tracking.records import Record
from pipeline.tracking.spool import told
from pipeline.tracking.store import comparison_identity, provenance, quiet, resolved_params, store_of
from pipeline.tracking.training import TABLE_TAG, episode_table
from pipeline.workspace.errors import UserError
from pipeline.workspace.layout import Layout

HEADLINES = ("success_mean", "difference_to_reference", "difference_to_uniform", "difference_to_control")
"""Numbers of a comparison's rows that become metrics, ``<name>/<method>/<temperature>``."""


def log_comparison(
    config: Config,
    root: Path,
    comparison: Mapping[str, Any],
    curves: Mapping[tuple[str, str], Mapping[str, list[dict[str, float]]]],
    episodes: Mapping[str, Mapping[str, list[dict[str, Any]]]],
    layout: Layout,
) -> None:
    """Bring the run of a comparison up to date, in each environment's experiment.

    It has the headline numbers as metrics, the report and its figures, the resolved settings, a sample of the episodes,
    the list of all trainings with their runs, and the best policy as the champion.

    Args:
        config: checked params.
        root: of the project.
        comparison: what ``pipeline.analysis.comparison.compare`` returns.
        curves: (environment, method) -> seed -> one row per iteration.
        episodes: environment -> method -> the sample, records of ``pipeline.trajectories.records``.
        layout: of the run.
    """
    quiet()
    for environment in config.environments:
        rows = [row for row in comparison["rows"] if row["environment"] == environment]
        trainings = _trainings(config, environment, layout)
        best = best_training({method: curves[environment, method] for method in config.methods})
        sample = [(method, one) for method, chosen in episodes.get(environment, {}).items() for one in chosen]
        texts = {
            "params.yaml": resolved_params(config),
            "trainings.json": json.dumps(trainings, indent=1),
            "episodes.json": episode_table(sample),
        }
        tags = {**provenance(config, root), **_elsewhere(config, trainings), **TABLE_TAG, "environment": environment}
        metrics = {
            f"{name}/{row['method']}/{row['temperature']:g}": row[name]
            for row in rows
            for name in HEADLINES
            if row[name] is not None
        }
        for row in rows:
            if row["headline"] and "alarms" in row:
                metrics[f"alarmed_seeds/{row['method']}"] = row["alarmed_seeds"]
                tags[f"alarms.{row['method']}"] = ", ".join(row["alarms"])
        champion = None if best is None else _champion(config, environment, *best, trainings, layout)
        run = ParentRun(store_of(config, root), environment, config.comparison, comparison_identity(config), tags)
        log_parent(run, metrics, texts, _files(environment, layout), champion)


def best_training(curves: Mapping[str, Mapping[str, list[dict[str, float]]]]) -> tuple[str, str, float] | None:
    """Method, seed and validation success of the training that ends best, by validation states at the last iteration.

    Test states decide nothing here: a champion that was chosen on them would make their result too good. Of equals the
    first method has it, then the first seed. None if nothing was validated at the end.
    """
    ends = [
        (rows[-1]["validation_success"], method, seed)
        for method, seeds in curves.items()
        for seed, rows in seeds.items()
        if "validation_success" in rows[-1]
    ]
    if not ends:
        return None
    success, method, seed = max(ends, key=lambda end: end[0])
    return method, seed, success


def _trainings(config: Config, environment: str, layout: Layout) -> list[dict[str, Any]]:
    """Method, seed and run of every training; one that DVC or the cache has restored has the run that made it."""
    found = []
    for method in config.methods:
        file, known = layout.runs(environment, method), dict[str, Any]()
        try:
            known = noted_runs(file) if file.exists() else {}
        except UserError as error:  # the comparison itself does not need it
            told(f"{error}; its trainings are listed without their runs")
        found += [{"method": method, "seed": seed, **known.get(str(seed), {})} for seed in config.seeds]
    return found


def _elsewhere(config: Config, trainings: list[dict[str, Any]]) -> dict[str, str]:
    """A tag for every training whose run is nested in another comparison's, because it was made there."""
    return {
        f"training.{one['method']}.seed-{one['seed']}": f"{one['run_id'] or one['tracking_id']} in {one['comparison']}"
        for one in trainings
        if one.get("comparison", config.comparison) != config.comparison
    }


def _files(environment: str, layout: Layout) -> list[tuple[str, Path]]:
    """Files of the report with their folders in the run."""
    pictures = layout.reports / "figures"
    figures = [*sorted(pictures.glob("answers.*")), *sorted(pictures.glob(f"{environment}-*"))]
    bottleneck = sorted(layout.bottleneck(environment).glob("*.svg"))
    tables = [layout.reports / name for name in ("comparison.json", "comparison.md", "comparison.txt", "index.html")]
    return [*(("", file) for file in tables), *(("figures", file) for file in [*figures, *bottleneck])]


def _champion(
    config: Config,
    environment: str,
    method: str,
    seed: str,
    success: float,
    trainings: list[dict[str, Any]],
    layout: Layout,
) -> Record | None:
    """The record by which the best policy becomes the champion; None if it is not there."""
    directory = layout.final_policy(environment, method, seed).resolve()
    if not directory.is_dir():
        return None
    own = next(one for one in trainings if one["method"] == method and str(one["seed"]) == seed)
    tags = {"method": method, "seed": seed, "environment": environment, "comparison": config.comparison}
    tags |= {"validation_success": f"{success:g}", "run_id": str(own.get("run_id") or own.get("tracking_id") or "")}
    return {
        "name": f"{config.comparison}-{environment}",
        "model": str(directory),
        "digest": dvc_digest(directory),
        "dtype": config.policy.dtype if config.policy.kind == "pretrained" else "float32",
        "tags": tags,
    }
