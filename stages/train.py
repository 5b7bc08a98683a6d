"""Train a method on an environment, one policy per seed: models/trained/<environment>-<method>/seed-<seed>."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from pipeline.commands.command import configured, next_command, out_folder, parse_arguments, run
from pipeline.trajectories.table import read
from pipeline.trajectories.trajectory import TrajectoryError
from pipeline.workspace.files import lock, read_json, write_json

if TYPE_CHECKING:
    from argparse import Namespace

    from pipeline.settings.params import Config


def main() -> str:
    arguments = parse_arguments(__doc__, "environment", "method")
    config = configured(arguments)
    name, out = f"{arguments.environment}-{arguments.method}", out_folder(config)
    table = out / "data" / "annotated" / f"{arguments.environment}.parquet"
    if not read(table).annotated:
        raise TrajectoryError(
            f"{table}: not annotated; run `python -m stages.annotate --environment {arguments.environment}`"
        )

    def waiting() -> None:
        print(f"train {name}: another command makes the same; this one waits for its end", file=sys.stderr, flush=True)

    with lock(Path(".cache") / "locks" / quote(f"{config.out}/train/{name}", safe=""), waiting=waiting):
        return train(arguments, config, out)


def train(arguments: Namespace, config: Config, out: Path) -> str:
    """Train what has not been trained, and put all of it where the next stages look for it."""
    from pipeline.progress.display import doing
    from pipeline.tracking.store import open_store, run_settings, store_of
    from pipeline.training.result import training_task
    from pipeline.training.run import TrainingJob, train_one
    from pipeline.workspace.processes import in_own_process, run_in_processes

    environment, method = arguments.environment, arguments.method
    policy, table = out / "models" / "policy", out / "data" / "annotated" / f"{environment}.parquet"
    tasks = [training_task(config, environment, method, seed, policy, Path(".cache")) for seed in config.seeds]
    made_from = {"annotated episodes": table, "reference policy": policy}
    runs = run_settings(config, Path("."), environment, method, made_from)
    jobs = {f"seed {t.seed}": TrainingJob(t, table, runs[t.seed]) for t in tasks if not t.finished}
    if jobs:
        doing("opening MLflow's store")
        in_own_process(open_store, store_of(config, Path(".")), environment)
    run_in_processes(train_one, jobs, config.workers, f"train {environment}-{method}")

    doing("copying the results")
    name = f"{environment}-{method}"
    target = out / "models" / "trained" / name
    shutil.rmtree(target, ignore_errors=True)
    for task in tasks:
        shutil.copytree(task.result / "policy", target / f"seed-{task.seed}")
    for kind in ("curves", "timings", "runs"):
        collect_results(out / "data" / kind / f"{name}.json", kind, {t.seed: t.result for t in tasks})
    episodes = out / "data" / "episodes" / f"{name}.parquet"
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
