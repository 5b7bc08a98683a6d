"""What a forward pass holds, how many tokens it is given, and activations that are computed twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config

from pipeline.model import memory
from pipeline.model.attention import packed_attention
from pipeline.model.memory import activation_bytes, most_tokens, recompute_where_needed, tokens_per_forward
from pipeline.model.policy import Policy
from pipeline.model.trunk import hidden_states
from pipeline.training.seed_key import training_key
from tests.test_trunk import LENGTHS, packed, random_backbone, with_gradients
from tests.trainings import LAKE, configured

ROOT = Path(__file__).parents[1]
MEASURED = """
import numpy as np, torch
from pathlib import Path
from transformers import Qwen2Config, Qwen2ForCausalLM
from pipeline.model.memory import activation_bytes, number_size
from pipeline.model.policy import Policy
from pipeline.model.scoring import predicting_hidden, score_tokens

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1000 for line in lines if line.startswith(name))

def step(lengths):
    ids = [np.random.default_rng(i).integers(300, size=length) for i, length in enumerate(lengths)]
    hidden = predicting_hidden(policy, ids, [np.arange(len(own)) > 0 for own in ids])
    tokens = torch.from_numpy(np.concatenate([own[1:] for own in ids]))
    sum(column.sum() for column in score_tokens(hidden, tokens, policy.head, 1.0)).backward()

torch.set_num_threads(1)
shape = Qwen2Config(vocab_size=300, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
                    num_attention_heads=8, num_key_value_heads=4)
policy = Policy(Qwen2ForCausalLM(shape), None)
step([20])
before = resident("VmRSS")
step([128] * 8)
print(resident("VmHWM") - before, activation_bytes(shape, 1024, number_size(policy)))
"""


def test_what_is_held_is_within_a_factor_of_two_of_what_was_measured() -> None:
    command = [sys.executable, "-c", MEASURED]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    measured, told = map(float, found.stdout.split())
    assert measured / 2 <= told <= 2 * measured


def test_tokens_are_the_largest_power_of_two_that_fits() -> None:
    shape = Qwen2Config(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
    assert most_tokens(shape, 4, 0) == 256
    assert most_tokens(shape, 4, 1e18) == 65_536
    for tokens in (512, 4096):
        enough = activation_bytes(shape, tokens, 4)
        assert most_tokens(shape, 4, enough) == tokens
        assert most_tokens(shape, 4, 0.999 * enough) == tokens // 2
        assert most_tokens(shape, 2, enough / 2 + 2e8) >= tokens


def test_auto_follows_memory_and_workers(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for total, workers in ((10**9, 1), (10**9, 16), (10**8, 1), (10**15, 1)):
        monkeypatch.setattr(memory, "total_memory", lambda _, total=total: total)
        auto = configured({"train": {"tokens_per_forward": "auto"}, "workers": workers})
        found.append(tokens_per_forward(auto, policy))
    one, many, small, large = found
    assert 256 <= many < one < large == 65_536
    assert small < one
    assert tokens_per_forward(configured({"train": {"tokens_per_forward": 777}}), policy) == 777


def test_a_training_that_sizes_itself_has_another_key_with_other_workers(directory: Path) -> None:
    """Rounding depends on what shares a forward pass."""
    keys = {
        (size, workers): training_key(
            configured({"train": {"tokens_per_forward": size}, "workers": workers}), LAKE, "grpo", 0, directory
        )
        for size in ("auto", 4096)
        for workers in (1, 2)
    }
    assert len(set(keys.values())) == 3
    assert keys[4096, 1] == keys[4096, 2]


def test_the_machine_has_memory_and_a_container_not_more_than_it_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = memory.total_memory(torch.device("cpu"))
    assert 2**28 < whole < 2**50
    (tmp_path / "unlimited").write_text("max\n")
    (tmp_path / "limited").write_text("123456789\n")
    monkeypatch.setattr(memory, "LIMITS", [])
    machine = memory.total_memory(torch.device("cpu"))
    for names, expected in ((["unlimited", "missing"], machine), (["missing", "limited"], 123456789)):
        monkeypatch.setattr(memory, "LIMITS", [tmp_path / name for name in names])
        assert memory.total_memory(torch.device("cpu")) == expected


def test_layers_recompute_only_where_the_longest_sequence_does_not_fit(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for total, expected in ((10**15, False), (10**6, True)):
        own = policy.frozen_copy()
        monkeypatch.setattr(memory, "total_memory", lambda _, total=total: total)
        recompute_where_needed(configured(), LAKE, own)
        assert own.model.is_gradient_checkpointing == expected


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gpt2", "llama with another activation"])
def test_recomputed_activations_give_the_same_gradients(name: str, size: int, training: bool) -> None:
    """To the last bit, with less kept in between, in either mode of the model."""
    backbone = random_backbone(name, size)
    for part in backbone.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    backbone.train(training)
    ids, positions = packed()
    kept, found = list[int](), list[list[torch.Tensor]]()
    for again in (False, True):
        if again:
            backbone.activation_checkpointing_enable({"use_reentrant": False})
        numbers: list[int] = []

        def note(x: Any, numbers: list[int] = numbers) -> Any:
            numbers.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            hidden = hidden_states(backbone, ids, positions, packed_attention(LENGTHS, torch.device("cpu")))
        kept.append(sum(numbers))
        found.append(with_gradients(backbone, hidden))
        assert backbone.config._attn_implementation == "eager"
        assert all(part.training == training for part in backbone.modules())
    assert kept[1] < 0.5 * kept[0]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
