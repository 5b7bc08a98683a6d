"""Compare two revisions: success, differences, settings."""

import os
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.cli import ParamsFile, go_to_root


def main(
    params: ParamsFile = "params.yaml",
    a: Annotated[str, typer.Option(metavar="REV", help="Git revision or DVC experiment.")] = "HEAD",
    b: Annotated[str, typer.Option(metavar="REV", help="Another one, or workspace: files as they are.")] = "workspace",
) -> str:
    from pipeline.analysis.revision_files import WORKSPACE, read_revision
    from pipeline.report.revisions import revisions_text

    if Path(params).exists():  # else it may be in both revisions all the same
        params = os.path.relpath(go_to_root(params))
    text = revisions_text(read_revision("A", a, params), read_revision("B", b, params))
    named = " ".join(revision for revision in (a, b) if revision != WORKSPACE)
    return f"{text}\nNext: dvc plots diff {named} --targets {params.removesuffix('params.yaml')}dvc.yaml::"
