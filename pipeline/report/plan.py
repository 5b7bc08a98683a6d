"""What `actfocus plan` says: the answer, then the phases, the schedules, the memory and what it all rests on."""

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.planning.constants import Miss
from pipeline.planning.plan import GAIN, Fleet, Plan, comparison_hours
from pipeline.planning.schedules import Schedule
from pipeline.planning.work import Work
from pipeline.progress.display import duration
from pipeline.report.tables import aligned
from pipeline.settings.params import Config

NAMES: dict[Schedule, str] = {
    "colocated": "colocated",
    "disaggregated": "disaggregated",
    "ahead": "one step ahead",
}
AIM = 0.2
"""Largest relative error that a prediction of a point left out should have."""


def plan_text(config: Config, plans: Mapping[str, Plan], fleet: Fleet, assumed: Sequence[str]) -> str:
    """The answer in one line, then what it rests on; the phases are those of the environment that takes longest.

    ``assumed`` are sentences on what is not known yet.
    """
    name = max(plans, key=lambda own: sum(plans[own].seconds.values()))
    plan, own = plans[name], plans[name].iteration
    lengths, shape = own.lengths, own.shape
    lines = [
        _answer(config, plans, fleet, plan),
        f"policy: {shape.name}, {shape.parameters / 1e6:.4g} M parameters, {str(shape.dtype).removeprefix('torch.')}"
        f"{'' if shape.lora is None else f', adapters of {shape.trained / 1e6:.3g} M'}",
        f"{name}, {own.method}: an iteration of {len(lengths)} episodes, each of {lengths.whole.mean():.0f} tokens, "
        f"{lengths.sampled.mean():.0f} of them sampled; {own.slots} at once; {own.budget} tokens a forward pass"
        f"{', activations computed again in the backward pass' if own.recomputes else ''}",
        *(f"assumed: {sentence}" for sentence in assumed),
        "",
        f"phases on one device ({fleet.device.name})",
        aligned(_phases(plan)),
        "",
        f"schedules on {fleet.devices} device{'s' * (fleet.devices > 1)}, episode lengths with a spread of {plan.spread:.2g}",
        aligned(_schedules(plan)),
        "",
        f"memory of a device, of {_gigabytes(fleet.device.memory / fleet.workers)}",
        aligned(_memory(plan)),
    ]
    others = [f"{other}: {_iteration(plans[other])} an iteration" for other in plans if other != name]
    return "\n".join([*lines, *(["", *others] if others else [])])


def _answer(config: Config, plans: Mapping[str, Plan], fleet: Fleet, plan: Plan) -> str:
    many = f"{fleet.devices} x {fleet.device.name}" if fleet.devices > 1 else fleet.device.name
    if any(own.recommended is None for own in plans.values()):
        least = min(_largest(plan, kind) for kind in plan.fits)
        return (
            f"does not fit on {many}: {_gigabytes(least)} on a device, of {_gigabytes(fleet.device.memory / fleet.workers)}; "
            "more devices or larger ones, train.lora, smaller tokens_per_forward or rollout.cache_gigabytes"
        )
    assert plan.recommended is not None
    parts = comparison_hours(config, plans, fleet)
    shown = ", ".join(f"{part} {duration(3600 * spent)}" for part, spent in parts.items() if spent)
    return (
        f"{NAMES[plan.recommended]} on {many}: about {duration(3600 * sum(parts.values()))} for the whole comparison "
        f"({shown}); {_gigabytes(_largest(plan, plan.recommended))} on a device at its highest"
        f"{', with fsdp2' if plan.sharded[plan.recommended] else ''}; {_why(plan)}"
    )


def _why(plan: Plan) -> str:
    """What speaks for the schedule that is recommended."""
    chosen, ahead = plan.recommended, plan.runs.get("ahead")
    fits = [kind for kind in plan.runs if plan.fits[kind]]
    others = [kind for kind in fits if kind not in (chosen, "ahead")]
    if ahead is None:
        return "one device does everything in turn"
    first = min((plan.runs[kind].seconds for kind in fits if kind != "ahead"), default=None)
    if first is None:
        return "no other schedule fits"
    saved = 1 - ahead.seconds / first
    if chosen == "ahead":
        return f"it saves {saved:.0%} of an iteration, at the price of weights that are one older"
    if not plan.fits["ahead"]:
        return "one step ahead does not fit"
    said = f"one step ahead would save {max(saved, 0):.0%}, and less than {GAIN:.0%} is not worth older weights"
    return said if others or chosen == "colocated" else f"colocated does not fit; {said}"


