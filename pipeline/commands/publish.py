"""Put the latest comparison and measurements into the documents: README.md, docs/ and docs/figures."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.command import configured, out_folder, parse_arguments, run

if TYPE_CHECKING:
    from pipeline.settings.params import Config

MARKS = "<!-- {0}: written by `make publish` -->", "<!-- /{0} -->"

ENVIRONMENTS = ("sokoban", "sudoku", "bandit", "webshop")
"""Presets of an environment each, which README.md has a table of."""
PRESETS = ("controls", "methods", "branching", *ENVIRONMENTS)
"""Presets whose results stand in docs/results.md beside those of params.yaml."""


def main() -> str:
    config = configured(parse_arguments(__doc__))
    from pipeline.progress.display import doing
    from pipeline.report.comparison_tables import comparison_text, overview_markdown
    from pipeline.settings.params import load
    from pipeline.workspace.files import read_json

    reports, results, figures = out_folder(config) / "reports", Path("docs/results.md"), Path("docs/figures")
    figures.mkdir(parents=True, exist_ok=True)
    own_runs = [out_folder(config) / "data" / "runs"]
    text = fenced(comparison_text(read_json(reports / "comparison.json")))
    publish_block(Path("README.md"), "comparison", text, own_runs)
    publish_block(results, "comparison", comparison_block(config), own_runs)
    for png in sorted((reports / "figures").glob("*.png")):
        shutil.copy2(png, figures / png.name)
    published = [config.comparison]
    for name in config.environments:
        for png in sorted((reports / "bottleneck" / name).glob("*.png")):
            shutil.copy2(png, figures / f"{name}-bottleneck-{png.name}")
        replayed = reports / "replay" / name
        if replayed.is_dir():
            text = fenced((replayed / "replay.txt").read_text(encoding="utf-8"))
            publish_block(results, f"replay {name}", text, own_runs)
            shutil.copy2(replayed / "replay.png", figures / f"{name}-replay.png")
            published.append(f"replay {name}")
    published += publish_sweeps(config, results, figures, "")
    for preset in PRESETS:
        doing(preset)
        own, runs = Path("presets") / preset / "reports", [Path("presets") / preset / "data" / "runs"]
        if (own / "comparison.md").exists():
            publish_block(results, preset, comparison_block(load(f"presets/{preset}/params.yaml")), runs)
            for png in sorted((own / "figures").glob("*.png")):
                if not png.name.endswith("-health.png"):
                    shutil.copy2(png, figures / f"{preset}-{png.name}")
            published.append(preset)
        published += publish_sweeps(load(f"presets/{preset}/params.yaml"), results, figures, f"{preset} ")
        for measured in sorted((own / "decisions").glob("*/decisions.txt")):
            name = f"decisions {measured.parent.name}"
            publish_block(results, name, fenced(measured.read_text(encoding="utf-8")), runs)
            shutil.copy2(measured.with_suffix(".png"), figures / f"{measured.parent.name}-decisions.png")
            published.append(name)
    compared = [Path("presets") / preset / "reports" / "comparison.json" for preset in ENVIRONMENTS]
    if all(file.exists() for file in compared):
        text, runs = overview_markdown([read_json(file) for file in compared]), [f.parents[1] for f in compared]
        publish_block(Path("README.md"), "environments", text, [folder / "data" / "runs" for folder in runs])
    for document, names in ((results, None), (Path("README.md"), ("environments",))):
        name_commits(document, names)
    bench = reports / "bench.txt"
    if bench.exists():
        replace_block(Path("docs/performance.md"), "bench", fenced(bench.read_text(encoding="utf-8")))
        shutil.copy2(reports / "bench.png", figures / "bench.png")
        published.append("measurements")
    return (
        f"README.md, docs/ and docs/figures hold the latest: {', '.join(published)}; what is not there stays as it was. "
        "Next: git diff README.md docs"
    )


def publish_sweeps(config: Config, results: Path, figures: Path, prefix: str) -> list[str]:
    """Put the confirmed sweeps of a params file into a document; returns their names.

    What a sweep picks is not published without its confirmation, nor takes an earlier one's place.
    """
    published = []
    for study in config.sweep.studies:
        swept = out_folder(config) / "reports" / "sweep" / study
        confirmed = out_folder(config) / "sweeps" / f"confirm_{study}" / "reports"
        parts = [swept / "sweep.txt", confirmed / "comparison.txt", confirmed / "verdict.txt"]
        if all(part.exists() for part in parts):
            text = "\n".join(part.read_text(encoding="utf-8") for part in parts)
            runs = out_folder(config) / "sweeps" / f"confirm_{study}" / "data" / "runs"
            publish_block(results, f"{prefix}sweep {study}", fenced(text), [runs])
            for png in (*sorted(swept.glob("*-slice.png")), *sorted(swept.glob("*-contour*.png"))):
                shutil.copy2(png, figures / f"{prefix.replace(' ', '-')}sweep-{png.name}")
            published.append(f"{prefix}sweep {study}")
    return published


def comparison_block(config: Config) -> str:
    """A comparison's Markdown, and what its environments cost."""
    from pipeline.analysis.comparison import read_timings
    from pipeline.analysis.timings import environment_shares

    out = out_folder(config)
    timings = read_timings(config, out / "data")
    text = demoted((out / "reports" / "comparison.md").read_text(encoding="utf-8"))
    for name in config.environments:
        shares = [environment_shares(curves) for (place, _), curves in timings.items() if place == name]
        if shares:
            parts = (f"{phase}s {max(share[phase] for share in shares):.1%}" for phase in ("reset", "step"))
            text += f"\n\n{name}: of the time of rollouts its {' and its '.join(parts)}, at most over the methods."
    return text


