"""What a training leaves, where it is kept, and the key under which it may be used again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.settings.params import Config
from pipeline.sources.code import result_key
from pipeline.sources.fingerprints import of_environment, of_method
from pipeline.sources.hashes import holds, tree_hashes
from pipeline.trajectories.trajectory import Trajectories
from pipeline.workspace.errors import UserError
from pipeline.workspace.layout import Cache


@dataclass(frozen=True)
class TrainingTask:
    """One training: a method, an environment and a seed."""

    config: Config
    environment: str
    method: str
    seed: int
    policy: Path
    """Directory of the reference policy."""
    key: str
    """Hash of everything that decides the result; see ``training_key``."""
    cache: Path
    """Folder of this training, named by its key: checkpoint while it runs, result when it is finished."""

    @property
    def result(self) -> Path:
        """Folder of the finished result: policy/, curves.json, episodes.parquet, timings.json, runs.json."""
        return self.cache / "result"

    @property
    def manifest(self) -> Path:
        """Hashes of all that the finished result holds."""
        return self.cache / "manifest.json"

    @property
    def finished(self) -> bool:
        """Whether the result is there, as it was written: it appears all at once, and is made again where it has changed."""
        return holds(self.result, self.manifest)


def training_task(config: Config, environment: str, method: str, seed: int, policy: Path, cache: Path) -> TrainingTask:
    """Name a training by the hash of its resolved inputs."""
    key = training_key(config, environment, method, seed, policy)
    return TrainingTask(config, environment, method, seed, policy, key, Cache(cache).training(key))


def training_key(config: Config, environment: str, method: str, seed: int, policy: Path) -> str:
    """Hash of all that decides a training's bytes: settings, what they name, reference policy, code, build and seed.

    Code is ``pipeline.training.run`` and what it imports. The number of processes is left out: it decides rounding alone, and
    a training goes on with another one. The annotated table is not among them: its slices are what the
    training would sample itself (invariant 4).

    Raises:
        UserError: the method's learning rate is yet to be found (see ``matching.py``).
    """
    if config.methods[method].matched_to is not None:
        raise UserError(f"methods.{method}: only its train stage trains it, which finds its learning rate first")
    resolved: dict[str, Any] = {
        "environment": {environment: config.environments[environment].model_dump(mode="json")},
        "rollout": config.rollout.model_dump(mode="json", exclude={"workers"}),
        "train": config.train.model_dump(mode="json", exclude={"processes"}),
        "method": config.methods[method].model_dump(mode="json", exclude={"source", "status", "matched_to"}),
        "evaluation": {
            k: getattr(config.evaluation, k) for k in ("validation_states", "validation_rollouts", "temperatures")
        },
        "seed": seed,
        "threads": config.threads,
        "policy": tree_hashes(policy),
        "sources": [of_environment(config.environments[environment]), of_method(config.methods[method])],
    }
    if config.train.tokens_per_forward == "auto":
        import psutil  # not torch, which asks for seconds

        resolved["memory"] = round(psutil.virtual_memory().total / 2**30) / config.workers
    return result_key("pipeline.training.run", resolved)


def table_slice(table: Trajectories, config: Config, environment: str, seed: int) -> Trajectories | None:
    """The rows of the annotated table that are this seed's first iteration, or None if it has none."""
    rows = [i for i, s in enumerate(table.episodes["seed"]) if s == seed]
    expected = config.rollout.groups * config.rollout.group_size
    return table.select(rows) if len(rows) == expected else None
