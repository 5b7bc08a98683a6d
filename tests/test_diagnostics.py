"""The Action Bottleneck diagnostic on trajectories whose energies are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pipeline.analysis.bottleneck import bottleneck, group_energy
from pipeline.report.bottleneck_figures import draw_bottleneck
from pipeline.trajectories.builder import EpisodeBuilder, build
from pipeline.trajectories.trajectory import RESPONSE_ROLES, Role, Trajectories, TrajectoryError

GROUPS, SIZE = 40, 8
Returns = Callable[[int, int], float]


def coin_returns(group: int, member: int) -> float:
    """Wins in the group: 0 to 8 of 8, so variances tie and some are 0."""
    return float(member < group % (SIZE + 1))


def spread_returns(group: int, member: int) -> float:
    """A variance of its own for each group."""
    return (1.0 + group) * (1 if member % 2 else -1)


def make(returns: Returns = coin_returns, groups: int = GROUPS, size: int = SIZE, action: bool = True) -> Trajectories:
    """Two turns per episode, reasoning of uneven length, a forced think tag, and no energy yet."""
    builders = []
    for group in range(groups):
        for member in range(size):
            numbers = dict.fromkeys(("seed", "iteration", "policy_version"), 0)
            names = {"episode_id": f"{group}-{member}", "group_id": f"g{group}", "state_key": str(group % 30)}
            builder = EpisodeBuilder(environment="toy-v0", **names, **numbers)
            builder.append_text([1, 2, 3], Role.PROMPT)
            for turn in range(2):
                start = len(builder)
                builder.append_text([4], Role.THINK_TAG)
                roles = [Role.REASONING] * (1 + (group + 2 * member + turn) % 5) + [Role.THINK_TAG, Role.ANSWER_TAG]
                roles += [Role.ACTION] * (1 + turn) if action else [Role.OTHER]
                builder.append_sampled([7] * len(roles), roles, [-0.5] * len(roles), [0.5] * len(roles))
                builder.close_turn(start, returns(group, member) if turn else 0.0, "up", True, "s")
                builder.append_text([5, 6], Role.OBSERVATION)
            builder.finish(returns(group, member) > 0, "goal")
            builders.append(builder)
    return build(builders)


def with_energy(trajectories: Trajectories, energy: np.ndarray) -> Trajectories:
    energy = energy.astype(np.float32)
    return replace(trajectories, energy=energy, ref_logprob=np.zeros_like(energy), ref_entropy=np.zeros_like(energy))


def variance_in_actions(trajectories: Trajectories, noise: float = 0.0) -> Trajectories:
    """Action energy grows with the group's return variance; all other energy is noise, and the same on average."""
    draws = np.random.default_rng(1)
    size = len(trajectories.input_ids)
    variance = np.array([reference_group(trajectories, g)["variance"] for g in range(trajectories.groups.max() + 1)])
    per_token = np.sqrt(variance)[trajectories.groups[trajectories.token_episode]]
    energy = -12 + 2 * draws.standard_normal(size)
    action = trajectories.role == Role.ACTION
    energy[action] = -20 + 3 * per_token[action] + noise * draws.standard_normal(int(action.sum()))
    return with_energy(trajectories, energy)


def reference_group(trajectories: Trajectories, group: int) -> dict[str, float]:
    """Variance and mean energies of one group, token by token in plain Python."""
    returns: list[float] = []
    tokens: dict[str, list[float]] = {"action": [], "reasoning": [], "response": []}
    for episode in range(len(trajectories)):
        if trajectories.episodes["group_id"][episode] != f"g{group}":
            continue
        returns.append(trajectories.episodes["return"][episode])
        for token in range(trajectories.offsets[episode], trajectories.offsets[episode + 1]):
            if not trajectories.sampled[token] or trajectories.energy is None:
                continue
            role, energy = Role(trajectories.role[token]), float(trajectories.energy[token])
            tokens["response"].append(energy)
            for scope, wanted in (("action", Role.ACTION), ("reasoning", Role.REASONING)):
                if role == wanted:
                    tokens[scope].append(energy)
    mean = sum(returns) / len(returns)
    means = {scope: sum(values) / len(values) for scope, values in tokens.items() if values}
    return {"variance": sum((r - mean) ** 2 for r in returns) / len(returns), **means}


