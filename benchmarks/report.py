"""What ``make bench`` prints and draws from its measurements."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure


def summary(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of name and value: medians, ratios and shares of the floor."""
    head, peak = found["headline"], found["peaks"]["float32, 1 thread"]["peak"]

    def rate(section: dict[str, Any]) -> float:
        return float(section["tokens_per_second"]["median"])

    def share(section: dict[str, Any]) -> str:
        return f"{section['flops_per_second']['median'] / peak:.0%} of the float32 matrix peak"

    lines = [
        ("float32 matrix peak, one core", f"{peak / 1e9:.0f} GFLOP/s"),
        ("rollout", f"{rate(head['rollout']):,.0f} tokens/s, {share(head['rollout'])}"),
        (
            "rollout, 5 turns, against model.generate a turn",
            f"{rate(head['rollout_5_turns']) / rate(head['rollout_5_turns_generate']):.1f} x",
        ),
        (
            "time per token, turns 2 to 10, off a line",
            f"{head['by_turn']['largest_departure_turns_2_to_10']:.0%} at most",
        ),
        ("annotation", f"{rate(head['annotation']):,.0f} tokens/s, {share(head['annotation'])}"),
        ("update", f"{rate(head['update']):,.0f} tokens/s, {share(head['update'])}"),
        (
            "update, against padded transformers",
            f"{rate(head['update']) / rate(head['update_padded_transformers']):.1f} x",
        ),
        (
            f"update, {head['update_1M']['parameters'] / 1e6:.1f} M parameters",
            f"{rate(head['update_1M']):,.0f} tokens/s, {share(head['update_1M'])}",
        ),
    ]
    for length, both in head["attention"].items():
        kernel, pytorch = both["kernel"]["median"], both["pytorch"]["median"]
        lines.append(
            (
                f"causal attention with gradients, {length} tokens",
                f"{kernel:.1f} µs a token and layer; PyTorch's {pytorch:.1f}",
            )
        )
    lines += _training_lines(found)
    if found.get("memory_megabytes"):
        used = found["memory_megabytes"]
        lines.append(("memory at its highest", ", ".join(f"{name} {value:,.0f} MB" for name, value in used.items())))
    if found.get("dvc"):
        dvc = found["dvc"]
        lines.append(
            ("DVC", f"{dvc['seconds_per_stage']:.2f} s a stage; {dvc['nothing_to_do']:.1f} s when nothing is to do")
        )
    return lines


def _training_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    for section in ("training", "training_two_at_once"):
        for label, run in found.get(section, {}).items():
            name = f"{section.replace('_', ' ')}: {label.split(' ', 1)[1]}"
            lines += [
                (
                    name,
                    f"{run['seconds_per_iteration']['median']:.2f} s an iteration, "
                    f"{run['generated_tokens_per_second']['median']:,.0f} generated tokens/s",
                ),
                (
                    "  of which weights / reference pass / tracking, checkpoint, progress",
                    f"{run['share_of_weights']:.2%} / {run['share_of_annotation']:.1%} / "
                    f"{run['share_of_tracking_checkpoint_progress']:.1%}",
                ),
            ]
    if found.get("trl"):
        theirs = found["trl"]
        for name, run in theirs.items():
            if isinstance(run, dict):
                lines.append(
                    (
                        f"TRL, {name}",
                        f"{run['seconds_per_iteration']['median']:.2f} s an iteration, "
                        f"{run['generated_tokens_per_second']['median']:,.0f} generated tokens/s",
                    )
                )
        ours = next(iter(found["training"].values()))["generated_tokens_per_second"]["median"]
        best = theirs[theirs["best"]]["generated_tokens_per_second"]["median"]
        lines.append(("one core each: ours against TRL's best", f"{ours / best:.1f} x"))
        pair = sum(run["generated_tokens_per_second"]["median"] for run in found["training_two_at_once"].values())
        both = max(
            theirs[f"{theirs['best']}, two threads"]["generated_tokens_per_second"]["median"],
            2 * theirs[f"{theirs['best']}, beside another"]["generated_tokens_per_second"]["median"],
        )
        lines.append(("two cores each: two of our trainings against the better of TRL's ways", f"{pair / both:.1f} x"))
    return lines


def bench_text(found: dict[str, Any]) -> str:
    """The summary as two columns."""
    lines = summary(found)
    width = max(len(name) for name, _ in lines)
    return "".join(f"{name:<{width}}  {value}\n" for name, value in lines)


def bench_figure(found: dict[str, Any]) -> Figure:
    """Shares of the floor, time by phase, and scaling along four axes."""
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
    axes[0, 2].plot(turns["context"], turns["line"], label="line through turns 2 to 10")
    axes[0, 2].set(title="Sampling, turn by turn", xlabel="tokens of context", ylabel="µs per token", ylim=(0, None))
    axes[0, 2].legend()
    scaling = found.get("scaling", {})
    for axis, (key, label) in zip(
        axes[1],
        (("batch", "episodes at once"), ("context", "tokens per sequence"), ("model", "parameters")),
        strict=True,
    ):
        points = scaling.get(key, {})
        if key == "model":
            at = [point["parameters"] for point in points.values()]
        else:
            at = [int(k) for k in points]
        share = [point["flops_per_second"]["median"] / peak * 100 for point in points.values()]
        axis.plot(at, share, "o-")
        axis.set(xscale="log", xlabel=label, ylabel="percent of the matrix peak", ylim=(0, 100))
        axis.set_xticks(at, [f"{value:,.0f}" if value < 1e5 else f"{value / 1e6:.1f} M" for value in at])
        axis.minorticks_off()
        axis.set_title("Rollout" if key == "batch" else "Update")
    return figure
