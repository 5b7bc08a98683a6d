"""Put the latest comparison into the documents: README.md's table, docs/results.md and docs/figures."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from stages.command import configured, out_folder, parse_arguments, run

START, END = "<!-- comparison: written by `make publish` -->", "<!-- /comparison -->"


def main() -> str:
    config = configured(parse_arguments(__doc__))
    from pipeline.files import read_json, write_text
    from pipeline.report.comparison_tables import comparison_text

    reports = out_folder(config) / "reports"
    table = comparison_text(read_json(reports / "comparison.json"))
    readme = Path("README.md")
    text = readme.read_text(encoding="utf-8")
    block = f"{START}\n```text\n{table}```\n{END}"
    write_text(readme, re.sub(f"{re.escape(START)}.*?{re.escape(END)}", lambda _: block, text, flags=re.S))
    write_text(Path("docs/results.md"), (reports / "comparison.md").read_text(encoding="utf-8"))
    figures = Path("docs/figures")
    shutil.rmtree(figures, ignore_errors=True)
    figures.mkdir(parents=True)
    for png in sorted((reports / "figures").glob("*.png")):
        shutil.copy2(png, figures / png.name)
    for name in config.environments:
        for png in sorted((reports / "bottleneck" / name).glob("*.png")):
            shutil.copy2(png, figures / f"{name}-bottleneck-{png.name}")
    return "README.md, docs/results.md and docs/figures hold the latest comparison"


if __name__ == "__main__":
    run(main)