def test_group_means_and_variances_equal_a_loop() -> None:
    trajectories = variance_in_actions(make(), noise=1.0)
    found = group_energy(trajectories)
    expected = [reference_group(trajectories, group) for group in range(GROUPS)]
    np.testing.assert_allclose(found.variance, [row["variance"] for row in expected], atol=1e-9)
    for scope in ("action", "reasoning", "response"):
        np.testing.assert_allclose(found.energy[scope], [row[scope] for row in expected], rtol=1e-8)


def test_action_energy_that_follows_variance_is_found_and_reasoning_is_not() -> None:
    trajectories = variance_in_actions(make(spread_returns))
    result = bottleneck(trajectories, resamples=500)
    assert result["action"]["spearman"] == 1
    assert bottleneck(replace(trajectories, energy=-np.asarray(trajectories.energy)), 100)["action"]["spearman"] == -1
    assert result["action"]["ci_low"] > 0.99
    assert result["action"]["p_value"] < 1e-30
    assert result["reasoning"]["ci_low"] < 0 < result["reasoning"]["ci_high"]
    assert result["reasoning"]["p_value"] > 0.05


def test_correlations_are_scipys_and_the_interval_is_the_percentile_bootstrap() -> None:
    trajectories = variance_in_actions(make(), noise=8.0)
    rows = [reference_group(trajectories, group) for group in range(GROUPS)]
    variance = np.round([row["variance"] for row in rows], 9)
    result = bottleneck(trajectories, resamples=4000)
    for scope in ("action", "reasoning", "response"):
        energy = np.array([row[scope] for row in rows])
        for found, kept in ((result[scope], variance >= 0), (result[scope]["varying"], variance > 0)):
            expected = stats.spearmanr(energy[kept], variance[kept])
            assert found["spearman"] == pytest.approx(expected.statistic, rel=1e-5)
            assert found["p_value"] == pytest.approx(expected.pvalue, rel=1e-4)
            assert found["groups"] == kept.sum()
    interval = stats.bootstrap(
        (np.array([row["action"] for row in rows]), variance),
        lambda a, b: stats.spearmanr(a, b).statistic,
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=1000,
        rng=np.random.default_rng(3),
    ).confidence_interval
    assert result["action"]["ci_low"] == pytest.approx(interval.low, abs=0.05)
    assert result["action"]["ci_high"] == pytest.approx(interval.high, abs=0.05)


def test_groups_without_variance_are_counted_and_left_out_of_the_varying() -> None:
    result = bottleneck(variance_in_actions(make()), resamples=100)
    equal = sum(group % (SIZE + 1) in (0, SIZE) for group in range(GROUPS))
    assert result["zero_variance_groups"] == equal
    assert result["action"]["groups"] == GROUPS
    assert result["action"]["varying"]["groups"] == GROUPS - equal


def test_returns_that_differ_by_rounding_alone_are_no_variance_and_tie() -> None:
    # 0.1 + 0.2 is not 0.3 in floating point; and 3 wins of 8 vary as much as 5 wins of 8.
    noisy = make(lambda group, member: 0.1 + 0.2 if member % 2 else 0.3)
    assert bottleneck(variance_in_actions(noisy), resamples=100)["zero_variance_groups"] == GROUPS
    variance = group_energy(variance_in_actions(make(lambda g, m: 0.1 * coin_returns(g, m)))).variance
    assert len(set(variance)) == 5


