"""Find the learning rate that moves a method as far as another.

Trains both for a few iterations, at a few rates, and prints the one to be written into params.yaml.
"""

from typing import Annotated

import typer

from pipeline.commands.cli import FirstEnvironment, ParamsFile, configured


def main(
    method: Annotated[str, typer.Option(metavar="NAME", help="Whose learning rate is sought.")],
    to: Annotated[str, typer.Option(metavar="NAME", help="The method to be matched.")],
    environment: FirstEnvironment = None,
    params: ParamsFile = "params.yaml",
) -> str:
    config, layout, _ = configured(params, environment)
    from pipeline.analysis.matching import CLOSE, STEPS, matched, nearest
    from pipeline.workspace.errors import UserError

    for name in (method, to):
        if name not in config.methods:
            raise UserError(f"--method, --to: {name!r} is not there; allowed: {', '.join(config.methods)}")
    environment = environment or next(iter(config.environments))
    wanted, tried = matched(config, environment, method, to, layout.policy)
    found, seeds = nearest(tried, wanted.kl), len(config.seeds)
    off, close = found.off(wanted.kl), found.off(wanted.kl) < CLOSE
    measured = [
        f"{name} at {one.rate:.4g}: KL per iteration on action tokens {one.kl:.4g}"
        for name, one in ((to, wanted), *((method, one) for one in tried))
    ]
    return "\n".join(measured) + (
        f"\nmethods.{method}.learning_rate: {found.rate:g}  # mean KL per iteration {found.kl:.4g}, {to}'s {wanted.kl:.4g}: "
        f"{off:.1%} apart over {seeds} seed{'s' * (seeds > 1)}"
        f"{'' if close else f', not within {CLOSE:.0%} after {STEPS} steps'}\n"
        f"Next: write it into params.yaml or the preset's overlay, then {'`make repro`' if close else 'run this again'}"
    )
