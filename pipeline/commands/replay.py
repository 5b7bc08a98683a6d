"""What would reweighting change? Gradients without new rollouts.

Those of the annotated table, under a grid of token weights: each of its options may be repeated.
"""

from typing import Annotated, get_args

from typer import Option

from pipeline.commands.cli import FirstEnvironment, ParamsFile, configured, make_alone

GRID = ([0.0, 0.1, 0.5, 1.0], [0.0, 0.5, 2.0], [1.0], ["reference_energy", "reference_entropy"])
WHOSE = "Whose advantages and tag weights are used. Default: the first with ActFocus weights and no critic."


def main(
    params: ParamsFile = "params.yaml",
    environment: FirstEnvironment = None,
    method: Annotated[str | None, Option(metavar="NAME", help=WHOSE)] = None,
    groups: Annotated[int, Option(min=1, metavar="N", help="Groups of the table that are used.")] = 128,
    alpha: Annotated[
        list[float], Option(min=0, metavar="X", help="Weight of reasoning tokens; repeat for more.")
    ] = GRID[0],
    beta: Annotated[
        list[float], Option(min=0, metavar="X", help="Strength of redistribution; repeat for more.")
    ] = GRID[1],
    tau: Annotated[list[float], Option(min=1e-3, metavar="X", help="Temperature of it; repeat for more.")] = GRID[2],
    signal: Annotated[list[str], Option(metavar="NAME", help="What redistributes; repeat for more.")] = GRID[3],
) -> str:
    config, layout, _ = configured(params, environment, method)
    make_alone(layout, "replay")
    import torch
    import transformers.models.auto.modeling_auto  # noqa: F401  (imported before the processes fork)

    from pipeline.analysis.replay import grid, replay
    from pipeline.progress.display import doing
    from pipeline.report.replay_figures import draw_replay, replay_text
    from pipeline.settings.advantage import CriticAdvantage
    from pipeline.settings.weight import ActFocusWeight, Signal
    from pipeline.trajectories.table import read
    from pipeline.trajectories.trajectory import TrajectoryError
    from pipeline.workspace.errors import UserError
    from pipeline.workspace.files import write_json, write_text

    if unknown := [name for name in signal if name not in get_args(Signal)]:
        raise UserError(f"--signal: {unknown[0]!r} is not allowed; allowed: {', '.join(get_args(Signal))}")
    torch.set_num_threads(1)  # this process computes before others are forked, which would not have its threads
    environment = environment or next(iter(config.environments))
    usable = [name for name, row in config.methods.items() if not isinstance(row.advantage, CriticAdvantage)]
    weighted = [name for name in usable if isinstance(config.methods[name].weight, ActFocusWeight)]
    method = method or next(iter([*weighted, *usable, *config.methods]))
    table = layout.annotated(environment)
    doing("reading the table")
    trajectories = read(table)
    if not trajectories.annotated:
        raise TrajectoryError(f"{table}: not annotated; run `python -m stages.annotate --environment {environment}`")
    points = grid(alpha, beta, tau, signal)
    result = replay(config, layout.policy, trajectories, method, points, groups)
    folder = layout.replay(environment)
    doing("drawing")
    text = replay_text(result)
    write_json(folder / "replay.json", result)
    write_text(folder / "replay.txt", text)
    draw_replay(result, folder / "replay")
    return f"{text}\n{folder}: replay.json, replay.txt, replay.png. Next: open replay.png, or `make repro` to train"
