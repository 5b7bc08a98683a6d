"""The Action Bottleneck diagnostic: whose energy tells how much the returns of a group vary?

Per group of G episodes of one initial state: the variance of the returns, and the mean energy of its response, reasoning
and action tokens; then the rank correlation of each mean with the variance over groups (arXiv 2605.14558).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from pipeline.analysis.scores import significant
from pipeline.trajectories.trajectory import REPORTED_ROLES, RESPONSE_ROLES, Role, Trajectories, TrajectoryError
from pipeline.workspace.randomness import generator

SCOPES: dict[str, tuple[Role, ...]] = {
    "action": (Role.ACTION,),
    "reasoning": (Role.REASONING,),
    "response": RESPONSE_ROLES,
}
"""The token sets whose mean energy is compared; "response" is all that the policy chose, tags included."""

LEAST_GROUPS = 3
"""A rank correlation of two points is always 1 or -1."""

_QUANTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class GroupEnergy:
    """One entry per group, in order of first appearance."""

    variance: Float[np.ndarray, " g"]
    """Population variance of the returns; exactly 0 where all are equal."""
    energy: dict[str, Float[np.ndarray, " g"]]
    """Scope -> mean energy over the group's sampled tokens of that scope; NaN where it has none."""


def bottleneck(trajectories: Trajectories, resamples: int, seed: int = 0) -> dict[str, Any]:
    """Rank correlation of mean token energy with return variance, and the energies of every role (arXiv 2605.14558).

    Returns:
        A JSON-ready dict. Floats have 6 significant digits; what is undefined is None.

        * ``action``, ``reasoning``, ``response``: ``spearman``, its 95 % percentile interval ``ci_low`` and
          ``ci_high`` over bootstrap resamples of groups, two-sided ``p_value``, ``groups`` (those with such tokens),
          ``undefined_resamples`` (left out of the interval because all their values were equal); ``varying`` holds the
          same over groups of non-zero variance.
        * ``groups``, ``group_size``, ``episodes``, ``distinct_states`` (fewer than groups where initial states repeat),
          ``zero_variance_groups``, ``mean_return_variance``, ``success``.
        * ``tokens`` (sampled), ``action_token_share`` of them; ``role_counts`` of all tokens, prompts too.
        * ``energy_by_role``: response role -> ``count``, ``mean``, ``std`` (population), ``q05`` ... ``q95`` of the
          sampled tokens' energies, in nats.

    Raises:
        TrajectoryError: not annotated, non-finite energies, no sampled token, several environments, or groups that
            differ in size (population variance depends on it).
    """
    per_group = group_energy(trajectories)
    size = _group_size(trajectories)
    chosen = sampled_tokens(trajectories, RESPONSE_ROLES)
    tokens = int(chosen.sum())
    varying = per_group.variance > 0
    result: dict[str, Any] = {
        "environment": trajectories.episodes["environment"][0],
        "groups": len(per_group.variance),
        "group_size": size,
        "episodes": len(trajectories),
        "distinct_states": len(set(trajectories.episodes["state_key"])),
        "zero_variance_groups": int((~varying).sum()),
        "mean_return_variance": significant(per_group.variance.mean()),
        "success": significant(np.mean(trajectories.episodes["success"])),
        "tokens": tokens,
        "action_token_share": significant(sampled_tokens(trajectories, (Role.ACTION,)).sum() / tokens),
        "role_counts": {role.name.lower(): int((trajectories.role == role).sum()) for role in Role},
    }
    for scope, energy in per_group.energy.items():
        found = {}
        for part, members in (("all", np.full_like(varying, True)), ("varying", varying)):
            draws = generator(seed, "bottleneck bootstrap", scope, part)
            found[part] = _correlation(energy[members], per_group.variance[members], resamples, draws)
        result[scope] = {**found["all"], "varying": found["varying"]}
    energies = {role.name.lower(): role_energy(trajectories, role) for role in RESPONSE_ROLES}
    return {**result, "energy_by_role": {role: _distribution(values) for role, values in energies.items()}}


def group_energy(trajectories: Trajectories) -> GroupEnergy:
    """Return variance and mean energies of every group; a mean is over tokens, so a long episode counts for more.

    Raises:
        TrajectoryError: as ``bottleneck``, except for the groups' sizes.
    """
    energy, group = _checked_energy(trajectories), trajectories.groups
    count, token_group = int(group.max()) + 1, group[trajectories.token_episode]
    means = {}
    for scope, roles in SCOPES.items():
        chosen = sampled_tokens(trajectories, roles)
        total = np.bincount(token_group[chosen], weights=energy[chosen], minlength=count)
        tokens = np.bincount(token_group[chosen], minlength=count)
        mean = np.divide(total, tokens, out=np.full(count, np.nan), where=tokens > 0)
        means[scope] = _without_float_noise(mean, float(np.abs(energy[chosen]).max(initial=0)))
    returns = trajectories.returns
    variance = np.array([returns[group == index].var() for index in range(count)])
    return GroupEnergy(_without_float_noise(variance, float(np.abs(returns).max()) ** 2), means)


