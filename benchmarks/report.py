"""What ``make bench`` prints and draws from its measurements.

A ratio's spread comes from the extremes of both sides' repetitions: the least over the most, and the most over the least.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

EXTREMES = {"median": "median", "least": "most", "most": "least"}
"""Which of the other side's values a ratio's median, least and most are over."""


def quotient(above: dict[str, Any], below: dict[str, Any]) -> dict[str, float]:
    """Median, least and most of a ratio."""
    return {key: above[key] / below[other] for key, other in EXTREMES.items()}


def times(above: dict[str, Any], below: dict[str, Any]) -> str:
    """A ratio and its spread in words."""
    found = quotient(above, below)
    return f"{found['median']:.1f} x ({found['least']:.1f} to {found['most']:.1f})"


def percent(above: dict[str, Any], whole: float) -> str:
    """A share of a fixed number, and its spread, in words."""
    return f"{above['median'] / whole:.0%} ({above['least'] / whole:.0%} to {above['most'] / whole:.0%})"


def together(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The sum of what ran side by side."""
    return {key: sum(run[key] for run in runs) for key in EXTREMES}


def summary(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of name and value: medians, ratios and shares of the floor, of those sections that were measured."""
    lines = []
    if found.get("machine"):
        lines.append(("processor", f"{found['machine']['processor']}; kernels: {found['machine']['kernels']}"))
    if found.get("headline") and found.get("peaks"):
        lines += _headline_lines(found["headline"], found["peaks"]["float32, 1 thread"]["peak"])
    threads = {int(key): value for key, value in found.get("scaling", {}).get("threads", {}).items()}
    if threads:
        ratios = [
            f"{name} {times(threads[2][name]['tokens_per_second'], threads[1][name]['tokens_per_second'])}"
            for name in ("update", "rollout")
        ]
        lines.append(("two threads against one", ", ".join(ratios)))
    for section in ("training", "training_two_at_once"):
        lines += _training_lines(section, found.get(section) or {})
    if found.get("trl"):
        lines += _trl_lines(found["trl"], found.get("training"), found.get("training_two_at_once"))
    for threads, own in (found.get("language_model") or {}).items():
        lines += _language_model_lines(threads, own)
    if found.get("memory_megabytes"):
        used = found["memory_megabytes"]
        lines.append(("memory at its highest", ", ".join(f"{name} {value:,.0f} MB" for name, value in used.items())))
    if found.get("dvc"):
        dvc = found["dvc"]
        lines.append(
            ("DVC", f"{dvc['seconds_per_stage']:.2f} s a stage; {dvc['nothing_to_do']:.1f} s when nothing is to do")
        )
    if found.get("gpu"):
        lines += _gpu_lines(found["gpu"])
    peaks = {f"matrix peak, {name}": peak.get("skipped") for name, peak in (found.get("peaks") or {}).items()}
    skipped = {name.replace("_", " "): reason for name, reason in found.get("skipped", {}).items()}
    lines += [(name, f"skipped: {reason}") for name, reason in (peaks | skipped).items() if reason]
    return lines


def _headline_lines(head: dict[str, Any], peak: float) -> list[tuple[str, str]]:
    def speed(name: str) -> str:
        section = head[name]
        share = percent(section["flops_per_second"], peak)
        return f"{section['tokens_per_second']['median']:,.0f} tokens/s, {share} of the float32 matrix peak"

    def against(ours: str, theirs: str) -> str:
        return times(head[ours]["tokens_per_second"], head[theirs]["tokens_per_second"])

    lines = [
        ("float32 matrix peak, one core", f"{peak / 1e9:.0f} GFLOP/s"),
        ("rollout", speed("rollout")),
        ("rollout, 5 turns, against model.generate a turn", against("rollout_5_turns", "rollout_5_turns_generate")),
        (
            "time per token, turns 2 to 10, off a line fitted to them",
            f"{head['by_turn']['largest_departure_turns_2_to_10']:.0%} at most",
        ),
        ("annotation", speed("annotation")),
        ("update", speed("update")),
        ("update, against padded transformers", against("update", "update_padded_transformers")),
        (f"update, {head['update_1M']['parameters'] / 1e6:.1f} M parameters", speed("update_1M")),
    ]
    for length, both in sorted(head["attention"].items(), key=lambda item: int(item[0])):
        kernel, pytorch = both["kernel"], both["pytorch"]
        lines.append(
            (
                f"causal attention with gradients, {length} tokens",
                f"{kernel['median']:.1f} µs a token and layer; PyTorch's {pytorch['median']:.1f}, "
                f"{times(pytorch, kernel)}",
            )
        )
    return lines


def _training_lines(section: str, runs: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    for label, run in runs.items():
        lines += [
            (f"{section.replace('_', ' ')}: {label.split(' ', 1)[1]}", _iteration(run)),
            (
                "  of which weights / reference pass / tracking, checkpoint, progress",
                f"{run['share_of_weights']:.2%} / {run['share_of_annotation']:.1%} / "
                f"{run['share_of_tracking_checkpoint_progress']:.1%}",
            ),
        ]
        trained = run.get("trained_tokens_per_second_of_update")
        if trained:
            lines.append(("  trained tokens/s of the update phase alone", f"{trained['median']:,.0f}"))
    return lines


def _iteration(run: dict[str, Any]) -> str:
    return (
        f"{run['seconds_per_iteration']['median']:.2f} s an iteration, "
        f"{run['generated_tokens_per_second']['median']:,.0f} generated tokens/s"
    )


def _trl_lines(
    theirs: dict[str, Any], alone: dict[str, Any] | None, pair: dict[str, Any] | None
) -> list[tuple[str, str]]:
    generated, trained = "generated_tokens_per_second", "trained_tokens_per_second_outside_generation"
    lines = [(f"TRL, {name}", _iteration(run)) for name, run in theirs.items() if isinstance(run, dict)]
    best = theirs[theirs["best"]]
    if alone:
        ours = next(iter(alone.values()))
        lines.append(("one core each: ours against TRL's best", times(ours[generated], best[generated])))
        if trained in ours:
            # What trl_peer.py calls the update is an iteration less its generation.
            other = best["trained_tokens_per_second_of_update"]
            lines.append(
                (
                    "  trained tokens/s, generation left out",
                    f"{ours[trained]['median']:,.0f} against {other['median']:,.0f}, {times(ours[trained], other)}",
                )
            )
    if pair:
        ways = (
            theirs[f"{theirs['best']}, two threads"][generated],
            together([theirs[f"{theirs['best']}, beside another"][generated]] * 2),
        )
        both = together([run[generated] for run in pair.values()])
        better = max(ways, key=lambda way: float(way["median"]))
        lines.append(
            ("two cores each: two of our trainings against the better of TRL's ways", times(both, better)),
        )
    return lines


def _language_model_lines(threads: str, own: dict[str, Any]) -> list[tuple[str, str]]:
    update, decoding = own["update"], own["decoding"]
    on = f"{update['parameters'] / 1e6:,.0f} M parameters, {threads} core{'s' * (threads != '1')}"
    return [
        (
            f"{name}, {on}",
            f"{part['tokens_per_second']['median']:,.0f} tokens/s, {percent(part['flops_per_second'], own['peak'])} of "
            f"{own['peak'] / 1e9:.0f} GFLOP/s",
        )
        for name, part in ((f"decoding {decoding['episodes']} episodes", decoding), ("update", update))
    ]


def _gpu_lines(gpu: dict[str, Any]) -> list[tuple[str, str]]:
    update, decoding = gpu["update"], gpu["decode_share_of_weight_reading_floor"]
    size = f"{update['parameters'] / 1e6:,.0f} M parameters"
    return [
        (f"{gpu['device']}, {gpu['dtype']} matrix peak", f"{gpu['matrix_peak'] / 1e12:.1f} TFLOP/s"),
        ("  memory, read and written", f"{gpu['bandwidth'] / 1e9:,.0f} GB/s"),
        (
            f"  update, {size}",
            f"{update['tokens_per_second']['median']:,.0f} tokens/s, "
            f"{percent(update['flops_per_second'], gpu['matrix_peak'])} of the matrix peak",
        ),
        (
            f"  decoding, {size}, {gpu['decode_slots']} at once",
            f"{gpu['decode_tokens_per_second']['median']:,.0f} tokens/s; reading the weights takes "
            f"{percent(decoding, 1.0)} of the time",
        ),
    ]


def bench_text(found: dict[str, Any]) -> str:
    """The summary as two columns."""
    lines = summary(found)
    width = max((len(name) for name, _ in lines), default=0)
    return "".join(f"{name:<{width}}  {value}\n" for name, value in lines)


def bench_figure(found: dict[str, Any]) -> Figure:
    """Shares of the floor, time by phase, and scaling along three axes."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    head, peak = found["headline"], found["peaks"]["float32, 1 thread"]["peak"]
    names = {"rollout": "rollout", "annotation": "annotation", "update": "update", "update_1M": "update, 1.1 M"}
    shares = [head[key]["flops_per_second"]["median"] / peak * 100 for key in names]
    axes[0, 0].barh(list(names.values()), shares)
    axes[0, 0].set(title="Share of the float32 matrix peak", xlabel="percent", xlim=(0, 100))
    axes[0, 0].invert_yaxis()
    if found.get("training"):
        phases = next(iter(found["training"].values()))["phases"]
        shown = {name: value["median"] for name, value in phases.items() if value["median"] > 1e-3}
        axes[0, 1].barh(list(shown), list(shown.values()))
        axes[0, 1].set(title="One iteration of GRPO by phase", xlabel="seconds")
        axes[0, 1].invert_yaxis()
    turns = head["by_turn"]
    axes[0, 2].plot(turns["context"], turns["microseconds_per_token"], "o", label="measured")
    axes[0, 2].plot(turns["context"], turns["line"], label="line fitted to turns 2 to 10")
    axes[0, 2].set(title="Sampling, turn by turn", xlabel="tokens of context", ylabel="µs per token", ylim=(0, None))
    axes[0, 2].legend()
    scaling = found.get("scaling", {})
    for axis, (key, label) in zip(
        axes[1],
        (("batch", "episodes at once"), ("context", "tokens per sequence"), ("model", "parameters")),
        strict=True,
    ):
        # In JSON the keys are words, in the order of the alphabet.
        points = sorted(
            (point["parameters"] if key == "model" else int(name), point["flops_per_second"]["median"] / peak * 100)
            for name, point in scaling.get(key, {}).items()
        )
        at = [place for place, _ in points]
        axis.plot(at, [share for _, share in points], "o-")
        axis.set(xscale="log", xlabel=label, ylabel="percent of the matrix peak", ylim=(0, 100))
        axis.set_xticks(at, [f"{value:,.0f}" if value < 1e5 else f"{value / 1e6:.1f} M" for value in at])
        axis.minorticks_off()
        axis.set_title("Rollout" if key == "batch" else "Update")
    return figure
