"""The processes that do one training together, and what they tell one another.

All have the same episodes, and compute from them what is a sum, a mean or a rank over a batch: filters, advantages, weights,
c_t, plans. Nothing of that is added up over processes. They share out what takes long: the groups to be sampled and scored by
the reference policy, and the trajectories of each minibatch. A trajectory's part of the loss is divided by numbers of the
whole minibatch, so that gradients and measurements of all processes have to be added, and nothing else.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as distributed
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import nn

from pipeline.settings.params import Config
from pipeline.settings.processes import Processes
from pipeline.training.sharded import Sharded
from pipeline.trajectories.trajectory import Trajectories, concatenate
from pipeline.workspace.errors import UserError

Told = TypeVar("Told")

PATIENCE = timedelta(days=7)
"""How long a process waits for another one: that may play slow environments, and if it ends, all are ended."""


@dataclass(frozen=True)
class Team:
    """The processes of one training, as one of them sees them."""

    rank: int = 0
    """This process's number, from 0; the first one writes files and tells how far the training is."""
    count: int = 1
    sharded: bool = False
    """Each holds a part of the policy's weights only; what computes with them must do so equally often."""

    @property
    def first(self) -> bool:
        """Whether this process writes what a training leaves."""
        return self.rank == 0

    def own_rows(self, groups: Sequence[str]) -> list[int]:
        """Of episodes, given by their groups' ids, those that this process samples: whole groups, side by side."""
        names = list(dict.fromkeys(groups))
        own = {names[n] for n in np.array_split(np.arange(len(names)), self.count)[self.rank]}
        return [row for row, name in enumerate(groups) if name in own]

    def own(self, everyone: Trajectories) -> Trajectories:
        """Those episodes of all that this process would have sampled."""
        return everyone if self.count == 1 else everyone.select(self.own_rows(everyone.episodes["group_id"]))

    def gathered(self, own: Trajectories) -> Trajectories:
        """The episodes of all processes, in order."""
        return own if self.count == 1 else concatenate([part for part in self._told(own) if len(part)])

    def shares(self, sizes: Sequence[int]) -> list[np.ndarray]:
        """Rows for each process, ascending, so that sums of their sizes are about equal: the largest are dealt first."""
        shares: list[list[int]] = [[] for _ in range(self.count)]
        loads = [0] * self.count
        for row in np.argsort(-np.asarray(sizes, dtype=np.int64), kind="stable").tolist():
            least = loads.index(min(loads))
            shares[least].append(row)
            loads[least] += sizes[row]
        return [np.array(sorted(share), dtype=np.int64) for share in shares]

    def summed(self, own: dict[str, float]) -> dict[str, float]:
        """By name, the sum over all processes: the same bits in each of them."""
        totals = dict[str, float]()
        for numbers in self._told(own):
            for name, number in numbers.items():
                totals[name] = totals.get(name, 0.0) + number
        return totals

    def sum_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        """Give every process the sum of all gradients; one that no process has stays away. FSDP2 has summed its own."""
        if self.count == 1:
            return
        ours = [weight for weight in weights if not hasattr(weight, "full_tensor")]
        if not ours:
            return
        there = torch.tensor([weight.grad is not None for weight in ours], dtype=torch.int32, device=ours[0].device)
        distributed.all_reduce(there, distributed.ReduceOp.MAX)
        summing = []
        for weight, anywhere in zip(ours, there.tolist(), strict=True):
            if anywhere:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                summing.append(distributed.all_reduce(weight.grad, async_op=True))
        for work in summing:
            work.wait()

    def _told(self, own: Told) -> list[Told]:
        """What every process has, in their order."""
        if self.count == 1:
            return [own]
        told: list[Any] = [None] * self.count
        distributed.all_gather_object(told, own)
        return told


ALONE = Team()
"""One process that does its training by itself."""


def join(rank: int, plan: Processes, meeting: Path) -> Team:
    """Meet the other processes of a training at a file, which must be new; returns when all are there."""
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}  # Lightning starts no processes of its own then
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # nor changes that
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # they are on one machine
    distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"file://{meeting.absolute()}",
        timeout=PATIENCE,
        world_size=plan.number,
        rank=rank,
    )
    return Team(rank, plan.number, plan.strategy == "fsdp2")


def trainer_settings(team: Team) -> dict[str, Any]:
    """What Lightning's trainer is told of a training's processes."""
    if team.count == 1:
        return {"devices": 1}
    strategy: Strategy = Sharded(team.count) if team.sharded else DDPStrategy(broadcast_buffers=False)
    return {"devices": team.count, "strategy": strategy, "plugins": [LightningEnvironment()]}


def require_room(config: Config) -> None:
    """Refuse more processes of a training than this machine has devices, or cores where it has no device.

    Raises:
        UserError: there are more.
    """
    devices, kind = torch.cuda.device_count(), "GPUs"
    if not devices:
        devices, kind = (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            "cores",
        )
    if config.train.processes.number > devices:
        raise UserError(
            f"{config.params_file}: train.processes.number: {config.train.processes.number} processes are more than this "
            f"machine's {kind}; allowed: at most {devices}"
        )
