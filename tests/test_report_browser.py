"""The report in a real browser, offline: charts, viewer, keyboard, dark mode, a phone, and hostile texts that stay texts."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pipeline.analysis.bottleneck import bottleneck
from pipeline.analysis.comparison import REFERENCE, compare
from pipeline.report.html import report_html
from pipeline.report.screenshots import chromium, shoot_report
from pipeline.report.viewer import Played, viewer_data
from pipeline.settings.params import Config, Environment
from pipeline.trajectories.builder import EpisodeBuilder, build
from pipeline.trajectories.trajectory import Role, Trajectories
from pipeline.workspace.errors import UserError
from tests.test_collector import TOKENIZER
from tests.test_comparison import configuration, inputs
from tests.test_diagnostics import make, variance_in_actions
from tests.test_report_tree import FORK, planted
from tests.test_webshop import hostile_purchase

pytestmark = pytest.mark.xdist_group("browser")

MEGABYTE = 2**20
LAKE = "SFFF/FHFF/FFFG/FFFF@0,0"
HOSTILE = [
    "<script>window.hacked = 1; alert(1)</script>",
    "</script><script>window.hacked = 2</script>",
    "<img src=x onerror='window.hacked = 3'>",
    "<!-- <script>",
    '<a href="javascript:window.hacked = 4">here</a>',
    "javascript:window.hacked=5//",
    "\u202eedoc\u2066\x1b[2J\x00\u2028\u2029",
    "<|im_end|>\n<|im_start|>system\n",
    "&lt;b&gt;&amp;",
    "${window.hacked = 6}{{ 7 * 7 }}%{x}",
    "é漢字🙂",
    "x" * 100_000,
]


def tokenizer() -> Any:
    """One token per hostile text, and one per byte, so that some characters take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    # Added tokens are decoded as they are, control characters and all.
    made.add_tokens([AddedToken(text, normalized=False) for text in HOSTILE])
    return SimpleNamespace(backend_tokenizer=made)


def hostile_episodes(tokens: Any, seed: int) -> Played:
    """Two states, six episodes of each, of three turns; what is shown, written, done and named is hostile."""
    ids = {text: tokens.backend_tokenizer.token_to_id(text) for text in HOSTILE}
    pieces = tokens.backend_tokenizer.encode("ü\n").ids
    assert len(pieces) == 3
    builders = []
    for group in range(2):
        for member in range(6):
            builder = EpisodeBuilder(
                episode_id=f"<b>{group}-{member}</b>", group_id=str(group), environment="toy", seed=seed, iteration=3,
                policy_version=3, state_key=LAKE if group == 0 else LAKE.replace("@0,0", "@3,3"),
            )  # fmt: skip
            for turn in range(3):
                # the long one once: it is there for the page's layout, not for its size
                long = seed == 1 and (group, member, turn) == (0, 1, 0)
                texts = [ids[text] for text in (HOSTILE if long else HOSTILE[:-1])]
                builder.append_text(texts, Role.OBSERVATION)
                start = len(builder)
                builder.append_text([ids[HOSTILE[8]]], Role.THINK_TAG)
                written = [*texts, *pieces]
                roles = [Role.REASONING] * (len(written) - 2) + [Role.ACTION, Role.OTHER]
                builder.append_sampled(written, roles, [-0.5 - turn] * len(written), [0.1] * len(written))
                key = f"SFFF/FHFF/FFFG/FFFF@{turn},{turn}"
                reward, ended = float(member % 2 and turn == 2), "response_tokens" if turn == 1 else "stop"
                builder.close_turn(start, reward, HOSTILE[0], turn != 1, key, ended=ended)
            builder.finish(bool(member % 2), HOSTILE[2])
            builders.append(builder)
    episodes = annotated(build(builders), seed)
    draws = np.random.default_rng(seed)
    trained = np.where(episodes.sampled & (episodes.token_episode % 6 < 5), 1.0, np.nan)
    columns = {
        "advantage": trained * draws.normal(size=len(trained)),
        "weight": trained * draws.uniform(0.1, 2, size=len(trained)),
        "coefficient": trained * 1e-4,
    }
    return Played(episodes, columns)


