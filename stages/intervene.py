"""Whether the reference policy uses its reasoning: data/interventions/<environment>.json."""

from pipeline.commands.cli import EnvironmentName, ParamsFile, configured, make_alone, next_command, run


def main(environment: EnvironmentName, params: ParamsFile = "params.yaml") -> str:
    config, layout, params = configured(params, environment)
    make_alone(layout, f"intervene {environment}")
    import transformers.models.auto.modeling_auto  # noqa: F401  (imported before the processes fork)

    from pipeline.analysis.interventions import intervention
    from pipeline.evaluation.interventions import InterventionTask, intervene
    from pipeline.workspace.files import write_record
    from pipeline.workspace.processes import run_in_processes

    tasks = {
        f"at {temperature:g}": InterventionTask(config, environment, layout.policy, temperature)
        for temperature in config.evaluation.temperatures
    }
    played = run_in_processes(intervene, tasks, config.workers, f"intervene {environment}", config.threads)
    found = dict(zip(config.evaluation.temperatures, played.values(), strict=True))
    demonstrations = config.policy.demonstrations
    kind = None if demonstrations is None else demonstrations.reasoning
    target, result = layout.interventions(environment), intervention(environment, kind, found)
    write_record(target, result)
    return f"{target}: {result['verdict']} {next_command(params, 'python -m stages.compare')}"


if __name__ == "__main__":
    run(main)
