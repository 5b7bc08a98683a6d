"""Predict what a comparison costs, phase by phase.

Time, memory and the schedule to choose: on a GPU of the table by its data sheet, or without --device on this machine, with
constants that are fitted on what --measure has timed. Only --measure trains: small iterations of its own, for minutes.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.cli import ParamsFile, configured

if TYPE_CHECKING:
    from pipeline.planning.lengths import Lengths
    from pipeline.planning.plan import Fleet, Plan
    from pipeline.planning.schedules import Schedule, Timeline
    from pipeline.planning.shapes import Shape
    from pipeline.settings.params import Config
    from pipeline.workspace.layout import Layout

DEVICE = "GPU by its data sheet; default: this machine, as measured."
MODEL = "Hub id or directory in place of the params file's policy."
SPREAD = "Standard deviation of episode lengths over their mean. Default: as sampled, or 0.5."
FIGURE = "Draw schedules on up to 1,024 devices into reports/plan/."


def main(
    params: ParamsFile = "params.yaml",
    device: Annotated[str | None, typer.Option(metavar="NAME", help=DEVICE)] = None,
    count: Annotated[int, typer.Option(metavar="COUNT", help="Devices, up to 1,024.")] = 1,
    method: Annotated[str | None, typer.Option(metavar="NAME", help="Default: the one that takes longest.")] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help=MODEL)] = None,
    spread: Annotated[float | None, typer.Option(metavar="SHARE", help=SPREAD)] = None,
    figure: Annotated[bool, typer.Option("--figure", help=FIGURE)] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Time this machine first.")] = False,
) -> str:
    config, layout, params = configured(params)
    import torch

    from pipeline.planning.lengths import longest_lengths
    from pipeline.planning.measuring import recorded
    from pipeline.planning.plan import iteration_time, longest_method, make_plan, planned
    from pipeline.planning.shapes import shape_of
    from pipeline.report.plan import plan_text, trained_text
    from pipeline.workspace.errors import UserError, listed, shown

    if method is not None and method not in config.methods:
        raise UserError(f"{params}: methods: {shown(method)} is not there; allowed: {listed(config.methods)}")
    if not 1 <= count <= 1024:
        raise UserError(f"--count: {count}; allowed: 1 to 1024")
    if spread is not None and not 0 <= spread <= 10:
        raise UserError(f"--spread: {spread:g}; allowed: 0 to 10")
    torch.set_num_threads(config.threads)
    said = _measured(config) if measure else ""
    shape = shape_of(config, model)
    fleet, basis = _fleet(config, shape, device, count)
    plans, assumed = {}, [basis]
    trained, foretold = dict[str, dict[str, float]](), dict[str, dict[str, float]]()
    for environment in config.environments:
        lengths = _lengths(config, environment, layout)
        if lengths is None:
            lengths, own = longest_lengths(config, environment), 0.5
            assumed.append(f"{environment}: no episodes are annotated yet; each is taken to be as long as it may be")
        else:
            own = lengths.spread
        chosen = method or longest_method(config, environment, shape, lengths, fleet)
        iteration = planned(config, environment, chosen, shape, lengths, fleet)
        plans[environment] = make_plan(iteration, environment, fleet, own if spread is None else spread)
        trained |= {environment: recorded(layout, config, environment) if fleet.device.measured and not model else {}}
        foretold[environment] = {
            name: iteration_time(config, environment, name, shape, lengths, fleet) for name in trained[environment]
        }
    drawn = f"\n\n{_draw(layout, plans, fleet)}" if figure else ""
    held = "".join(f"\n\n{trained_text(name, own, foretold[name])}" for name, own in trained.items() if own)
    return f"{plan_text(config, plans, fleet, assumed)}{held}{drawn}{said}"


def _measured(config: "Config") -> str:
    """Time this machine, keep it, and say how well the constants predict what they were not fitted on."""
    from pipeline.planning.constants import larger_left_out, left_out
    from pipeline.planning.measuring import device_name, keep, measure, measurements
    from pipeline.report.plan import fit_text

    points = measure(config)
    keep(points, measurements())
    text = fit_text(device_name(), left_out(points), larger_left_out(points))
    return f"\n\nmeasured, {measurements()}\n{text}"


def _fleet(config: "Config", shape: "Shape", device: str | None, count: int) -> "tuple[Fleet, str]":
    """What is planned on, and in a sentence what its constants are from."""
    import torch

    from pipeline.model.memory import total_memory
    from pipeline.planning.constants import fitted
    from pipeline.planning.devices import SHEETS, measured_device, sheet_device
    from pipeline.planning.measuring import device_name, kept_points, measurements
    from pipeline.planning.plan import Fleet
    from pipeline.workspace.errors import UserError

    if device is not None:
        basis = "constants are shares of the data sheet's peaks (pipeline/planning/devices.py); nothing is measured"
        return Fleet(sheet_device(device, shape.dtype), count, False, 1), basis
    source = measurements()
    if not source.exists():
        raise UserError(
            f"--device: {device_name()} with {config.threads} threads has not been measured; run `actfocus plan --measure`, "
            f"or name one of {', '.join(SHEETS)}"
        )
    gpu, points = torch.cuda.is_available(), kept_points(source)
    memory = float(total_memory(torch.device("cuda" if gpu else "cpu")))
    found = measured_device(device_name(), memory, fitted(points))
    between = f"; between devices {found.link / 1e9:.3g} GB/s" if count > 1 else ""
    basis = f"constants are fitted on {len(points)} iterations measured here, of up to {points[-1].shape} parameters{between}"
    return Fleet(found, count, not gpu, 1 if gpu else config.workers), basis


def _lengths(config: "Config", environment: str, layout: "Layout") -> "Lengths | None":
    """Those of an iteration's episodes as the rollout stage has sampled them; None where it has not."""
    from pipeline.planning.lengths import sampled_lengths
    from pipeline.trajectories.table import read

    table, size = layout.annotated(environment), config.rollout.groups * config.rollout.group_size
    episodes = read(table) if table.exists() else None
    return None if episodes is None or len(episodes) < size else sampled_lengths(episodes.select(range(size)))


def _draw(layout: "Layout", plans: "dict[str, Plan]", fleet: "Fleet") -> Path:
    from pipeline.planning.plan import schedule
    from pipeline.report.plan_figures import draw_schedules

    name = max(plans, key=lambda own: sum(plans[own].seconds.values()))
    plan = plans[name]

    def simulated(kind: "Schedule", count: int, spread: float) -> "Timeline | None":
        return schedule(plan, fleet._replace(devices=count), kind, spread)

    shape = plan.iteration.shape
    title = f"{name}: {shape.name}, {len(plan.iteration.lengths)} episodes an iteration, {fleet.device.name}"
    return draw_schedules(simulated, plan.spread or 0.5, title, layout.reports / "plan" / "schedules")[0]
