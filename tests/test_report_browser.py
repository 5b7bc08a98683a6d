"""The report in a real browser, offline: charts, viewer, keyboard, dark mode, a phone, and hostile texts that stay texts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pipeline.analysis.comparison import REFERENCE
from pipeline.report.screenshots import chromium
from pipeline.workspace.errors import UserError
from tests.browser_cases import Visit, page_of
from tests.test_comparison import configuration

pytestmark = pytest.mark.xdist_group("browser")


MEGABYTE = 2**20


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "index.html"
    path.write_text(page_of(configuration()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with ExitStack() as stack:
        try:
            yield stack.enter_context(chromium())
        except UserError as error:
            pytest.skip(str(error))


def test_the_page_is_one_small_file_that_opens_without_errors(written: Path, browser: Any, capsys: Any) -> None:
    assert written.stat().st_size < 8 * MEGABYTE
    with Visit(browser, written) as visit:
        visit.draw_all()
        assert visit.wrong == []
        assert visit.count("figure.chart") == visit.count("figure.chart figcaption")
        captions = visit.page.locator("figure.chart figcaption").all_inner_texts()
        assert all(
            "Run: lake (actfocus/FrozenLake-v1)" in caption for caption in captions[:-1]
        )  # the last is a sweep's
    with capsys.disabled():
        print(f"\n{written.stat().st_size / MEGABYTE:.2f} MB, opened in {visit.seconds:.2f} s")


def test_no_chart_has_a_button_that_sends_it_anywhere(written: Path, browser: Any) -> None:
    """Plotly's own offer to upload a chart is among those that are missing."""
    with Visit(browser, written) as visit:
        visit.draw_all()
        buttons = visit.page.locator("figure.chart .modebar-btn")
        titles = {buttons.nth(i).get_attribute("data-title") for i in range(buttons.count())}
        assert titles == {"Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}
        server = "[...document.querySelectorAll('.js-plotly-plot')].map((plot) => plot._context.plotlyServerURL)"
        assert set(visit.page.evaluate(server)) == {""}
        assert visit.wrong == []


def test_views_of_a_chart_change_by_mouse_and_keyboard(written: Path, browser: Any) -> None:
    with Visit(browser, written) as visit:
        figure = visit.page.locator('figure[data-chart="lake-learning"]')
        figure.scroll_into_view_if_needed()
        title = figure.locator(".xtitle")
        title.wait_for()
        assert title.inner_html() == "iterations"
        figure.locator("select.view").select_option("tokens")
        assert title.inner_html() == "sampled tokens"
        figure.locator("select.view").focus()
        visit.page.keyboard.press("ArrowUp")
        assert title.inner_html() == "episodes"
        assert visit.wrong == []


def test_many_methods_can_be_brought_out_one_by_one(tmp_path: Path, browser: Any) -> None:
    config = configuration(methods={f"method_{letter}": {} for letter in "abcdefghij"}, compare={"resamples": 100})
    path = tmp_path / "index.html"
    path.write_text(page_of(config), encoding="utf-8")
    with Visit(browser, path) as visit:
        figure = visit.page.locator('figure[data-chart="lake-learning"]')
        figure.scroll_into_view_if_needed()
        figure.locator(".main-svg").first.wait_for()
        colours = (
            "[...document.querySelectorAll('[data-chart=lake-learning] .js-line')].map((line) => line.style.stroke)"
        )
        drawn = []
        for method in ("method_a", "method_c", ""):
            figure.locator("select.method").select_option(method)
            assert figure.locator(".js-fill").count() == (1 if method else 10)  # bands
            drawn.append([stroke for stroke in visit.page.evaluate(colours) if stroke != "rgb(138, 138, 138)"])
        assert len(set(drawn[0])) == len(set(drawn[1])) == 1
        assert set(drawn[0]) != set(drawn[1])
        assert len(set(drawn[2])) == 6
        assert figure.locator(".legend").count() == 0
        assert visit.wrong == []


def test_the_viewer_works_by_mouse(written: Path, browser: Any) -> None:
    with Visit(browser, written) as visit:
        page, root = visit.page, visit.page.locator("#viewer")
        methods = root.locator("select.method option").all_inner_texts()
        assert methods == [*configuration().methods, REFERENCE]
        assert root.locator("select.method").input_value() == "grpo_actfocus"  # what the comparison is about
        labels = root.locator("select.episode option").all_inner_texts()
        assert len(labels) == 8
        assert re.fullmatch(r"state A, episode 1: success, return 1", labels[0])
        assert sum("no success" in label for label in labels) == 4
        assert root.locator(".turn").count() == 3
        assert root.locator(".board").first.get_attribute("aria-label") == "Board: P _ _ _; _ O _ _; _ _ _ G; _ _ _ _"
        assert "no valid action (cut by response_tokens)" in root.locator(".turn h4").nth(1).inner_text()

        root.locator(".tokens .token.action").first.hover()
        shown = visit.numbers()
        assert shown["role"] == "action"
        assert float(shown["log-probability"].replace("−", "-")) == -0.5
        assert {"energy", "weight", "advantage", "shift", "c"} <= set(shown)
        assert all(re.fullmatch(r"−?[\d.e−]+", shown[name]) for name in ("energy", "weight", "advantage", "shift", "c"))

        token, colours = root.locator(".tokens .token.action").first, set()
        for colouring in ("energy", "weight", "advantage", "shift", "role"):
            page.locator("#viewer-colour").select_option(colouring)
            colours.add(token.evaluate("(token) => getComputedStyle(token).backgroundColor"))
            assert root.locator(".legend").inner_text()
        assert len(colours) == 5
        root.locator("select.method").select_option(REFERENCE)
        page.locator("#viewer-colour").select_option("advantage")
        assert root.locator(".tokens .token").count() == root.locator(".tokens .token.none").count()

        page.locator("#viewer-beside").click()
        assert root.locator(".panes > section").count() == 2
        root.locator("select.episode").nth(1).select_option("3")
        assert "return 0" in root.locator(".panes > section").nth(1).locator("p.quiet").first.inner_text()
        assert visit.wrong == []


def test_the_viewer_works_by_keyboard(written: Path, browser: Any) -> None:
    with Visit(browser, written) as visit:
        page, root = visit.page, visit.page.locator("#viewer")
        root.locator("select.episode").focus()
        before = root.locator("p.quiet").first.inner_text()
        page.keyboard.press("ArrowDown")
        assert root.locator("p.quiet").first.inner_text() != before
        assert root.locator('.token[tabindex="0"]').count() == 1

        def focused() -> str:
            return str(page.evaluate("document.activeElement.className"))

        for _ in range(2):  # what is shown in the first turn, then its tokens
            page.keyboard.press("Tab")
        assert "token" in focused()
        first = visit.numbers()
        assert first["role"] == "think tag, forced"
        assert first["energy"] == "–"
        page.keyboard.press("ArrowRight")
        assert visit.numbers()["role"] == "reasoning"
        assert "reasoning, energy" in page.evaluate("document.activeElement.getAttribute('aria-label')")
        page.keyboard.press("ArrowDown")
        assert page.evaluate("document.activeElement.record.turn") == 1
        page.keyboard.press("End")
        assert visit.numbers()["token"] == '"\\n"'
        page.keyboard.press("Home")
        page.keyboard.press("ArrowUp")
        assert page.evaluate("document.activeElement.record.turn") == 0
        assert root.locator('.token[tabindex="0"]').count() == 1
        ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert ring != "none"
        assert visit.wrong == []
