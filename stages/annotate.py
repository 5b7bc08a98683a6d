"""Annotate the table with token energy: data/annotated/<environment>.parquet."""

import shutil

from pipeline.commands.cli import EnvironmentName, ParamsFile, configured, make_alone, next_command, run
from pipeline.trajectories.table import read, write
from pipeline.trajectories.trajectory import concatenate


def main(environment: EnvironmentName, params: ParamsFile = "params.yaml") -> str:
    config, layout, params = configured(params, environment)
    table = read(layout.trajectories(environment))
    import transformers.models.auto.modeling_auto  # noqa: F401  (imported before the processes fork)

    from pipeline.energy.annotate import annotate_part
    from pipeline.sources.code import result_key
    from pipeline.sources.hashes import tree_hashes
    from pipeline.workspace.layout import Cache
    from pipeline.workspace.processes import run_in_processes

    settings = config.model_dump(
        mode="json", include={"rollout": True, "train": {"tokens_per_forward"}, "threads": True}
    )
    made_of = {"table": tree_hashes(layout.trajectories(environment)), "policy": tree_hashes(layout.policy)}
    cache = Cache().slices(result_key("pipeline.energy.annotate", settings | made_of))
    make_alone(layout, f"annotate {environment}", cache)
    slice_size = config.rollout.groups * config.rollout.group_size
    size = -(-len(table) // (slice_size * config.workers)) * slice_size
    tasks = {
        f"part {start // size}": (
            config,
            layout.policy,
            table.select(range(start, min(start + size, len(table)))),
            cache,
        )
        for start in range(0, len(table), size)
    }
    parts = run_in_processes(annotate_part, tasks, config.workers, f"annotate {environment}", config.threads)
    annotated = concatenate(list(parts.values()))
    target = layout.annotated(environment)
    write(annotated, target)
    shutil.rmtree(cache, ignore_errors=True)
    return (
        f"{target}: {len(annotated)} episodes, {int(annotated.sampled.sum())} sampled tokens with their energies. "
        f"{next_command(params, 'python -m stages.bottleneck', environment=environment)}"
    )


if __name__ == "__main__":
    run(main)
