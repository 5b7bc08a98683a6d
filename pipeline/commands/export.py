"""Write a trained policy as a Hugging Face directory.

Adapters are merged into its weights, so that it loads anywhere.
"""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.cli import FirstEnvironment, MethodName, ParamsFile, configured, make_alone


def main(
    method: MethodName,
    to: Annotated[Path, typer.Option(metavar="DIR", help="A new folder.")],
    params: ParamsFile = "params.yaml",
    environment: FirstEnvironment = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of the training. Default: the first one.")] = None,
) -> str:
    target = to.absolute()  # before the working folder changes
    config, layout, _ = configured(params, environment, method)
    make_alone(layout, "export")
    from pipeline.model.adapters import find_adapters, merged
    from pipeline.model.loading import load_trained
    from pipeline.progress.display import doing
    from pipeline.workspace.errors import UserError
    from pipeline.workspace.files import replacing
    from pipeline.workspace.manifest import copy_whole

    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"--to: {to} is there already; allowed: a new or an empty folder")
    seed = config.seeds[0] if seed is None else seed
    directory = layout.final_policy(environment or next(iter(config.environments)), method, seed)
    doing("loading the policy")
    policy = merged(load_trained(directory, config))
    doing("saving")
    if find_adapters(directory) is None:
        with replacing(target) as partial:
            copy_whole(directory, partial)
    else:
        policy.save(target)
    size = sum(p.numel() for p in policy.model.parameters())
    return f"{to}: {size / 1e6:.2f} M parameters. Next: transformers' from_pretrained, or policy.model of a params file"
