"""The reference policy's table of trajectories, slice by slice.

A slice is what a training with that seed would sample in its first iteration: same states, noise, draws and batches.
"""

from pathlib import Path

from pipeline.model.loading import load_trained
from pipeline.progress.display import span
from pipeline.rollout.collector import collect
from pipeline.rollout.making import make_engine
from pipeline.rollout.specs import iteration_specs
from pipeline.settings.params import Config
from pipeline.trajectories.trajectory import Trajectories
from pipeline.workspace.processes import Tell


def sample_slices(task: tuple[Config, str, Path, list[int]], report: Tell) -> dict[int, Trajectories]:
    """Sample the slices of some seeds; ``task`` is config, environment, policy directory and seeds."""
    config, name, directory, seeds = task
    policy = load_trained(directory, config)
    engine = make_engine(config, policy)
    result, size = {}, config.rollout.groups * config.rollout.group_size
    for done, seed in enumerate(seeds, start=1):
        report((done - 1) * size, len(seeds) * size, "episodes")
        with span("", 0, size):
            specs = iteration_specs(config, name, seed, 0)
            result[seed] = collect(engine, policy.tokenizer, config, name, specs, config.rollout.temperature)
    return result
