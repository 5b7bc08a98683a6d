"""Every params file and overlay is loaded or refused within a second, in lines that a terminal shows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.settings.params import load, parse
from pipeline.workspace.errors import LONGEST, UserError, fitted, listed, shown
from pipeline.workspace.yaml_files import LARGEST_LOCK, parse_yaml, read_yaml
from tests import params_fuzz
from tests.config_cases import ROOT, put
from tests.params_fuzz import RAW, SECONDS, beginnings, spoilt, tried, wrong

FILES = 60
"""Files that are tried here; ``python -m tests.params_fuzz 10000`` tries others."""


def test_files_gone_wrong_are_loaded_or_refused_in_time_and_in_lines(tmp_path: Path) -> None:
    begun = beginnings()
    for seed in range(FILES):
        found = tried(tmp_path, *spoilt(seed, begun))
        assert not wrong(found), f"seed {seed}"


@pytest.mark.parametrize("text", RAW)
def test_whatever_stands_behind_a_key_is_loaded_or_refused(tmp_path: Path, text: str) -> None:
    lines = (ROOT / "params.yaml").read_text(encoding="utf-8").replace("threads: 1 ", f"threads: {text}\n#")
    found = tried(tmp_path, "", lines.encode())
    assert found.config is None or found.config.threads in (1, 10)
    assert not wrong(found)


BASE = (ROOT / "params.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"a: [" + b"[" * 20_000, "not valid YAML: more than 32 mappings and lists in one another"),
        (b"a: [" + b"1," * 20_000 + b"]", "not valid YAML: more than 6553 keys and values"),
        (b"#" * 70_000, "too large; allowed: at most 64 KiB"),
        (b"a: !!float x", "not valid YAML: a value is not of its tag (could not convert string to float: 'x')"),
        (b"a: " + b"9" * 5000, "not valid YAML: a value is not of its tag (Exceeds the limit"),
        (b"a: 0x" + b"f" * 5000, "a: a very large int is not allowed; allowed: whole numbers below 2 ** 64"),
        (b"a: 2001-01-01", "a: datetime.date(2001, 1, 1) is not allowed; allowed: text (dates in quotes), numbers"),
        (b"a: {1: 2}", "a: the key 1 is not text; allowed: text, in quotes if need be"),
        (b'a: "\\ud800"', "a: has the character U+D800; allowed: text without control characters"),
        (b'a: "\\e[31m"', "a: has the character U+001B; allowed: text without control characters"),
        (b"a: \xe9", "not valid YAML: byte 4 is not UTF-8"),
        (BASE.encode("utf-16"), "not valid YAML: byte 1 is not UTF-8"),
        (b"a: 1\na: 2", "not valid YAML: line 2, column 1: while constructing a mapping: found duplicate key"),
        (b"--- 1\n--- 2", "expected a single document in the stream: but found another document"),
        (b"a: .inf", "a: input should be a finite number, got inf"),
        (b"a: !mine 1", "could not determine a constructor for the tag '!mine'"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_settings_is_refused_by_what_it_holds(tmp_path: Path, content: bytes, line: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        load(file)
    assert line in str(error.value)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "params.yaml")
    with pytest.raises(UserError, match=r"params\.yaml: not a file"):
        load(tmp_path / "params.yaml")
    with pytest.raises(UserError, match="not a file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("x" * 10_000, 1),
        ("seeds", [0] * 1000),
        ("comparison", "x" * 10_000),
        ("comparison", "\x1b[31m"),
        ("methods.grpo.weight", {"kind": "x" * 5000}),
        ("compare.uniform", {"y" * 500: "x" * 500}),
        ("seeds", 10**5000),
        ("environments.frozen_lake.max_turns", {"a": [["b" * 500] * 50]}),
    ],
)
def test_a_long_value_is_shown_in_part(key: str, value: Any) -> None:
    with pytest.raises(UserError) as error:
        parse(put(read_yaml(ROOT / "params.yaml"), key, value))
    for line in str(error.value).split("\n"):
        assert line.isprintable()
        assert len(line) <= LONGEST


def test_of_very_many_mistakes_the_first_are_told(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("\n".join([BASE, *(f"mine{n}: 1" for n in range(1000))]))
    with pytest.raises(UserError) as error:
        load(file)
    lines = str(error.value).split("\n")
    assert len(lines) == 21
    assert lines[-1] == "and more"
    assert all("unknown key" in line for line in lines[:-1])


def test_a_line_keeps_its_beginning_and_its_end() -> None:
    assert fitted("a\nb\x1b\u202e") == r"a\nb\x1b\u202e"
    long = fitted("begin" + "x" * 10**6 + "end")
    assert long.startswith("beginx")
    assert long.endswith("xend")
    assert len(long) == LONGEST
    assert fitted("x" * LONGEST) == "x" * LONGEST
    assert len(shown({"a": list(range(1000))})) == 80
    assert listed(["a", "b"]) == "a, b"
    assert listed([f"name{n}" for n in range(100)]).endswith("name19 and 80 more")


def test_a_lock_of_dvcs_may_be_larger() -> None:
    text = "\n".join(f"key{n}: value" for n in range(20_000)).encode()
    with pytest.raises(UserError, match="too large"):
        parse_yaml(text, "x")
    assert 10 * len(text) < LARGEST_LOCK
    assert len(parse_yaml(text[:100_000].rpartition(b"\n")[0], "dvc.lock", LARGEST_LOCK)) > 5000


def test_what_is_wrong_with_a_refusal_is_seen() -> None:
    for lines in ([""], [" : "], ["x" * 300], ["a\tb"]):
        assert wrong(params_fuzz.Tried(None, lines, 0.0))
    assert wrong(params_fuzz.Tried(None, ["x"], SECONDS + 0.1)) == ["1.10 s"]
    assert not wrong(params_fuzz.Tried(None, ["params.yaml: x"], 0.1))
