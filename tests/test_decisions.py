"""Decision points: the variance components are unbiased, branches are where they should be, and the command says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.analysis import decisions as subject
from pipeline.analysis.decisions import SIGNALS, Plan, Position, components, decisions, resampled, summarised
from pipeline.model.loading import load_trained
from pipeline.report.decision_figures import decisions_text, draw_decisions
from pipeline.rollout.collector import play
from pipeline.rollout.episode import Episode, Setup
from pipeline.rollout.specs import iteration_specs
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.workspace.errors import UserError
from tests.trainings import LAKE, ROOT, configured

PLAN = Plan(seeds=[300, 301], positions=2, candidates=3, continuations=2)


def test_components_of_a_hand_worked_layout() -> None:
    # Means 1, 3; variances 2, 2: MS_within 2, MS_between 2 * 2 = 4, so (4 - 2) / 2 = 1.
    assert components(np.array([[0.0, 2.0], [2.0, 4.0]])) == (1.0, 2.0)
    assert components(np.array([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])) == (pytest.approx(1 / 3), 0.0)
    between, within = components(np.array([[0.0, 1.0], [0.0, 1.0]]))
    assert between == -0.25  # unbiased, so it may be negative
    assert within == 0.5


def test_components_are_unbiased() -> None:
    draws = np.random.default_rng(0)
    effects = 0.7 * draws.standard_normal((20_000, 4, 1))
    found = np.array([components(own) for own in effects + 1.3 * draws.standard_normal((20_000, 4, 3))])
    assert found.mean(axis=0) == pytest.approx([0.49, 1.69], abs=0.02)


def test_candidates_share_what_came_before_and_continuations_their_candidate(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured()
    reference = load_trained(directory, config)
    engine, setup = TransformersEngine(reference, 128), Setup(reference.tokenizer, config, LAKE)
    episodes = play(engine, map(setup.begin, iteration_specs(config, LAKE, 0, 0)), 1.0)
    chosen = np.flatnonzero(episodes[0].builder.tokens["sampled"])
    places = [
        (0, int(chosen[1])),
        (0, int(chosen[-1])),
        (1, int(np.flatnonzero(episodes[1].builder.tokens["sampled"])[0])),
    ]
    played: list[list[Episode]] = []
    monkeypatch.setattr(subject, "play", lambda *arguments: played.append(play(*arguments)) or played[-1])
    returns = resampled(engine, episodes, places, PLAN, 1.0)
    first, second = played
    assert [own.shape for own in returns] == [(3, 2)] * 3
    returned = [episode.builder.outcome["return"] for episode in first]
    assert np.stack(returns)[:, :, 0].ravel().tolist() == returned
    for (row, split), own in zip(places, np.array(first, dtype=object).reshape(3, 3), strict=True):
        for branch in own:
            assert branch.builder.identity["split"] == split
            assert branch.builder.ids[:split] == episodes[row].builder.ids[:split]
    by_id = {episode.spec.episode_id: episode for episode in first}
    for branch in second:
        parent = by_id[branch.builder.identity["parent"]]
        split = branch.builder.identity["split"]
        own = np.flatnonzero(parent.builder.tokens["sampled"])
        assert split == own[own > parent.builder.identity["split"]][0], "everything but the candidate is sampled again"
    assert len({tuple(episode.spec.draws) for episode in (*first, *second)}) == len(first) + len(second)


def test_a_signal_is_summarised_over_states() -> None:
    positions = [Position("entropy", "a", "action", 0.2, 0.2), Position("entropy", "b", "reasoning", 0.0, 0.4)]
    (row,) = summarised(positions).values()
    assert row["roles"] == {"reasoning": 0.5, "action": 0.5, "tag": 0.0, "other": 0.0}
    assert row["between"] == {"mean": 0.1, "low": 0.0, "high": 0.2}
    assert row["explained"] == {"mean": 0.25, "low": 0.0, "high": 0.5}
    assert row["minus_control"] is None
    assert summarised([Position("entropy", "a", "action", 0.0, 0.0)])["entropy"]["explained"]["mean"] == 0.0


def test_a_signal_is_paired_by_state_with_a_draw_among_the_same_tokens() -> None:
    """What differs between states alone leaves no interval; it does without pairing."""
    share = {"a": 0.1, "b": 0.5, "c": 0.9}
    gain = {"entropy": 0.05, "random": 0.0, "action_energy": -0.05, "action_random": 0.0}
    rows = summarised(
        [
            Position(signal, s, "action", share[s] + gain[signal], 1 - share[s] - gain[signal])
            for signal in gain
            for s in share
        ]
    )
    assert list(rows) == ["entropy", "action_energy", "action_random", "random"]
    for signal, expected in gain.items():
        if expected:
            assert rows[signal]["minus_control"] == pytest.approx(
                dict.fromkeys(("mean", "low", "high"), expected), abs=1e-6
            )
            assert rows[signal]["explained"]["high"] - rows[signal]["explained"]["low"] > 0.5
        else:
            assert rows[signal]["minus_control"] is None


def test_a_state_without_a_token_for_a_signal_counts_for_nothing() -> None:
    positions = [Position("random", state, "reasoning", 0.5, 0.5) for state in "abc"]
    row = summarised([*positions, Position("action_random", "a", "action", 0.2, 0.2)])["action_random"]
    assert row["between"]["mean"] == 0.2
    assert (row["between"]["low"], row["between"]["high"]) == (0.0, 0.2)
    assert row["explained"]["mean"] == 0.5


def test_every_signal_is_measured_and_repeatable(directory: Path, tmp_path: Path) -> None:
    config = configured({"rollout": {"groups": 2, "group_size": 4}})
    result, again = (decisions(config, directory, LAKE, "grpo", PLAN, tmp_path / folder) for folder in ("a", "b"))
    assert result == again
    assert result["states"] == 4
    assert list(result["signals"]) == list(SIGNALS)
    for row in result["signals"].values():
        assert sum(row["roles"].values()) == pytest.approx(1)
        assert row["between"]["low"] <= row["between"]["mean"] <= row["between"]["high"]
    for signal in ("action_energy", "action_random", "action_start"):
        assert result["signals"][signal]["roles"]["action"] == 1.0
    text = decisions_text(result)
    assert all(signal in text for signal in SIGNALS)
    assert "95 % bootstrap intervals over states of the reference policy alone, which say nothing of trainings" in text
    files = draw_decisions(result, tmp_path / "decisions")
    before = [file.read_bytes() for file in files]
    draw_decisions(result, tmp_path / "decisions")
    assert [file.read_bytes() for file in files] == before


def test_what_cannot_be_measured_is_refused(directory: Path, tmp_path: Path) -> None:
    grown = {"kind": "tree_search", "width": 2}
    config = configured({"methods": {"grpo": {"branching": grown, "advantage": {"kind": "siblings"}}}})
    with pytest.raises(UserError, match="must not branch itself"):
        decisions(config, directory, LAKE, "grpo", PLAN, tmp_path)
    with pytest.raises(UserError, match="at least 2"):
        decisions(configured(), directory, LAKE, "grpo", Plan([0], 1, 1, 2), tmp_path)


def test_the_command_names_what_is_wrong() -> None:
    command = [
        sys.executable,
        "-m",
        "pipeline.commands.decisions",
        "--environment",
        "lake",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "params.yaml: environments: 'lake' is not there; allowed: frozen_lake\n"
