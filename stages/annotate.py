"""Annotate the table with token energy, and measure the Action Bottleneck: data/annotated, reports/bottleneck."""

from __future__ import annotations

from pipeline.trajectory import concatenate, read
from stages.command import configured, next_command, out_folder, parse_arguments, run


def main() -> str:
    arguments = parse_arguments(__doc__, "environment")
    config = configured(arguments)
    name, out = arguments.environment, out_folder(config)
    table = read(out / "data" / "trajectories" / f"{name}.parquet")
    import transformers.models.auto.modeling_auto  # noqa: F401  (imported before the processes fork)

    from pipeline.energy.annotate import annotate_part
    from pipeline.energy.diagnostics import bottleneck
    from pipeline.files import write_json
    from pipeline.processes import run_in_processes
    from pipeline.progress import doing
    from pipeline.report.bottleneck_figures import draw_bottleneck

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
    doing("measuring the Action Bottleneck")
    diagnostics = bottleneck(annotated, config.bottleneck.resamples)
    target = out / "data" / "annotated" / f"{name}.parquet"
    annotated.write(target)
    folder = out / "reports" / "bottleneck" / name
    write_json(folder / "bottleneck.json", diagnostics)
    doing("drawing the Action Bottleneck")
    draw_bottleneck(annotated, diagnostics, folder)
    rho = {key: diagnostics[key]["spearman"] for key in ("action", "reasoning", "response")}
    shown = ", ".join(f"{key} {value:+.3f}" if value is not None else f"{key} undefined" for key, value in rho.items())
    return (
        f"{target}: {diagnostics['groups']} groups; Spearman of mean energy with return variance: {shown}. "
        f"{next_command(arguments, 'train', environment=name, method=next(iter(config.methods)))}"
    )


if __name__ == "__main__":
    run(main)
