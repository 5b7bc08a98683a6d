"""Measure the Action Bottleneck, and draw it: reports/bottleneck/<environment>."""

from pipeline.commands.cli import EnvironmentName, ParamsFile, configured, make_alone, next_command, run
from pipeline.trajectories.table import read


def main(environment: EnvironmentName, params: ParamsFile = "params.yaml") -> str:
    config, layout, params = configured(params, environment)
    make_alone(layout, f"bottleneck {environment}")
    annotated = read(layout.annotated(environment))
    from pipeline.analysis.bottleneck import bottleneck
    from pipeline.progress.display import doing
    from pipeline.report.bottleneck_figures import draw_bottleneck
    from pipeline.workspace.files import write_record

    doing("measuring the Action Bottleneck")
    diagnostics = bottleneck(annotated, config.bottleneck.resamples)
    folder = layout.bottleneck(environment)
    write_record(folder / "bottleneck.json", diagnostics)
    doing("drawing the Action Bottleneck")
    draw_bottleneck(annotated, diagnostics, folder)
    rho = {key: diagnostics[key]["spearman"] for key in ("action", "reasoning", "response")}
    shown = ", ".join(f"{key} {value:+.3f}" if value is not None else f"{key} undefined" for key, value in rho.items())
    return (
        f"{folder}: {diagnostics['groups']} groups; Spearman of mean energy with return variance: {shown}. "
        f"{next_command(params, 'python -m stages.train', environment=environment, method=next(iter(config.methods)))}"
    )


if __name__ == "__main__":
    run(main)
