"""Which signal finds the decision points?

Branches at the tokens that each signal ranks highest, and measures how much of the returns' variance they explain.
"""

from typing import Annotated

import typer

from pipeline.commands.cli import ParamsFile, configured, make_alone

SEEDS = [300, 301, 302, 303]
MOVES = "One iteration of it moves the policy. Default: the first that does not branch."


def main(
    params: ParamsFile = "params.yaml",
    environment: Annotated[str | None, typer.Option(metavar="NAME", help="Default: all.")] = None,
    method: Annotated[str | None, typer.Option(metavar="NAME", help=MOVES)] = None,
    seed: Annotated[list[int], typer.Option(metavar="N", help="Of initial states; repeat for more.")] = SEEDS,
    positions: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens per signal and initial state.")] = 4,
    candidates: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens that are sampled in place of each.")] = 4,
    continuations: Annotated[int, typer.Option(min=1, metavar="N", help="Of each candidate.")] = 4,
) -> str:
    config, layout, _ = configured(params, environment, method)
    make_alone(layout, "decisions")
    import transformers.models.auto.modeling_auto  # noqa: F401  (imported before the processes fork)

    from pipeline.analysis.decisions import SampleSizes, decisions
    from pipeline.progress.display import doing
    from pipeline.report.decision_figures import decisions_text, draw_decisions
    from pipeline.workspace.files import write_json, write_text
    from pipeline.workspace.layout import Cache

    environments = [environment] if environment else list(config.environments)
    usable = [name for name, row in config.methods.items() if row.branching.kind == "none"]
    method = method or next(iter([*usable, *config.methods]))
    sizes = SampleSizes(seed, positions, candidates, continuations)
    texts = []
    for name in environments:
        result = decisions(config, layout.policy, name, method, sizes, Cache().folder)
        doing(f"{name}: drawing")
        folder = layout.decisions(name)
        folder.mkdir(parents=True, exist_ok=True)
        texts.append(decisions_text(result))
        write_json(folder / "decisions.json", result)
        write_text(folder / "decisions.txt", texts[-1])
        draw_decisions(result, folder / "decisions")
    return "\n".join(texts) + f"\n{folder.parent}: decisions.json, .txt, .png per environment. Next: open the figure"
