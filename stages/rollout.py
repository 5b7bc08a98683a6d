"""Sample the reference policy's episodes: data/trajectories/<environment>.parquet."""

from pipeline.commands.cli import EnvironmentName, ParamsFile, configured, next_command, run


def main(environment: EnvironmentName, params: ParamsFile = "params.yaml") -> str:
    config, layout, params = configured(params, environment)
    import transformers.models.auto.modeling_auto  # noqa: F401  (imported before the processes fork)

    from pipeline.progress.display import doing
    from pipeline.rollout.slices import sample_slices
    from pipeline.trajectories.table import write
    from pipeline.trajectories.trajectory import RESPONSES, concatenate
    from pipeline.workspace.processes import run_in_processes

    slices = range(config.bottleneck.groups // config.rollout.groups)
    tasks = {
        f"slice {n}": (config, environment, layout.policy, list(slices[n :: config.workers]))
        for n in range(config.workers)
    }
    parts = run_in_processes(sample_slices, tasks, config.workers, f"rollout {environment}")
    by_seed = {seed: part for result in parts.values() for seed, part in result.items()}
    doing("writing the table")
    table = concatenate([by_seed[seed] for seed in slices])
    target = layout.trajectories(environment)
    write(table, target)
    success = sum(table.episodes["success"]) / len(table)
    responses = table.responses
    turns = ", ".join(f"{responses.count(kind)} {kind}" for kind in RESPONSES)
    return (
        f"{target}: {len(table)} episodes, {int(table.sampled.sum())} sampled tokens, success {success:.3f} at "
        f"temperature {config.rollout.temperature:g}, of {len(responses)} turns {turns}. "
        f"{next_command(params, 'python -m stages.annotate', environment=environment)}"
    )


if __name__ == "__main__":
    run(main)
