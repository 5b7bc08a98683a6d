"""What the documents say is there: settings, commands, files, tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.settings.params import parse
from pipeline.settings.presets import overlay
from pipeline.workspace.yaml_files import read_yaml

ROOT = Path(__file__).parents[1]
README, ARCHITECTURE, SCALING = ROOT / "README.md", ROOT / "docs" / "architecture.md", ROOT / "docs" / "scaling.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]


def said(document: Path) -> str:
    return document.read_text(encoding="utf-8")


@pytest.mark.parametrize("document", [README, SCALING], ids=lambda path: path.name)
def test_every_yaml_block_is_valid_on_top_of_params(document: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", said(document), flags=re.S)
    assert len(blocks) >= 2
    for block in blocks:
        parse(overlay(read_yaml(ROOT / "params.yaml"), YAML(typ="safe").load(block)), document.name)


def test_the_readme_is_for_two_minutes() -> None:
    assert said(README).count("\n") <= 150


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_is_there(document: Path) -> None:
    text = said(document)
    targets = set(re.findall(r"^([a-z-]+):", said(ROOT / "Makefile"), flags=re.M))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.M)) <= targets
    for path in re.findall(r"`((?:pipeline|stages|tests|presets|docs|benchmarks)/[A-Za-z0-9_./-]+)`", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(([\w./-]+)(?:#[\w-]*)?\)", text):
        assert (document.parent / path).exists(), path
    for path, section in re.findall(r"\]\(([\w./-]*\.md)#([\w-]+)\)", text):
        headings = re.findall(r"^#+ (.+)$", said(document.parent / path), flags=re.M)
        assert section in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], section


def test_every_invariant_has_tests_that_are_there() -> None:
    rows = re.findall(r"^\| (\d) \| \*\*.+\| (.+) \|$", said(ARCHITECTURE), flags=re.M)
    assert [number for number, _ in rows] == [str(number + 1) for number in range(8)]
    there = {name for file in ROOT.glob("tests/test_*.py") for name in re.findall(r"^def (test_\w+)", said(file), re.M)}
    for number, tests in rows:
        named = re.findall(r"`(\w+)`", tests)
        assert named, number
        assert set(named) <= there, set(named) - there


def test_the_folders_of_the_architecture_are_all_that_there_are() -> None:
    folders = {f"pipeline/{path.parent.name}/" for path in ROOT.glob("pipeline/*/__init__.py")}
    assert set(re.findall(r"^\| `(pipeline/\w+/)` \|", said(ARCHITECTURE), flags=re.M)) == folders
