"""``actfocus plan``: the answer first, what it rests on, and what it says of mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.planning import measuring
from pipeline.planning.constants import Constants, constants_of
from pipeline.planning.devices import measured_device, sheet_device
from pipeline.planning.lengths import longest_lengths
from pipeline.planning.plan import Fleet, Plan, comparison_hours, longest_method, make_plan, pace_of, planned, schedule
from pipeline.planning.schedules import KINDS
from pipeline.planning.shapes import shape_of
from pipeline.planning.work import PHASES
from pipeline.report.plan import plan_text
from pipeline.report.plan_figures import draw_schedules
from pipeline.settings.params import Config
from pipeline.workspace.files import write_text
from pipeline.workspace.yaml_files import yaml_text
from tests.commands import complaints
from tests.test_actfocus import called
from tests.trainings import LAKE, configured

SLOW = Constants(1e-10, 1e-10, 1e-4, 1e-5)
FIT = {constants_of(phase): SLOW for phase in PHASES}


def gpus(count: int, name: str = "H100", dtype: torch.dtype = torch.bfloat16) -> Fleet:
    return Fleet(sheet_device(name, dtype), count, False, 1)


def language_model(name: str) -> Config:
    return configured({"policy": {"kind": "pretrained", "model": name, "dtype": "bfloat16"}})


def plan_of(config: Config, fleet: Fleet, spread: float = 0.0, method: str = "grpo") -> Plan:
    lengths, shape = longest_lengths(config, LAKE), shape_of(config)
    return make_plan(planned(config, LAKE, method, shape, lengths, fleet), LAKE, fleet, spread)


def test_one_device_takes_as_long_as_its_phases_together() -> None:
    """The simulation and the sum of the phases are two ways to the same number, where nothing is spread."""
    for fleet in (gpus(1), Fleet(measured_device("here", 1e12, FIT), 1, True, 1)):
        plan = plan_of(configured(), fleet)
        assert plan.recommended == "colocated"
        assert set(plan.runs) == {"colocated"}
        assert plan.runs["colocated"].iteration == pytest.approx(sum(plan.seconds.values()), rel=1e-3)


def test_hours_follow_the_schedule_and_the_devices() -> None:
    config = configured()
    one, eight = (plan_of(config, gpus(count)) for count in (1, 8))
    alone, together = (comparison_hours(config, {LAKE: p}, gpus(n)) for p, n in ((one, 1), (eight, 8)))
    assert together["evaluation"] == pytest.approx(alone["evaluation"] / 8)
    assert together["policy"] == alone["policy"]
    assert eight.recommended is not None
    faster = eight.runs[eight.recommended].iteration / sum(eight.seconds.values())
    assert together["training"] == pytest.approx(alone["training"] * faster, rel=1e-3)
    pace = pace_of(one)
    episodes = len(one.iteration.lengths)
    whole = episodes * (pace.sampled + pace.annotated + config.train.passes * pace.updated)
    assert whole == pytest.approx(sum(one.seconds.values()))


def test_a_model_too_large_for_one_device_is_spread_over_several_or_does_not_fit() -> None:
    config = language_model("Qwen/Qwen2.5-7B-Instruct")
    one, many = plan_of(config, gpus(1)), plan_of(config, gpus(16))
    assert one.recommended is None
    text = plan_text(config, {LAKE: one}, gpus(1), [])
    assert text.startswith("does not fit on H100: ")
    assert "train.lora" in text.splitlines()[0]
    assert many.recommended is not None
    assert many.sharded["colocated"]
    assert "with fsdp2" in plan_text(config, {LAKE: many}, gpus(16), []).splitlines()[0]
    adapted = config.model_copy(update={"train": config.train.model_copy(update={"lora": _lora()})})
    assert plan_of(adapted, gpus(1)).recommended == "colocated"


def _lora() -> object:
    from pipeline.settings.lora import Lora

    return Lora(rank=8)


def test_one_step_ahead_is_recommended_where_it_saves_enough() -> None:
    plan = plan_of(language_model("Qwen/Qwen2.5-0.5B"), gpus(16), spread=1.5)
    saved = 1 - plan.runs["ahead"].seconds / min(plan.runs[kind].seconds for kind in KINDS[:2])
    assert (plan.recommended == "ahead") == (saved > 0.15)


def test_the_method_with_a_critic_of_its_own_takes_longest() -> None:
    changes = {"methods": {"ppo": {"advantage": {"critic": {"kind": "model"}}}}}
    config = configured(changes)
    assert longest_method(config, LAKE, shape_of(config), longest_lengths(config, LAKE), gpus(1)) == "ppo"


def test_the_answer_is_the_first_line_and_the_phases_add_up() -> None:
    config, fleet = configured(), gpus(2)
    plan = plan_of(config, fleet)
    first, *rest = plan_text(config, {LAKE: plan}, fleet, ["nothing is measured"]).splitlines()
    assert " on 2 x H100: about " in first
    assert " for the whole comparison (" in first
    assert " GB on a device at its highest" in first
    assert "assumed: nothing is measured" in rest
    table = rest[rest.index("phases on one device (H100)") + 2 :]
    shown = [line.split("  ")[0].strip() for line in table[: table.index("")]]
    assert shown[:3] == ["prefill", "decoding", "environment"]
    assert shown[-1] == "sum"


def test_schedules_are_drawn_and_equal_ones_are_equal_bytes(tmp_path: Path) -> None:
    fleet = gpus(1)
    plan = plan_of(language_model("Qwen/Qwen2.5-0.5B"), fleet, 0.5)
    drawn = []
    for name in ("one", "two"):
        drawn.append(
            draw_schedules(
                lambda kind, count, spread: schedule(plan, fleet._replace(devices=count), kind, spread),
                0.5,
                "a title",
                tmp_path / name,
                devices=(1, 2, 8),
            )
        )
    assert [path.read_bytes() for path in drawn[0]] == [path.read_bytes() for path in drawn[1]]
    assert "one step ahead" in drawn[0][1].read_text(encoding="utf-8")


@pytest.fixture
def params(tmp_path: Path) -> str:
    raw = configured().model_dump(mode="json", by_alias=True)
    raw = {key: raw[key] for key in raw if key != "seeds_until"}
    write_text(tmp_path / "params.yaml", yaml_text(raw))
    return str(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "H1000"], "--device: 'H1000' is not known; allowed: A100-40, A100-80, H100, "),
        (["--device", "H100", "--count", "0"], "--count: 0; allowed: 1 to 1024"),
        (["--device", "H100", "--spread", "-1"], "--spread: -1; allowed: 0 to 10"),
        (["--device", "H100", "--method", "nothing"], "params.yaml: methods: 'nothing' is not there; allowed: ppo, "),
        (["--device", "H100", "--model", "./nothing"], "policy: ./nothing: no such model directory"),
        ([], "--device: "),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(measuring, "measurements", lambda: tmp_path / "none.json")
    assert called(monkeypatch, "plan", *words) == 2
    out, err = capfd.readouterr()
    (line,) = complaints(err)
    assert line.startswith(said)
    assert out == ""
    if not words:
        assert "has not been measured; run `actfocus plan --measure`, or name one of A100-40, " in line


def test_a_plan_is_made_from_a_params_file_alone(
    params: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, "plan", "--params", params, "--device", "H100", "--count", "4") == 0
    first, policy, *rest = capfd.readouterr().out.splitlines()
    assert " on 4 x H100: about " in first
    assert policy.startswith("policy: from scratch, 0.0")
    assert any(line.startswith("assumed: frozen_lake: no episodes are annotated yet") for line in rest)
