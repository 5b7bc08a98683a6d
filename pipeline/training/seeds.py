"""All seeds of a method: trained where they have not been, and put where evaluation and report look for them."""

from pathlib import Path
from typing import Any, NamedTuple

from pipeline.progress.display import doing
from pipeline.settings.params import Config
from pipeline.tracking.store import open_store, run_settings, store_of
from pipeline.training.alarms import alarm_text
from pipeline.training.matching import matched
from pipeline.training.run import TrainingJob, train_one
from pipeline.training.seed_key import training_task
from pipeline.trajectories.parquet import copy_parquet
from pipeline.workspace.files import read_json, replacing, write_record
from pipeline.workspace.layout import Cache, Layout
from pipeline.workspace.manifest import copy_whole
from pipeline.workspace.processes import in_own_process, run_in_processes


class Trained(NamedTuple):
    """What has become of a method's seeds."""

    target: Path
    """Folder of the policies."""
    now: int
    """How many seeds have been trained now."""
    matching: dict[str, Any]
    """How the learning rate was found, of a method that is matched to another (see ``matched``)."""
    alarms: dict[int, str]
    """What seeds have alarmed of, in words; none of those that have not."""


def train_seeds(config: Config, environment: str, method: str, layout: Layout) -> Trained:
    """Train what has not been trained, in processes of their own, and copy all of it from .cache.

    The process works in the root of the params file. The learning rate of a method that is matched is found first.
    """
    config, matching = matched(config, environment, method, layout)
    policy, table = layout.policy, layout.annotated(environment)
    tasks = [training_task(config, environment, method, seed, policy, Cache().folder) for seed in config.seeds]
    made_from = {"annotated episodes": table, "reference policy": policy}
    runs = run_settings(config, Path("."), environment, method, made_from)
    jobs = {f"seed {t.seed}": TrainingJob(t, table, runs[t.seed]) for t in tasks if not t.finished}
    if jobs:
        doing("opening MLflow's store")
        in_own_process(open_store, store_of(config, Path(".")), environment)
    title = f"train {environment}-{method}"
    run_in_processes(train_one, jobs, config.trainings, title, config.threads, saved="iterations at work")

    doing("copying the results")
    target = layout.trained(environment, method)
    with replacing(target) as partial:
        for task in tasks:
            final = layout.final_policy(environment, method, task.seed)
            copy_whole(task.result / "policy", partial / final.relative_to(target))
    for kind, place in (("curves", layout.curves), ("timings", layout.timings), ("runs", layout.runs)):
        seeds = {str(task.seed): read_json(task.result / f"{kind}.json") for task in tasks}
        found = {"matching": matching} if matching and kind == "curves" else {}
        write_record(place(environment, method), {"seeds": seeds, **found})
    copy_parquet(tasks[0].result / "episodes.parquet", layout.episodes(environment, method))
    alarmed = {task.seed: alarm_text(read_json(task.result / "curves.json")) for task in tasks}
    return Trained(target, len(jobs), matching, {seed: text for seed, text in alarmed.items() if text})