def fenced(text: str) -> str:
    """Plain text as a Markdown block."""
    return f"```text\n{text}```"


def demoted(markdown: str) -> str:
    """Markdown whose headings are a level lower."""
    return re.sub(r"^#", "##", markdown.rstrip(), flags=re.M)


def publish_block(document: Path, name: str, content: str, runs: Sequence[Path]) -> None:
    """Put text between a document's marks of that name, and under it the commit that it is from.

    Args:
        document: has such marks.
        name: theirs.
        content: Markdown.
        runs: folders ``data/runs`` of the trainings that it is about. If they have noted no commit, content that has not
            changed keeps the commit that stands there (see ``name_commits``); that of new content is unknown.

    Raises:
        ValueError: as ``replace_block``.
    """
    from pipeline.report.commits import MADE, made_by, noted_revisions

    noted = [noted_revisions(folder) for folder in runs]
    revisions = [revision for found in noted for revision in found] if all(noted) else []
    old = blocks_of(document.read_text(encoding="utf-8")).get(name, "")
    if revisions or MADE.sub("", old) != content:
        replace_block(document, name, f"{content}\n\n{made_by(dict.fromkeys(revisions), Path('.'))}")


def name_commits(document: Path, names: Sequence[str] | None = None) -> None:
    """Put under every table that does not say it the commit in which it last changed: results published earlier.

    Args:
        document: its blocks are looked at.
        names: of these alone; None is all.
    """
    from pipeline.report.commits import MADE, last_changed

    text = document.read_text(encoding="utf-8")
    for name, content in blocks_of(text).items():
        if MADE.search(content) or (names is not None and name not in names):
            continue
        first = text[: text.index(MARKS[0].format(name))].count("\n") + 2
        made = last_changed(document, first, first + content.count("\n"))
        replace_block(document, name, f"{content}\n\n{made}")
        text = document.read_text(encoding="utf-8")


def blocks_of(text: str) -> dict[str, str]:
    """What stands between a document's marks, by their names."""
    start, end = (re.escape(mark).replace(r"\{0\}", "{}") for mark in MARKS)
    pattern = f"{start.format('(?P<name>.+?)')}\n(?P<content>.*?)\n{end.format('(?P=name)')}"
    return {found["name"]: found["content"] for found in re.finditer(pattern, text, flags=re.S)}


def replace_block(document: Path, name: str, content: str) -> None:
    """Put text between a document's marks of that name.

    Raises:
        ValueError: the document has no such marks, and the text would be lost.
    """
    from pipeline.workspace.files import write_text

    start, end = (mark.format(name) for mark in MARKS)
    text = document.read_text(encoding="utf-8")
    if start not in text or end not in text:
        raise ValueError(f"{document}: no block {name!r}")
    block = f"{start}\n{content}\n{end}"
    write_text(document, re.sub(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: block, text, flags=re.S))


if __name__ == "__main__":
    run(main)
