"""A supervision on disk, so that one that was killed goes on where it was, and ends in the same bytes."""

import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.workspace.files import replacing

SPARING = 20.0
"""How many times as long as a save takes the supervision goes on before the next one."""


class Saving:
    """Weights that are supervised, with what their optimizer and schedule know, in a file.

    Args:
        file: where they are kept, named by all that decides them; None: nowhere.
        weights: what is trained.
        optimizer: of these.
        schedule: of its learning rate.
    """

    def __init__(self, file: Path | None, weights: list[nn.Parameter], optimizer: Any, schedule: Any) -> None:
        self._file, self._weights, self._optimizer, self._schedule = file, weights, optimizer, schedule
        self._next = 0.0

    @torch.no_grad()
    def restore(self) -> int:
        """Go on from what is in the file; returns the steps that had been taken, 0 where there is none or it is damaged."""
        state = None if self._file is None else _read(self._file)
        if state is None:
            return 0
        for weight, saved in zip(self._weights, state["weights"], strict=True):
            weight.copy_(saved)
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        return int(state["step"])

    def save(self, step: int, insist: bool = False) -> None:
        """Keep what so many steps have made; left out soon after the last time, unless ``insist``."""
        began = time.monotonic()
        if self._file is None or not (insist or began >= self._next):
            return
        weights = [weight.detach() for weight in self._weights]
        state = {"step": step, "weights": weights, "optimizer": self._optimizer.state_dict()}
        with replacing(self._file) as partial:
            torch.save({**state, "schedule": self._schedule.state_dict()}, partial)
        self._next = time.monotonic() + SPARING * (time.monotonic() - began)


def _read(file: Path) -> Any:
    """What is in a checkpoint whose checksums are right; None of any other, which costs steps and nothing else."""
    try:
        with zipfile.ZipFile(file) as archive:
            whole = archive.testzip() is None
        return torch.load(file, weights_only=True) if whole else None
    except Exception:  # of many kinds, as damages are
        return None
