"""Optional packages of environments, and what their adapters share."""

from __future__ import annotations

import importlib.util
import random
import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires

import numpy as np
import pytest

from pipeline.environments import make
from pipeline.environments.foreign import Enclosure, free_text
from pipeline.environments.making import EXTRAS, OURS
from pipeline.settings.params import Environment
from pipeline.workspace.errors import UserError
from tests.extras import ROOT

# ------------------------------------------------------------------------------------------------------- the packages


def test_a_package_that_is_not_there_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, (_, extra) in EXTRAS.items():
        with pytest.raises(UserError) as caught:
            make(Environment(id=name))
        said = f"environments: id {name!r} needs the package {extra}: pip install -e '.[{extra}]'"
        assert str(caught.value) == said


def test_the_packages_are_imported_when_their_environments_are_made() -> None:
    program = "import sys, pipeline.environments as e; print({'reasoning_gym', 'textarena', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert not set(OURS) & set(EXTRAS)


def normal(requirement: str) -> str:
    return re.split(r"[ ;<>=!~\[(]", requirement)[0].lower().replace("_", "-")


def pinned() -> set[str]:
    return {normal(line) for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]}


def test_every_extra_can_be_installed_by_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for _, extra in EXTRAS.values():
        assert [normal(requirement) for requirement in project["optional-dependencies"][extra]] == [extra]
        assert extra in pinned()


@pytest.mark.parametrize("package", ["reasoning_gym", "textarena"])
def test_what_an_extra_requires_is_pinned(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    assert {normal(line) for line in requires(package) or [] if "extra ==" not in line} <= pinned()


# -------------------------------------------------------------------------------------------------- what they share


@pytest.mark.parametrize(
    ("text", "action"),
    [
        (" 42\n", "42"),
        ("1 2\n\t3  4 ", "1 2\n\t3  4"),
        ("a | b < c", "a | b < c"),
        ("x" * 50, "x" * 50),
        ("x" * 51, None),
        (" \n", None),
        ("a || b", None),
        ("<answer>4", None),
        ("4\r", "4"),
        ("4\r5", None),
        ("\x00", None),
        ("\ud800", None),
    ],
)
def test_free_text_loses_the_space_around_it_alone(text: str, action: str | None) -> None:
    assert free_text(text, 50) == action


def test_an_enclosure_has_draws_of_its_own_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def drawn(enclosure: Enclosure) -> tuple[float, float]:
        with enclosure.entered():
            print("noise")
            return random.random(), float(np.random.random())

    random.seed(5)
    np.random.seed(5)
    undisturbed = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    one, twin = Enclosure(7), Enclosure(7)
    first, second = drawn(one), drawn(one)
    with pytest.raises(KeyError), one.entered():
        raise KeyError
    assert (random.random(), np.random.random()) == undisturbed
    assert (drawn(twin), drawn(twin)) == (first, second)
    assert len({first, second, drawn(Enclosure(8))}) == 3
    assert capsys.readouterr().out == ""
