"""Find the learning rate at which a method moves action tokens as far per iteration as another one does.

What is matched is the mean KL(behaviour || policy) on action tokens over the first three iterations and all seeds, after
all of an iteration's updates, on its last minibatch (``kl_iteration_action``). The result is printed, to be written into
params.yaml by hand. Means that are close are all that is claimed: it is no test of two methods.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pipeline.commands.command import configured, layout_of, run

ITERATIONS, STEPS, CLOSE = 3, 5, 0.05


class Match(NamedTuple):
    """A learning rate and the KL per iteration that was measured at it."""

    rate: float
    kl: float

    def off(self, wanted: float) -> float:
        """Relative distance to another KL."""
        return abs(self.kl / wanted - 1)


def nearest(moved: Callable[[float], float], wanted: float, rate: float) -> Match:
    """The learning rate, of at most ``STEPS`` that are tried, at which the KL comes nearest to the one wanted.

    Args:
        moved: learning rate -> mean KL per iteration there.
        wanted: the KL that is sought; the search ends within a share ``CLOSE`` of it.
        rate: the first learning rate.
    """
    tried: list[Match] = []
    while len(tried) < STEPS:
        tried.append(Match(rate, moved(rate)))
        if tried[-1].off(wanted) < CLOSE:
            break
        # Small steps move the policy by a KL of about the square of the step.
        rate = float(f"{rate * math.sqrt(wanted / tried[-1].kl):.3g}")
    return min(tried, key=lambda match: match.off(wanted))


def main() -> str:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--environment", help="default: the first one")
    parser.add_argument("--method", required=True, help="whose learning rate is sought")
    parser.add_argument("--to", required=True, help="the method to be matched")
    arguments = parser.parse_args()
    config = configured(arguments)
    from pipeline.settings.params import Config
    from pipeline.tracking.store import open_store, run_settings, store_of
    from pipeline.training.result import training_task
    from pipeline.training.run import TrainingJob, train_one
    from pipeline.workspace.errors import UserError
    from pipeline.workspace.files import read_json
    from pipeline.workspace.layout import Cache
    from pipeline.workspace.processes import in_own_process, run_in_processes

    environment = arguments.environment or next(iter(config.environments))
    for name in (arguments.method, arguments.to):
        if name not in config.methods:
            raise UserError(f"--method, --to: {name!r} is not there; allowed: {', '.join(config.methods)}")
    in_own_process(open_store, store_of(config, Path(".")), environment)
    policy = layout_of(config).policy
    train = config.train.model_copy(update={"iterations": ITERATIONS, "tokens": None, "validate_every": ITERATIONS})
    short = config.model_copy(update={"train": train, "comparison": "match"})

    measured: list[str] = []

    def moved(method: str, rate: float) -> float:
        slots = short.methods[method].model_copy(update={"learning_rate": rate})
        at_rate: Config = short.model_copy(update={"methods": {**short.methods, method: slots}})
        tasks = [training_task(at_rate, environment, method, seed, policy, Cache().folder) for seed in config.seeds]
        runs = run_settings(at_rate, Path("."), environment, method, {"reference policy": policy})
        jobs = {f"seed {t.seed}": TrainingJob(t, None, runs[t.seed]) for t in tasks if not t.finished}
        run_in_processes(train_one, jobs, config.workers, f"{method} at {rate:.3g}")
        rows = [row for task in tasks for row in read_json(task.result / "curves.json")]
        kl: float = sum(row["kl_iteration_action"] for row in rows) / len(rows)
        measured.append(f"{method} at {rate:.4g}: KL per iteration on action tokens {kl:.4g}")
        return kl

    wanted = moved(arguments.to, config.methods[arguments.to].learning_rate)
    found = nearest(lambda rate: moved(arguments.method, rate), wanted, config.methods[arguments.method].learning_rate)
    close, seeds = found.off(wanted) < CLOSE, len(config.seeds)
    return "\n".join(measured) + (
        f"\nmethods.{arguments.method}.learning_rate: {found.rate:g}  # mean KL per iteration {found.kl:.4g}, {arguments.to}'s "
        f"{wanted:.4g}: {found.off(wanted):.1%} apart over {seeds} seed{'s' * (seeds > 1)}"
        f"{'' if close else f', not within {CLOSE:.0%} after {STEPS} steps'}\n"
        f"Next: write it into params.yaml or the preset's overlay, then {'`make repro`' if close else 'run this again'}"
    )


if __name__ == "__main__":
    run(main)
