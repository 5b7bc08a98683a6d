"""The latest comparisons and measurements in the documents: README.md, docs/ and docs/figures."""

import re
import shutil
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from pipeline.analysis.comparison import read_comparison, read_timings
from pipeline.analysis.interventions import read_interventions
from pipeline.analysis.timings import environment_shares
from pipeline.progress.display import doing
from pipeline.report.commits import MADE, last_changed, made_by, noted_revisions
from pipeline.report.comparison_tables import comparison_text, interventions_markdown, verdicts_markdown
from pipeline.settings.params import Config
from pipeline.settings.presets import load_preset
from pipeline.workspace.files import read_text, write_text
from pipeline.workspace.layout import Layout
from pipeline.workspace.manifest import listed_text

NOT_RUN = "Not run yet."
"""A block's content before there is anything."""
MARKS = "<!-- {0}: written by `make publish` -->", "<!-- /{0} -->"

README, RESULTS, PERFORMANCE = Path("README.md"), Path("docs/results.md"), Path("docs/performance.md")
FIGURES = Path("docs/figures")

POLES = ("facts", "controls")
"""Presets whose declared comparisons stand in one table with those of params.yaml."""
PLAYED = ("facts", "sokoban", "sokoban_facts")
"""Presets of whose reference policy it stands in a table whether it uses its reasoning."""
PRESETS = (*POLES, "methods", "branching", "bandit", "sokoban", "sudoku", "webshop", "smollm2")
"""Presets whose results stand in docs/results.md beside those of params.yaml."""
BOTTLENECKS = ("smollm2_raw", "smollm2_bottleneck")
"""Presets whose tables of the Action Bottleneck stand in docs/results.md."""


def publish(config: Config) -> list[str]:
    """Put all that there is into the documents and return its names; what is not there stays as it was."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    published = publish_default(config)
    for preset in PRESETS:
        doing(preset)
        published += publish_preset(preset)
    judged = [Layout(Path(config.out)), *(Layout(Path("presets") / preset) for preset in POLES)]
    if all(one.comparison.exists() for one in judged):
        text = verdicts_markdown([read_comparison(one) for one in judged])
        publish_block(RESULTS, "verdicts", text, [one.all_runs for one in judged])
    settings = [config, *(load_preset(preset, Path(".")) for preset in PLAYED)]
    played = {one.comparison: read_interventions(one, Layout(Path(one.out))) for one in settings}
    if all(played.values()):
        publish_block(RESULTS, "reasoning", interventions_markdown(played), [judged[0].all_runs])
    for preset in BOTTLENECKS:
        table = Layout(Path("presets") / preset).reports / "bottleneck.md"
        if table.exists():
            publish_block(RESULTS, f"bottleneck {preset}", read_text(table).rstrip(), [])
            published.append(f"bottleneck {preset}")
    name_commits(RESULTS)
    bench = Layout(Path(config.out)).reports / "bench.txt"
    if bench.exists():
        replace_block(PERFORMANCE, "bench", fenced(read_text(bench)))
        shutil.copy2(bench.with_suffix(".png"), FIGURES / "bench.png")
        published.append("measurements")
    return published


def publish_default(config: Config) -> list[str]:
    """Put what params.yaml gives into README.md and docs/results.md; returns its names."""
    layout = Layout(Path(config.out))
    reports, runs = layout.reports, [layout.all_runs]
    publish_block(README, "comparison", fenced(comparison_text(read_comparison(layout))), runs)
    publish_block(RESULTS, "comparison", comparison_block(config), runs)
    copy_figures((reports / "figures").glob("*.png"))
    published = [config.comparison]
    for name in config.environments:
        copy_figures(layout.bottleneck(name).glob("*.png"), f"{name}-bottleneck-")
        published += publish_texts(layout, "replay", name)
    return published + publish_sweeps(config, "")


def publish_preset(preset: str) -> list[str]:
    """Put what a preset gives into docs/results.md; returns its names."""
    config = load_preset(preset, Path("."))
    layout = Layout(Path(config.out))
    reports, published = layout.reports, []
    if (reports / "comparison.md").exists():
        publish_block(RESULTS, preset, comparison_block(config), [layout.all_runs])
        copy_figures((reports / "figures").glob("*.png"), f"{preset}-")
        published.append(preset)
    published += publish_sweeps(config, f"{preset} ")
    for measured in sorted((reports / "decisions").glob("*/decisions.txt")):
        published += publish_texts(layout, "decisions", measured.parent.name)
    return published


def publish_texts(layout: Layout, what: str, name: str) -> list[str]:
    """Put ``reports/<what>/<name>/<what>.txt`` and its picture into docs/results.md, if it is there; returns its name."""
    text = layout.reports / what / name / f"{what}.txt"
    if not text.exists():
        return []
    publish_block(RESULTS, f"{what} {name}", fenced(read_text(text)), [layout.all_runs])
    shutil.copy2(text.with_suffix(".png"), FIGURES / f"{name}-{what}.png")
    return [f"{what} {name}"]


def copy_figures(pictures: Iterable[Path], prefix: str = "") -> None:
    """Copy pictures to docs/figures, under their names with a prefix; those that a document shows."""
    documents = "".join(page.read_text(encoding="utf-8") for page in (README, *RESULTS.parent.glob("*.md")))
    for picture in pictures:
        if f"/{prefix}{picture.name})" in documents:
            shutil.copy2(picture, FIGURES / f"{prefix}{picture.name}")


def publish_sweeps(config: Config, prefix: str) -> list[str]:
    """Put the confirmed sweeps of a params file into docs/results.md; returns their names.

    What a sweep picks is not published without its confirmation, nor takes an earlier one's place.
    """
    published, layout = [], Layout(Path(config.out))
    for study in config.sweep.studies:
        swept, confirmed = layout.sweep(study), layout.confirmation(study)
        parts = [swept / "sweep.txt", *(confirmed.reports / name for name in ("comparison.txt", "verdict.txt"))]
        if all(part.exists() for part in parts):
            text = "\n".join(read_text(part) for part in parts)
            publish_block(RESULTS, f"{prefix}sweep {study}", fenced(text), [confirmed.all_runs])
            pictures = (*swept.glob("*-slice.png"), *swept.glob("*-contour*.png"))
            copy_figures(pictures, f"{prefix.replace(' ', '-')}sweep-")
            published.append(f"{prefix}sweep {study}")
    return published


def comparison_block(config: Config) -> str:
    """A comparison's Markdown, and what its environments cost."""
    layout = Layout(Path(config.out))
    timings = read_timings(config, layout)
    written = listed_text(layout.plots, layout.reports / "comparison.md")
    text = re.sub(r"^#", "##", written.rstrip(), flags=re.M)  # headings a level lower
    for name in config.environments:
        shares = [environment_shares(curves) for (place, _), curves in timings.items() if place == name]
        if shares:
            parts = (f"{phase}s {max(share[phase] for share in shares):.1%}" for phase in ("reset", "step"))
            text += f"\n\n{name}: of the time of rollouts its {' and its '.join(parts)}, at most over the methods."
    return text


