"""Who plays episodes: an engine in this process, or workers elsewhere."""

from collections.abc import Sequence
from typing import Any

from pipeline.model.policy import Policy
from pipeline.progress.display import span
from pipeline.progress.timing import Phases
from pipeline.rollout.collector import collect
from pipeline.rollout.engine import RolloutEngine
from pipeline.rollout.making import make_engine
from pipeline.rollout.ray_pool import RayPool
from pipeline.rollout.specs import EpisodeSpec, units
from pipeline.settings.params import Config
from pipeline.trajectories.trajectory import Trajectories, concatenate

Sampler = RolloutEngine | RayPool


def make_sampler(config: Config, policy: Policy) -> Sampler:
    """Workers where there are ``rollout.workers``, else an engine (see ``make_engine``).

    Raises:
        UserError: not a single episode fits, or the workers cannot be had (see ``RayPool``).
    """
    workers = config.rollout.workers
    return make_engine(config, policy) if workers is None else RayPool(config, workers, policy)


def sample_episodes(
    sampler: Sampler,
    tokenizer: Any,
    config: Config,
    name: str,
    specs: Sequence[EpisodeSpec],
    temperature: float,
    phases: Phases | None = None,
    closing: bool = False,
) -> Trajectories:
    """Play episodes to their end, unit of work by unit, as ``collect`` does; ``phases`` are told nothing of what workers do.

    The same units give the same bytes, whoever plays them.
    """
    if isinstance(sampler, RayPool):
        return sampler.begin(name, specs, temperature, closing).episodes()
    parts, work = list[Trajectories](), units(specs, config.rollout.unit_episodes)
    if len(work) == 1:
        return collect(sampler, tokenizer, config, name, specs, temperature, phases, closing)
    for done, unit in enumerate(work):
        with span("", done / len(work), (done + 1) / len(work)):
            parts.append(collect(sampler, tokenizer, config, name, unit, temperature, phases, closing))
    return concatenate(parts)
