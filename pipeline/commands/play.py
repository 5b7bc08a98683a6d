"""Watch one episode turn by turn, with its tokens' energies."""

from typing import Annotated

import typer

from pipeline.commands.cli import FirstEnvironment, MethodName, ParamsFile, configured, next_command


def main(
    params: ParamsFile = "params.yaml",
    environment: FirstEnvironment = None,
    method: MethodName = "reference",
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of the training. Default: the first one.")] = None,
    temperature: Annotated[float | None, typer.Option(metavar="T", help="Default: the first of evaluation.")] = None,
    episode: Annotated[int, typer.Option(min=0, metavar="N", help="Which test state.")] = 0,
) -> str:
    config, layout, params = configured(params, environment, method)
    from pipeline.energy.annotate import annotate
    from pipeline.evaluation.evaluate import evaluation_specs
    from pipeline.model.loading import load_trained
    from pipeline.model.memory import tokens_per_forward
    from pipeline.progress.display import doing
    from pipeline.report.episode import show
    from pipeline.rollout.collector import collect
    from pipeline.rollout.making import make_engine
    from pipeline.workspace.errors import UserError

    name = environment or next(iter(config.environments))
    seed = config.seeds[0] if seed is None else seed
    temperature = temperature or config.evaluation.temperatures[0]
    directory = layout.final_policy(name, method, seed)
    doing("loading the policies")
    policy, reference = load_trained(directory, config), load_trained(layout.policy, config)
    states = config.evaluation.states
    if not 0 <= episode < states:
        raise UserError(f"--episode: {episode} is not there; allowed: 0 to {states - 1}")
    spec = evaluation_specs(config, name, "test", states, 1, seed, "play")[episode]
    played = collect(make_engine(config, policy, slots=1), policy.tokenizer, config, name, [spec], temperature)
    shown = annotate(played, reference, temperature, tokens_per_forward(config, reference))
    show(shown, policy.tokenizer)
    outcome = "success" if shown.episodes["success"][0] else f"no success ({shown.episodes['end_reason'][0]})"
    following = next_command(params, "actfocus play", method=method, episode=f"{(episode + 1) % states}")
    return f"{name}, {method}, seed {seed}, temperature {temperature:g}: {outcome}. {following}"
