"""An environment that no process survives."""

from __future__ import annotations

import os
import signal
from typing import Any

import gymnasium

from pipeline.environments.frozen_lake import FrozenLake


class Deadly(FrozenLake):
    """Ends the process that plays it."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().reset(seed=seed, options=options)


gymnasium.register(id="Deadly-v0", entry_point=Deadly, disable_env_checker=True)
