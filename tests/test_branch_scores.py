"""Scores of the places at which episodes may branch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.rollout.branch_scores import action_starts, blank_tokens, branch_scores, omega, standardised
from pipeline.rollout.specs import iteration_specs
from pipeline.settings.branching import Independent, Positions
from pipeline.trajectories.builder import EpisodeBuilder, build
from pipeline.trajectories.trajectory import Role, Trajectories
from tests.forests import lake, planted, rows
from tests.made_up_trees import say
from tests.test_collector import NAME, TOKENIZER


def independent_table(seed: int = 0) -> Trajectories:
    changed = lake()
    return planted(changed, Independent(), specs=iteration_specs(changed, NAME, seed, 0))


OWN_MOVE = Positions(kind="positions", discount=0.0)
"""APPO's score, in which a token's own move is all that counts."""


def by(signal: str) -> Positions:
    return Positions.model_validate({"kind": "positions", "signal": signal})


@settings(max_examples=20)
@given(st.integers(0, 500), st.sampled_from([0.0, 0.9, 0.99, 1.0]), st.sampled_from([(0.8, 1.2), (0.1, 4.0)]))
def test_appos_score_is_that_of_loops(seed: int, discount: float, bounds: tuple[float, float]) -> None:
    table = independent_table(seed % 7)
    moved = np.random.default_rng(seed).normal(0, 0.3, len(table.input_ids))
    leads = np.ones(len(moved))
    for episode in range(len(table)):
        chosen = [t for t in range(table.offsets[episode], table.offsets[episode + 1]) if table.sampled[t]]
        for i, t in enumerate(chosen):
            total = sum(discount**k * moved[later] for k, later in enumerate(chosen[i:]))
            leads[t] = min(max(math.exp(total), bounds[0]), bounds[1])
    appo = Positions(kind="positions", discount=discount, bounds=bounds)
    np.testing.assert_allclose(omega(table, moved, appo), leads, rtol=1e-9)

    blank = np.random.default_rng(seed).random(len(moved)) < 0.2
    scores = branch_scores(appo, table, np.random.default_rng(0), moved, blank)
    strict: dict[int, float] = {}
    rest: dict[int, float] = {}
    for episode in range(len(table)):
        chosen = [t for t in range(table.offsets[episode], table.offsets[episode + 1]) if table.sampled[t]]
        z = {}
        for name, values in (("entropy", table.entropy.astype(float)), ("omega", leads)):
            own = [values[t] for t in chosen]
            mean = sum(own) / len(own)
            spread = math.sqrt(sum((value - mean) ** 2 for value in own) / len(own))
            alike = len(set(own)) == 1  # their float mean may differ from them
            z[name] = {t: 0.0 if alike else (values[t] - mean) / (spread + 1e-6) for t in chosen}
        for t in chosen:
            if not blank[t]:
                both = z["entropy"][t] > 0 and z["omega"][t] > 0
                (strict if both else rest)[t] = z["entropy"][t] * z["omega"][t]
    assert np.flatnonzero(np.isfinite(scores)).tolist() == sorted([*strict, *rest])
    for t, product in strict.items():
        assert scores[t] == pytest.approx(product)
    behind = {round(scores[t] - product, 9) for t, product in rest.items()}
    assert len(behind) == 1  # the order of their products
    assert max(scores[t] for t in rest) < min((scores[t] for t in strict), default=0)


def test_where_too_few_tokens_qualify_the_next_best_products_follow() -> None:
    """Only the last is high in both; the first has a larger product, of two low ones, and comes behind it."""
    made = build([lone_episode([0.0, 1.0, 3.0, 4.0])])
    shift = np.array([0, 0, 0, -0.19, 0.02, -0.04, 0.05])
    scores = branch_scores(OWN_MOVE, made, np.random.default_rng(0), shift)
    product = standardised(np.array([0.0, 1.0, 3.0, 4.0])) * standardised(np.exp(shift[3:]))
    assert product[0] > product[3] > 0 > product[1]
    assert scores[6] == pytest.approx(product[3])
    assert np.argsort(-scores, kind="stable")[:4].tolist() == [6, 3, 5, 4]
    still = branch_scores(by("branching_score"), made, np.random.default_rng(0), np.zeros(7))
    assert np.isfinite(still).sum() == 4
    assert len(set(still[3:])) == 1


def test_scores_are_each_episodes_own() -> None:
    """An episode of tenfold entropies, and one whose policy has moved ten times as far, change no score of another's."""
    one, other = [0.0, 1.0, 3.0, 4.0], [40.0, 10.0, 30.0, 20.0]
    shift = np.array([0, 0, 0, -0.1, 0.02, -0.04, 0.1])
    pair, single = build([lone_episode(one), lone_episode(other)]), build([lone_episode(one)])
    both = branch_scores(OWN_MOVE, pair, np.random.default_rng(0), np.r_[shift, shift])
    alone = branch_scores(OWN_MOVE, single, np.random.default_rng(0), shift)
    assert both[6] == alone[6]


