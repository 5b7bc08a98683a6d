"""Check a params file, and say what it would run.

The first stage of the DAG does the same, but for the environments, each of which is made once here.
"""

import math
from pathlib import Path

from pipeline.commands.cli import ParamsFile, configured


def main(params: ParamsFile = "params.yaml") -> str:
    config, _, params = configured(params)
    from pipeline.environments import make
    from pipeline.settings.params import every_seed
    from pipeline.sources.checks import check_named
    from pipeline.workspace.yaml_files import read_yaml

    check_named(config, params)
    for section in config.environments.values():
        make(section)
    dag = Path(params).with_name("dvc.yaml")
    stages = read_yaml(dag)["stages"] if dag.exists() else {}
    # A stage runs once for each combination of its matrix, which names sections of the params file.
    matrices = {name: stage.get("matrix", {}).values() for name, stage in stages.items()}
    runs = {name: [len(getattr(config, part.strip("${}"))) for part in matrix] for name, matrix in matrices.items()}
    counted = ", ".join(f"{name} {math.prod(lengths)}" for name, lengths in runs.items())
    sizes = {name: getattr(config, name) for name in ("environments", "methods", "seeds")}
    trainings = " x ".join(f"{len(values)} {name}" for name, values in sizes.items())
    most = len(every_seed(config))
    more = f", with up to {most} seeds until it is decided" if most > len(config.seeds) else ""
    return (
        f"{params}: right. {trainings} = {math.prod(map(len, sizes.values()))} trainings{more}\n"
        f"environments: {', '.join(config.environments)}\nmethods: {', '.join(config.methods)}\n"
        f"runs of each stage: {counted or f'{dag}: no such file'}\nNext: dvc repro {dag}"
    )
