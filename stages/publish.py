"""Put the latest comparison and measurements into the documents: README.md, docs/ and docs/figures."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from stages.command import configured, out_folder, parse_arguments, run

MARKS = "<!-- {0}: written by `make publish` -->", "<!-- /{0} -->"


PRESETS = ("controls", "methods")
"""Presets whose results stand in docs/results.md beside those of params.yaml."""


def main() -> str:
    config = configured(parse_arguments(__doc__))
    from pipeline.files import read_json
    from pipeline.report.comparison_tables import comparison_text

    reports, results, figures = out_folder(config) / "reports", Path("docs/results.md"), Path("docs/figures")
    figures.mkdir(parents=True, exist_ok=True)
    replace_block(Path("README.md"), "comparison", fenced(comparison_text(read_json(reports / "comparison.json"))))
    replace_block(results, "comparison", demoted((reports / "comparison.md").read_text(encoding="utf-8")))
    for png in sorted((reports / "figures").glob("*.png")):
        shutil.copy2(png, figures / png.name)
    published = [config.comparison]
    for name in config.environments:
        for png in sorted((reports / "bottleneck" / name).glob("*.png")):
            shutil.copy2(png, figures / f"{name}-bottleneck-{png.name}")
        replayed = reports / "replay" / name
        if replayed.is_dir():
            replace_block(results, f"replay {name}", fenced((replayed / "replay.txt").read_text(encoding="utf-8")))
            shutil.copy2(replayed / "replay.png", figures / f"{name}-replay.png")
            published.append(f"replay {name}")
    for preset in PRESETS:
        own = Path("presets") / preset / "reports"
        if (own / "comparison.md").exists():
            replace_block(results, preset, demoted((own / "comparison.md").read_text(encoding="utf-8")))
            for png in sorted((own / "figures").glob("*.png")):
                if not png.name.endswith("-health.png"):
                    shutil.copy2(png, figures / f"{preset}-{png.name}")
            published.append(preset)
    measured = reports / "bench.txt"
    if measured.exists():
        replace_block(Path("docs/performance.md"), "bench", fenced(measured.read_text(encoding="utf-8")))
        shutil.copy2(reports / "bench.png", figures / "bench.png")
        published.append("measurements")
    return (
        f"README.md, docs/ and docs/figures hold the latest: {', '.join(published)}; what is not there stays as it was"
    )


def fenced(text: str) -> str:
    """Plain text as a Markdown block."""
    return f"```text\n{text}```"


def demoted(markdown: str) -> str:
    """Markdown whose headings are a level lower."""
    return re.sub(r"^#", "##", markdown.rstrip(), flags=re.M)


def replace_block(document: Path, name: str, content: str) -> None:
    """Put text between a document's marks of that name.

    Raises:
        ValueError: the document has no such marks, and the text would be lost.
    """
    from pipeline.files import write_text

    start, end = (mark.format(name) for mark in MARKS)
    text = document.read_text(encoding="utf-8")
    if start not in text or end not in text:
        raise ValueError(f"{document}: no block {name!r}")
    block = f"{start}\n{content}\n{end}"
    write_text(document, re.sub(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: block, text, flags=re.S))


if __name__ == "__main__":
    run(main)
