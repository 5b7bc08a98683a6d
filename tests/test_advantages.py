"""Every advantage against its definition, written out over lists."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given

from pipeline.objective import methods
from pipeline.objective.batch import TokenBatch
from pipeline.objective.methods import shape_rewards, token_advantages
from pipeline.objective.turns import last_of_turn
from pipeline.settings.params import parse
from pipeline.workspace.errors import UserError
from pipeline.workspace.yaml_files import read_yaml
from tests.advantage_cases import WITH_HEADS, close, dense, estimates, reference_whitened, row, small_batch
from tests.batches import batches, noise, properties

ROOT = Path(__file__).parents[1]


KINDS = [kind for kind in methods.ADVANTAGES if kind != "custom"]


# ------------------------------------------------------------------------------------------------ entropy's scale


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "soft_q"])
@given(batches())
@properties
def test_entropys_scale_multiplies_every_advantage_and_no_target(kind: str, batch: TokenBatch) -> None:
    batch = dense(batch)
    plain = token_advantages(row(kind), batch, estimates(batch))
    scaled = token_advantages(row(kind, entropy_scale=0.2), batch, estimates(batch))
    z = reference_whitened(batch, batch.entropy.tolist())
    close(scaled.advantage, [a * (1 + 0.2 * own) for a, own in zip(plain.advantage.tolist(), z, strict=True)])
    assert scaled.targets.keys() == plain.targets.keys()
    for name, (value, mask) in plain.targets.items():
        assert torch.equal(scaled.targets[name].value, value)
        assert torch.equal(scaled.targets[name].mask, mask)


# --------------------------------------------------------------------------------------------- whatever the choice


@pytest.mark.parametrize("kind", KINDS)
@given(batches())
@properties
def test_advantages_and_targets_are_zero_outside_trainable_tokens(kind: str, batch: TokenBatch) -> None:
    others = ~batch.trainable
    assert bool(others.any())
    estimate = token_advantages(row(kind), shape_rewards(row(kind), batch), estimates(batch))
    assert estimate.advantage[others].abs().sum() == 0
    for value, mask in estimate.targets.values():
        assert not bool((mask & others).any())
        assert value[~mask].abs().sum() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_advantage_tells_better_from_worse(kind: str) -> None:
    """Of two trajectories alike but for their success, the rewarded one has the higher advantage or target at its end.

    But for GTPO's, which compares successes with successes: it does if they are not apart.
    """
    chosen = row(kind, **({"apart": False} if kind == "token_group" else {}))
    batch = small_batch([[2], [2]], [[1], [0]], [[0], [0]])
    batch = replace(batch, success=torch.tensor([True, False]))
    heads = {name: torch.zeros_like(value) for name, value in estimates(batch).items()}
    estimate = token_advantages(chosen, shape_rewards(chosen, batch), heads)
    signal = estimate.targets["q"].value if kind == "soft_q" else estimate.advantage
    better, worse = signal[last_of_turn(batch)].tolist()
    assert better > worse


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_advantages_are_in_the_rewards_precision(kind: str, dtype: torch.dtype) -> None:
    batch = small_batch([[2, 1], [2]], [[0, 1], [0]], [[0, 1], [0]])
    floats = ("returns", "reward", "logprob", "entropy", "energy", "ref_logprob", "ref_entropy", "noise")
    batch = replace(batch, **{name: getattr(batch, name).to(dtype) for name in floats})
    heads = {name: value.to(dtype) for name, value in estimates(batch).items()}
    estimate = token_advantages(row(kind), shape_rewards(row(kind), batch), heads)
    assert estimate.advantage.dtype == dtype
    assert all(value.dtype == dtype for value, _ in estimate.targets.values())


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("kind", "names"), WITH_HEADS.items())
def test_an_advantage_without_the_estimates_of_its_heads_is_refused(kind: str, names: str) -> None:
    batch = small_batch([[2]], [[1]], [[0]])
    with pytest.raises(ValueError, match=f"advantage {kind} needs the estimates of its heads: {names}"):
        token_advantages(row(kind), batch, {})


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(WITH_HEADS)))
def test_an_advantage_without_heads_needs_no_estimates(kind: str) -> None:
    batch = small_batch([[2]], [[1]], [[0]])
    estimate = token_advantages(row(kind), batch, {})
    assert estimate.targets == {}
    # A group of one trajectory, but of two tokens: 0 and 1, of mean 1/2 and sample deviation 1 / sqrt(2).
    expected = [0.0, -(0.5**0.5), 0.5**0.5] if kind == "token_group" else [0.0, 0.0, 0.0]
    assert estimate.advantage.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "only"), [("entropy_gae", "value"), ("entropy_gae", "entropy_value"), ("soft_q", "taken"), ("gae", "q")]
)
def test_an_advantage_with_a_part_of_the_estimates_is_refused(kind: str, only: str) -> None:
    batch = small_batch([[2]], [[1]], [[0]])
    with pytest.raises(ValueError, match="needs the estimates"):
        token_advantages(row(kind), batch, {only: noise(batch)})


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_on_an_untrainable_token_is_refused(kind: str, place: int) -> None:
    """A prompt's, and that of a turn's token which the policy did not choose."""
    batch = small_batch([[3, 2]], [[0, 1]], [[0, 1]])
    trainable, reward = batch.trainable.clone(), batch.reward.clone()
    trainable[place], reward[place] = False, 1.0
    batch = replace(batch, trainable=trainable, reward=reward)
    with pytest.raises(ValueError, match="reward stands on a token that the policy did not choose"):
        token_advantages(row(kind), batch, estimates(batch))


# ------------------------------------------------------------------------------------------- which slots go together


@pytest.mark.parametrize(
    ("slots", "line"),
    [
        ({"advantage": {"kind": "soft_q"}}, ": advantage soft_q and surrogate soft_q go together"),
        ({"surrogate": {"kind": "soft_q"}}, ": advantage soft_q and surrogate soft_q go together"),
        ({"advantage": {"kind": "token_group"}}, ": reward token_entropy and advantage token_group go together"),
        ({"reward": {"kind": "token_entropy"}}, ": reward token_entropy and advantage token_group go together"),
        (
            {"advantage": {"kind": "soft_q", "entropy_scale": 0.2}, "surrogate": {"kind": "soft_q"}},
            ".advantage: entropy_scale has no effect while the policy learns from Q itself",
        ),
        *(
            ({"advantage": {"kind": kind, "cut_off": "bootstrap"}}, ".advantage.cut_off: unknown key; allowed: ")
            for kind in ("group", "step_group")
        ),
        *(
            (
                {
                    "advantage": {"kind": kind},
                    "surrogate": {"kind": "soft_q" if kind == "soft_q" else "ppo_clip"},
                    "aggregation": {"kind": "weight_sum", "count": "with_advantage"},
                },
                f": aggregation.count with_advantage has no effect with advantage {kind}: one that comes from a critic is "
                "0 nowhere; it needs one that compares within groups",
            )
            for kind in WITH_HEADS
        ),
    ],
)
def test_slots_that_do_nothing_together_are_refused_in_one_line(slots: dict[str, Any], line: str) -> None:
    raw = read_yaml(ROOT / "params.yaml")
    raw["methods"]["mine"] = slots
    with pytest.raises(UserError) as error:
        parse(raw)
    (found,) = str(error.value).split("\n")
    assert found.startswith(f"params.yaml: methods.mine{line}")


@pytest.mark.parametrize("kind", KINDS)
def test_every_advantage_can_be_written_in_a_params_file(kind: str) -> None:
    raw, wanted = read_yaml(ROOT / "params.yaml"), row(kind)
    raw["methods"]["mine"] = {
        slot: {"kind": getattr(wanted, slot).kind} for slot in ("branching", "reward", "advantage", "surrogate")
    }
    mine = parse(raw).methods["mine"]
    assert (mine.branching, mine.reward, mine.advantage) == (wanted.branching, wanted.reward, wanted.advantage)
