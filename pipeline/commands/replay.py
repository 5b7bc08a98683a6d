"""What would reweighting change? Gradients of the annotated table under a grid of token weights, without new rollouts."""

from __future__ import annotations

import argparse
from typing import get_args

from pipeline.commands.command import configured, layout_of, run


def main() -> str:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--params", default="params.yaml", help="params file (default: params.yaml)")
    parser.add_argument("--environment", help="default: the first one")
    parser.add_argument(
        "--method",
        help="whose advantages and tag weights are used (default: the first with ActFocus weights and no critic)",
    )
    parser.add_argument("--groups", type=int, default=128, help="groups of the table that are used (default: 128)")
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.0, 0.1, 0.5, 1.0])
    parser.add_argument("--beta", type=float, nargs="+", default=[0.0, 0.5, 2.0])
    parser.add_argument("--tau", type=float, nargs="+", default=[1.0])
    parser.add_argument("--signal", nargs="+", default=["reference_energy", "reference_entropy"])
    arguments = parser.parse_args()
    from pipeline.settings.advantage import CriticAdvantage
    from pipeline.settings.weight import ActFocusWeight, Signal
    from pipeline.workspace.errors import UserError

    for name, values, least in (("alpha", arguments.alpha, 0.0), ("beta", arguments.beta, 0.0)):
        if min(values) < least:
            raise UserError(f"--{name}: {min(values):g} is not allowed; at least {least:g}")
    if min(arguments.tau) <= 0:
        raise UserError(f"--tau: {min(arguments.tau):g} is not allowed; greater than 0")
    for signal in arguments.signal:
        if signal not in get_args(Signal):
            raise UserError(f"--signal: {signal!r} is not allowed; allowed: {', '.join(get_args(Signal))}")
    config = configured(arguments)
    environment = arguments.environment or next(iter(config.environments))
    usable = [name for name, method in config.methods.items() if not isinstance(method.advantage, CriticAdvantage)]
    weighted = [name for name in usable if isinstance(config.methods[name].weight, ActFocusWeight)]
    method = arguments.method or next(iter([*weighted, *usable, *config.methods]))
    import transformers.models.auto.modeling_auto  # noqa: F401  (imported before the processes fork)

    from pipeline.analysis.replay import grid, replay
    from pipeline.progress.display import doing
    from pipeline.report.replay_figures import draw_replay, replay_text
    from pipeline.trajectories.table import read
    from pipeline.trajectories.trajectory import TrajectoryError
    from pipeline.workspace.files import write_json, write_text

    layout = layout_of(config)
    table = layout.annotated(environment)
    doing("reading the table")
    trajectories = read(table)
    if not trajectories.annotated:
        raise TrajectoryError(f"{table}: not annotated; run `python -m stages.annotate --environment {environment}`")
    points = grid(arguments.alpha, arguments.beta, arguments.tau, arguments.signal)
    result = replay(config, layout.policy, trajectories, method, points, arguments.groups)
    folder = layout.replay(environment)
    doing("drawing")
    text = replay_text(result)
    write_json(folder / "replay.json", result)
    write_text(folder / "replay.txt", text)
    draw_replay(result, folder / "replay")
    return f"{text}\n{folder}: replay.json, replay.txt, replay.png. Next: open replay.png, or `make repro` to train"


if __name__ == "__main__":
    run(main)
