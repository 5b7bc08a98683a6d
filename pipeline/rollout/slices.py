"""The reference policy's table of trajectories, slice by slice.

A slice is what a training with that seed would sample in its first iteration: same states, noise, draws and batches.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.model.loading import load_trained
from pipeline.progress.display import begin, span, within
from pipeline.rollout.sampler import make_sampler, sample_episodes
from pipeline.rollout.specs import iteration_specs
from pipeline.settings.params import Config
from pipeline.trajectories.table import kept
from pipeline.trajectories.trajectory import Trajectories
from pipeline.workspace.processes import Tell


@dataclass(frozen=True)
class SlicesTask:
    """The slices of some seeds, to be sampled in a process of their own."""

    config: Config
    environment: str
    policy: Path
    seeds: list[int]
    cache: Path
    """Folder of the slices that are finished: one that is there is not sampled again."""


def sample_slices(task: SlicesTask, report: Tell) -> dict[int, Trajectories]:
    """Sample the slices of some seeds, but for those that are kept."""
    config, name, size = task.config, task.environment, task.config.rollout.groups * task.config.rollout.group_size
    files = {seed: task.cache / f"{seed}.parquet" for seed in task.seeds}
    order = sorted(task.seeds, key=lambda seed: not files[seed].exists())
    begin(size * sum(file.exists() for file in files.values()), size * len(files), "episodes")
    within(0.0, "loading the policy", insist=True)
    policy = load_trained(task.policy, config)
    sampler = make_sampler(config, policy)

    def sample(seed: int) -> Trajectories:
        specs = iteration_specs(config, name, seed, 0)
        return sample_episodes(sampler, policy.tokenizer, config, name, specs, config.rollout.temperature)

    result = {}
    for done, seed in enumerate(order):
        report(done * size, len(order) * size, "episodes")
        with span("", 0, size):
            result[seed] = kept(files[seed], partial(sample, seed))
    return result
