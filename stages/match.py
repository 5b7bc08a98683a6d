"""Find the learning rate at which a method moves action tokens as far per update as another one does.

What is matched is the mean KL(behaviour || policy) on action tokens over the first three iterations and all seeds
(``kl_update_action``). The result is printed, to be written into params.yaml by hand.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from stages.command import configured, out_folder, run

ITERATIONS, STEPS, CLOSE = 3, 5, 0.05


def main() -> str:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--environment", help="default: the first one")
    parser.add_argument("--method", required=True, help="whose learning rate is sought")
    parser.add_argument("--to", required=True, help="the method to be matched")
    arguments = parser.parse_args()
    config = configured(arguments)
    from pipeline.config import Config, ConfigError
    from pipeline.files import read_json
    from pipeline.processes import in_own_process, run_in_processes
    from pipeline.tracking.store import open_store, run_settings, store_of
    from pipeline.training.result import training_task
    from pipeline.training.run import TrainingJob, train_one

    environment = arguments.environment or next(iter(config.environments))
    for name in (arguments.method, arguments.to):
        if name not in config.methods:
            raise ConfigError(f"--method, --to: {name!r} is not there; allowed: {', '.join(config.methods)}")
    in_own_process(open_store, store_of(config, Path(".")), environment)
    policy = out_folder(config) / "models" / "policy"
    train = config.train.model_copy(update={"iterations": ITERATIONS, "tokens": None, "validate_every": ITERATIONS})
    short = config.model_copy(update={"train": train, "comparison": "match"})

    found: list[str] = []

    def moved(method: str, rate: float) -> float:
        slots = short.methods[method].model_copy(update={"learning_rate": rate})
        at_rate: Config = short.model_copy(update={"methods": {**short.methods, method: slots}})
        tasks = [training_task(at_rate, environment, method, seed, policy, Path(".cache")) for seed in config.seeds]
        runs = run_settings(at_rate, Path("."), environment, method, {"reference policy": policy})
        jobs = {f"seed {t.seed}": TrainingJob(t, None, runs[t.seed]) for t in tasks if not t.finished}
        run_in_processes(train_one, jobs, config.workers, f"{method} at {rate:.3g}")
        rows = [row for task in tasks for row in read_json(task.result / "curves.json")]
        kl: float = sum(row["kl_update_action"] for row in rows) / len(rows)
        found.append(f"{method} at {rate:.4g}: KL per update on action tokens {kl:.4g}")
        return kl

    wanted = moved(arguments.to, config.methods[arguments.to].learning_rate)
    rate = config.methods[arguments.method].learning_rate
    for _ in range(STEPS):
        got = moved(arguments.method, rate)
        if abs(got / wanted - 1) < CLOSE:
            break
        # Small steps move the policy by a KL of about the square of the step.
        rate = float(f"{rate * math.sqrt(wanted / got):.3g}")
    return "\n".join(found) + (
        f"\nmethods.{arguments.method}.learning_rate: {rate:g}  # moves action tokens as {arguments.to} does\n"
        "Next: write it into params.yaml or the preset's overlay, then `make repro`"
    )


if __name__ == "__main__":
    run(main)
