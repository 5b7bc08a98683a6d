"""Benchmarks are not timed here, but what they hold time against is checked."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.baselines import GenerateEngine, padded_scores
from benchmarks.kernels import least, pairs
from benchmarks.language_model import SMOLLM2, language_model
from benchmarks.report import bench_text, summary
from benchmarks.subjects import Setup
from benchmarks.throughput import Large, on_gpu, update
from benchmarks.timing import Unmeasured, run_sections
from benchmarks.workload import workload
from pipeline.bootstrap.tokenizer import train_tokenizer
from pipeline.model.policy import Policy
from pipeline.model.scoring import predicting_hidden, score_tokens
from pipeline.planning.flops import forward_flops, sampling_flops
from pipeline.report.publishing import MARKS, NOT_RUN, blocks_of, fenced, name_commits, publish_block, replace_block
from pipeline.rollout.collector import collect
from pipeline.rollout.specs import iteration_specs
from pipeline.settings.params import load
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import write_json

ROOT = Path(__file__).parents[1]


def small_policy() -> Policy:
    tokenizer = train_tokenizer(["player 0 1 goal 3 3 holes 1 2", "Left Right Up Down"] * 3, 320)
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Policy(Qwen2ForCausalLM(shape).eval(), tokenizer)


def counted(config: Qwen2Config, length: int, wanted: np.ndarray, cached: bool = False) -> float:
    """Multiplications and additions of one sequence, token by token; a cache needs the last layer's, too."""
    size, width, inner = config.hidden_size // config.num_attention_heads, config.hidden_size, config.intermediate_size
    total = 0
    for layer in range(config.num_hidden_layers):
        last = layer == config.num_hidden_layers - 1
        for token in range(length):
            total += 2 * 2 * width * config.num_key_value_heads * size  # keys and values
            if last and not cached and not (token + 1 < length and wanted[token + 1]):
                continue
            total += 2 * 2 * width * width + 3 * 2 * width * inner  # query, output, SwiGLU
            total += (token + 1) * config.num_attention_heads * 2 * 2 * size
    return total + int(wanted.sum()) * 2 * width * config.vocab_size


def test_forward_flops_are_those_of_a_count_token_by_token() -> None:
    config = small_policy().model.config
    wanted = [np.array([False, False, True, True, False]), np.array([False, True, False])]
    expected = counted(config, 5, wanted[0]) + counted(config, 3, wanted[1])
    assert forward_flops(config, [5, 3], wanted) == expected


def test_sampling_flops_count_a_shared_prompt_once() -> None:
    config = small_policy().model.config
    alone = sampling_flops(config, [4, 4], [9, 7], sampled=6)
    together = sampling_flops(config, [4], [9, 7], sampled=6)
    assert alone - together == counted(config, 4, np.zeros(4, dtype=bool), cached=True)
    whole = [counted(config, n, np.zeros(n, dtype=bool), cached=True) for n in (9, 7)]
    assert alone == sum(whole) + 6 * 2 * config.hidden_size * config.vocab_size


def test_the_padded_baseline_computes_what_ours_does() -> None:
    policy, draws = small_policy(), np.random.default_rng(0)
    ids = [draws.integers(0, 300, n).astype(np.int32) for n in (12, 7, 9)]
    wanted = [np.arange(len(i)) % 3 == 1 for i in ids]
    tokens = torch.from_numpy(np.concatenate([i[w] for i, w in zip(ids, wanted, strict=True)]).astype(np.int64))
    ours = score_tokens(predicting_hidden(policy, ids, wanted), tokens, policy.head, 1.0)
    logprob, entropy = padded_scores(policy, ids, wanted)
    torch.testing.assert_close(ours.logprob, logprob, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.entropy, entropy, atol=1e-4, rtol=0)


@pytest.mark.parametrize("padded", [False, True])
def test_the_timed_update_moves_the_policy_alike_padded_or_packed(padded: bool) -> None:
    policy, draws = small_policy(), np.random.default_rng(0)
    before = policy.head.weight.detach().clone()
    ids = [draws.integers(0, 300, n).astype(np.int32) for n in (12, 7, 9)]
    update(policy, ids, [np.arange(len(i)) % 3 == 1 for i in ids], 16, padded)
    moved = (policy.head.weight.detach() - before).abs().max()
    assert 0 < float(moved) < 1e-5  # one Adam step of 1e-6


