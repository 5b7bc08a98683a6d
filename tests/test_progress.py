"""What is said while work goes on: when, how far it is, how long it will take, and from how deep inside."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.progress import display as progress
from pipeline.progress.display import Display, Teller, beat, begin, doing, duration, on_beat, span, tell, within
from pipeline.workspace.processes import Tell, run_in_processes
from tests.trainings import LAKE, ROOT, configured


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word is heard, the first line is still to come, and nobody listens to this process afterwards."""
    for name, value in (("PAUSE", 0.0), ("_next", 0.0), ("_teller", None)):
        monkeypatch.setattr(progress, name, value)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time of displays, which print when they are made to look."""
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    monkeypatch.setattr(Display, "_wake", lambda self: None)
    return made


@pytest.fixture
def heard() -> list[tuple[float, float, str]]:
    """What this process says of itself."""
    words: list[tuple[float, float, str]] = []
    tell(lambda *word: words.append(word))
    return words


def three_units(seconds: float, report: Tell) -> None:
    report(0, 3, "units")
    for done in (1, 2, 3):
        time.sleep(seconds)
        report(done, 3, "units")


def test_a_pool_tells_how_far_its_tasks_are(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST", 0.2)
    monkeypatch.setattr(progress, "EVERY", 0.2)
    run_in_processes(three_units, {"fast": 0.05, "slow": 0.5}, 2, "count")
    output, error = capfd.readouterr()
    assert output == ""
    last = error.splitlines()[-1]
    assert re.fullmatch(r"count: 1 of 2 done; slow: [012]/3 units; \d s so far, about \d s left", last)


def test_short_work_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    run_in_processes(three_units, {"one": 0.02}, 1, "count")
    assert capfd.readouterr() == ("", "")


def test_the_first_line_comes_within_ten_seconds_and_another_every_twenty(
    clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    printed = []
    with Display("policy", [""]) as display:
        for _ in range(60):
            clock.now += 1
            display.look()
            printed += [clock.now - 1000 for _ in capfd.readouterr().err.splitlines()]
    assert progress.FIRST < 10
    assert printed == [progress.FIRST + n * progress.EVERY for n in range(3)]


def test_a_display_inside_another_goes_on_with_its_lines(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    lines = []
    with Display("train", [""], bars=False) as outer:
        clock.now += 9
        outer.look()
        with Display("train lake", ["seed 0", "seed 1"]) as inner:
            inner.update("seed 0", 3, 36, "success 0.5")
            for _ in range(30):
                clock.now += 1
                inner.look()
                lines += capfd.readouterr().err.splitlines()
    assert lines[0] == "train: starting; 9 s so far"
    assert lines[1] == "train lake: 0 of 2 done; seed 0: 3/36 success 0.5; 29 s so far"
    assert len(lines) == 2


def test_a_task_that_says_nothing_is_said_to_be_silent(clock: Clock) -> None:
    with Display("wait", ["one"]) as display:
        display.update("one", 0, 0, "starting")
        clock.now += 59
        assert display.line() == "wait: one: starting; 59 s so far"
        clock.now += 121
        assert display.line() == "wait: one: starting (last word 3 min ago); 3 min so far"


def test_time_left_is_from_the_pace_of_what_was_done_now(clock: Clock) -> None:
    """Half of the first task had been done before: three quarters of it and the second task are left."""
    with Display("train", ["a", "b"]) as display:
        display.update("a", 10, 20, "")
        clock.now += 40
        assert display.line() == "train: 0 of 2 done; a: 10/20; 40 s so far"
        clock.now += 20
        display.update("a", 15, 20, "")
        assert display.line() == "train: 0 of 2 done; a: 15/20; 60 s so far, about 5 min left"
        display.finish("a")
        clock.now += 60
        assert display.line() == "train: 1 of 2 done; 2 min so far, about 4 min left"


def test_time_left_of_a_sweep_is_from_the_trials_that_have_ended(clock: Clock) -> None:
    with Display("sweep", ["worker 0", "worker 1"]) as display:
        display.whole(4, 16)
        display.update("worker 0", 0, 10, "trial 4")
        clock.now += 600
        display.update("worker 0", 5, 10, "trial 6")
        display.whole(6, 16)
        assert display.line() == "sweep: 6 of 16 done; worker 0: 5/10 trial 6; 10 min so far, about 38 min left"


def test_a_part_of_a_unit_is_its_place_in_the_spans_around_it(heard: list[tuple[float, float, str]]) -> None:
    begin(2, 8, "iterations")
    begin(0, 9, "not the first word")
    with span("sampling", 0.0, 0.5), span("again", 0.5, 1.0):
        within(0.5, "3 of 6")
    assert heard[0] == (2, 8, "iterations")
    assert heard[-1] == (2.375, 8, "iterations; sampling again 3 of 6")
    doing("drawing")
    assert heard[-1] == (0, 0, "drawing")


def test_a_word_from_inside_waits_until_it_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PAUSE", 60.0)
    words: list[str] = []
    report = tell(lambda done, total, text: words.append(text))
    report(1, 2, "one")
    with span("two"):
        within(0.5, "half")
        with on_beat(lambda tokens: words.append(f"{tokens} tokens")):
            beat(7)
    report(2, 2, "three")
    assert words == ["one", "three"]


def test_what_was_reported_inside_a_span_is_not_counted_twice(heard: list[tuple[float, float, str]]) -> None:
    report = Teller(lambda *word: heard.append(word))
    report(0, 10)
    with report.span("", 0, 10):
        report(4, 10)
        report.within(0.45, "")
    assert heard[-1][:2] == (4.5, 10)


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "7 s"), (100, "2 min"), (5400, "1.5 h")])
def test_a_stretch_of_time_reads_naturally(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_inside_an_iteration_episodes_turns_and_tokens_are_told(
    directory: Path, tmp_path: Path, heard: list[tuple[float, float, str]]
) -> None:
    from pipeline.training.run import TrainingJob, train_one
    from pipeline.training.seed_key import training_task

    task = training_task(configured(), LAKE, "grpo", 0, directory, tmp_path)
    report = progress._teller
    assert report is not None
    train_one(TrainingJob(task, None, None), report)
    told = [text for _, _, text in heard]
    assert any(re.search(r"sampling \d of 8 episodes ended, \d+ turns, [1-9]\d* tokens", text) for text in told)
    for word in ("loading the policy", "validation:", "reference scores 8 of 8 episodes", "updates: 1 of 4 done, "):
        assert any(word in text for text in told), word
    sampling = [done for done, _, text in heard if "sampling" in text and done < 1]
    assert sampling == sorted(sampling)
    assert len({*sampling}) > 8, "tokens count, too, not only episodes that have ended"
    assert [done for done, *_ in heard][-1] == 2


def test_a_stage_speaks_before_it_has_imported_what_takes_long_and_prints_one_line_of_result(tmp_path: Path) -> None:
    """A process of its own, whose seconds are as short as here; what it waits for stands for a long import."""
    script = (
        "import sys, time\n"
        "from pipeline.progress import display as progress\n"
        "progress.FIRST, progress.EVERY = 0.1, 0.3\n"
        "from pipeline.commands.cli import run\n"
        "def main(environment: str = ''):\n"
        "    time.sleep(0.5)\n"
        "    progress.doing('statistics')\n"
        "    time.sleep(1)\n"
        "    return 'made'\n"
        "sys.argv = ['stages/compare.py', '--environment', 'lake']\n"
        "assert 'torch' not in sys.modules\n"
        "run(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "made\n"
    lines = done.stderr.splitlines()
    assert re.fullmatch(r"compare lake: starting; \d s so far", lines[0])
    assert any(line.startswith("compare lake: statistics; ") for line in lines)
