"""The report in a real browser, offline: charts, viewer, keyboard, dark mode, a phone, and hostile texts that stay texts."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pipeline.analysis.comparison import REFERENCE
from pipeline.report.html import report_html
from pipeline.report.screenshots import chromium, shoot_report
from pipeline.settings.params import Environment
from pipeline.workspace.errors import UserError
from tests.browser_cases import HOSTILE, Visit, annotated, page_of
from tests.comparison_cases import compared, configuration, inputs
from tests.test_collector import TOKENIZER
from tests.test_webshop import hostile_purchase

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
        assert captions[0].startswith("The declared differences in success.")
        assert all(
            "Run: lake (actfocus/FrozenLake-v1)" in caption for caption in captions[1:-1]
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
    config = configuration(methods={f"method_{letter}": {} for letter in "abcdefghij"}, compare={})
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


def test_hostile_texts_stay_texts(written: Path, browser: Any) -> None:
    with Visit(browser, written) as visit:
        page = visit.page
        visit.draw_all()
        for method in (*configuration().methods, REFERENCE, "grpo_actfocus"):
            page.locator("#viewer select.method").select_option(method)
        assert page.evaluate("window.hacked") is None
        assert visit.count("#viewer img, #viewer a, #viewer script, #viewer b") == 0
        assert visit.count("main a:not(nav a), main b, main img:not(.plot img)") == 0
        assert page.evaluate("[...document.querySelectorAll('.plot a')].length") == 0
        assert visit.count("script") == 2 + 4 + 1 + 1  # data, code, plotly as it lies there and as it runs
        assert visit.wrong == []

        texts = page.locator("#viewer .tokens").first.locator(".token").all_inner_texts()
        for text in HOSTILE[:6]:
            assert text in texts
            assert text in page.locator("#viewer .shown").first.inner_text()
        assert len(max(texts, key=len)) == 100_000
        assert texts[-3:] == ["ü", "‿", "↵\n"]  # a character of two tokens
        assert not any(c in text for text in texts for c in "\u202e\u2066\x1b\x00")
        title = page.locator('figure[data-chart^="sweep"] .gtitle')
        assert title.text_content() == HOSTILE[4]
        assert page.title() == f"Comparison {HOSTILE[1]}"


def test_hostile_products_of_a_shop_stay_texts(tmp_path: Path, browser: Any) -> None:
    shop = {"lake": Environment(id="actfocus/WebShop-v1", settings={"generated_products": 100})}
    config = configuration().model_copy(update={"environments": shop})
    path = tmp_path / "index.html"
    path.write_text(page_of(config, annotated(hostile_purchase(tmp_path), 0), TOKENIZER), encoding="utf-8")
    with Visit(browser, path) as visit:
        visit.page.locator("#viewer select.method").select_option(list(config.methods)[-1])
        shown = "\n".join(visit.page.locator("#viewer .shown").all_inner_texts())
        assert "click[( | answer)(|user|)(|end|)( | think) (31m (script)alert(1)( | scri]" in shown
        assert "<script>alert(1)</script>" in shown
        assert visit.count("#viewer img, #viewer a, #viewer script, #viewer b") == 0
        assert visit.wrong == []


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(written: Path, browser: Any, width: int) -> None:
    """Nor when everything that is folded has been opened; and the short tables have nothing to scroll to."""
    with Visit(browser, written, width) as visit:
        visit.draw_all()
        visit.page.locator("#viewer-beside").click()
        assert visit.page.evaluate("document.documentElement.scrollWidth") == width
        visit.page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert visit.page.evaluate("document.documentElement.scrollWidth") == width
        fits = "[...document.querySelectorAll('.fits')].every((one) => one.scrollWidth <= one.clientWidth)"
        assert visit.page.evaluate(fits)
        assert visit.wrong == []


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 800)])
def test_the_first_screen_is_the_answer(tmp_path: Path, browser: Any, width: int, height: int) -> None:
    """Verdicts, picture, who won and at what cost are seen without scrolling, and every table comes after."""
    config = configuration(seeds=list(range(10)))
    made = inputs(config)
    path = tmp_path / "index.html"
    path.write_text(report_html(config, compared(config, made), made), encoding="utf-8")
    with Visit(browser, path, width) as visit:
        visit.page.set_viewport_size({"width": width, "height": height})
        visit.page.locator("figure.chart .main-svg").first.wait_for()
        end = "(name) => document.querySelector(name).getBoundingClientRect().bottom"
        for name in (".answer", ".answers figure .main-svg", ".answers .leader", ".answers .cost"):
            assert visit.page.evaluate(end, name) <= height, name
        assert visit.page.evaluate(end, ".answers") < visit.page.evaluate(end, "table")
        assert visit.wrong == []


def test_page_charts_and_tokens_follow_the_colour_scheme(written: Path, browser: Any) -> None:
    with Visit(browser, written, scheme="dark") as visit:
        visit.draw_all()
        page = visit.page
        look = """() => [document.body, document.querySelector(".legendtext, .xtitle"), document.querySelector(".token")]
            .map((e) => { const s = getComputedStyle(e); return [s.backgroundColor, s.fill, s.color].join(" "); })"""
        page.locator("#viewer-colour").select_option("advantage")
        dark = page.evaluate(look)
        assert "rgb(23, 24, 26)" in dark[0]
        assert "rgb(232, 232, 230)" in dark[1]
        page.emulate_media(color_scheme="light")
        page.wait_for_timeout(1000)  # the page's policy keeps playwright from polling in it
        light = page.evaluate(look)
        assert all(a != b for a, b in zip(dark[:2], light[:2], strict=True))
        assert visit.wrong == []


def test_text_on_coloured_tokens_can_be_read(written: Path, browser: Any) -> None:
    """WCAG's 4.5 : 1, in every colouring and both schemes."""
    ratio = """() => [...document.querySelectorAll("#viewer .tokens .token:not(.none)")].map((token) => {
        const style = getComputedStyle(token);
        const [a, b] = [style.color, style.backgroundColor].map((text) => {
            const parts = text.match(/[0-9.]+/g).slice(0, 3).map((v) => v / 255);
            const [r, g, b] = parts.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        }).sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05);
    })"""
    for scheme in ("light", "dark"):
        with Visit(browser, written, scheme=scheme) as visit:
            for colouring in ("energy", "weight", "advantage", "shift", "role"):
                visit.page.locator("#viewer-colour").select_option(colouring)
                found = visit.page.evaluate(ratio)
                assert len(found) > 10
                assert min(found) >= 4.5, (scheme, colouring)


def test_pictures_for_the_documents(written: Path, browser: Any, tmp_path: Path) -> None:
    shoot_report(browser, written, tmp_path / "report.png", tmp_path / "viewer.png")
    for name in ("report.png", "viewer.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).stat().st_size < 300_000
    with pytest.raises(UserError, match=r"none\.html: no such file; `make repro` makes it"):
        shoot_report(browser, tmp_path / "none.html", tmp_path / "report.png", tmp_path / "viewer.png")


def test_a_missing_browser_is_one_line(tmp_path: Path) -> None:
    code = "from pipeline.report.screenshots import *\ntry:\n    chromium().__enter__()\nexcept UserError as e:\n    print(e)"
    kept = {"PATH": str(tmp_path), "PLAYWRIGHT_BROWSERS_PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, timeout=60)
    (line,) = done.stdout.splitlines()
    assert line.startswith("screenshots: ")
    assert "playwright install chromium" in line or "playwright is not installed" in line
