"""Train a method on an environment, one policy per seed: models/trained/<environment>-<method>/seed-<seed>."""

from pipeline.commands.cli import EnvironmentName, MethodName, ParamsFile, configured, make_alone, next_command, run
from pipeline.trajectories.table import read
from pipeline.trajectories.trajectory import TrajectoryError


def main(environment: EnvironmentName, method: MethodName, params: ParamsFile = "params.yaml") -> str:
    config, layout, params = configured(params, environment, method)
    table = layout.annotated(environment)
    if not read(table).annotated:
        raise TrajectoryError(f"{table}: not annotated; run `python -m stages.annotate --environment {environment}`")
    make_alone(layout, f"train {environment}-{method}")
    from pipeline.training.seeds import train_seeds  # takes seconds

    done = train_seeds(config, environment, method, layout)
    found = done.matching
    return (
        f"{done.target}: {len(config.seeds)} seeds ({done.now} trained now, {len(config.seeds) - done.now} kept). "
        + (
            f"Learning rate {found['learning_rate']:g}: KL of an update on action tokens {found['found']:.3g}, "
            f"{found['off']:.1%} off that of {found['matched_to']}. "
            if found
            else ""
        )
        + "".join(f"ALARM, seed {seed}: {text}. " for seed, text in done.alarms.items())
        + f"{next_command(params, 'python -m stages.evaluate', environment=environment, method=method)}"
    )


if __name__ == "__main__":
    run(main)
