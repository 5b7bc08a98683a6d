"""A name of params.yaml is part of commands: none is run before it has been checked, whatever is started."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.settings.params import parse
from pipeline.settings.presets import overlay, resolve_preset
from pipeline.workspace.errors import UserError
from pipeline.workspace.yaml_files import read_yaml
from tests.test_dag import clone, environment

pytestmark = [pytest.mark.dag, pytest.mark.xdist_group("dag")]

ROOT = Path(__file__).parents[1]
EVIL = [
    "x; touch PWNED #",
    "$(touch PWNED)",
    "`touch PWNED`",
    "x' ; touch PWNED ; '",
    'x" ; touch PWNED ; "',
    "a\ntouch PWNED",
]
LAKE = read_yaml(ROOT / "params.yaml")["environments"]["frozen_lake"]
STUDY = read_yaml(ROOT / "params.yaml")["sweep"]["studies"]["actfocus"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which `make` finds everything installed."""
    target = clone(tmp_path_factory.mktemp("names") / "clone")
    (target / ".venv").mkdir()
    (target / ".venv" / ".installed").touch()
    return target


def started(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    variables = {**environment(), "ACTFOCUS_KERNELS": "off"}  # compiling them takes seconds
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120)


def changed(name: str) -> dict[str, dict[str, Any]]:
    """A name in every place where one can stand, by the place."""
    return {
        "methods": {"methods": {name: {}}},
        "environments": {"environments": {name: LAKE}},
        "sweep.studies": {"sweep": {"studies": {name: STUDY}}},
        "comparison": {"comparison": name},
        "params_file": {"params_file": f"params.yaml{name}"},
        "out": {"out": name},
    }


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("place", changed(""))
def test_a_name_with_anything_but_letters_digits_and_underscores_is_refused(name: str, place: str) -> None:
    raw = read_yaml(ROOT / "params.yaml")
    with pytest.raises(UserError) as error:
        parse(overlay(raw, changed(name)[place]))
    value = changed(name)[place].get(place)
    assert repr(value if isinstance(value, str) else name) in str(error.value)
    assert str(error.value).startswith(f"params.yaml: {place}")
    assert "is not allowed; allowed: a " in str(error.value)
    assert str(error.value).replace(name, "").count("\n") == 0


EVERYWHERE = {
    key: value for part in ("methods", "environments", "sweep.studies") for key, value in changed(EVIL[3])[part].items()
}


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        (EVERYWHERE, ["make", "repro"]),
        (EVERYWHERE, ["dvc", "repro", "--keep-going", "sweeps/dvc.yaml"]),
        (changed(EVIL[3])["params_file"], ["dvc", "repro"]),
        ({"params_file": {EVIL[0]: {}}}, ["dvc", "repro"]),
    ],
)
def test_no_command_runs_with_a_name_that_has_not_been_checked(
    folder: Path, changes: dict[str, Any], command: list[str]
) -> None:
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(overlay(read_yaml(ROOT / "params.yaml"), changes), file)
    done = started(folder, *command)
    assert done.returncode != 0
    assert not any(folder.rglob("PWNED*"))
    assert set(re.findall("Running stage '([^']+)'", done.stdout)) <= {"sources@params"}
    if changes is EVERYWHERE:
        refused = [line for line in done.stderr.splitlines() if "is not allowed; allowed: a letter" in line]
        assert [line.split(": ")[1].split(".")[0] for line in refused] == ["environments", "methods", "sweep"]


def test_dvc_quotes_the_names_of_a_stage_that_is_started_alone(folder: Path) -> None:
    raw = read_yaml(ROOT / "params.yaml")
    name = EVIL[3]
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(overlay(raw, {"methods": {name: {}}}), file)
    done = started(folder, "dvc", "repro", "--single-item", "--force", "--dry", f"train@frozen_lake-{name}")
    assert "touch PWNED ; '\"'\"''" in done.stdout


def test_a_params_file_that_says_it_is_another_one_is_refused(folder: Path) -> None:
    """DVC reads names from the file beside dvc.yaml, and would have commands for the other one."""
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump({**read_yaml(ROOT / "params.yaml"), "params_file": "other.yaml"}, file)
    done = started(folder, "python", "-m", "stages.sources")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "params.yaml: params_file: 'other.yaml' is another file; allowed: params.yaml\n"


def test_a_presets_params_file_is_checked_from_the_root(folder: Path) -> None:
    with (folder / "params.yaml").open("wb") as file:
        file.write((ROOT / "params.yaml").read_bytes())
    command = ["dvc", "repro", "presets/bandit/dvc.yaml:sources@params"]
    assert started(folder, *command).returncode != 0, "in a new clone nothing has been made"
    made = resolve_preset("bandit", folder)
    assert started(folder, *command).returncode == 0
    assert (folder / "presets/bandit/data/sources/environments/bandit.json").exists()
    made.write_text(f"{made.read_text()}# an edit\n")
    done = started(folder, "python", "-m", "stages.sources", "--params", "presets/bandit/params.yaml")
    line = "presets/bandit/params.yaml: not what its overlay makes of it; run `make preset PRESET=bandit`\n"
    assert (done.returncode, done.stderr) == (2, line)
    resolve_preset("bandit", folder)


@pytest.mark.parametrize(
    ("target", "variable"),
    [
        ("repro", "PRESET"),
        ("sweep", "STUDY"),
        ("sweep-confirm", "STUDY"),
        ("play", "METHOD"),
        ("match", "TO"),
        ("compare", "A"),
        ("replay", "ARGS"),
        ("decisions", "ARGS"),
        ("bench", "DEVICE"),
        ("bench", "ISA"),
    ],
)
def test_make_runs_nothing_of_what_it_is_given_by_name(folder: Path, target: str, variable: str) -> None:
    given = {"METHOD": "grpo"} if target == "match" else {}
    command = ["make", "--dry-run", target, *(f"{k}={v}" for k, v in {**given, variable: "x; touch PWNED #"}.items())]
    done = started(folder, *command)
    assert "touch PWNED" not in done.stdout, "a shell would read it"
    started(
        folder, "make", "--dry-run", target, *(f"{k}={v}" for k, v in given.items()), f"{variable}=$(shell touch PWNED)"
    )
    assert not any(folder.rglob("PWNED*")), "Make would read it"
    if variable == "PRESET":
        assert done.returncode != 0
        assert "PRESET: 'x; touch PWNED #' is not there; allowed: " in done.stderr