def fenced(text: str) -> str:
    """Plain text as a Markdown block."""
    return f"```text\n{text}```"


def publish_block(document: Path, name: str, content: str, runs: Sequence[Path]) -> None:
    """Put Markdown between a document's marks of that name, and under it the commit that it is from.

    ``runs`` are folders ``data/runs`` of the trainings that it is about. If they have noted no commit, content that has
    not changed keeps the commit that stands there (see ``name_commits``); that of new content is unknown.

    Raises:
        ValueError: as ``replace_block``.
    """
    noted = [noted_revisions(folder) for folder in runs]
    revisions = list(chain(*noted)) if all(noted) else []
    old = blocks_of(document.read_text(encoding="utf-8")).get(name, "")
    if revisions or MADE.sub("", old) != content:
        replace_block(document, name, f"{content}\n\n{made_by(dict.fromkeys(revisions), Path('.'))}")


def name_commits(document: Path) -> None:
    """Put under every table that does not say it the commit in which it last changed: results published earlier."""
    text = document.read_text(encoding="utf-8")
    for name, content in blocks_of(text).items():
        if content != NOT_RUN and not MADE.search(content):
            first = text[: text.index(MARKS[0].format(name))].count("\n") + 2
            made = last_changed(document, first, first + content.count("\n"))
            replace_block(document, name, f"{content}\n\n{made}")
            text = document.read_text(encoding="utf-8")


def blocks_of(text: str) -> dict[str, str]:
    """What stands between a document's marks, by their names."""
    start, end = (re.escape(mark).replace(r"\{0\}", "{}") for mark in MARKS)
    pattern = f"{start.format('(?P<name>.+?)')}\n(?P<content>.*?)\n{end.format('(?P=name)')}"
    return {found["name"]: found["content"] for found in re.finditer(pattern, text, flags=re.S)}


def replace_block(document: Path, name: str, content: str, marks: tuple[str, str] = MARKS) -> None:
    """Put text between a document's marks of that name.

    Raises:
        ValueError: the document has no such marks, and the text would be lost.
    """
    start, end = (mark.format(name) for mark in marks)
    text = document.read_text(encoding="utf-8")
    if start not in text or end not in text:
        raise ValueError(f"{document}: no block {name!r}")
    block = f"{start}\n{content}\n{end}"
    write_text(document, re.sub(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: block, text, flags=re.S))