def test_tokens_that_were_not_sampled_change_nothing() -> None:
    trajectories = variance_in_actions(make(), noise=1.0)
    assert trajectories.energy is not None
    poisoned = np.where(trajectories.sampled, trajectories.energy, np.float32(1e6))
    poisoned[~trajectories.sampled & (trajectories.role == Role.PROMPT)] = np.nan
    assert (trajectories.role[~trajectories.sampled] == Role.THINK_TAG).any()
    assert bottleneck(with_energy(trajectories, poisoned), 100) == bottleneck(trajectories, 100)


@pytest.mark.parametrize("role", [Role.ACTION, Role.REASONING, Role.ANSWER_TAG])
def test_each_scope_sees_its_own_roles(role: Role) -> None:
    trajectories = variance_in_actions(make(), noise=1.0)
    assert trajectories.energy is not None
    shifted = with_energy(trajectories, trajectories.energy + (trajectories.role == role))
    before, after = group_energy(trajectories).energy, group_energy(shifted).energy
    for scope, seen in (("action", role == Role.ACTION), ("reasoning", role == Role.REASONING), ("response", True)):
        assert bool((before[scope] != after[scope]).all()) is seen
        assert bool((before[scope] == after[scope]).all()) is not seen


# -0.1 as float32: the means of uneven numbers of such tokens differ in their last bits.
@pytest.mark.parametrize(
    "trajectories",
    [with_energy(make(), np.full(len(make().input_ids), -0.1)), *(variance_in_actions(make(groups=g)) for g in (1, 2))],
    ids=["constant energy", "one group", "two groups"],
)
def test_undefined_correlations_are_null_and_never_nan(trajectories: Trajectories) -> None:
    result = bottleneck(trajectories, resamples=100)
    for scope in ("action", "reasoning", "response"):
        for part in (result[scope], result[scope]["varying"]):
            assert [part[key] for key in ("spearman", "ci_low", "ci_high", "p_value")] == [None] * 4
    json.dumps(result, allow_nan=False)


def test_resamples_without_a_correlation_are_counted_not_averaged() -> None:
    result = bottleneck(variance_in_actions(make(spread_returns, groups=3)), resamples=1000)
    # All three draws hit the same group with probability 1/9.
    assert 50 < result["action"]["undefined_resamples"] < 180
    assert (result["action"]["ci_low"], result["action"]["ci_high"]) == (1, 1)


def test_groups_without_action_tokens_leave_that_correlation_alone() -> None:
    trajectories = variance_in_actions(make(spread_returns))
    role = trajectories.role.copy()
    first = (trajectories.groups < 5)[trajectories.token_episode]
    role[first & (role == Role.ACTION)] = Role.OTHER
    result = bottleneck(replace(trajectories, role=role), resamples=100)
    assert result["action"]["groups"] == GROUPS - 5
    assert result["action"]["spearman"] == 1
    assert result["response"]["groups"] == GROUPS


def test_no_action_token_at_all_is_shown_not_hidden(tmp_path: Path) -> None:
    trajectories = variance_in_actions(make(action=False))
    result = bottleneck(trajectories, resamples=100)
    assert result["action_token_share"] == 0
    assert result["action"]["spearman"] is None
    assert list(result["energy_by_role"]["action"].values()) == [0] + [None] * 7
    json.dumps(result, allow_nan=False)
    assert all(path.stat().st_size > 0 for path in draw_bottleneck(trajectories, result, tmp_path))