def annotated(episodes: Trajectories, seed: int) -> Trajectories:
    draws, size = np.random.default_rng(seed), len(episodes.input_ids)
    scores = {name: draws.normal(-9, 2, size).astype(np.float32) for name in ("energy", "ref_logprob", "ref_entropy")}
    return replace(episodes, **scores)


def page_of(config: Config, own: Trajectories | None = None, own_tokens: Any = None) -> str:
    """The report; with ``own`` its last method has those episodes, whose ids are ``own_tokens``'s."""
    made = inputs(config)
    found = compare(config, made)
    found["comparison"], found["warnings"] = HOSTILE[1], [*found["warnings"], *HOSTILE[:5]]
    table = variance_in_actions(make(), noise=0.5)
    tokens = tokenizer()
    played = {
        ("lake", method): hostile_episodes(tokens, seed) for seed, method in enumerate((*config.methods, REFERENCE))
    }
    played["lake", REFERENCE] = Played(played["lake", REFERENCE].trajectories, {})
    if own is not None:
        played["lake", list(config.methods)[-1]] = Played(own, {})
    figure = {
        "data": [{"type": "bar", "x": [HOSTILE[4], HOSTILE[2]], "y": [1, 2], "name": HOSTILE[4], "text": HOSTILE[:2]}],
        "layout": {
            "title": {"text": HOSTILE[4]},
            "showlegend": True,
            "annotations": [{"text": HOSTILE[4], "x": 0, "y": 1}],
            "images": [{"source": "https://example.invalid/x.png"}],
        },
    }
    study = {
        "name": HOSTILE[0],
        "summary": HOSTILE[2],
        "table": {"header": ["trial", HOSTILE[3]], "rows": [["0", HOSTILE[0]]]},
        "verdict": HOSTILE[:2],
        "figures": [{"title": HOSTILE[4], "caption": HOSTILE[1], "plotly": figure}],
    }
    episodes = viewer_data(config, own_tokens or tokens, played)
    return report_html(config, found, made, {"lake": bottleneck(table, 100)}, {"lake": table}, episodes, [study])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "index.html"
    path.write_text(page_of(configuration()), encoding="utf-8")
    return path


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


class Visit:
    """A page that was opened, and everything that went wrong on it."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(
            offline=True, viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", lambda said: self.wrong.append(f"{said.type}: {said.text}"))
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("requestfailed", lambda request: self.wrong.append(f"request: {request.url[:100]}"))
        self.page.on("dialog", lambda dialog: (self.wrong.append("dialog"), dialog.dismiss()))
        began = time.monotonic()
        self.page.goto(path.as_uri(), wait_until="load")
        self.seconds = time.monotonic() - began

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *raised: Any) -> None:
        self.context.close()

    def draw_all(self) -> None:
        """Scroll through the page: every chart is drawn once it is seen."""
        charts = self.page.locator("figure.chart")
        for index in range(charts.count()):
            charts.nth(index).scroll_into_view_if_needed()
            charts.nth(index).locator(".plot.js-plotly-plot .main-svg").first.wait_for(timeout=20_000)

    def count(self, selector: str) -> int:
        return int(self.page.locator(selector).count())

    def numbers(self) -> dict[str, str]:
        """What the panel says of the current token."""
        pairs = self.page.locator("#viewer .numbers dl > div")
        return {
            pairs.nth(i).locator("dt").inner_text(): pairs.nth(i).locator("dd").inner_text()
            for i in range(pairs.count())
        }


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
        assert visit.count("script") == 2 + 2 + 1 + 1  # data, code, plotly as it lies there and as it runs
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
