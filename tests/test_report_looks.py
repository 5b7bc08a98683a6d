"""Hostile texts in the report, and how it looks, in a real browser."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pipeline.analysis.comparison import REFERENCE
from pipeline.report.screenshots import chromium, shoot_report
from pipeline.settings.params import Environment
from pipeline.workspace.errors import UserError
from tests.browser_cases import HOSTILE, Visit, annotated, page_of
from tests.test_collector import TOKENIZER
from tests.test_comparison import configuration
from tests.test_webshop import hostile_purchase

pytestmark = pytest.mark.xdist_group("browser")


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


def test_hostile_texts_stay_texts(written: Path, browser: Any) -> None:
    with Visit(browser, written) as visit:
        page = visit.page
        visit.draw_all()
        for method in (*configuration().methods, REFERENCE, "grpo_actfocus"):
            page.locator("#viewer select.method").select_option(method)
        assert page.evaluate("window.hacked") is None
        assert visit.count("#viewer img, #viewer a, #viewer script, #viewer b") == 0
        assert visit.count("main a, main b, main img:not(.plot img)") == 0
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
    with Visit(browser, written, width) as visit:
        visit.draw_all()
        visit.page.locator("#viewer-beside").click()
        assert visit.page.evaluate("document.documentElement.scrollWidth") == width
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
