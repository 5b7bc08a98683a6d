"""Builds of the kernels: instruction sets, caches of compiled libraries, machines without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipeline.bootstrap.tokenizer import train_tokenizer
from pipeline.energy.annotate import score_trajectories
from pipeline.model.attention import Heads, packed_attention
from pipeline.model.kernels import library, native
from pipeline.model.policy import Policy
from pipeline.rollout.collector import collect
from pipeline.rollout.specs import iteration_specs
from pipeline.rollout.transformers_engine import TransformersEngine
from pipeline.settings.params import parse
from pipeline.workspace.errors import UserError
from pipeline.workspace.yaml_files import read_yaml
from tests.kernel_cases import (
    HAS_COMPILER,
    SETS,
    WORK,
    assert_close,
    codes,
    compiled_for,
    gradients,
    needs_compiler,
    normal,
    plain_swiglu,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels that are compiled for this one, as on a machine that has no wider one; one after another."""
    yield compiled_for(request.param, monkeypatch)
    library.library.cache_clear()


# ------------------------------------------------------------------------------------------------ instruction sets


def odd_rows(width: int) -> Sequence[Tensor]:
    inputs = [normal(37, width, seed=seed, scale=5.0) for seed in (0, 1)]
    normed = gradients(lambda *xs: native.rms_norm(*xs, 1e-6), inputs[0], normal(width, seed=2))
    return [*normed, *gradients(native.swiglu, *inputs)]


def odd_logits(vocabulary: int) -> Sequence[Tensor]:
    logits, tokens = normal(7, vocabulary, seed=0, scale=3.0), torch.arange(7) % vocabulary
    columns = native.score(logits.clone(), tokens, 0.7)
    raw, normaliser, _, entropy = columns
    slopes = tuple(normal(3, 7, seed=1))
    slope = native.score_slope(logits.clone(), tokens, 0.7, raw, normaliser, entropy, slopes)
    return [*columns, slope, *native.sample(logits, 0.7, torch.linspace(0, 0.99, 7, dtype=torch.float64))]


def odd_heads(size: int) -> Sequence[Tensor]:
    lengths = [17, 1, 131, 15, 33]
    tensors = [normal(sum(lengths), heads, size, seed=heads + i) for i, heads in enumerate((6, 3, 3))]
    rotation, layout = codes(np.concatenate([np.arange(n) for n in lengths]), size), native.layout(lengths)
    return gradients(lambda *qkv: native.causal_attention(*qkv, rotation, layout, size**-0.5), *tensors)


ODD: dict[str, Callable[[], Sequence[Tensor]]] = {
    **{f"causal, heads of {size}": partial(odd_heads, size) for size in native.HEAD_SIZES},
    "cached": WORK["cached, one long"],
    **{f"rows of {width}": partial(odd_rows, width) for width in (16, 48, 1040)},
    **{f"vocabulary of {count}": partial(odd_logits, count) for count in (1, 15, 17, 421, 3001)},
}


@needs_compiler
@pytest.mark.parametrize("name", ODD)
def test_kernels_say_the_same_for_every_instruction_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both have fused multiply-add to the bit: the order of sums does not depend on the length of a vector."""
    found = {}
    for which in SETS:
        compiled_for(which, monkeypatch)
        found[which] = ODD[name]()
    library.library.cache_clear()
    for which, results in found.items():
        for ours, theirs in zip(results, found[SETS[0]], strict=True):
            assert_close(ours, theirs, 2e-5)
            if {which, SETS[0]} == {"avx2", "avx512"}:
                assert torch.equal(ours, theirs)


class Seen(TorchDispatchMode):
    """Names of the operations that PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [64, 128])
def test_attention_is_left_to_pytorch_where_pytorch_is_faster(instruction_set: str, size: int) -> None:
    """In long sequences of wide heads; not for a short sequence beside them, which would be padded."""
    longest = native.LONGEST[instruction_set][size]
    for lengths, pytorch in (([longest + 1], True), ([longest], False), ([longest + 1, 3], False)):
        tensors = [normal(sum(lengths), 1, size, seed=seed) for seed in range(3)]
        with Seen() as seen, torch.no_grad():
            mixed = packed_attention(lengths, torch.device("cpu"))(0, Heads(*tensors, None, size**-0.5))
        assert any("scaled_dot_product" in name for name in seen.names) == pytorch
        alone = native.causal_attention(*tensors, None, native.layout(lengths), size**-0.5)
        assert_close(mixed, alone, 2e-5)
        assert torch.equal(mixed, alone) != pytorch


def test_every_instruction_set_has_a_longest_sequence_for_every_head_size() -> None:
    assert set(native.LONGEST) == set(library.INSTRUCTION_SETS)
    assert all(tuple(sizes) == native.HEAD_SIZES for sizes in native.LONGEST.values())


