"""An episode on a terminal, turn by turn."""

import time
from typing import Any

from rich.console import Console
from rich.text import Text

from pipeline.trajectories.prompting import plain_text
from pipeline.trajectories.trajectory import Role


def show(episode: Any, tokenizer: Any) -> None:
    """Print an episode; action tokens carry their energy. Model output is text, never markup or control characters."""
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