def test_whitespace_is_no_place_to_branch() -> None:
    texts = [" ", "so", "\n", "a b"]
    ids = [i for text in texts for i in TOKENIZER(text, add_special_tokens=False)["input_ids"]]
    found = blank_tokens(TOKENIZER, np.array([*ids, TOKENIZER.eos_token_id]))
    assert found.tolist() == [not TOKENIZER.decode([i]).strip() for i in ids] + [False]
    assert {True, False} == set(found[: len(ids)].tolist())
    made = build([lone_episode([4.0, 1.0, 3.0, 0.0])])
    shift = np.array([0, 0, 0, 0.1, -0.02, 0.04, -0.1])
    blank = np.array([False, False, False, True, False, False, False])
    scores = branch_scores(OWN_MOVE, made, np.random.default_rng(0), shift, blank)
    plain = branch_scores(OWN_MOVE, made, np.random.default_rng(0), shift)
    assert int(np.argmax(plain)) == 3
    assert int(np.argmax(scores)) == 5
    assert not np.isfinite(scores[3])


def lone_episode(entropies: Sequence[float]) -> EpisodeBuilder:
    names = ("episode_id", "group_id", "environment", "state_key")
    builder = EpisodeBuilder(**dict.fromkeys(names, "e"), seed=0, iteration=0, policy_version=0)
    builder.append_text([1, 2, 3], Role.PROMPT)
    say(builder, [entropies])
    builder.finish(False, "turns")
    return builder


def test_signals_score_sampled_tokens_alone() -> None:
    table = independent_table()
    draws = lambda: np.random.default_rng(5)  # noqa: E731
    entropy = branch_scores(by("entropy"), table, draws())
    np.testing.assert_array_equal(entropy, np.where(table.sampled, table.entropy.astype(np.float64), -np.inf))
    anywhere = branch_scores(by("random"), table, draws())
    np.testing.assert_array_equal(np.isfinite(anywhere), table.sampled)
    acting = branch_scores(by("action_random"), table, draws())
    action = table.sampled & (table.role == Role.ACTION)
    np.testing.assert_array_equal(acting, np.where(action, draws().random(len(action)), -np.inf))
    starts = branch_scores(by("action_start"), table, draws())
    np.testing.assert_array_equal(np.isfinite(starts), action_starts(table))
    expected = []
    for row, base in zip(rows(table), table.offsets, strict=False):
        for turn in row["turns"]:
            own = [t for t in range(turn["start"], turn["end"]) if row["role"][t] == Role.ACTION and row["sampled"][t]]
            expected += [int(base) + t for t in own[:1]]
    assert np.flatnonzero(action_starts(table)).tolist() == expected
    assert expected
    with pytest.raises(ValueError, match="not annotated"):
        branch_scores(by("reference_energy"), table, draws())
    with pytest.raises(ValueError, match="policy that has moved"):
        branch_scores(by("branching_score"), table, draws())
