"""The replay: its parts add up to the weights, its gradients to the gradient, and its measures are what they say."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.analysis import replay as subject
from pipeline.analysis.replay import (
    FIXED,
    Point,
    Task,
    cosine,
    cosine_to_others,
    grid,
    group_gradients,
    part_factors,
    part_weights,
    replay,
    role_shares,
    signal_to_noise,
)
from pipeline.energy.annotate import annotate
from pipeline.model.loading import load_policy
from pipeline.model.policy import Policy
from pipeline.objective.batch import TokenBatch, token_batch
from pipeline.objective.methods import token_advantages
from pipeline.objective.weights import actfocus_weights
from pipeline.report.replay_figures import draw_replay, replay_text
from pipeline.rollout.collector import collect
from pipeline.rollout.specs import iteration_specs
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.settings.params import Config
from pipeline.settings.weight import ActFocusWeight, Signal
from pipeline.trajectories.trajectory import Trajectories
from pipeline.workspace.errors import UserError
from pipeline.workspace.randomness import generator
from tests.batches import batches, properties
from tests.trainings import LAKE, configured


@pytest.fixture(scope="module")
def config() -> Config:
    return configured({"rollout": {"groups": 4}, "train": {"tokens_per_forward": 800}, "workers": 2})


@pytest.fixture(scope="module")
def table(config: Config, directory: Path) -> Trajectories:
    """Eight groups, so that there are others beside an iteration's four."""
    policy = load_policy(directory)
    both = configured({"rollout": {"groups": 8}, "bottleneck": {"groups": 8}})
    sampled = collect(TransformersEngine(policy), policy.tokenizer, both, LAKE, iteration_specs(both, LAKE, 0, 0), 1.0)
    return annotate(sampled, policy, 1.0, 4096)


@properties
@given(
    batches(),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([0.5, 2.0]),
    st.sampled_from([0.3, 1.0]),
    st.sampled_from(get_args(Signal)),
    st.sampled_from([None, 0.4]),
)
def test_parts_add_up_to_the_weights(
    batch: TokenBatch, alpha: float, beta: float, tau: float, signal: Any, tags: float | None
) -> None:
    pairs = list(itertools.product(get_args(Signal), (0.3, 1.0)))
    weight = ActFocusWeight(
        kind="actfocus",
        reasoning_downweight=alpha,
        redistribution_strength=beta,
        redistribution_temperature=tau,
        signal=signal,
        think_tag_weight=tags,
        malformed_weight=tags,
        answer_tag_weight=0.8,
    )
    expected = actfocus_weights(batch, weight)
    factors = torch.from_numpy(part_factors(Point(alpha, beta, tau, signal), pairs, weight))
    torch.testing.assert_close(part_weights(batch, pairs) @ factors, expected)


def exact(policy: Policy, episodes: Trajectories, weights: torch.Tensor) -> torch.Tensor:
    """The gradient of ``sum_t w_t log pi_t``, episode by episode through the model's own forward pass."""
    policy.model.zero_grad()
    for e in range(len(episodes)):
        span = slice(int(episodes.offsets[e]), int(episodes.offsets[e + 1]))
        ids = torch.from_numpy(episodes.input_ids[span].astype(np.int64))
        logprob = torch.log_softmax(policy.model(input_ids=ids[None]).logits[0, :-1], dim=-1)
        (weights[span][1:] * logprob.gather(-1, ids[1:, None])[:, 0]).sum().backward()
    return torch.cat([p.grad.reshape(-1).clone() for p in policy.model.parameters()])


def test_gradients_are_the_policys(config: Config, directory: Path, table: Trajectories, monkeypatch: Any) -> None:
    """Inner products of sketches are those of the gradients they stand for, of every part of every group."""
    monkeypatch.setattr(subject, "SKETCH", 2**18)
    batch = token_batch(table, generator(0, "test"))
    advantage = token_advantages(config.methods["grpo"], batch, {}).advantage
    parts = (part_weights(batch, [("reference_energy", 1.0)]) * advantage.unsqueeze(-1)).numpy()
    work = []
    for group in (0, 1):
        index = np.flatnonzero(table.groups == group)
        rows = np.concatenate([np.arange(table.offsets[e], table.offsets[e + 1]) for e in index])
        work.append((table.select(index), parts[rows]))
    reported: list[tuple[int, int]] = []
    sketched = group_gradients(
        Task(config, directory, work), lambda done, total, text="": reported.append((done, total))
    )
    assert reported == [(0, 2), (1, 2), (2, 2)]
    policy = load_policy(directory)
    plain = [[exact(policy, e, torch.from_numpy(p[:, k])) for k in range(p.shape[1])] for e, p in work]
    vectors = torch.stack([v for group in plain for v in group])
    flat = torch.from_numpy(sketched.reshape(len(vectors), -1))
    norms = vectors.norm(dim=1)
    assert (norms > 0).sum() >= 8
    scale = norms[:, None] * norms[None, :]
    torch.testing.assert_close(
        flat @ flat.T / scale.clamp_min(1e-9), vectors @ vectors.T / scale.clamp_min(1e-9), atol=0.02, rtol=0
    )


