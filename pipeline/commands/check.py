"""Check a params file and its policy, and say what it would run.

The first stage of the DAG does the same, but for the environments, each of which is made once here, and for the policy,
which plays and trains a small iteration on each.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.cli import ParamsFile, configured

if TYPE_CHECKING:
    from pipeline.model.policy import Policy
    from pipeline.settings.params import Config
    from pipeline.workspace.layout import Layout

TRY = "Try the policy. Default: where policy.kind is pretrained."


def main(
    params: ParamsFile = "params.yaml",
    policy: Annotated[bool | None, typer.Option("--policy/--no-policy", help=TRY)] = None,
) -> str:
    config, layout, params = configured(params)
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
    wanted = config.policy.kind == "pretrained" if policy is None else policy
    ready = f"{_tried(config, layout, params)}\n" if wanted else ""
    return (
        f"{ready}{params}: right. {trainings} = {math.prod(map(len, sizes.values()))} trainings{more}\n"
        f"environments: {', '.join(config.environments)}\nmethods: {', '.join(config.methods)}\n"
        f"runs of each stage: {counted or f'{dag}: no such file'}\nNext: dvc repro {dag}"
    )


def _tried(config: "Config", layout: "Layout", params: str) -> str:
    """Whether the policy is ready: the one that is made, or else the pretrained model as it is."""
    from pipeline.workspace.yaml_files import LARGEST_LOCK, read_yaml

    dag, lock = Path(params).with_name("dvc.yaml"), Path(params).with_name("dvc.lock")
    noted = read_yaml(lock, LARGEST_LOCK)["stages"] if lock.exists() else {}
    settings = noted.get("policy", {}).get("params", {}).get(config.params_file, {})
    written = read_yaml(params)
    made = layout.policy.is_dir() and all(settings.get(key) == written[key] for key in ("policy", "environments"))
    if not made and config.policy.kind == "scratch":
        return f"policy: none is made from these settings yet; run `dvc repro {dag}:policy`, and check again"
    import torch

    from pipeline.analysis.readiness import peak_memory, try_policy
    from pipeline.model.loading import load_policy, load_trained, longest_context
    from pipeline.report.readiness import Checked, readiness_text

    torch.set_num_threads(config.threads)
    source, context = config.policy, longest_context(config)

    def load() -> "Policy":
        if made or source.kind == "scratch":
            return load_trained(layout.policy, config)
        named = source.model_dump(exclude={"kind", "model", "demonstrations"})
        return load_policy(source.model, **named, context=context)

    begun = not made and getattr(source, "demonstrations", None) is not None
    name = str(layout.policy) if made or source.kind == "scratch" else source.model
    facts, tried = try_policy(config, load)
    return readiness_text(config, Checked(name, begun, facts, tried, peak_memory()))
