"""Put the latest comparison and measurements into the documents: README.md, docs/ and docs/figures."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from stages.command import configured, out_folder, parse_arguments, run

MARKS = "<!-- {0}: written by `make publish` -->", "<!-- /{0} -->"


def main() -> str:
    config = configured(parse_arguments(__doc__))
    from pipeline.files import read_json, write_text
    from pipeline.report.comparison_tables import comparison_text

    reports = out_folder(config) / "reports"
    table = comparison_text(read_json(reports / "comparison.json"))
    replace_block(Path("README.md"), "comparison", table)
    write_text(Path("docs/results.md"), (reports / "comparison.md").read_text(encoding="utf-8"))
    figures = Path("docs/figures")
    figures.mkdir(parents=True, exist_ok=True)
    for old in figures.glob("*.png"):
        if old.name != "bench.png":
            old.unlink()
    for png in sorted((reports / "figures").glob("*.png")):
        shutil.copy2(png, figures / png.name)
    for name in config.environments:
        for png in sorted((reports / "bottleneck" / name).glob("*.png")):
            shutil.copy2(png, figures / f"{name}-bottleneck-{png.name}")
    measured = reports / "bench.txt"
    if measured.exists():
        replace_block(Path("docs/performance.md"), "bench", measured.read_text(encoding="utf-8"))
        shutil.copy2(reports / "bench.png", figures / "bench.png")
    return "README.md, docs/ and docs/figures hold the latest comparison" + (
        " and measurements" if measured.exists() else "; there are no measurements (make bench)"
    )


def replace_block(document: Path, name: str, content: str) -> None:
    """Put text between a document's marks of that name.

    Raises:
        ValueError: the document has no such marks, and the text would be lost.
    """
    from pipeline.files import write_text

    start, end = (mark.format(name) for mark in MARKS)
    block = f"{start}\n```text\n{content}```\n{end}"
    text = document.read_text(encoding="utf-8")
    if start not in text or end not in text:
        raise ValueError(f"{document}: no block {name!r}")
    write_text(document, re.sub(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: block, text, flags=re.S))


if __name__ == "__main__":
    run(main)
