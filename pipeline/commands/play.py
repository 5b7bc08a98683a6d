"""Watch one episode of a policy, turn by turn, with the energy of its tokens under the reference policy."""

from __future__ import annotations

import argparse
import time
from typing import Any

from pipeline.commands.command import configured, layout_of, next_command, run


def main() -> str:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip())
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--environment", help="default: the first one")
    parser.add_argument("--method", default="reference", help="default: the reference policy")
    parser.add_argument("--seed", type=int, help="of the training; default: the first one")
    parser.add_argument("--temperature", type=float, help="default: the headline temperature")
    parser.add_argument("--episode", type=int, default=0, help="which test state, from 0")
    arguments = parser.parse_args()
    config = configured(arguments)
    from pipeline.energy.annotate import annotate
    from pipeline.evaluation.evaluate import evaluation_specs
    from pipeline.model.loading import load_trained
    from pipeline.progress.display import doing
    from pipeline.rollout.collector import collect
    from pipeline.rollout.making import make_engine
    from pipeline.workspace.errors import UserError

    name = arguments.environment or next(iter(config.environments))
    seed = config.seeds[0] if arguments.seed is None else arguments.seed
    temperature = arguments.temperature or config.evaluation.temperatures[0]
    layout = layout_of(config)
    directory = layout.final_policy(name, arguments.method, seed)
    doing("loading the policies")
    policy, reference = load_trained(directory, config), load_trained(layout.policy, config)
    states = config.evaluation.states
    if not 0 <= arguments.episode < states:
        raise UserError(f"--episode: {arguments.episode} is not there; allowed: 0 to {states - 1}")
    spec = evaluation_specs(config, name, "test", states, 1, seed, "play")[arguments.episode]
    played = collect(make_engine(config, policy, slots=1), policy.tokenizer, config, name, [spec], temperature)
    episode = annotate(played, reference, temperature, config.train.tokens_per_forward)
    show(episode, policy.tokenizer)
    outcome = "success" if episode.episodes["success"][0] else f"no success ({episode.episodes['end_reason'][0]})"
    following = next_command(arguments, "play", method=arguments.method, episode=f"{(arguments.episode + 1) % states}")
    return f"{name}, {arguments.method}, seed {seed}, temperature {temperature:g}: {outcome}. {following}"


def show(episode: Any, tokenizer: Any) -> None:
    """Print an episode; action tokens carry their energy. Model output is text, never markup or control characters."""
    from rich.console import Console
    from rich.text import Text

    from pipeline.trajectories.prompting import plain_text
    from pipeline.trajectories.trajectory import Role

    console, position = Console(), 0
    for turn, (start, end) in enumerate(zip(episode.turns["start"], episode.turns["end"], strict=True), start=1):
        console.print(Text(f"\nTurn {turn}", style="bold"))
        console.print(Text(plain_text(tokenizer.decode(episode.input_ids[position:start])), style="dim"))
        line = Text()
        for token in range(start, end):
            action = episode.role[token] == Role.ACTION
            reasoning = episode.role[token] == Role.REASONING
            style = "bold green" if action else "cyan" if reasoning else "dim"
            line.append(plain_text(tokenizer.decode([episode.input_ids[token]])), style=style)
            if action:
                line.append(f"[E {episode.energy[token]:.2f}]", style="yellow")
        console.print(line)
        reward, kind = episode.turns["reward"][turn - 1], episode.responses[turn - 1]
        why = f"cut by {episode.turns['ended'][turn - 1]}" if kind == "cut" else kind
        console.print(Text(f"reward {reward:g}{'' if kind == 'valid' else f' ({why})'}", style="magenta"))
        if console.is_terminal:
            time.sleep(0.6)
        position = end


if __name__ == "__main__":
    run(main)