def test_the_generate_baseline_plays_whole_episodes() -> None:
    config, policy = load(ROOT / "params.yaml"), small_policy()
    section = config.environments["frozen_lake"].model_copy(update={"max_turns": 2, "response_tokens": 6})
    config = config.model_copy(update={"environments": {"frozen_lake": section}})
    specs = iteration_specs(config, "frozen_lake", 0, 0)[:20]
    played = collect(GenerateEngine(policy), policy.tokenizer, config, "frozen_lake", specs, 1.0)
    assert len(played) == 20
    assert set(np.diff(played.turn_offsets)) == {2}
    assert played.sampled.sum() <= 20 * 2 * 6
    assert float(np.abs(played.logprob[played.sampled]).max()) > 0


class SmallSetup(Setup):
    """A setup without the files that ``make repro`` makes."""

    def policy(self) -> Policy:
        return small_policy()


def test_what_a_gpu_runs_also_runs_tiny_on_a_cpu_and_is_reported() -> None:
    setup = SmallSetup(load(ROOT / "params.yaml"), ROOT, ROOT, torch.device("cpu"), torch.bfloat16)
    tiny = Large(shape=(32, 2, 2), product=64, copied=2**16, sequences=4, length=40, slots=3, steps=5)
    found = json.loads(json.dumps(on_gpu(setup, tiny)))
    assert found["update"]["parameters"] == sum(p.numel() for p in setup.scratch(32, 2, 2).model.parameters())
    names, values = zip(*summary({"gpu": found}), strict=True)
    assert names[0] == "cpu, bfloat16 matrix peak"
    assert names[3].endswith("3 at once")
    assert "of the matrix peak" in values[2]


def waits(seconds: float, report: Any) -> None:
    time.sleep(seconds)


def test_a_language_models_section_runs_at_a_small_size_and_is_reported() -> None:
    small = SMOLLM2 | {"vocab_size": 512, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    found = language_model(small | {"num_attention_heads": 3, "num_key_value_heads": 1}, threads=(1,))
    parts = found["1"]
    assert all(0 < parts[part]["flops_per_second"]["least"] < parts["peak"] for part in ("update", "decoding"))
    lines = dict(summary({"language_model": json.loads(json.dumps(found))}))
    assert [name.split(",")[0] for name in lines] == ["decoding 32 episodes", "update"]
    assert all(re.search(r"tokens/s, \d+% \(\d+% to \d+%\) of \d+ GFLOP/s", value) for value in lines.values())


def test_what_cannot_be_measured_is_skipped_with_a_word_and_within_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    """Also what waits for worker processes."""
    from pipeline.workspace.processes import run_in_processes

    def broken() -> None:
        raise ValueError("no such thing\nat all")

    def missing() -> None:
        raise Unmeasured("no --trl was given")

    found: dict[str, Any] = {"seconds": {}, "skipped": {"first": "before"}, "training": "of another time"}
    sections: dict[str, Callable[[], Any]] = {
        "first": lambda: {"value": 1},
        "broken": broken,
        "trl": missing,
        "training": lambda: run_in_processes(waits, {"a": 60.0, "b": 60.0}, 2, "train"),
        "never": lambda: {"value": 2},
    }
    kept, began = [], time.monotonic()
    run_sections(found, sections, 2.0, lambda: kept.append(len(found["seconds"])))
    assert time.monotonic() - began < 30
    assert kept == [1, 2, 3, 4, 5]
    assert found["first"] == {"value": 1}
    assert found["skipped"] == {
        "broken": "ValueError: no such thing",
        "trl": "no --trl was given",
        "training": "not done in the 2 seconds that were left",
        "never": "no time was left",
    }
    assert "training" not in found
    assert not multiprocessing.active_children()
    lines = capsys.readouterr().err.splitlines()  # no terminal
    assert lines[:3] == ["bench 1/5 first", "bench 2/5 broken", "bench 2/5 broken: skipped, ValueError: no such thing"]
    assert "bench 4/5 training" in lines
    assert ("never", "skipped: no time was left") in summary(found)


def test_a_benchmark_with_nothing_to_measure_on_is_refused() -> None:
    def section() -> None:
        raise UserError("models/policy: no such policy")

    with pytest.raises(UserError, match="no such policy"):
        run_sections({"seconds": {}, "skipped": {}}, {"headline": section}, 10.0, lambda: None)


PEAKS = """
import json, torch
from benchmarks import machine
machine.PRODUCTS = ((64, 64, 64),)
torch.set_num_threads(1)
print(json.dumps(machine.peaks()))
"""


def test_peaks_of_a_precision_that_the_processor_does_not_multiply_are_skipped() -> None:
    """As on a processor without AVX-512, where PyTorch multiplies bfloat16 number by number."""
    lesser = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PEAKS], cwd=ROOT, env=lesser, capture_output=True, text=True, check=True, timeout=120
    )
    found = json.loads(done.stdout)
    assert found["float32, 1 thread"]["peak"] > 1e8
    for threads in ("1 thread", "2 threads"):
        assert "times as long as in float32" in found[f"bfloat16, {threads}"]["skipped"]
    words = dict(summary({"peaks": found}))
    assert words["matrix peak, bfloat16, 1 thread"].startswith("skipped: a product takes ")


