"""Scores of given tokens against the model's own full logits."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipeline.energy.annotate import annotate
from pipeline.model import scoring
from pipeline.model.kernels import native
from pipeline.model.policy import Policy
from pipeline.model.scoring import TokenScores, length_batches, predicting_hidden, score_tokens
from pipeline.trajectories.builder import EpisodeBuilder, build
from pipeline.trajectories.trajectory import Role, Trajectories

ROOT = Path(__file__).parents[1]
VOCABULARY = 37
properties = settings(max_examples=30)


def random_policy() -> Policy:
    """Two random layers under a head with a bias, with logits far from uniform."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.5,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    ).eval()
    model.lm_head = torch.nn.Linear(16, VOCABULARY)
    return Policy(model, None)


@functools.cache
def shared_policy() -> Policy:
    """For tests that only read it."""
    return random_policy()


@pytest.fixture
def policy() -> Policy:
    """For tests that may change it."""
    return random_policy()


def some_sequences(lengths: Sequence[int], seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Random ids, and masks of about half of the tokens, never of the first."""
    draws = np.random.default_rng(seed)
    ids = [draws.integers(VOCABULARY, size=n).astype(np.int32) for n in lengths]
    wanted = [draws.random(n) < 0.5 for n in lengths]
    for mask in wanted:
        mask[0], mask[-1] = False, len(mask) > 1
    return ids, wanted


def score(policy: Policy, ids: list[np.ndarray], wanted: list[np.ndarray], temperature: float = 1.0) -> TokenScores:
    hidden = predicting_hidden(policy, ids, wanted)
    tokens = np.concatenate([i[w] for i, w in zip(ids, wanted, strict=True)]).astype(np.int64)
    return score_tokens(hidden, torch.from_numpy(tokens), policy.head, temperature)


def reference(
    policy: Policy, ids: list[np.ndarray], wanted: list[np.ndarray], temperature: float = 1.0
) -> list[tuple[float, float, float]]:
    """Each sequence alone, through the whole model, one position at a time, in float64."""
    rows = []
    with torch.no_grad():
        for sequence, mask in zip(ids, wanted, strict=True):
            logits = (
                policy.model(input_ids=torch.from_numpy(sequence.astype(np.int64))[None]).logits[0].double().numpy()
            )
            for t in np.flatnonzero(mask):
                raw = logits[t - 1]
                tempered = np.exp(raw / temperature)
                probability = tempered / tempered.sum()
                entropy = -sum(p * np.log(p) for p in probability)
                rows.append((np.log(probability[sequence[t]]), entropy, np.log(np.exp(raw).sum())))
    return rows


@properties
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 99))
def test_scores_equal_the_full_logits(lengths: list[int], temperature: float, seed: int) -> None:
    """Packed in a batch, all three statistics are those of each sequence alone; temperature leaves the log-partition."""
    policy = shared_policy()
    ids, wanted = some_sequences(lengths, seed)
    actual = torch.stack(list(score(policy, ids, wanted, temperature)), 1).double()
    expected = torch.tensor(reference(policy, ids, wanted, temperature), dtype=torch.float64).reshape(-1, 3)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


def annotated_trajectories(ids: list[np.ndarray], wanted: list[np.ndarray]) -> Trajectories:
    builders = []
    for number, (sequence, mask) in enumerate(zip(ids, wanted, strict=True)):
        builder = EpisodeBuilder(
            episode_id=str(number), group_id="g", environment="x", state_key="s", seed=0, iteration=0, policy_version=0
        )
        for token, sampled in zip(sequence.tolist(), mask.tolist(), strict=True):
            if sampled:
                builder.append_sampled([token], [Role.ACTION], [-1.0], [1.0])
            else:
                builder.append_text([token], Role.OBSERVATION)
        builder.finish(False, "turns")
        builders.append(builder)
    return build(builders)


@pytest.mark.parametrize("tokens_per_forward", [1, 20, 10_000])
def test_annotation_is_minus_logsumexp_on_sampled_tokens_only(policy: Policy, tokens_per_forward: int) -> None:
    ids, wanted = some_sequences([7, 3, 12, 5])
    marked = annotate(annotated_trajectories(ids, wanted), policy, 0.7, tokens_per_forward)
    expected = np.array(reference(policy, ids, wanted, 0.7))
    sampled = np.concatenate(wanted)
    assert marked.energy is not None
    assert marked.ref_logprob is not None
    assert marked.ref_entropy is not None
    np.testing.assert_allclose(marked.energy[sampled], -expected[:, 2], atol=2e-5)
    np.testing.assert_allclose(marked.ref_logprob[sampled], expected[:, 0], atol=2e-5)
    np.testing.assert_allclose(marked.ref_entropy[sampled], expected[:, 1], atol=2e-5)
    for column in (marked.energy, marked.ref_logprob, marked.ref_entropy):
        assert not column[~sampled].any()


def test_energy_does_not_depend_on_the_sampled_token(policy: Policy) -> None:
    ids, wanted = some_sequences([6])
    other = ids[0].copy()
    other[-1] = (other[-1] + 1) % VOCABULARY
    before, after = score(policy, ids, wanted), score(policy, [other], wanted)
    assert torch.equal(before.logsumexp, after.logsumexp)
    assert before.logprob[-1] != after.logprob[-1]


@pytest.mark.parametrize("shift", [-3.0, 5.0])
def test_constant_added_to_all_logits_lowers_energy_and_nothing_else(policy: Policy, shift: float) -> None:
    ids, wanted = some_sequences([9, 4])
    with torch.no_grad():
        before = score(policy, ids, wanted, temperature=0.8)
        policy.head.bias += shift
        after = score(policy, ids, wanted, temperature=0.8)
    torch.testing.assert_close(-after.logsumexp, -before.logsumexp - shift, atol=2e-5, rtol=0)
    torch.testing.assert_close(after.logprob, before.logprob, atol=2e-5, rtol=0)
    torch.testing.assert_close(after.entropy, before.entropy, atol=2e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("rows", [1, 3])
def test_chunks_change_neither_values_nor_gradients(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, temperature: float, rows: int
) -> None:
    ids, wanted = some_sequences([12, 5, 8])
    results = []
    for limit in (10**9, rows * VOCABULARY):
        monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", limit)
        policy.model.zero_grad()
        scores = score(policy, ids, wanted, temperature)
        (scores.logprob.sum() + 0.3 * scores.entropy.sum() + 0.1 * scores.logsumexp.sum()).backward()
        gradients = [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]
        assert len(gradients) == len(list(policy.model.parameters()))
        results.append([*scores, *gradients])
    assert len(results[0][0]) > 2 * rows
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, atol=1e-4, rtol=1e-4)


def obvious_scores(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tokens: torch.Tensor, temperature: float
) -> list[torch.Tensor]:
    """All logits at once, and autograd."""
    logits = hidden @ weight.T + (0 if bias is None else bias)
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    return [distribution.log_prob(tokens), distribution.entropy(), logits.logsumexp(-1)]


@pytest.fixture(params=["kernels", "torch"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the native kernels, where there is a compiler, and as on other devices."""
    if request.param == "torch":
        monkeypatch.setattr(native, "scores", lambda logits: False)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("used", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.7, -0.4, 0.2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_gradients_are_those_of_autograd_through_all_logits(
    monkeypatch: pytest.MonkeyPatch, used: tuple[float, ...], bias: bool, temperature: float, rows: int
) -> None:
    """Of every output alone, the others left out, and of all together; 11 tokens in chunks of 1, 4 and one chunk."""
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", rows * VOCABULARY)
    draws = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(16, VOCABULARY, bias=bias)
    hidden, tokens = torch.randn(11, 16, generator=draws), torch.randint(VOCABULARY, (11,), generator=draws)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws))
    slopes = torch.randn(3, 11, generator=draws)

    def gradients(outputs: Sequence[torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        parts = [u * (s.to(x.dtype) * x).sum() for u, s, x in zip(used, slopes, outputs, strict=True) if u]
        return list(torch.autograd.grad(sum(parts), inputs))

    exact = [x.detach().double().requires_grad_() for x in (hidden, *head.parameters())]
    expected = obvious_scores(exact[0], exact[1], exact[2] if bias else None, tokens, temperature)
    hidden.requires_grad_()
    actual = score_tokens(hidden, tokens, head, temperature)
    own = gradients(actual, [hidden, *head.parameters()])
    for ours, theirs in zip([*actual, *own], [*expected, *gradients(expected, exact)], strict=True):
        torch.testing.assert_close(ours.detach().double(), theirs.detach(), atol=1e-4, rtol=2e-5)


@pytest.mark.usefixtures("either_way")
def test_half_precision_keeps_its_type_and_scores_in_float32() -> None:
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(16, VOCABULARY).bfloat16(), torch.randn(9, 16).bfloat16().requires_grad_()
    tokens = torch.arange(9)
    scores = score_tokens(hidden, tokens, head, 0.8)
    assert {column.dtype for column in scores} == {torch.float32}
    sum(column.sum() for column in scores).backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, head.weight, head.bias)]
    sum(column.sum() for column in obvious_scores(*exact, tokens, 0.8)).backward()
    for ours, theirs in zip((hidden, head.weight, head.bias), exact, strict=True):
        assert ours.grad.dtype == torch.bfloat16
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=0.05, rtol=0.05)


