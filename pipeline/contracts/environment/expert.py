"""The contract of an environment's expert."""

from collections.abc import Iterator

from pipeline.contracts.environment.suite import Suite
from pipeline.environments.playing import parse_action, step


def expert(suite: Suite) -> Iterator[str]:
    """The expert solves what it calls solvable, within some attempts; what it says is what ``step`` takes."""
    if suite.expert is None:
        return
    environment, player, unsolved, asked = suite.fresh(), suite.expert, list[int](), 0
    solvable = getattr(player, "solvable", lambda environment: True)
    for state, seed in suite.states():
        suite.reset(environment, seed, state)
        before = environment.state_key
        if not isinstance(player.reason(environment, 5, suite.draws), str):
            yield "reason does not return text"
        is_solvable = solvable(environment)
        player.act(environment, suite.draws)
        player.random_action(environment, suite.draws)
        if environment.state_key != before:
            yield "the expert changes the state by looking at it"
        if not is_solvable:
            continue
        asked += 1
        for attempt in range(suite.bounds.attempts):
            suite.reset(environment, seed + attempt, state)
            for _ in range(suite.bounds.longest):
                for name in ("random_action", "act"):
                    action = getattr(player, name)(environment, suite.draws)
                    if parse_action(environment, action) != action:
                        yield f"{name} gives {action!r}, which is not allowed or not its canonical form"
                if step(environment, action)[-1]:
                    break
            if environment.success:
                break
        else:
            unsolved.append(state)
    suite.place = f"(state_seed {', '.join(map(str, unsolved))})"
    if asked - len(unsolved) < suite.bounds.solved * asked:
        share, attempts = suite.bounds.solved, suite.bounds.attempts
        yield f"solves {asked - len(unsolved)} of {asked} instances in {attempts} attempts, less than {share:.0%}; not"
