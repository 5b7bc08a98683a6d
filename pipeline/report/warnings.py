"""What a reader should know before believing a comparison; one line each."""

from collections.abc import Mapping
from typing import Any

from pipeline.analysis.comparison import Row, headline
from pipeline.analysis.curves import Curves
from pipeline.report.differences import seeds_advice
from pipeline.settings.params import Config

KL_DRIFT = 0.1
"""Largest relative difference of a control's KL per update on action tokens from its method's that passes without a
warning."""
SHORTFALL = 0.05
"""Largest share of ``train.tokens`` that may be left at a training's end without a warning."""


def comparison_warnings(
    config: Config, curves: Mapping[tuple[str, str], Curves], comparison: Mapping[str, Any]
) -> list[str]:
    """Few seeds, trainings of unequal length, step sizes that do not match, and the like; one line each."""
    found = list[str]()
    if config.rollout.engine.kind == "vllm":
        found.append(
            "vLLM sampled, with random numbers of its own: the same params give other episodes when they are run again"
        )
    for environment in config.environments:
        own = headline(comparison)[environment]
        few = [one for one in comparison["hypotheses"] if one["environment"] == environment and one["verdict"] is None]
        if few:
            least = min(one["seeds"] for one in few)
            named = ", ".join(dict.fromkeys(one["method"] for one in few))
            found.append(
                f"{environment}: {named}: as few as {least} paired seed{'s' * (least > 1)}: "
                f"{seeds_advice(comparison['family']['size'], comparison['family']['kind'])} "
                "(of a sweep's confirmation: `sweep.confirm_seeds`)"
            )
        for name in config.methods:
            texts = _method_warnings(config, own, name) + _length_warnings(config, curves[environment, name])
            found += [f"{environment}: {name}: {text}" for text in texts]
    return found


def _length_warnings(config: Config, curves: Curves) -> list[str]:
    """Trainings that were not as long as they should have been: equally, or as their tokens allow."""
    plan = config.train
    if plan.tokens is None:
        lengths = sorted({len(rows) for rows in curves.values()})
        return [f"seeds were trained for different numbers of iterations: {lengths}"] if len(lengths) > 1 else []
    ended = {seed: sum(row["tokens"] for row in rows) for seed, rows in curves.items() if len(rows) >= plan.iterations}
    short = {seed: tokens for seed, tokens in ended.items() if tokens < (1 - SHORTFALL) * plan.tokens}
    if not short:
        return []
    return [
        f"train.iterations ({plan.iterations}) ended seed{'s' * (len(short) > 1)} {', '.join(short)} after as few as "
        f"{min(short.values()):.0f} sampled tokens of train.tokens ({plan.tokens}): raise train.iterations to compare at "
        "equal tokens"
    ]


def _method_warnings(config: Config, rows: Mapping[str, Row], method: str) -> list[str]:
    row, found = rows[method], []
    uniform, control = row["uniform"], row["control"]
    if row["non_finite_losses"]:
        found.append(f"{row['non_finite_losses']} updates had a non-finite loss or gradient and were skipped")
    if uniform and not control:
        found.append(f"no matched control in compare.control: a difference to {uniform} may be one of step size")
    for other in filter(None, (uniform, control)):
        if config.methods[method].regulariser != config.methods[other].regulariser:
            found.append(f"its entropy or KL terms differ from those of {other}")
    for kind in ("reference", "uniform", "control"):
        paired = row[f"difference_to_{kind}_seeds"]
        if paired is not None and paired < row["seeds"]:
            found.append(f"only {paired} of {row['seeds']} seeds are paired with {row.get(kind, kind)}")
    matched = row.get("matched")
    if matched and matched["off"] > KL_DRIFT:
        found.append(
            f"at no learning rate that was tried does an update move action tokens as one of {matched['matched_to']} does: "
            f"KL {matched['found']:.3g} at {matched['learning_rate']:g}, {matched['off']:.0%} off {matched['wanted']:.3g}"
        )
    if control:
        mine, theirs = (rows[name]["kl_update_action_first3"] for name in (method, control))
        if mine is None or theirs is None:
            found.append(f"KL per update on action tokens is not known for it and its control {control}")
        elif abs(theirs - mine) > KL_DRIFT * mine:
            advice = "a difference may be one of step size"
            if config.methods[control].matched_to is None:
                advice += f"; a control with `matched_to: {method}` has a learning rate that is found"
            found.append(
                f"KL per update on action tokens over the first 3 iterations is {mine:.3g}, its control's {theirs:.3g} "
                f"({control}, off by more than {KL_DRIFT:.0%}): {advice}"
            )
    return found
