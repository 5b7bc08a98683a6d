"""Importance correction: bounded ratios of the trained policy to what has sampled, and what an update makes of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.model.loading import load_policy
from pipeline.objective.correction import importance_factors
from pipeline.settings.correction import Correction
from pipeline.training.module import PolicyGradient
from pipeline.workspace.errors import UserError
from tests.trainings import LAKE, configured, standing, unmoved

LOGPROBS = st.floats(-30.0, 0.0)
SECTIONS = st.builds(
    lambda kind, level, high, low: Correction(kind=kind, level=level, high=high, low=low if kind == "mask" else 0.0),
    kind=st.sampled_from(["truncate", "mask"]),
    level=st.sampled_from(["token", "sequence"]),
    high=st.floats(1.0, 10.0),
    low=st.floats(0.0, 1.0),
)


def slow_factors(tokens: list[tuple[float, float, bool, int]], section: Correction) -> list[tuple[float, bool]]:
    """Token by token, with products of probabilities."""
    result = []
    for trained, sampled, trainable, episode in tokens:
        own = [(t, s) for t, s, use, e in tokens if use and e == episode]
        if not trainable:
            result.append((1.0, False))
            continue
        ratio = (
            math.prod(math.exp(t - s) for t, s in own) if section.level == "sequence" else math.exp(trained - sampled)
        )
        inside = ratio <= section.high and (section.kind == "truncate" or ratio >= section.low)
        result.append((ratio if inside else section.high if section.kind == "truncate" else 0.0, not inside))
    return result


@given(st.lists(st.tuples(LOGPROBS, LOGPROBS, st.booleans()), max_size=20), st.integers(1, 4), SECTIONS)
def test_factors_are_those_of_a_slow_reference(
    drawn: list[tuple[float, float, bool]], episodes: int, section: Correction
) -> None:
    tokens = [(*one, i * episodes // max(1, len(drawn))) for i, one in enumerate(drawn)]
    columns = [
        torch.tensor([one[i] for one in tokens], dtype=t)
        for i, t in enumerate([torch.float64] * 2 + [torch.bool, torch.long])
    ]
    found = importance_factors(*columns, section)
    for (factor, touched), value, mark in zip(slow_factors(tokens, section), found.factor, found.touched, strict=True):
        near = math.isclose(factor, section.high, rel_tol=1e-6) or math.isclose(factor, section.low, rel_tol=1e-6)
        if not near:  # at a bound rounding decides
            assert float(value) == pytest.approx(factor, rel=1e-6)
            assert bool(mark) == touched


@given(st.lists(st.tuples(LOGPROBS, st.booleans()), min_size=1, max_size=12), SECTIONS)
def test_what_the_policy_itself_has_sampled_is_left_as_it_is(
    drawn: list[tuple[float, bool]], section: Correction
) -> None:
    logprob = torch.tensor([one for one, _ in drawn])
    found = importance_factors(
        logprob, logprob, torch.tensor([u for _, u in drawn]), torch.zeros(len(drawn), dtype=torch.long), section
    )
    assert torch.equal(found.factor, torch.ones(len(drawn)))
    assert not found.touched.any()


def test_a_ratio_beyond_all_numbers_is_bounded() -> None:
    far = torch.tensor([0.0]), torch.tensor([-1e4]), torch.tensor([True]), torch.tensor([0])
    assert importance_factors(*far, Correction(kind="truncate", high=3.0)).factor.tolist() == [3.0]
    assert importance_factors(*far, Correction(kind="mask", high=3.0)).factor.tolist() == [0.0]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_an_update_counts_each_token_by_its_factor(directory: Path, kind: str, level: str) -> None:
    """A bfloat16 sampler and a float32 policy: ratios differ from 1 by about a hundredth, and ``high`` by less."""
    low = {"low": 0.998} if kind == "mask" else {}
    corrects = begun(directory, {"kind": kind, "level": level, "high": 1.002, **low})
    done, plain = unmoved(corrects), unmoved(begun(directory, None))
    assert "correction" not in plain.table.columns
    episodes, own = done.episodes, done.table
    now = corrects.collection.now(episodes)[0]
    ratio = np.exp(now.astype(np.float64) - episodes.logprob)
    if level == "sequence":
        sums = np.bincount(episodes.token_episode, np.where(episodes.trainable, np.log(ratio), 0.0))
        ratio = np.exp(sums)[episodes.token_episode]
    outside = (ratio > 1.002) | ((ratio < 0.998) & (kind == "mask"))
    expected = np.where(outside, 1.002 if kind == "truncate" else 0.0, ratio)[own["place"].numpy()]
    sure = np.abs(ratio - 1.002)[own["place"].numpy()] > 1e-5
    sure &= (np.abs(ratio - 0.998)[own["place"].numpy()] > 1e-5) | (kind == "truncate")
    np.testing.assert_allclose(own["correction"].numpy()[sure], expected[sure], atol=1e-5)
    share = outside[episodes.trainable].mean()
    assert 0 < share < 1
    assert done.metrics["correction_touched"] == pytest.approx(share, abs=2e-3)
    with_factor = corrects.learner.with_coefficients(own)["coefficient"]
    without = corrects.learner.with_coefficients(plain.table)["coefficient"]
    assert torch.allclose(with_factor, without * own["correction"])


def test_nothing_is_corrected_where_there_is_nothing_to_correct() -> None:
    with pytest.raises(UserError, match=r"^params\.yaml: train\.correction: the policy samples itself"):
        configured({"train": {"correction": {"kind": "truncate"}}})
    configured({"train": {"correction": {"kind": "truncate"}}, "rollout": {"engine": {"kind": "vllm"}}})
    with pytest.raises(UserError, match=r"train\.correction: low has no effect while kind is truncate"):
        configured({"train": {"correction": {"kind": "truncate", "low": 0.5}}})
    with pytest.raises(UserError, match=r"train\.correction: low \(1\) exceeds high \(0\.5\)"):
        configured({"train": {"correction": {"kind": "mask", "low": 1.0, "high": 0.5}}})


def begun(directory: Path, correction: dict[str, object] | None) -> PolicyGradient:
    """A training of a policy that is sampled from in bfloat16."""
    policy = {"policy": {"kind": "pretrained", "model": str(directory), "dtype": "bfloat16"}} if correction else {}
    config = configured({**policy, "train": {"correction": correction}})
    return standing(PolicyGradient(config, LAKE, "grpo", 0, load_policy(directory, dtype="bfloat16")))