def test_the_benchmark_of_kernels_holds_each_against_pytorch() -> None:
    """At one shape each: both sides compute the same."""
    chosen = {pair.name: pair for pair in pairs((40,), (16,), (64,), (420,))}
    assert set(chosen) == {
        "attention", "attention, gradients", "attention, one token", "attention, prompt",
        "rms_norm", "rms_norm, gradients", "swiglu", "swiglu, gradients", "score", "sample",
    }  # fmt: skip
    for pair in chosen.values():
        for ours, theirs in zip(flat(pair.kernel()), flat(pair.pytorch()), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)
        assert all(0 < value < 1e9 for value in least([pair.kernel, pair.pytorch], 0.0, rounds=1))


def flat(found: Any) -> list[torch.Tensor]:
    return [found] if isinstance(found, torch.Tensor) else list(found)


def measured(*values: float) -> dict[str, float]:
    return {"median": float(np.median(values)), "least": min(values), "most": max(values), "n": len(values)}


def trained(*generated: float) -> dict[str, Any]:
    shares = dict.fromkeys(("weights", "annotation", "tracking_checkpoint_progress"), 0.1)
    return {
        "seconds_per_iteration": measured(1.0),
        "generated_tokens_per_second": measured(*generated),
        **{f"share_of_{name}": share for name, share in shares.items()},
    }


def test_ratios_are_reported_with_the_spread_of_both_sides() -> None:
    theirs = trained(10, 20, 40) | {"trained_tokens_per_second_of_update": measured(30, 40, 50)}
    others = {"cached, two threads": trained(20, 30, 60), "cached, beside another": trained(5, 10, 20)}
    found: dict[str, Any] = {
        "training": {"0 grpo": trained(80, 100, 120)},
        "training_two_at_once": {"0 grpo": trained(60, 70, 80), "1 grpo_actfocus": trained(40, 50, 60)},
        "trl": {"best": "cached", "cached": theirs, **others},
    }
    lines = dict(summary(found))
    assert lines["one core each: ours against TRL's best"] == "5.0 x (2.0 to 12.0)"
    pair = lines["two cores each: two of our trainings against the better of TRL's ways"]
    assert pair == "4.0 x (1.7 to 7.0)"  # two threads: 120 / 30, 100 / 60, 140 / 20
    assert "trained" not in bench_text(found)
    found["training"]["0 grpo"] |= {
        "trained_tokens_per_second_of_update": measured(300),
        "trained_tokens_per_second_outside_generation": measured(100, 200, 300),
    }
    lines = dict(summary(found))
    assert lines["  trained tokens/s of the update phase alone"] == "300"
    assert lines["  trained tokens/s, generation left out"] == "200 against 40, 5.0 x (2.0 to 10.0)"


@pytest.mark.parametrize("key", [int, str])
def test_two_threads_are_reported_against_one_before_and_after_json(key: Callable[[int], Any]) -> None:
    def both(*values: float) -> dict[str, Any]:
        return {name: {"tokens_per_second": measured(*values)} for name in ("update", "rollout")}

    found = {"scaling": {"threads": {key(1): both(10, 10, 20), key(2): both(10, 15, 20)}}}
    assert summary(found) == [("two threads against one", "update 1.5 x (0.5 to 2.0), rollout 1.5 x (0.5 to 2.0)")]


