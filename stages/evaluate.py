"""Play held-out initial states with a method's final policies, or with the reference policy (--method reference)."""

from pipeline.commands.cli import EnvironmentName, MethodName, ParamsFile, configured, make_alone, next_command, run


def main(environment: EnvironmentName, method: MethodName, params: ParamsFile = "params.yaml") -> str:
    config, layout, params = configured(params, environment, method)
    make_alone(layout, f"evaluate {environment}-{method}")
    import pyarrow as pa
    import pyarrow.compute as pc
    import transformers.models.auto.modeling_auto  # noqa: F401  (imported before the processes fork)

    from pipeline.evaluation.evaluate import EvaluationTask, evaluate_policy
    from pipeline.trajectories.results import write_results
    from pipeline.workspace.processes import run_in_processes

    tasks = {
        f"seed {seed} at {temperature:g}": EvaluationTask(
            config, environment, method, seed, layout.final_policy(environment, method, seed), temperature
        )
        for seed in config.seeds
        for temperature in config.evaluation.temperatures
    }
    results = run_in_processes(
        evaluate_policy, tasks, config.workers, f"evaluate {environment}-{method}", config.threads
    )
    table = pa.concat_tables(results.values())
    target = layout.evaluations(environment, method)
    write_results(table, target)
    success = [
        f"{pc.mean(table.filter(pc.equal(table['temperature'], t))['success']).as_py():.3f} at temperature {t:g}"
        for t in config.evaluation.temperatures
    ]
    return f"{target}: {len(table)} episodes, success {', '.join(success)}. {next_command(params, 'python -m stages.compare')}"


if __name__ == "__main__":
    run(main)
