"""Reports and what looks at them in a real browser."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pipeline.analysis.bottleneck import bottleneck
from pipeline.analysis.comparison import REFERENCE
from pipeline.analysis.examples import Played
from pipeline.report.html import report_html
from pipeline.report.viewer import viewer_data
from pipeline.settings.params import Config
from pipeline.trajectories.builder import EpisodeBuilder, build
from pipeline.trajectories.trajectory import Role, Trajectories
from tests.comparison_cases import compared, inputs
from tests.test_diagnostics import make, variance_in_actions

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
    found = compared(config, made)
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