def role_energy(trajectories: Trajectories, role: Role) -> Float[np.ndarray, " n"]:
    """Energies of the sampled tokens of a role, in nats."""
    return np.asarray(_checked_energy(trajectories)[sampled_tokens(trajectories, (role,))])


def sampled_tokens(trajectories: Trajectories, roles: tuple[Role, ...]) -> Bool[np.ndarray, " n"]:
    """Which tokens the policy chose in one of these roles; a prefilled tag is not among them."""
    return np.asarray(trajectories.sampled & np.isin(trajectories.role, roles))


def token_counts(diagnostics: Mapping[str, Any]) -> dict[str, int]:
    """Sampled tokens of the roles that are reported together, from what ``bottleneck`` gave."""
    counts = {role: found["count"] for role, found in diagnostics["energy_by_role"].items()}
    return {name: sum(counts[role.name.lower()] for role in roles) for name, roles in REPORTED_ROLES.items()}


def _checked_energy(trajectories: Trajectories) -> Float[np.ndarray, " n"]:
    if trajectories.energy is None:
        raise TrajectoryError("the trajectories carry no energy: annotate them first")
    environments = sorted(set(trajectories.episodes["environment"]))
    if len(environments) > 1:
        raise TrajectoryError(f"one environment at a time, found {', '.join(environments)}")
    chosen = sampled_tokens(trajectories, RESPONSE_ROLES)
    if not chosen.any():
        raise TrajectoryError("no sampled token: there is no energy to look at")
    broken = int((~np.isfinite(trajectories.energy[chosen])).sum())
    if broken:
        raise TrajectoryError(f"energy is not finite on {broken} of {int(chosen.sum())} sampled tokens")
    # Elsewhere the column means nothing, so whatever it holds there must not reach a scale or a sum.
    return np.where(chosen, trajectories.energy, 0).astype(np.float64)


def _group_size(trajectories: Trajectories) -> int:
    sizes: list[int] = np.unique(np.bincount(trajectories.groups)).tolist()
    if len(sizes) > 1:
        raise TrajectoryError(f"groups of one size are needed, found sizes {', '.join(map(str, sizes))}")
    return sizes[0]


def _without_float_noise(values: Float[np.ndarray, " g"], scale: float) -> Float[np.ndarray, " g"]:
    """Values that differ by summation order alone become equal: ranks would make much of the difference."""
    return np.asarray(np.round(values / scale, 10) * scale) if scale else values


def _correlation(
    energy: Float[np.ndarray, " g"], variance: Float[np.ndarray, " g"], resamples: int, draws: np.random.Generator
) -> dict[str, Any]:
    present = np.isfinite(energy)
    energy, variance = energy[present], variance[present]
    count = len(energy)
    constant = count == 0 or np.ptp(energy) == 0 or np.ptp(variance) == 0
    if count < LEAST_GROUPS or constant:
        undefined = dict.fromkeys(("spearman", "ci_low", "ci_high", "p_value"))
        return {**undefined, "groups": count, "undefined_resamples": 0}
    test = stats.spearmanr(energy, variance)
    index = draws.integers(count, size=(resamples, count))
    resampled = _rowwise_spearman(energy[index], variance[index])
    defined = resampled[np.isfinite(resampled)]
    low, high = np.quantile(defined, [0.025, 0.975]) if len(defined) else (math.nan, math.nan)
    return {
        "spearman": significant(test.statistic),
        "ci_low": significant(low),
        "ci_high": significant(high),
        "p_value": significant(test.pvalue),
        "groups": count,
        "undefined_resamples": resamples - len(defined),
    }


def _rowwise_spearman(left: Float[np.ndarray, "b g"], right: Float[np.ndarray, "b g"]) -> Float[np.ndarray, " b"]:
    """Pearson correlation of average ranks, row by row; NaN where a row is constant."""
    left, right = (stats.rankdata(values, axis=1) for values in (left, right))
    left, right = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (left, right))
    spread = np.sqrt((left**2).sum(axis=1) * (right**2).sum(axis=1))
    undefined = np.full(len(spread), np.nan)
    return np.asarray(np.divide((left * right).sum(axis=1), spread, out=undefined, where=spread > 0))


def _distribution(energy: Float[np.ndarray, " n"]) -> dict[str, Any]:
    names = ["mean", "std", *(f"q{percent:02d}" for percent in _QUANTILES)]
    if not len(energy):
        return {"count": 0, **dict.fromkeys(names)}
    values = [energy.mean(), energy.std(), *np.percentile(energy, _QUANTILES)]
    return {"count": len(energy), **{name: significant(value) for name, value in zip(names, values, strict=True)}}
