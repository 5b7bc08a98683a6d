"""The report's drawing of trees, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from pipeline.report.screenshots import chromium
from pipeline.workspace.errors import UserError
from tests.browser_cases import HOSTILE, LAKE, Visit, annotated, page_of, tokenizer
from tests.test_comparison import configuration
from tests.test_report_tree import FORK, planted

pytestmark = pytest.mark.xdist_group("browser")


@pytest.fixture(scope="module")
def branching(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its last method has a forest of five episodes, of which four can be opened; the last one's parent is gone."""
    tokens = tokenizer().backend_tokenizer.encode("abcdefghijklmnopqrstuvwxyz").ids
    trees = planted(FORK, cycle(tokens), [0, 0.5, 1, 0.25, 0], LAKE)
    trees.episodes["parent"][4] = HOSTILE[2]
    path = tmp_path_factory.mktemp("branching") / "index.html"
    config = configuration(report={"states": 1, "episodes": 2})
    path.write_text(page_of(config, annotated(trees, 0)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with ExitStack() as stack:
        try:
            yield stack.enter_context(chromium())
        except UserError as error:
            pytest.skip(str(error))


def test_a_leaf_of_the_drawing_opens_its_episode(branching: Path, browser: Any) -> None:
    with Visit(browser, branching) as visit:
        root = visit.page.locator("#viewer")
        assert root.locator(".forest").count() == 0  # a method without branches is shown as ever
        assert "ranch" not in root.inner_text()
        root.locator("select.method").select_option(list(configuration().methods)[-1])
        assert root.locator("select.episode option").count() == 4  # best, worst, and what the best branched from
        assert root.locator(".forest h4").inner_text() == "Branches of state A: 5 episodes from 2 roots"
        assert root.locator(".forest .note").inner_text().startswith("1 episode drawn as a root: ")
        leaves = root.locator(".forest .leaf")
        labels = [" ".join(text.split()) for text in leaves.locator("text").all_text_contents()]
        assert labels == ["0 #3", "0.5 #2", "1 #1", "0.25", "0 #4"]
        assert leaves.locator("circle.success").count() == 3
        assert leaves.locator("path.failure").count() == 2

        ways = []
        for leaf, title in ((0, "no success, return 0"), (1, "success, return 0.5"), (2, "success, return 1")):
            leaves.nth(leaf).click()
            assert f"episode {3 - leaf}: {title}" in root.locator("select.episode option:checked").inner_text()
            assert [leaves.nth(other).get_attribute("aria-pressed") for other in range(5)] == [
                str(other == leaf).lower() for other in range(5)
            ]
            ways.append(root.locator(".forest path.chosen").get_attribute("d").count("M"))
        assert ways == [1, 2, 3]  # an own part, and those of all that it branched from

        facts = root.locator("p.quiet").first.inner_text()
        assert "Branch of e1 at token 9" in facts
        shared = root.locator(".tokens .token.shared")
        assert shared.all_inner_texts() == list("bcdmno")  # not a, e and p, which were shown
        assert {shared.nth(i).get_attribute("title") for i in range(shared.count())} == {"shared with e1"}
        assert root.locator(".turn").count() == 3
        assert root.locator(".turn.shared").count() == 2
        assert root.locator(".shown.shared").count() == 3
        shared.first.hover()
        assert visit.numbers()["energy"] != "–"

        before = root.locator("p.quiet").first.inner_text()
        leaves.nth(3).click(force=True)  # it says that it is disabled
        assert root.locator("p.quiet").first.inner_text() == before
        assert "not kept in this page" in root.locator(".forest .said").inner_text()
        leaves.nth(4).hover()
        assert "a root" in root.locator(".forest .said").inner_text()
        leaves.nth(4).click()
        assert f"Its parent {HOSTILE[2]} is missing here" in root.locator("p.quiet").first.inner_text()
        assert root.locator(".token.shared, .turn.shared, .shown.shared").count() == 0
        assert visit.wrong == []


def test_the_drawing_works_by_keyboard_and_names_its_branch_points(branching: Path, browser: Any) -> None:
    with Visit(browser, branching) as visit:
        page, root = visit.page, visit.page.locator("#viewer")
        root.locator("select.method").select_option(list(configuration().methods)[-1])
        root.locator("select.episode").focus()
        page.keyboard.press("Tab")

        def after(*keys: str) -> str:
            for key in keys:
                page.keyboard.press(key)
            assert root.locator('.trees [tabindex="0"]').count() == 1
            said = page.evaluate("document.activeElement.getAttribute('aria-label')")
            assert root.locator(".forest .said").inner_text() == said
            return str(said)

        assert after().startswith("e2: success, return 1, 12 tokens, 3 turns, branch of e1 at token 9.")
        assert after("ArrowLeft") == "Branch point at token 9 of e1, in turn 3, role reasoning: 1 branch."
        assert after("ArrowLeft") == "Branch point at token 5 of e0, in turn 2, role reasoning: 2 branches."
        assert after("ArrowRight").startswith("e0: no success")
        assert after("ArrowDown").startswith("e1: ")
        page.keyboard.press("Enter")
        assert "Branch of e0 at token 5" in root.locator("p.quiet").first.inner_text()
        assert after("End").startswith("e4: ")
        assert after("Home").startswith("e0: ")
        page.keyboard.press(" ")
        assert "Branch of" not in root.locator("p.quiet").first.inner_text()
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        assert visit.wrong == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_drawing_fits_a_phone_and_its_colours_can_be_told_from_the_page(
    branching: Path, browser: Any, scheme: str
) -> None:
    """WCAG's 3 : 1 for shapes and 4.5 : 1 for texts."""
    ratio = """([selector, property]) => {
        const light = (text) => {
            const parts = text.match(/[0-9.]+/g).slice(0, 3).map((v) => v / 255);
            const [r, g, b] = parts.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const card = light(getComputedStyle(document.querySelector(".forest")).backgroundColor);
        return [...document.querySelectorAll(selector)].map((shape) => {
            const [a, b] = [card, light(getComputedStyle(shape)[property])].sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05);
        });
    }"""
    with Visit(browser, branching, 390, scheme) as visit:
        page = visit.page
        page.locator("#viewer select.method").select_option(list(configuration().methods)[-1])
        page.locator("#viewer-beside").click()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        inside = "[...document.querySelectorAll('.trees text')].every((t) => t.getBoundingClientRect().right < 390)"
        assert page.evaluate(inside)
        for selector, which, least in (
            (".trees text", "fill", 4.5),
            (".tokens .token.shared", "color", 4.5),
            (".trees .outcome, .trees .line, .trees .chosen, .trees .point", "stroke", 3),
        ):
            found = page.evaluate(ratio, [selector, which])
            assert len(found) > 5
            assert min(found) >= least
        assert visit.wrong == []