def _phases(plan: Plan) -> list[list[str]]:
    total, everything = sum(plan.seconds.values()), Work().plus(*plan.work.values())
    rows = [["phase", "seconds", "share", "TFLOP", "GB moved"]]
    for phase, seconds in plan.seconds.items():
        if seconds or any(plan.work[phase]):
            rows.append([phase, _seconds(seconds), f"{seconds / total:.0%}", *_amounts(plan.work[phase])])
    return [*rows, ["sum", _seconds(total), "", *_amounts(everything)]]


def _amounts(work: Work) -> tuple[str, ...]:
    scaled = (work.flops / 1e12, work.bytes / 1e9)
    return tuple(f"{amount:,.0f}" if amount >= 100 else f"{amount:.3g}" for amount in scaled)


def _schedules(plan: Plan) -> list[list[str]]:
    rows = [["schedule", "sample", "train", "an iteration", "busy", "fits"]]
    for kind, run in plan.runs.items():
        fit = "no" if not plan.fits[kind] else "with fsdp2" if plan.sharded[kind] else "yes"
        mark = " <" if kind == plan.recommended else ""
        sides = [str(run.sampling), "the same" if kind == "colocated" else str(run.training)]
        rows.append([NAMES[kind] + mark, *sides, _seconds(run.iteration), f"{run.busy:.0%}", fit])
    return rows


def _memory(plan: Plan) -> list[list[str]]:
    kind: Schedule = plan.recommended or "colocated"
    holding = plan.holds[kind]
    sides = (
        {"": holding.both} if kind == "colocated" else {"sampling: ": holding.sampling, "training: ": holding.training}
    )
    rows = [[side + item, _gigabytes(amount)] for side, part in sides.items() for item, amount in part.items()]
    return [*rows, *([side + "sum", _gigabytes(sum(part.values()))] for side, part in sides.items())]


def _largest(plan: Plan, kind: Schedule) -> float:
    holding = plan.holds[kind]
    parts = (holding.both,) if kind == "colocated" else (holding.sampling, holding.training)
    return max(sum(part.values()) for part in parts)


def _iteration(plan: Plan) -> str:
    return _seconds(plan.runs[plan.recommended or "colocated"].iteration)


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s"


def _gigabytes(amount: float) -> str:
    return f"{amount / 1e9:.3g} GB"


def trained_text(environment: str, measured: Mapping[str, float], foretold: Mapping[str, float]) -> str:
    """What trainings that are there have taken, beside what is predicted of them; seconds of an iteration by method."""
    shown = (
        f"{method} {_seconds(own)}, predicted {_seconds(foretold[method])} ({foretold[method] / own - 1:+.0%})"
        for method, own in measured.items()
    )
    return f"{environment}, an iteration of the trainings in data/timings: {'; '.join(shown)}"


def fit_text(where: str, misses: Sequence[Miss], larger: Sequence[Miss]) -> str:
    """How well constants that were fitted on measurements predict iterations that were left out of the fit."""
    lines = [
        f"{where}: {_judged(misses)} on iterations left out one by one; {_judged(larger)} on those of the largest policy, "
        "from smaller ones alone"
    ]
    rows = [["left out", "measured", "predicted", "error", "worst phase"]]
    for miss in misses:
        measured = {name: times for name, times in miss.by_name.items() if times[0] > 0.05 * miss.measured}
        worst = max(measured, key=lambda name: abs(measured[name][1] / measured[name][0] - 1))
        off = measured[worst][1] / measured[worst][0] - 1
        rows.append(
            [miss.point, _seconds(miss.measured), _seconds(miss.predicted), f"{miss.error:+.0%}", f"{worst} {off:+.0%}"]
        )
    return "\n".join([*lines, aligned(rows)])


def _judged(misses: Sequence[Miss]) -> str:
    errors = np.array([abs(miss.error) for miss in misses])
    if not len(errors):
        return "not judged"
    within = int((errors <= AIM).sum())
    return f"{within} of {len(errors)} within {AIM:.0%} (median {np.median(errors):.0%}, largest {errors.max():.0%})"
