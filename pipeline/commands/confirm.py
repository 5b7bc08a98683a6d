"""Compare a sweep's best and its baselines, on fresh seeds.

Trains them, and plays test states.
"""

import os
from pathlib import Path

from pipeline.commands.cli import ParamsFile, StudyName, configured, make_alone, reproduce


def main(study: StudyName, params: ParamsFile = "params.yaml") -> str:
    config, layout, params = configured(params)
    make_alone(layout, f"confirm {study}")
    from pipeline.analysis.comparison import read_comparison
    from pipeline.sweep.confirm import confirmation, confirmation_text
    from pipeline.sweep.plan import plans
    from pipeline.workspace.errors import UserError
    from pipeline.workspace.files import read_record, write_text
    from pipeline.workspace.layout import Layout
    from pipeline.workspace.manifest import listed_text
    from pipeline.workspace.yaml_files import yaml_text

    run = Layout(Path(config.out))  # seen from the root
    found = plans(params, study, run.policy)
    summary = run.sweep(study) / "summary.json"
    if not summary.exists():
        raise UserError(f"{summary}: no such file; `make sweep STUDY={study}` makes it")
    confirmed = run.confirmation(study)
    folder, reports = confirmed.out, confirmed.reports
    raw = confirmation(found, read_record(summary)["searches"], folder.as_posix(), os.path.relpath(".", folder))
    write_text(folder / "params.yaml", f"# Made by `make sweep-confirm STUDY={study}`.\n{yaml_text(raw)}")
    pipeline = folder / "dvc.yaml"
    write_text(pipeline, Path("dvc.yaml").read_text(encoding="utf-8"))
    reproduce(pipeline)
    text = confirmation_text(read_comparison(confirmed))
    write_text(reports / "verdict.txt", text + "\n")
    shown = layout.confirmation(study).reports
    return f"{listed_text(confirmed.plots, reports / 'comparison.txt')}\n{text}\n{shown}: verdict.txt, index.html. Next: open index.html"