UPDATE = """
import sys, torch
from pathlib import Path
from pipeline.model.scoring import score_tokens

def resident(name):  # of this program alone; ru_maxrss begins with what the process was before
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(name))

torch.set_num_threads(1)
head, tokens = torch.nn.Linear(64, 150_000, bias=False), torch.arange(int(sys.argv[1]))
hidden = torch.randn(len(tokens), 64, requires_grad=True)
small = score_tokens(hidden[:2], tokens[:2], torch.nn.Linear(64, 9), 0.9)
sum(column.sum() for column in small).backward()
before = resident("VmRSS")
scores = score_tokens(hidden, tokens, head, 0.9)
(scores.logprob.sum() + scores.entropy.sum() + scores.logsumexp.sum()).backward()
assert head.weight.grad.abs().sum() > 0 and hidden.grad[-1].abs().sum() > 0
print(resident("VmHWM") - before)
"""


def test_memory_of_an_update_does_not_hold_all_logits() -> None:
    """4,096 tokens of a vocabulary of 150,000 have 2.5 GB of logits, and as much of gradients and probabilities."""
    raised = {}
    for tokens in (1024, 4096):
        done = subprocess.run([sys.executable, "-c", UPDATE, str(tokens)], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        raised[tokens] = float(done.stdout)
    assert 0 < raised[4096] < 600
    assert raised[4096] < 4 * raised[1024]
    assert raised[4096] - raised[1024] < 50


def test_nothing_wanted_gives_nothing(policy: Policy) -> None:
    ids, wanted = some_sequences([4, 6])
    scores = score(policy, ids, [np.zeros_like(mask) for mask in wanted])
    assert [len(column) for column in scores] == [0, 0, 0]


def test_wanting_a_first_token_is_refused(policy: Policy) -> None:
    ids, wanted = some_sequences([4, 6])
    wanted[1][0] = True
    with pytest.raises(ValueError, match="first token"):
        predicting_hidden(policy, ids, wanted)


def test_neighbours_change_nothing(policy: Policy) -> None:
    """A sequence alone, and beside longer and shorter ones."""
    ids, wanted = some_sequences([5, 14, 2, 9])
    together = score(policy, ids, wanted)
    start = 0
    for sequence, mask in zip(ids, wanted, strict=True):
        alone = score(policy, [sequence], [mask])
        for whole, own in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[start : start + len(own)], own, atol=1e-5, rtol=1e-5)
        start += len(own)
    assert start == len(together.logprob)


def test_another_backbone_can_read_the_sequences(policy: Policy) -> None:
    ids, wanted = some_sequences([5, 8])
    other = policy.frozen_copy()
    with torch.no_grad():
        other.model.base_model.embed_tokens.weight.mul_(0.5)
        given_trunk = predicting_hidden(policy, ids, wanted, backbone=other.backbone)
        assert torch.equal(given_trunk, predicting_hidden(other, ids, wanted))
        assert not torch.allclose(given_trunk, predicting_hidden(policy, ids, wanted), atol=1e-2)


@settings(max_examples=200)
@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_length_batches_partition_within_budget(lengths: list[int], budget: int) -> None:
    batches = length_batches(lengths, budget)
    assert sorted(int(i) for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        own = [lengths[i] for i in batch]
        assert len(own) == 1 or len(own) * max(own) <= budget
    for longer, shorter in itertools.pairwise(batches):
        assert min(lengths[i] for i in longer) >= max(lengths[i] for i in shorter)
