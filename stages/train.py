"""Train a method on an environment, one policy per seed: models/trained/<environment>-<method>/seed-<seed>."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.command import configured, layout_of, next_command, parse_arguments, run
from pipeline.trajectories.table import read
from pipeline.trajectories.trajectory import TrajectoryError
from pipeline.workspace.files import lock, read_json, write_json
from pipeline.workspace.layout import Cache

if TYPE_CHECKING:
    from argparse import Namespace

    from pipeline.settings.params import Config
    from pipeline.workspace.layout import Layout


def main() -> str:
    arguments = parse_arguments(__doc__, "environment", "method")
    config = configured(arguments)
    name, layout = f"{arguments.environment}-{arguments.method}", layout_of(config)
    table = layout.annotated(arguments.environment)
    if not read(table).annotated:
        raise TrajectoryError(
            f"{table}: not annotated; run `python -m stages.annotate --environment {arguments.environment}`"
        )

    def waiting() -> None:
        print(f"train {name}: another command makes the same; this one waits for its end", file=sys.stderr, flush=True)

    with lock(Cache().lock(f"{config.out}/train/{name}"), waiting=waiting):
        return train(arguments, config, layout)


def train(arguments: Namespace, config: Config, layout: Layout) -> str:
    """Train what has not been trained, and put all of it where the next stages look for it."""
    from pipeline.progress.display import doing
    from pipeline.tracking.store import open_store, run_settings, store_of
    from pipeline.training.result import training_task
    from pipeline.training.run import TrainingJob, train_one
    from pipeline.workspace.processes import in_own_process, run_in_processes

    environment, method = arguments.environment, arguments.method
    policy, table = layout.policy, layout.annotated(environment)
    tasks = [training_task(config, environment, method, seed, policy, Cache().folder) for seed in config.seeds]
    made_from = {"annotated episodes": table, "reference policy": policy}
    runs = run_settings(config, Path("."), environment, method, made_from)
    jobs = {f"seed {t.seed}": TrainingJob(t, table, runs[t.seed]) for t in tasks if not t.finished}
    if jobs:
        doing("opening MLflow's store")
        in_own_process(open_store, store_of(config, Path(".")), environment)
    run_in_processes(train_one, jobs, config.workers, f"train {environment}-{method}")

    doing("copying the results")
    target = layout.trained(environment, method)
    shutil.rmtree(target, ignore_errors=True)
    for task in tasks:
        shutil.copytree(task.result / "policy", layout.final_policy(environment, method, task.seed))
    for kind, place in (("curves", layout.curves), ("timings", layout.timings), ("runs", layout.runs)):
        collect_results(place(environment, method), kind, {t.seed: t.result for t in tasks})
    episodes = layout.episodes(environment, method)
    episodes.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(tasks[0].result / "episodes.parquet", episodes)
    return (
        f"{target}: {len(tasks)} seeds ({len(jobs)} trained now, {len(tasks) - len(jobs)} kept). "
        f"{next_command(arguments, 'evaluate', environment=environment, method=method)}"
    )


def collect_results(target: Path, kind: str, results: dict[int, Path]) -> None:
    """Gather one file of each seed's result under ``seeds``."""
    write_json(target, {"seeds": {str(seed): read_json(folder / f"{kind}.json") for seed, folder in results.items()}})


if __name__ == "__main__":
    run(main)