def test_the_workload_is_told_by_a_hash_of_its_settings() -> None:
    config = load(ROOT / "params.yaml")
    longer = config.model_copy(update={"train": config.train.model_copy(update={"iterations": 37})})
    assert workload(config) == workload(load(ROOT / "params.yaml"))
    assert workload(config).split(":")[0] != workload(longer).split(":")[0]
    episodes = config.rollout.groups * config.rollout.group_size
    assert f"{config.train.iterations} iterations of {episodes} episodes" in workload(config)


def test_publishing_replaces_its_own_block_and_nothing_else(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    marks = [mark.format("bench") for mark in MARKS]
    document.write_text(f"before\n{marks[0]}\nold \\1\n{marks[1]}\nafter\n", encoding="utf-8")
    for content in ("new \\g<0> 1\n", "newer\n"):
        replace_block(document, "bench", fenced(content))
        text = document.read_text(encoding="utf-8")
        assert text == f"before\n{marks[0]}\n```text\n{content}```\n{marks[1]}\nafter\n"
    with pytest.raises(ValueError, match="no-such"):
        replace_block(document, "no-such", "lost")


def committed(folder: Path, date: str) -> str:
    """Commit everything in a git repository at a date; returns the hash."""
    who = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    dated = {**os.environ, "GIT_AUTHOR_DATE": f"{date}T12:00:00Z", "GIT_COMMITTER_DATE": f"{date}T12:00:00Z"}
    subprocess.run(["git", "add", "-A"], cwd=folder, check=True)
    subprocess.run(["git", *who, "commit", "-qm", date], cwd=folder, env=dated, check=True)
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=folder, text=True).strip()


def test_a_table_says_which_commit_it_is_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that its trainings have noted; without such a note, the one in which the table last changed."""
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    document, runs = Path("page.md"), tmp_path / "data" / "runs"
    names = ("sokoban", "bandit", "bandit sweep rates")
    marks = {name: [mark.format(name) for mark in MARKS] for name in names}
    document.write_text("".join(f"{begin}\nold\n\ntable\n{end}\nwords\n" for begin, end in marks.values()))
    first = committed(tmp_path, "2026-11-20")
    replace_block(document, "bandit", "newer\n\ntable")
    second = committed(tmp_path, "2026-11-21")
    document.write_text(f"a line above\n{document.read_text()}")
    last = committed(tmp_path, "2026-11-22")

    publish_block(document, "bandit sweep rates", "old\n\ntable", [runs])  # nothing new, and nothing noted
    name_commits(document)
    changed = "in which this table last changed."
    expected = {
        "sokoban": f"old\n\ntable\n\nMade by commit {first[:7]} (2026-11-20), {changed}",
        "bandit": f"newer\n\ntable\n\nMade by commit {second[:7]} (2026-11-21), {changed}",
        "bandit sweep rates": f"old\n\ntable\n\nMade by commit {first[:7]} (2026-11-20), {changed}",
    }
    assert blocks_of(document.read_text()) == expected
    committed(tmp_path, "2026-11-23")

    noted = {"seeds": {"0": {"revision": last}, "1": {"revision": f"{second}+changes"}}}
    write_json(runs / "lake-grpo.json", noted)
    publish_block(document, "sokoban", "new", [runs])
    by = f"{second[:7]} and uncommitted changes (2026-11-21), {last[:7]} (2026-11-22)"
    expected["sokoban"] = f"new\n\nMade by commits {by}."
    name_commits(document)  # what is said already stays
    assert blocks_of(document.read_text()) == expected

    write_json(runs / "lake-ppo.json", {"seeds": {"0": {"run_id": None}}})  # made before commits were noted
    publish_block(document, "sokoban", "new", [runs])
    publish_block(document, "bandit", "other", [runs])
    expected["bandit"] = "other\n\nMade by an unknown commit."
    assert blocks_of(document.read_text()) == expected


def test_every_published_table_says_which_commit_it_is_from() -> None:
    blocks = blocks_of((ROOT / "docs" / "results.md").read_text(encoding="utf-8"))
    blocks = {name: content for name, content in blocks.items() if content != NOT_RUN}
    assert len(blocks) > 10
    assert [name for name, content in blocks.items() if not re.search(r"\nMade by commits? [0-9a-f]{7}", content)] == []


def test_the_shops_benchmark_loads_without_and_with_an_index() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.webshop", "--products", "120", "--characters", "50"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    size, without, kept = done.stdout.splitlines()
    assert size.endswith("MB of products")
    assert without.startswith("without an index: 120 products in ")
    assert kept.startswith("with the index kept: 120 products in ")