def test_signal_to_noise_finds_a_known_ratio() -> None:
    draws = np.random.default_rng(0)
    mean = np.zeros(400)
    mean[0] = 2.0
    noisy = mean + draws.standard_normal((64, 400))
    # Squared mean 4; variance of the mean of 64 vectors of 400 unit variances: 400 / 64.
    found = signal_to_noise(noisy)
    assert found.value == pytest.approx(4 / (400 / 64), rel=0.3)
    assert abs(signal_to_noise(draws.standard_normal((64, 400))).value) < 0.1
    assert signal_to_noise(np.zeros((4, 3))) == (0.0, 0.0)
    # The standard error is the spread over fresh samples.
    fresh = [signal_to_noise(mean + draws.standard_normal((64, 400))).value for _ in range(60)]
    assert found.error == pytest.approx(np.std(fresh), rel=0.5)


def test_cosines() -> None:
    assert cosine(np.array([1.0, 0.0]), np.array([1.0, 1.0])) == pytest.approx(2**-0.5)
    assert cosine(np.zeros(2), np.ones(2)) == 0.0
    same = np.ones((6, 3))
    assert cosine_to_others(same, same, 2) == pytest.approx(1.0)
    assert cosine_to_others(-same, same, 2) == pytest.approx(-1.0)


def test_shares_count_the_sigmoid_part_as_action() -> None:
    gradients = np.zeros((1, len(FIXED) + 1, 2))
    gradients[0, FIXED.index("reasoning")] = [3.0, 4.0]
    gradients[0, FIXED.index("action")] = [1.0, 0.0]
    gradients[0, FIXED.index("think_tag")] = [0.0, 2.0]
    gradients[0, FIXED.index("answer_tag")] = [0.0, -2.0]
    gradients[0, -1] = [2.0, 0.0]
    shares = role_shares(gradients, np.array([0.2, 1.0, 1.0, 1.0, 1.0, 0.5]))
    assert shares == pytest.approx(
        {"share_reasoning": 1 / 3, "share_action": 2 / 3, "share_tag": 0.0, "share_other": 0.0}
    )


def test_a_grid_has_one_point_where_beta_is_zero() -> None:
    points = grid([0.0, 1.0], [0.0, 0.5], [0.3, 1.0], ["reference_energy", "reference_entropy"])
    assert len(points) == 2 * (1 + 4)
    assert [point for point in points if point.beta == 0] == [
        Point(0.0, 0.0, 0.3, "reference_energy"),
        Point(1.0, 0.0, 0.3, "reference_energy"),
    ]


def test_a_replay_reports_every_point_and_uniform_weights_agree_with_themselves(
    config: Config, directory: Path, table: Trajectories, tmp_path: Path
) -> None:
    uniform = {"reasoning_downweight": 1.0, "redistribution_strength": 0.0, "malformed_weight": 1.0}
    flat = configured(
        {
            "rollout": {"groups": 4},
            "methods": {"flat": {"advantage": {"kind": "group"}, "weight": {"kind": "actfocus", **uniform}}},
        }
    )
    points = grid([0.1, 1.0], [0.0, 0.5], [1.0], ["reference_energy"])
    result = replay(flat, directory, table, "flat", points, 8)
    assert [(row["alpha"], row["beta"]) for row in result["rows"]] == [(p.alpha, p.beta) for p in points]
    row = next(row for row in result["rows"] if (row["alpha"], row["beta"]) == (1.0, 0.0))
    assert row["cosine_uniform"] == pytest.approx(1.0, abs=1e-5)
    assert row["snr"] == pytest.approx(result["uniform"]["snr"], rel=1e-4)
    for row in result["rows"]:
        assert sum(row[f"share_{role}"] for role in ("action", "reasoning", "tag", "other")) == pytest.approx(1.0)
    shares = {(row["alpha"], row["beta"]): row["share_action"] for row in result["rows"]}
    assert shares[0.1, 0.5] > shares[0.1, 0.0] > shares[1.0, 0.0] > 0
    assert replay(flat, directory, table, "flat", points, 8) == result
    lines = replay_text(result).splitlines()
    assert len(lines) == 2 + len(points)
    assert "jackknife standard error over groups of the reference policy alone, which says nothing of train" in lines[0]
    files = draw_replay(result, tmp_path / "replay")
    before = [file.read_bytes() for file in files]
    assert [file.read_bytes() for file in draw_replay(result, tmp_path / "replay")] == before


@pytest.mark.parametrize(
    ("method", "groups", "line"),
    [
        ("ppo", 8, "methods.ppo: replay has no values for advantage gae; name another"),
        ("grpo", 7, "replay needs at least 8 groups, there are 7"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(
    config: Config, directory: Path, table: Trajectories, method: str, groups: int, line: str
) -> None:
    with pytest.raises(UserError, match=line):
        replay(config, directory, table, method, grid([1.0], [0.0], [1.0], ["reference_energy"]), groups)