def test_counts_and_distributions_by_role() -> None:
    trajectories = variance_in_actions(make(), noise=1.0)
    assert trajectories.energy is not None
    result = bottleneck(trajectories, resamples=100)
    assert (result["groups"], result["group_size"], result["episodes"]) == (GROUPS, SIZE, GROUPS * SIZE)
    assert result["distinct_states"] == 30
    assert result["tokens"] == trajectories.sampled.sum()
    assert result["action_token_share"] == pytest.approx(3 * GROUPS * SIZE / trajectories.sampled.sum(), rel=1e-5)
    assert sum(result["role_counts"].values()) == len(trajectories.input_ids)
    assert result["role_counts"]["prompt"] == 3 * GROUPS * SIZE
    assert result["success"] == pytest.approx(np.mean(trajectories.episodes["success"]), rel=1e-5)
    variances = [reference_group(trajectories, group)["variance"] for group in range(GROUPS)]
    assert result["mean_return_variance"] == pytest.approx(np.mean(variances), rel=1e-5)
    assert sum(row["count"] for row in result["energy_by_role"].values()) == result["tokens"]
    for role in RESPONSE_ROLES:
        values = trajectories.energy[trajectories.sampled & (trajectories.role == role)]
        row = result["energy_by_role"][role.name.lower()]
        assert row["count"] == len(values)
        if len(values):
            expected = [values.mean(), values.std(), *np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])]
            assert list(row.values())[1:] == pytest.approx(expected, rel=1e-4)


def test_equal_calls_give_equal_text_and_the_seed_moves_only_the_interval() -> None:
    trajectories = variance_in_actions(make(), noise=4.0)
    first, again, other = (bottleneck(trajectories, 300, seed=seed) for seed in (5, 5, 6))
    assert json.dumps(first) == json.dumps(again)
    assert first["action"]["ci_low"] != other["action"]["ci_low"]
    assert first["action"]["spearman"] == other["action"]["spearman"]


def test_order_of_the_episodes_does_not_matter_for_the_correlations() -> None:
    trajectories = variance_in_actions(make(), noise=4.0)
    shuffled = trajectories.select(np.random.default_rng(0).permutation(len(trajectories)))
    one, other = bottleneck(trajectories, 100), bottleneck(shuffled, 100)
    assert all(one[scope]["spearman"] == other[scope]["spearman"] for scope in ("action", "reasoning", "response"))
    assert one["energy_by_role"] == other["energy_by_role"]


def test_floats_have_six_significant_digits() -> None:
    def floats(value: Any) -> list[float]:
        if isinstance(value, dict):
            return [number for part in value.values() for number in floats(part)]
        return [value] if isinstance(value, float) else []

    numbers = floats(bottleneck(variance_in_actions(make(), noise=4.0), 100))
    assert len(numbers) > 30
    assert numbers == [float(f"{number:.6g}") for number in numbers]


def broken_energy(trajectories: Trajectories) -> Trajectories:
    assert trajectories.energy is not None
    energy = trajectories.energy.copy()
    energy[np.flatnonzero(trajectories.sampled)[:2]] = [np.nan, np.inf]
    return replace(trajectories, energy=energy)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: replace(t, energy=None), "annotate"),
        (broken_energy, "not finite on 2 of"),
        (lambda t: t.select(range(len(t) - 1)), "sizes 7, 8"),
        (lambda t: replace(t, sampled=np.zeros_like(t.sampled)), "no sampled token"),
        (lambda t: t.select([]), "no sampled token"),
        (
            lambda t: replace(t, episodes={**t.episodes, "environment": ["a-v0"] * SIZE + ["b-v0"] * (len(t) - SIZE)}),
            "one environment at a time, found a-v0, b-v0",
        ),
    ],
)
def test_what_cannot_be_diagnosed_is_refused(spoil: Callable[[Trajectories], Trajectories], message: str) -> None:
    with pytest.raises(TrajectoryError, match=message):
        bottleneck(spoil(variance_in_actions(make())), resamples=100)


def test_figures_are_written_twice_with_equal_bytes(tmp_path: Path) -> None:
    trajectories = variance_in_actions(make(), noise=1.0)
    result = bottleneck(trajectories, resamples=100)
    one, other = (draw_bottleneck(trajectories, result, tmp_path / folder) for folder in ("one", "other"))
    names = [f"{name}.{ending}" for name in ("correlations", "energy_by_role") for ending in ("png", "svg")]
    assert [path.name for path in one] == names
    assert all(path.stat().st_size > 10_000 for path in one)
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]
