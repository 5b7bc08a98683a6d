"""How episodes are sampled, by what, and by whom."""

from typing import Annotated, Literal, Union

from pydantic import Field

from pipeline.settings.engine import TransformersSection, VllmSection
from pipeline.settings.section import Count, Int, Positive, Section, Temperature
from pipeline.settings.workers import RayWorkers


class Rollout(Section):
    """How episodes are sampled for training."""

    groups: Count = 8
    """Initial states per iteration."""
    group_size: Annotated[Int, Field(ge=2, le=1_000_000)] = 16
    """Episodes per initial state (G)."""
    temperature: Temperature = 1.0
    """Sampling temperature; log-probabilities, ratio and entropy are those of the tempered policy."""
    prefill: Literal["", "<think>"] = ""
    """Text that the protocol forces at the start of each response; recorded as not sampled, never trained on."""
    batch_episodes: Annotated[Int, Field(ge=1, le=4096)] = 128
    """Episodes that an engine decodes together, where memory allows it (``cache_gigabytes``)."""
    cache_gigabytes: Positive | None = None
    """Gigabytes that an engine's keys and values may take; null: a quarter of the memory of the machine, or of the device,
    divided by ``workers`` (those of ``rollout`` are not counted). They take what is asked for. So many episodes are decoded
    together as fit if all of them get context_tokens long; results are the same up to rounding."""
    engine: Annotated[Union[TransformersSection, VllmSection], Field(discriminator="kind")] = TransformersSection()
    """What samples."""
    unit_episodes: Count | None = None
    """Episodes of a unit of work, at least: whole groups, played together by one engine from an empty cache. null: all that
    an iteration or an evaluation has. What is played together decides the last digits of results; ``workers`` do not."""
    environments_at_once: Annotated[Int, Field(ge=1, le=4096)] = 1
    """Environments of an engine that act at the same time, each in a thread. 1: one by one, each as soon as its response is
    complete. More are for environments that wait for a server or a sandbox; responses are then sampled round by round."""
    workers: RayWorkers | None = None
    """Who plays the episodes of iterations, evaluations and the table; null: the process that asks for them."""
