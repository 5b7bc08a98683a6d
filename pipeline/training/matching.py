"""The learning rate at which an update moves action tokens as far as one of another method does.

What is matched is the mean of ``kl_update_action`` over the first iterations in which the policy learns, and over a few of
the comparison's seeds. These short trainings are kept by key, as any other: a search that was killed goes on where it was,
and several methods that are matched to one share its. Means that are close are all that is claimed: it is no test of two
methods.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pipeline.objective.estimates import declared_heads
from pipeline.settings.params import Config, every_seed
from pipeline.training.run import TrainingJob, train_one
from pipeline.training.seed_key import training_task
from pipeline.training.update_kl import FIRST, first_updates
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import read_json
from pipeline.workspace.layout import Cache, Layout
from pipeline.workspace.processes import run_in_processes

SEEDS, TRIES, CLOSE = 6, 6, 0.05
"""Seeds of a short training and learning rates tried, at most, and how near in KL is near enough."""
STEEPNESS = 1.0, 4.0
"""Of log KL by log rate: what two tries may say of it. Small steps of a policy have a KL of about the square of the step."""
LARGEST_STEP = 8.0
LOWEST, HIGHEST = 1e-7, 1.0
"""Learning rates that params.yaml takes."""


class Match(NamedTuple):
    """A learning rate, and the mean KL of an update on action tokens that was measured at it, in nats per token."""

    rate: float
    kl: float

    def off(self, wanted: float) -> float:
        """Relative distance to another KL."""
        return abs(self.kl / wanted - 1)


def matching_seeds(config: Config) -> list[int]:
    """The seeds of the short trainings: the first that the params file allows, however many are in effect."""
    return every_seed(config)[:SEEDS]


def search(moved: Callable[[float], float], wanted: float, rate: float) -> list[Match]:
    """At most ``TRIES`` learning rates, in the order tried from ``rate`` on, with the mean KL of an update at each.

    The search ends within a share ``CLOSE`` of the KL that is wanted, or where it would try a rate again.
    """
    tried: list[Match] = []
    while len(tried) < TRIES and rate not in [match.rate for match in tried]:
        tried.append(Match(rate, moved(rate)))
        if tried[-1].off(wanted) < CLOSE:
            break
        rate = next_rate(tried, wanted)
    return tried


def next_rate(tried: Sequence[Match], wanted: float) -> float:
    """Where a line through the nearest tries, in logarithms, has the KL that is wanted; to three significant digits.

    It goes through the middle of the two nearest, or of more where that rate has been tried: measurements scatter. Its
    steepness is theirs, or 2 where that cannot be.
    """
    points = [(math.log(match.rate), math.log(max(match.kl, 1e-300) / wanted)) for match in tried]
    points.sort(key=lambda point: abs(point[1]))
    steepness, most = 2.0, math.log(LARGEST_STEP)
    if len(points) > 1:
        (x, y), (other_x, other_y) = points[:2]
        along = (y - other_y) / (x - other_x)
        steepness = along if STEEPNESS[0] <= along <= STEEPNESS[1] else steepness
    found = tried[0].rate
    for count in range(min(2, len(points)), len(points) + 1):
        x, y = (sum(column) / count for column in zip(*points[:count], strict=True))
        step = min(most, max(-most, x - y / steepness - points[0][0]))
        found = float(f"{min(HIGHEST, max(LOWEST, math.exp(points[0][0] + step))):.3g}")
        if found not in [match.rate for match in tried]:
            break
    return found


def nearest(tried: Sequence[Match], wanted: float) -> Match:
    """What has been measured that comes nearest to the KL wanted."""
    return min(tried, key=lambda match: match.off(wanted))


def matched(config: Config, environment: str, method: str, layout: Layout) -> tuple[Config, dict[str, Any]]:
    """The params with the learning rate of a method found, if it is matched to another one, and how.

    The process works in the root of the params file.

    Returns:
        The params, in which the method is an ordinary row; and ``matched_to``, ``seeds``, ``learning_rate`` found,
        ``wanted`` KL, ``found`` KL, ``off`` (relative), and ``tries``: a learning rate and its KL each. Nothing of a method
        that is not matched.

    Raises:
        UserError: the method to be matched moves no action token.
    """
    to = config.methods[method].matched_to
    if to is None:
        return config, {}
    seeds = matching_seeds(config)

    def moved(name: str, rate: float) -> float:
        short = shortened(with_rate(config, name, rate), name)
        tasks = [training_task(short, environment, name, seed, layout.policy, Cache().matching) for seed in seeds]
        plain = [TrainingJob(task, layout.annotated(environment), None, keeps_policy=False) for task in tasks]
        jobs = {f"seed {job.task.seed}": job for job in plain if not job.task.finished}
        title = f"match {method}: {name} at {rate:.3g}"
        run_in_processes(train_one, jobs, config.trainings, title, config.threads, saved="iterations at work")
        found = [kl for task in tasks for kl in first_updates(read_json(task.result / "curves.json"))]
        return sum(found) / len(found) if found else 0.0

    wanted = moved(to, config.methods[to].learning_rate)
    if not wanted > 0:
        raise UserError(
            f"{config.params_file}: methods.{method}.matched_to: {to} moves no action token in its first {FIRST} iterations "
            f"on {environment}: there is nothing to match"
        )
    tried = search(lambda rate: moved(method, rate), wanted, config.methods[method].learning_rate)
    best = nearest(tried, wanted)
    return with_rate(config, method, best.rate), {
        "matched_to": to,
        "seeds": seeds,
        "learning_rate": best.rate,
        "wanted": _six(wanted),
        "found": _six(best.kl),
        "off": round(best.off(wanted), 6),
        "tries": [{"learning_rate": match.rate, "kl_update_action": _six(match.kl)} for match in tried],
    }


def with_rate(config: Config, method: str, rate: float) -> Config:
    """The params with a method at a learning rate, matched to nothing."""
    slots = config.methods[method].model_copy(update={"learning_rate": rate, "matched_to": None})
    return config.model_copy(update={"methods": {**config.methods, method: slots}})


def shortened(config: Config, method: str) -> Config:
    """The params of a method's trainings up to the last iteration that is measured, with hardly a validation.

    Their iterations are the first ones of whole trainings, but for a learning rate that falls from the first on.
    """
    warmup = max((s.warmup_iterations for s in declared_heads(config.methods[method].advantage).values()), default=0)
    iterations = min(config.train.iterations, warmup + FIRST)
    train = {"iterations": iterations, "tokens": None, "schedule": "constant", "validate_every": warmup + FIRST}
    evaluation = {"validation_states": 1, "validation_rollouts": 1}
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=train),
            "evaluation": config.evaluation.model_copy(update=evaluation),
        }
    )


def _six(value: float) -> float:
    return float(f"{value:.6g}")
