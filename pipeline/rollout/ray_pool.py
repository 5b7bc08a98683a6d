"""A pool of workers on Ray: actors on this machine or others, each with an engine and environments (see ``Worker``).

A worker plays a unit of work from an empty cache, with the weights that come with it. So what a unit holds depends neither on
how many workers there are nor on what any of them has played before. Where a worker's process ends, Ray starts another, which
is given the policy, the weights and the unit again.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.util import Finalize
from typing import Any

from pipeline.model.policy import Policy
from pipeline.progress.display import within
from pipeline.rollout.specs import EpisodeSpec, units
from pipeline.rollout.worker import Weights, Worker, as_bytes, begun
from pipeline.settings.params import Config
from pipeline.settings.workers import RayWorkers
from pipeline.trajectories.table import from_table
from pipeline.trajectories.trajectory import Trajectories, concatenate
from pipeline.workspace.errors import UserError, line_of

TRIES = 3
"""How often a unit of work is played again after the end of its worker's process."""
PATIENCE = 5.0
"""Seconds within which an address must answer."""
TOLD = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_register_timeout_seconds": "600"}
"""What a Ray that is started here is told: to send nothing to anybody, and to wait for processes on a busy machine."""


class RayPool:
    """Plays episodes with a policy, as ``rollout.workers`` says. Actors begin as there is work for them, and end with ``close``
    or with the pool.

    Raises:
        UserError: Ray is not installed or does not answer, or there are more workers than cores.
    """

    def __init__(self, config: Config, settings: RayWorkers, policy: Policy) -> None:
        self.config, self.settings, self.policy, self.policy_version = config, settings, policy, 0
        self._ray = connected(config, settings)
        self._serial = itertools.count(1)
        self._begun = self._ray.put(begun(policy))
        self._weights = self._ray.put(Weights(0, 0, {}))
        self._actors: list[Any] = []

    def sync(self, policy: Policy, version: int) -> None:
        """See ``RolloutEngine.sync``. What is trained of the weights is put into the object store, once for all workers: of
        a policy with adapters these alone. A worker takes them over before the next unit that it is given."""
        if policy.model is not self.policy.model:
            self.policy.follow(policy)
        own = dict(self.policy.model.named_parameters())
        trained = [name for name, weight in policy.model.named_parameters() if weight.requires_grad] or list(own)
        arrays = {name: as_bytes(own[name]) for name in trained}
        self._weights = self._ray.put(Weights(next(self._serial), version, arrays))
        self.policy_version = version

    def begin(self, name: str, specs: Sequence[EpisodeSpec], temperature: float, closing: bool = False) -> Playing:
        """Have episodes played with the weights as they are now, whatever is synchronised later."""
        work = units(specs, self.config.rollout.unit_episodes)
        for _ in range(len(self._actors), min(len(work), self.settings.number)):
            self._actors.append(self._actor())
        given = temperature, closing, [self._begun], self._weights
        players = zip(work, itertools.cycle(self._actors), strict=False)
        return Playing([actor.play.remote(name, unit, *given) for unit, actor in players])

    def _actor(self) -> Any:
        """Another worker, in a process that is started again wherever it ends."""
        options = {"num_cpus": self.config.threads, "max_restarts": -1, "max_task_retries": TRIES}
        return self._ray.remote(**options)(Worker).remote(self.config)

    def close(self) -> None:
        """End the actors, with what they are playing; others begin with the next episodes."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []


class Playing:
    """Episodes that workers are playing, unit by unit."""

    def __init__(self, tables: Sequence[Any]) -> None:
        self._tables = list(tables)

    def first(self) -> Trajectories:
        """Those of the first unit, once they have ended. Raises like ``episodes``."""
        return from_table(_received(self._tables[:1])[0])

    def episodes(self) -> Trajectories:
        """All of them, in the order of their specs, once they have ended.

        Raises:
            UserError: a worker's process has ended more than ``TRIES`` times over the same unit.
            Exception: whatever playing has raised in a worker.
        """
        import ray

        waiting, count = self._tables, len(self._tables)
        while waiting:
            within(1 - len(waiting) / count, f"{count - len(waiting)} of {count} units of work ended")
            _, waiting = ray.wait(waiting, timeout=1.0)
        return concatenate([from_table(table) for table in _received(self._tables)])


def _received(tables: list[Any]) -> list[Any]:
    import ray

    try:
        return list(ray.get(tables))
    except ray.exceptions.RayTaskError as error:  # as if it had been raised here
        raise error.cause from None
    except ray.exceptions.RayError as error:
        said = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(
            f"rollout.workers: a worker's process has ended, and {TRIES} times again when its episodes were played again: "
            f"{said[-1].strip()}"
        ) from None


def connected(config: Config, settings: RayWorkers) -> Any:
    """Ray's module, once this process is in touch with it.

    Raises:
        UserError: see ``check_workers``; or Ray's cluster has fewer cores than the workers want.
    """
    check_workers(config, settings)
    import ray

    if not ray.is_initialized():
        for setting, value in TOLD.items():
            os.environ.setdefault(setting, value)
        own: dict[str, Any] = {} if settings.address else {"num_cpus": cores(), "include_dashboard": False}
        try:
            with _handlers_kept():
                ray.init(settings.address or "local", logging_level=logging.ERROR, log_to_driver=False, **own)
        except Exception as error:  # of many kinds
            asked = f"address: {settings.address}" if settings.address else "kind: ray"
            raise UserError(f"{_where(config)}.{asked}: Ray does not answer: {line_of(error)[:200]}") from None
        Finalize(None, ray.shutdown, exitpriority=0)  # also in processes that are forked
    _require_cores(config, settings, int(ray.cluster_resources().get("CPU", 0)))
    return ray


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray has SIGTERM exit at once, with a code of its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def check_workers(config: Config, settings: RayWorkers) -> None:
    """What can be told of ``rollout.workers`` within seconds, before anything is computed.

    Raises:
        UserError: Ray is not installed; nothing answers at the address; or there are more workers than this machine has
            cores, where they are to be started on it.
    """
    try:
        import ray
    except ImportError:
        command = "pip install -c constraints.txt -e '.[ray]'"
        raise UserError(f"{_where(config)}.kind: Ray is not installed; `{command}` installs it") from None
    if settings.address is None:
        if not ray.is_initialized():
            _require_cores(config, settings, cores())
    elif settings.address != "auto":
        host, port = settings.address.rsplit(":", 1)
        try:
            socket.create_connection((host, int(port)), timeout=PATIENCE).close()
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else line_of(error)
            raise UserError(
                f"{_where(config)}.address: nothing answers at {settings.address} ({reason}); `ray start --head` starts Ray "
                "on a machine"
            ) from None


def cores() -> int:
    """Of this machine, those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _require_cores(config: Config, settings: RayWorkers, there: int) -> None:
    if settings.number * config.threads > there:
        raise UserError(
            f"{_where(config)}.number: {settings.number} workers want {settings.number * config.threads} cores (threads: "
            f"{config.threads}), and there are {there}; allowed: at most {there // config.threads}"
        )


def _where(config: Config) -> str:
    return f"{config.params_file}: rollout.workers"
