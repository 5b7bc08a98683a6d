"""The console script: what it says of itself, and what it says of mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.commands.app import COMMANDS, main
from pipeline.workspace.files import write_text
from pipeline.workspace.yaml_files import yaml_text
from tests.commands import complaints
from tests.trainings import configured

ROOT = Path(__file__).parents[1]


def called(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of ``actfocus`` with these words, in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["actfocus", *words])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_help_has_a_line_for_every_command_and_imports_nothing_heavy() -> None:
    script = "import sys; from pipeline.commands.app import main\ntry: main()\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    *help_text, modules = done.stdout.splitlines()
    commands = help_text[help_text.index("Commands:") + 1 :]
    assert [line.split()[0] for line in commands] == list(COMMANDS)
    assert {"torch", "pandas", "mlflow", "transformers", "dvc", "pipeline.settings.slots"}.isdisjoint(modules.split())
    assert {file.stem for file in (ROOT / "pipeline" / "commands").glob("*.py")} == {
        *COMMANDS,
        "__init__",
        "app",
        "cli",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_is(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, command, "--help") == 0
    options = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert all("<" not in line and len(line.split(maxsplit=2)) == 3 for line in options)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "No such command 'nothing'."),
        (["play", "--nothing"], "No such option: --nothing"),
        (["play", "--method", "[/red]"], "params.yaml: methods: '[/red]' is not there; allowed: ppo, grpo,"),
        (["play", "--seed", "x"], "Invalid value for '--seed': "),
        (["simulate", "--trials", "3"], "--trials: 3; allowed: 100 to 100000"),
        (["replay", "--alpha", "-1"], "Invalid value for '--alpha': "),
        (["replay", "--signal", "x"], "--signal: 'x' is not allowed; allowed: reference_energy,"),
        (["contracts", "--function", "mine:weight"], "--slot, --function: one is given without the other"),
        (["contracts", "--settings", "{}", "--slot", "weight"], "--slot, --function: one is given without the other"),
        (["contracts", "--settings", '{"a": 1}'], "--settings: there is nothing to give them to"),
        (["contracts", "--settings", "3"], "Invalid value for '--settings': Value error, no JSON object"),
        (["contracts", "--params", "nothing.yaml"], "nothing.yaml: no such file"),
        (["preset", "--name", "x"], "presets: 'x' is not there; allowed: bandit,"),
    ],
)
def test_a_mistake_is_one_plain_line(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, *words) == 2
    out, err = capfd.readouterr()
    (line,) = complaints(err)
    assert line.startswith(said)
    assert out == ""


def test_a_params_file_is_checked_with_what_it_names(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert called(monkeypatch, "check", "--params", "params.yaml") == 0
    first, *_, runs, following = capfd.readouterr().out.splitlines()
    assert first == "params.yaml: right. 1 environments x 6 methods x 10 seeds = 60 trainings"
    assert runs.startswith("runs of each stage: sources 1, policy 1, rollout 1, annotate 1, bottleneck 1, train 6, ")
    assert following == "Next: dvc repro dvc.yaml"
    right, elsewhere = (ROOT / "params.yaml").read_text(encoding="utf-8"), tmp_path / "params.yaml"
    for text, code in ((right, 0), (right.replace("id: actfocus/", "id: nowhere:actfocus/", 1), 2)):
        elsewhere.write_text(text, encoding="utf-8")
        assert called(monkeypatch, "check", "--params", str(elsewhere)) == code
    assert "No module named 'nowhere'" in capfd.readouterr().err


def test_a_pretrained_policy_is_tried_and_the_answer_is_the_first_line(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    raw = configured({"policy": {"kind": "pretrained", "model": str(directory)}}).model_dump(mode="json", by_alias=True)
    write_text(tmp_path / "params.yaml", yaml_text({key: raw[key] for key in raw if key != "seeds_until"}))
    assert called(monkeypatch, "check", "--params", str(tmp_path / "params.yaml")) == 0
    first, policy, *_ = capfd.readouterr().out.splitlines()
    assert first.startswith(("ready: about ", "not ready: there is nothing to learn from ("))
    assert policy.startswith(f"policy: {directory}: qwen2, 0.03 M parameters, float32; ")
    assert called(monkeypatch, "check", "--params", str(tmp_path / "params.yaml"), "--no-policy") == 0
    assert capfd.readouterr().out.startswith(f"{tmp_path / 'params.yaml'}: right. ")


def test_contracts_that_are_broken_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for id, seen in (
        ("nowhere:Nothing-v0", "made: environments: id 'nowhere:Nothing-v0' cannot"),
        ("tests.broken_seeds:IgnoresItsSeeds-v0", "seed used: "),
    ):
        assert called(monkeypatch, "contracts", "--id", id) == 1
        assert capsys.readouterr().out.startswith(f"{id}: {seen}")
