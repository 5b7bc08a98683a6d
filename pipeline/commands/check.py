"""Check a params file, and say what it would run.

The environments that it names are made once, as the first stage of the DAG does.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.cli import ParamsFile, configured

if TYPE_CHECKING:
    from pipeline.settings.params import Config


def main(params: ParamsFile = "params.yaml") -> str:
    config, params = configured(params)
    from pipeline.sources.checks import check_named
    from pipeline.workspace.yaml_files import read_yaml

    check_named(config, params)
    dag = Path(params).with_name("dvc.yaml")
    stages = read_yaml(dag)["stages"] if dag.exists() else {}
    counted = ", ".join(f"{name} {runs_of(stage, config)}" for name, stage in stages.items())
    sizes = {name: getattr(config, name) for name in ("environments", "methods", "seeds")}
    trainings = " x ".join(f"{len(values)} {name}" for name, values in sizes.items())
    return (
        f"{params}: right. {trainings} = {math.prod(map(len, sizes.values()))} trainings\n"
        f"environments: {', '.join(config.environments)}\nmethods: {', '.join(config.methods)}\n"
        f"runs of each stage: {counted or f'{dag}: no such file'}\nNext: dvc repro {dag}"
    )


def runs_of(stage: dict[str, Any], config: Config) -> int:
    """How often DVC runs a stage of dvc.yaml, whose matrix names sections of the params file."""
    return math.prod(len(getattr(config, named.strip("${}"))) for named in stage.get("matrix", {}).values())