@pytest.mark.parametrize("choice", ["AVX2", "avx1024", "neon" if "neon" not in SETS else "avx512"])
def test_an_instruction_set_that_is_none_or_not_there_is_refused(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTFOCUS_KERNELS", choice)
    library.library.cache_clear()
    with pytest.raises(UserError) as refused:
        library.library()
    (line,) = str(refused.value).splitlines()
    allowed = ", ".join(["off", *SETS])
    assert line == f"ACTFOCUS_KERNELS: {choice!r} is not an instruction set of this machine; allowed: {allowed}"


# -------------------------------------------------------------------------------------------------- where none are


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A copy of the source that was never compiled, in a folder of its own; the user's cache is elsewhere."""
    source = tmp_path / "kernels" / "kernels.c"
    source.parent.mkdir()
    shutil.copy(library.SOURCE, source)
    monkeypatch.setattr(library, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.library.cache_clear()
    yield source.parent
    library.library.cache_clear()


@needs_compiler
def test_what_was_compiled_is_found_again(fresh_library: Path) -> None:
    assert library.library() is not None
    (compiled,) = fresh_library.rglob("*.so")
    before = compiled.stat()
    library.library.cache_clear()
    assert library.library() is not None
    assert list(fresh_library.rglob("*.so")) == [compiled]
    assert (compiled.stat().st_mtime_ns, compiled.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    (fresh_library / "kernels.c").write_text((fresh_library / "kernels.c").read_text() + "/* another */\n")
    library.library.cache_clear()
    assert library.library() is not None
    assert len(list(fresh_library.rglob("*.so"))) == 2


@needs_compiler
def test_it_is_compiled_elsewhere_when_its_own_folder_cannot_be_written(fresh_library: Path, tmp_path: Path) -> None:
    (fresh_library / "__pycache__").write_text("no folder")
    assert library.library() is not None
    assert len(list((tmp_path / "cache").rglob("*.so"))) == 1


def lesser_machine(folder: Path, without: str) -> str:
    """A compiler that works as the machine's does, but does not define macros with this in their names."""
    path = folder / f"cc-without-{without}"
    path.write_text(f'#!/bin/sh\ncase "$*" in\n*-dM*) cc "$@" | grep -v {without} ;;\n*) exec cc "$@" ;;\nesac\n')
    path.chmod(0o700)
    return str(path)


@needs_compiler
@pytest.mark.skipif("avx2" not in SETS, reason="no AVX2 here that could be missing")
def test_machines_that_share_a_cache_do_not_load_what_another_has_compiled(
    fresh_library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert library.library() is not None
    for number, (without, expected) in enumerate([("SSE4_2", SETS[0]), ("AVX512", "avx2")], 2):
        monkeypatch.setenv("CC", lesser_machine(tmp_path, without))
        library.library.cache_clear()
        loaded = library.library()
        assert loaded is not None
        assert loaded.instruction_set == expected
        assert len(list(fresh_library.rglob("*.so"))) == number
        last = torch.tensor([[1.0] * 16])
        assert_close(native.swiglu(last, last), plain_swiglu(last, last))


def test_what_does_not_compile_is_not_used(fresh_library: Path) -> None:
    (fresh_library / "kernels.c").write_text("this is no C")
    assert library.library() is None


@pytest.mark.parametrize("compiler", ["false", "/no/such/compiler"])
def test_without_a_working_compiler_there_are_no_kernels(
    fresh_library: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert library.library() is None
    assert not native.attends(torch.empty(1, 16))
    assert not native.computes(torch.empty(1, 16))


def rollout_and_scores(path: str) -> None:
    """Played and scored episodes of a random policy with heads of 16 numbers, as an .npz; also run on its own, below."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(["player 0 1 goal 3 3 holes none", "let me think", "Left Right Up Down"] * 3, 320)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
            **shape,
        )
    )
    policy = Policy(model.eval(), tokenizer)
    raw = read_yaml(ROOT / "params.yaml")
    raw["rollout"] = {"groups": 2, "group_size": 4, "batch_episodes": 3}
    raw["train"]["minibatch"] = 4
    config = parse(raw)
    name = next(iter(config.environments))
    played = collect(TransformersEngine(policy, 3), tokenizer, config, name, iteration_specs(config, name, 0, 0), 0.9)
    logprob, entropy, partition = score_trajectories(policy, played, 0.9, 500)
    columns = {"sampled": played.sampled, "recorded": played.logprob, "recorded_entropy": played.entropy}
    scored = {"logprob": logprob, "entropy": entropy, "partition": partition}
    np.savez(
        path, ids=played.input_ids, offsets=played.offsets, kernels=library.library() is not None, **columns, **scored
    )


def test_the_pipeline_says_the_same_without_kernels(tmp_path: Path) -> None:
    rollout_and_scores(str(tmp_path / "with.npz"))
    for name, variables in (("off", {"ACTFOCUS_KERNELS": "off"}), ("broken", {"CC": "false"})):
        code = f"import test_kernel_builds; test_kernel_builds.rollout_and_scores({str(tmp_path / name)!r} + '.npz')"
        environment = {**os.environ, **variables, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    own = np.load(tmp_path / "with.npz")
    assert own["kernels"] == HAS_COMPILER
    assert own["sampled"].sum() > 500
    np.testing.assert_allclose(own["logprob"][own["sampled"]], own["recorded"][own["sampled"]], atol=1e-4)
    for name in ("off", "broken"):
        plain = np.load(tmp_path / f"{name}.npz")
        assert not plain["kernels"]
        for column in ("ids", "offsets", "sampled"):
            np.testing.assert_array_equal(plain[column], own[column])
        for column in ("recorded", "recorded_entropy", "logprob", "entropy", "partition"):
            np.testing.assert_allclose(plain[column], own[column], atol=1e-4)
