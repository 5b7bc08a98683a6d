"""Processes that play episodes in place of the one that asks for them."""

from typing import Literal

from pipeline.settings.section import Cluster, Count, Section


class RayWorkers(Section):
    """Actors of Ray, each with an engine and the environments of the episodes that it plays. Results depend on none of this."""

    kind: Literal["ray"]
    number: Count = 2
    """Actors, each with ``threads``: at most as many as there are cores for, and units of work (``rollout.unit_episodes``)."""
    address: Cluster | None = None
    """``host:port`` of a Ray that runs, or ``auto`` for the one that runs on this machine. null: each process that samples
    starts one on this machine, which ends with it."""
