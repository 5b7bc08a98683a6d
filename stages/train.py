"""Train a method on an environment, one policy per seed: models/trained/<environment>-<method>/seed-<seed>."""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.parse import quote

from pipeline.commands.cli import EnvironmentName, MethodName, ParamsFile, configured, next_command, out_folder, run
from pipeline.trajectories.trajectory import TrajectoryError, read
from pipeline.workspace.files import lock


def main(environment: EnvironmentName, method: MethodName, params: ParamsFile = "params.yaml") -> str:
    config, params = configured(params, environment, method)
    name, out = f"{environment}-{method}", out_folder(config)
    table = out / "data" / "annotated" / f"{environment}.parquet"
    if not read(table).annotated:
        raise TrajectoryError(f"{table}: not annotated; run `python -m stages.annotate --environment {environment}`")

    def waiting() -> None:
        print(f"train {name}: another command makes the same; this one waits for its end", file=sys.stderr, flush=True)

    with lock(Path(".cache") / "locks" / quote(f"{config.out}/train/{name}", safe=""), waiting=waiting):
        from pipeline.training.seeds import train_seeds  # takes seconds

        target, trained = train_seeds(config, environment, method, out)
    return (
        f"{target}: {len(config.seeds)} seeds ({trained} trained now, {len(config.seeds) - trained} kept). "
        f"{next_command(params, 'python -m stages.evaluate', environment=environment, method=method)}"
    )


if __name__ == "__main__":
    run(main)
