"""The learning rate at which a method moves action tokens as far per iteration as another one does.

What is matched is the mean KL(behaviour || policy) on action tokens over the first three iterations and all seeds, after
all of an iteration's updates, on its last minibatch (``kl_iteration_action``). Means that are close are all that is
claimed: it is no test of two methods.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.settings.params import Config
from pipeline.tracking.store import open_store, run_settings, store_of
from pipeline.training.run import TrainingJob, train_one
from pipeline.training.seed_key import training_task
from pipeline.workspace.files import read_json
from pipeline.workspace.layout import Cache
from pipeline.workspace.processes import in_own_process, run_in_processes

ITERATIONS, STEPS, CLOSE = 3, 5, 0.05


class Match(NamedTuple):
    """A learning rate and the KL per iteration that was measured at it."""

    rate: float
    kl: float

    def off(self, wanted: float) -> float:
        """Relative distance to another KL."""
        return abs(self.kl / wanted - 1)


def search(moved: Callable[[float], float], wanted: float, rate: float) -> list[Match]:
    """At most ``STEPS`` learning rates, in the order tried from ``rate`` on, with the mean KL per iteration at each.

    The search ends within a share ``CLOSE`` of the KL that is wanted.
    """
    tried: list[Match] = []
    while len(tried) < STEPS:
        tried.append(Match(rate, moved(rate)))
        if tried[-1].off(wanted) < CLOSE:
            break
        # Small steps move the policy by a KL of about the square of the step.
        rate = float(f"{rate * math.sqrt(wanted / tried[-1].kl):.3g}")
    return tried


def nearest(tried: Sequence[Match], wanted: float) -> Match:
    """What has been measured that comes nearest to the KL wanted."""
    return min(tried, key=lambda match: match.off(wanted))


def matched(config: Config, environment: str, method: str, to: str, policy: Path) -> tuple[Match, list[Match]]:
    """Train both methods for a few iterations, at the learning rates that are tried; runs are kept, and told to MLflow.

    Returns:
        The method ``to`` at its own learning rate, and what was tried of ``method`` to match it, in order.
    """
    in_own_process(open_store, store_of(config, Path(".")), environment)
    train = config.train.model_copy(update={"iterations": ITERATIONS, "tokens": None, "validate_every": ITERATIONS})
    short = config.model_copy(update={"train": train, "comparison": "match"})

    def moved(name: str, rate: float) -> float:
        slots = short.methods[name].model_copy(update={"learning_rate": rate})
        at_rate: Config = short.model_copy(update={"methods": {**short.methods, name: slots}})
        tasks = [training_task(at_rate, environment, name, seed, policy, Cache().folder) for seed in config.seeds]
        runs = run_settings(at_rate, Path("."), environment, name, {"reference policy": policy})
        jobs = {f"seed {t.seed}": TrainingJob(t, None, runs[t.seed]) for t in tasks if not t.finished}
        run_in_processes(train_one, jobs, config.workers, f"{name} at {rate:.3g}")
        rows = [row for task in tasks for row in read_json(task.result / "curves.json")]
        return float(sum(row["kl_iteration_action"] for row in rows) / len(rows))

    rate = config.methods[to].learning_rate
    wanted = Match(rate, moved(to, rate))
    return wanted, search(lambda rate: moved(method, rate), wanted.kl, config.methods[method].learning_rate)
