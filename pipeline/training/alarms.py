"""Which alarms an iteration raises: pure functions of a training's learning curve; thresholds are ``train.alarms``.

An alarm warns. It stands in the iteration's row, from where progress, MLflow, the report and the comparison have it.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from pipeline.settings.alarms import PREFIX, SAID
from pipeline.settings.params import Config
from pipeline.training.budget import Rows

RECENT = 3
"""Iterations whose mean is looked at, or that must all be so; fewer where there have not been so many yet."""
LEAST_EXPECTED = 5.0
"""So many successes there must have been among the recent ones at the rate of before, for their lack to be no chance."""
KL = ("kl_reference", "kl_update_action", "kl_update_reasoning", "kl_behaviour")
STOOD_STILL = "updates", "non_finite_losses", "skipped_steps"


def alarms(curve: Rows, config: Config) -> dict[str, float]:
    """What a curve's last row is an alarm of: by name (see ``Alarms``), with what was measured."""
    found = {name: RULES[name](curve, limit, config) for name, limit in config.train.alarms if limit is not None}
    return {name: value for name, value in found.items() if value is not None}


def raised(row: Mapping[str, float]) -> dict[str, float]:
    """The alarms that stand in a row of a learning curve."""
    return {key.removeprefix(PREFIX): value for key, value in row.items() if key.startswith(PREFIX)}


def alarm_text(curve: Rows) -> str:
    """All that a training has alarmed of, in words: the first iteration of each, and what was measured there; or nothing."""
    first: dict[str, str] = {}
    for number, row in enumerate(curve):
        for name, value in raised(row).items():
            first.setdefault(name, f"{SAID[name].format(value)} (iteration {number})")
    return ", ".join(first.values())


def _success(curve: Rows, share: float, config: Config) -> float | None:
    """Groups are counted, as episodes of one initial state succeed together."""
    validated = [row for row in curve if "validation_success" in row]
    fallen = _fallen([row["success"] for row in curve], share, config.rollout.groups, RECENT)
    if fallen is None and "validation_success" in curve[-1] and "validation_success_before" in curve[0]:
        series = [curve[0]["validation_success_before"], *(row["validation_success"] for row in validated)]
        fallen = _fallen(series, share, config.evaluation.validation_states, 1)
    return fallen


def _valid_actions(curve: Rows, share: float, config: Config) -> float | None:
    """Episodes are counted. What is validated has the first iteration's rate to be compared with."""
    rate, validated = "valid_action_rate", "validation_valid_action_rate"
    fallen = _fallen([row[rate] for row in curve], share, curve[-1]["episodes"], RECENT)
    if fallen is None and validated in curve[-1]:
        series = [curve[0][rate], *(row[validated] for row in curve if validated in row)]
        episodes = config.evaluation.validation_states * config.evaluation.validation_rollouts
        fallen = _fallen(series, share, episodes, 1)
    return fallen


def _fallen(series: Sequence[float], share: float, units: float, recent: int) -> float | None:
    """The mean of the recent numbers, where it is below a share of the highest such mean before, and not by chance.

    Args:
        series: rates in [0, 1], the last one the latest.
        share: see above.
        units: of how many things each of them is the rate.
        recent: how many numbers a mean is of, at most.
    """
    count = min(recent, len(series) - 1)
    if not count:
        return None
    earlier, now = series[:-count], mean(series[-count:])
    width = min(recent, len(earlier))
    # By itself the first, which is the reference policy's: in a mean with those behind a collapse it would be lost.
    before = max([earlier[0], *(mean(earlier[i : i + width]) for i in range(len(earlier) - width + 1))])
    return now if now < share * before and before * units * count >= LEAST_EXPECTED else None


def _kl(curve: Rows, limit: float, _: Config) -> float | None:
    highest = max((curve[-1][key] for key in KL if key in curve[-1]), default=0.0)
    return highest if highest > limit else None


def _entropy(curve: Rows, factors: tuple[float, float], _: Config) -> float | None:
    return _beyond([row["entropy"] for row in curve], *factors)


def _length(curve: Rows, factors: tuple[float, float], _: Config) -> float | None:
    return _beyond([row["tokens_per_episode"] / row["turns_per_episode"] for row in curve], *factors)


def _beyond(series: Sequence[float], low: float, high: float) -> float | None:
    """The latest number, where it is not between two multiples of the first one."""
    return None if low * series[0] <= series[-1] <= high * series[0] or series[0] <= 0 else series[-1]


def _repetition(curve: Rows, limit: float, _: Config) -> float | None:
    return _risen([row["repetition"] for row in curve], limit)


def _cut(curve: Rows, limit: float, _: Config) -> float | None:
    return _risen([row["cut_rate"] for row in curve], limit)


def _risen(series: Sequence[float], limit: float) -> float | None:
    """The latest share, where it is above a limit and above twice the first one."""
    return series[-1] if series[-1] > max(limit, 2 * series[0]) else None


def _steps(curve: Rows, share: float, _: Config) -> float | None:
    """An iteration without a step counts, too. While only heads learn, the policy's norm is 0 and nothing has vanished."""
    norms = [row.get("gradient_norm") if _stepped(row) else None for row in curve]
    largest = max((norm for norm in norms if norm is not None), default=0.0)
    vanished = [norm is None or norm < share * largest for norm in norms[-RECENT:]]
    return norms[-1] or 0.0 if len(curve) >= RECENT and all(vanished) else None


def _stepped(row: Mapping[str, float]) -> bool:
    """Whether any update of an iteration has moved the policy."""
    updates, non_finite, skipped = (row.get(key, 0.0) for key in STOOD_STILL)
    return updates > non_finite + skipped


def _skipped(curve: Rows, share: float, _: Config) -> float | None:
    left_out = curve[-1].get("non_finite_losses", 0.0) / max(1.0, curve[-1].get("updates", 0.0))
    return left_out if left_out > share else None


def _sampler(curve: Rows, limit: float, _: Config) -> float | None:
    apart = curve[-1].get("sampler_difference", 0.0)
    return apart if apart > limit else None


def _heads(curve: Rows, limit: float, _: Config) -> float | None:
    """Before its first update a head has foreseen nothing, and need not have."""
    recent = curve[1:][-RECENT:]
    explained = [[value for key, value in row.items() if key.endswith("_explained_variance")] for row in recent]
    errors = [1 - min(values) for values in explained if values]
    return errors[-1] if errors and min(errors) > limit else None


RULES: Mapping[str, Callable[[Rows, Any, Config], float | None]] = {
    "success": _success,
    "valid_actions": _valid_actions,
    "kl": _kl,
    "entropy": _entropy,
    "repetition": _repetition,
    "length": _length,
    "cut": _cut,
    "steps": _steps,
    "skipped": _skipped,
    "sampler": _sampler,
    "heads": _heads,
}
"""By the name of an alarm, what the last row has that is beyond its threshold, which is given; None where nothing is."""
