"""A supervision that is killed, or asked to stop, goes on where it was and ends in the same weights."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import torch

from pipeline.bootstrap.saving import Saving
from pipeline.bootstrap.scratch import bootstrap
from pipeline.model.policy import Policy
from pipeline.workspace.stopping import Stopped
from tests.trainings import configured, same, weights

CONFIG = configured()


def signalled(number: int, at: int, checkpoint: Path) -> None:
    """The supervision of a process that is sent a signal within a step; it exits with that where it has stopped."""
    assert CONFIG.policy.kind == "scratch"

    def report(step: int, total: int, loss: float) -> None:
        if step == at:
            os.kill(os.getpid(), number)

    try:
        bootstrap(CONFIG.policy, CONFIG.environments, report, checkpoint)
    except Stopped as stopped:
        os._exit(stopped.number)


def test_a_supervision_that_was_killed_and_stopped_ends_in_the_same_weights(tmp_path: Path, policy: Policy) -> None:
    assert CONFIG.policy.kind == "scratch"
    checkpoint, told = tmp_path / "supervision", list[int]()
    for number, at, code in ((signal.SIGKILL, 15, -9), (signal.SIGTERM, 25, 15), (signal.SIGINT, 40, 2)):
        process = multiprocessing.get_context("fork").Process(target=signalled, args=(number, at, checkpoint))
        process.start()
        process.join()
        assert process.exitcode == code
        assert checkpoint.exists()
    made = bootstrap(CONFIG.policy, CONFIG.environments, lambda step, *_: told.append(step), checkpoint)
    assert told == list(range(41, 61)), "one that was asked to stop has saved the step at work"
    assert same(weights(made.model), weights(policy.model))


def test_a_damaged_checkpoint_is_as_good_as_none(tmp_path: Path) -> None:
    numbers = torch.arange(300.0)
    weight = torch.nn.Parameter(numbers.clone())
    optimizer = torch.optim.AdamW([weight])
    saving = Saving(tmp_path / "file", [weight], optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    assert saving.restore() == 0
    saving.save(7)
    assert saving.restore() == 7
    written = (tmp_path / "file").read_bytes()
    flipped = [written[:at] + bytes([written[at] ^ 1]) + written[at + 1 :] for at in range(0, len(written), 61)]
    found = []
    for damaged in (b"", written[:100], written[:-1], *flipped):
        (tmp_path / "file").write_bytes(damaged)
        found.append(saving.restore())
        assert torch.equal(weight, numbers)
    assert set(found) <= {0, 7}, "what is between its records may be anything"
    assert found.count(0) > len(found) / 4
