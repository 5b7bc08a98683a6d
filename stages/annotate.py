"""Annotate the table with token energy: data/annotated/<environment>.parquet."""

from __future__ import annotations

from pipeline.commands.cli import EnvironmentName, ParamsFile, configured, next_command, out_folder, run
from pipeline.trajectories.trajectory import concatenate, read


def main(environment: EnvironmentName, params: ParamsFile = "params.yaml") -> str:
    config, params = configured(params, environment)
    name, out = environment, out_folder(config)
    table = read(out / "data" / "trajectories" / f"{name}.parquet")
    import transformers.models.auto.modeling_auto  # noqa: F401  (imported before the processes fork)

    from pipeline.energy.annotate import annotate_part
    from pipeline.workspace.processes import run_in_processes

    slice_size = config.rollout.groups * config.rollout.group_size
    size = -(-len(table) // (slice_size * config.workers)) * slice_size
    tasks = {
        f"part {start // size}": (
            config,
            out / "models" / "policy",
            table.select(range(start, min(start + size, len(table)))),
        )
        for start in range(0, len(table), size)
    }
    annotated = concatenate(list(run_in_processes(annotate_part, tasks, config.workers, f"annotate {name}").values()))
    target = out / "data" / "annotated" / f"{name}.parquet"
    annotated.write(target)
    return (
        f"{target}: {len(annotated)} episodes, {int(annotated.sampled.sum())} sampled tokens with their energies. "
        f"{next_command(params, 'python -m stages.bottleneck', environment=name)}"
    )


if __name__ == "__main__":
    run(main)
