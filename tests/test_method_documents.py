"""docs/methods.md: every YAML block in it is valid, is the preset's row, and trains."""

from __future__ import annotations

import ast
import copy
import re
from typing import Any, get_args

import pytest
import torch
from ruamel.yaml import YAML

from pipeline.model.policy import Policy
from pipeline.report.methods import SLOTS
from pipeline.settings.method import Method
from pipeline.settings.params import Config, parse
from pipeline.settings.presets import load_preset, overlay, preset_values
from pipeline.training.module import PolicyGradient
from pipeline.workspace.yaml_files import read_yaml
from tests.trainings import LAKE, ROOT, TINY, fit

TEXT = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
ENTRY = re.compile(r"^#{3,4} `(\w+)`$", re.MULTILINE)
BLOCK = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS: list[Any] = [YAML(typ="safe", pure=True).load(block) for block in BLOCK.findall(TEXT)]
NAMES = [name for block in BLOCKS for name in block["methods"]]
COMPARED = re.compile(r"arXiv \d{4}\.\d{5}, \w|[\w-]+/[\w.-]+@[0-9a-f]{7}|; [\w-]+/[\w.-]+|verl \d")
"""How a source names a place."""
PRESETS = ("methods", "branching")
ROWS = {name for preset in PRESETS for name in preset_values(preset, ROOT)["methods"]}
SMALL = {key: value for key, value in TINY.items() if key != "method_defaults"}
"""All but the slots; each group of four makes two updates, so that no rule on the ratio is idle."""


def laid_over(block: Any, *changes: Any) -> Config:
    """params.yaml with a block on top of it, as the handbook tells its readers to use it."""
    raw = read_yaml(ROOT / "params.yaml")
    for change in (*changes, block):
        raw = overlay(raw, change)
    return parse(raw)


def alone(block: Any) -> Config:
    """params.yaml with the block's methods and no others: a row of the same name there must not fill anything in."""
    raw = read_yaml(ROOT / "params.yaml") | {"methods": None, "compare": {}}
    return parse(overlay(raw, {"methods": complete(block["methods"]), "train": block.get("train", {})}))


def complete(rows: dict[str, Any]) -> dict[str, Any]:
    """Rows with those that they are matched to."""
    others = {row["matched_to"] for row in rows.values() if "matched_to" in row} - set(rows)
    return {**{name: block_of(name)["methods"][name] for name in others}, **rows}


def block_of(name: str) -> Any:
    (block,) = (block for block in BLOCKS if name in block["methods"])
    return block


def small(row: Any) -> Any:
    """The row with trees that fit into a group of four."""
    own = row.get("branching", {})
    fitting = {key: min(own[key], 2) for key in ("initial", "width") if isinstance(own.get(key), int)}
    return {**row, "branching": own | fitting} if own else row


def slots(method: Method) -> dict[str, Any]:
    return method.model_dump(exclude={"source", "status"})


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: "+".join(block["methods"]))
def test_every_block_is_valid_as_it_is_pasted(block: Any) -> None:
    assert set(block) <= {"methods", "train", "compare", "sweep"}
    config = laid_over(block)
    assert set(block["methods"]) <= set(config.methods)
    by_itself = alone(block)
    for name in block["methods"]:
        assert slots(config.methods[name]) == slots(by_itself.methods[name]), name


def test_every_row_has_one_entry_and_one_block() -> None:
    assert len(NAMES) == len(set(NAMES))
    assert set(NAMES) >= ROWS
    entries = ENTRY.split(TEXT)[1:]
    headings, bodies = entries[::2], entries[1::2]
    assert len(headings) == len(set(headings))
    assert set(headings) >= ROWS
    for heading, body in zip(headings, bodies, strict=True):
        first = BLOCK.search(body)
        assert first, heading
        assert next(iter(YAML(typ="safe", pure=True).load(first[1])["methods"])) == heading


@pytest.mark.parametrize("preset", PRESETS)
def test_a_block_is_the_presets_row(preset: str) -> None:
    rows = load_preset(preset, ROOT).methods
    for name, row in rows.items():
        assert slots(alone(block_of(name)).methods[name]) == slots(row), name


def test_the_table_of_slots_lists_every_choice() -> None:
    """In the order of the schema."""
    for slot in SLOTS:
        annotation = Method.model_fields[slot].annotation
        kinds = [get_args(section.model_fields["kind"].annotation)[0] for section in get_args(annotation)]
        assert f"| `{slot}` | {', '.join(f'`{kind}`' for kind in kinds)} |" in TEXT


def test_an_entry_says_its_rows_status() -> None:
    entries = ENTRY.split(TEXT)[1:]
    bodies = dict(zip(entries[::2], entries[1::2], strict=True))
    for preset in PRESETS:
        for name, method in load_preset(preset, ROOT).methods.items():
            assert f"Status: {method.status}" in bodies[name], name


def test_a_faithful_row_says_what_it_was_compared_with() -> None:
    """A part of a paper, a repository or a release: the paper's number alone names nothing that can be looked up."""
    entries = ENTRY.split(TEXT)[1:]
    bodies = dict(zip(entries[::2], entries[1::2], strict=True))
    found = 0
    for preset in PRESETS:
        for name, method in load_preset(preset, ROOT).methods.items():
            if method.status == "faithful":
                assert COMPARED.search(method.source), (name, method.source)
                assert "unchecked" not in bodies[name], name
                found += 1
    assert found > 10


def test_the_controls_are_those_of_the_preset() -> None:
    methods = load_preset("controls", ROOT).methods
    assert set(methods) <= set(NAMES)
    for name, method in methods.items():
        assert slots(alone(block_of(name)).methods[name]) == slots(method), name


@pytest.mark.parametrize("name", NAMES)
def test_every_block_trains(name: str, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs" / "examples")
    config = laid_over({"methods": complete({name: small(block_of(name)["methods"][name])})}, SMALL)
    module = PolicyGradient(config, LAKE, name, 0, policy)
    before = copy.deepcopy(module.state_dict())
    fit(module, config.train.iterations)
    assert len(module.curve) == 2
    for row in module.curve:
        assert row["updates"] >= 2
        assert row["non_finite_losses"] == 0
        assert all(torch.isfinite(torch.tensor(value)) for value in row.values())
    after = module.state_dict()
    assert all(bool(value.isfinite().all()) for value in after.values())
    for part in ("model.", *(f"heads.{index}." for index in range(len(module.heads)))):
        assert any(not torch.equal(after[key], before[key]) for key in after if key.startswith(part)), part


def test_no_code_knows_a_methods_name() -> None:
    """A method is a row of choices; a branch on its name would be in the wrong place."""
    found = []
    for folder in ("pipeline", "stages"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in ROWS:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}")
    assert not found
