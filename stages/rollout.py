"""Sample the reference policy's episodes: data/trajectories/<environment>.parquet."""

import shutil

from pipeline.commands.cli import EnvironmentName, ParamsFile, configured, make_alone, next_command, run


def main(environment: EnvironmentName, params: ParamsFile = "params.yaml") -> str:
    config, layout, params = configured(params, environment)
    import transformers.models.auto.modeling_auto  # noqa: F401  (imported before the processes fork)

    from pipeline.progress.display import doing
    from pipeline.rollout.slices import SlicesTask, sample_slices
    from pipeline.sources.code import result_key
    from pipeline.sources.fingerprints import of_environment
    from pipeline.sources.hashes import tree_hashes
    from pipeline.trajectories.learnable import why_nothing_to_learn
    from pipeline.trajectories.table import write
    from pipeline.trajectories.trajectory import RESPONSES, concatenate
    from pipeline.workspace.layout import Cache
    from pipeline.workspace.processes import run_in_processes

    section, slices = config.environments[environment], range(config.bottleneck.groups // config.rollout.groups)
    settings = config.model_dump(mode="json", include={"policy", "threads"})
    settings["rollout"] = config.rollout.model_dump(mode="json", exclude={"workers"})
    named = {environment: section.model_dump(mode="json"), "sources": of_environment(section)}
    made_of = settings | named | {"files": tree_hashes(layout.policy)}
    cache = Cache().slices(result_key("pipeline.rollout.slices", made_of))
    make_alone(layout, f"rollout {environment}", cache)
    tasks = {
        f"slice {n}": SlicesTask(config, environment, layout.policy, list(slices[n :: config.workers]), cache)
        for n in range(min(config.workers, len(slices)))
    }
    parts = run_in_processes(sample_slices, tasks, config.workers, f"rollout {environment}", config.threads)
    by_seed = {seed: part for result in parts.values() for seed, part in result.items()}
    doing("writing the table")
    table = concatenate([by_seed[seed] for seed in slices])
    target = layout.trajectories(environment)
    write(table, target)
    shutil.rmtree(cache, ignore_errors=True)
    success = sum(table.episodes["success"]) / len(table)
    responses = table.responses
    turns = ", ".join(f"{responses.count(kind)} {kind}" for kind in RESPONSES)
    why = why_nothing_to_learn(table)
    warning = f"There is hardly anything to learn from: {why}; see `actfocus check --params {params}`. " if why else ""
    return (
        f"{target}: {len(table)} episodes, {int(table.sampled.sum())} sampled tokens, success {success:.3f} at "
        f"temperature {config.rollout.temperature:g}, of {len(responses)} turns {turns}. "
        f"{warning}{next_command(params, 'python -m stages.annotate', environment=environment)}"
    )


if __name__ == "__main__":
    run(main)
