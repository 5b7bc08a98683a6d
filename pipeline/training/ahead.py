"""Sampling one iteration ahead: workers play the next episodes while the policy is updated with those before."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch

from pipeline.rollout.ray_pool import Playing, RayPool
from pipeline.rollout.specs import EpisodeSpec
from pipeline.training.checks import Agreement
from pipeline.trajectories.table import from_table, to_table
from pipeline.trajectories.trajectory import Trajectories


class Ahead:
    """The episodes of the next iteration, which are sampled with the weights that this one begins with."""

    def __init__(self, pool: RayPool) -> None:
        self._pool, self._number = pool, -1
        self._playing: Playing | None = None
        self._episodes: Trajectories | None = None
        self.agreements: dict[int, Agreement] = {}
        """By iteration, how far its log-probabilities are from the policy's while that still had their weights."""

    def begin(self, number: int, name: str, specs: Sequence[EpisodeSpec], temperature: float, closing: bool) -> None:
        """Have the episodes of an iteration played with the weights that the workers were given last."""
        self._number, self._playing = number, self._pool.begin(name, specs, temperature, closing)

    def first(self) -> Trajectories | None:
        """Those that were begun first, once they have ended; None if none have been begun."""
        return None if self._playing is None else self._playing.first()

    def take(self, number: int) -> Trajectories | None:
        """The episodes of an iteration, once they have ended; None if they have not been begun ahead."""
        if number != self._number:
            return None
        episodes = self._ended()
        self._number, self._episodes = -1, None
        return episodes

    def state(self) -> dict[str, Any]:
        """For a checkpoint, once all have ended: their weights are gone by the time that it is read."""
        episodes = self._ended()
        if episodes is None:
            return {}
        sink, table = pa.BufferOutputStream(), to_table(episodes)
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        held = torch.frombuffer(bytearray(sink.getvalue()), dtype=torch.uint8)
        agreements = {number: list(agreement) for number, agreement in self.agreements.items()}
        return {"number": self._number, "episodes": held, "agreements": agreements}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        if state:
            with pa.ipc.open_stream(state["episodes"].numpy().tobytes()) as stream:
                self._episodes = from_table(stream.read_all())
            self._number, self._playing = state["number"], None
            self.agreements = {number: Agreement(*agreement) for number, agreement in state["agreements"].items()}

    def _ended(self) -> Trajectories | None:
        if self._playing is not None:
            self._episodes, self._playing = self._playing.episodes(), None
        return self._episodes
