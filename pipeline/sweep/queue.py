"""A study's trials as a queue that any number of workers on any number of machines share.

Every finished trial that is asked for has a slot, a number from 0. Trials are put into the storage for their slots before
anyone runs them; a worker claims one by the storage's own compare-and-set. A trial whose worker was killed is marked as
failed and its slot gets another trial, first with the same settings. So killing workers loses nothing, runs nothing
twice, and a study ends with exactly as many finished trials as were asked for.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from pipeline.sweep.journal import Journal
from pipeline.workspace.addresses import shown
from pipeline.workspace.errors import UserError, line_of

SILENT_BEATS = 6
"""A worker elsewhere that misses so many heartbeats is taken for dead."""
OCCUPIED = (TrialState.RUNNING, TrialState.WAITING, TrialState.COMPLETE, TrialState.PRUNED)
"""States in which a trial holds its slot."""
KILLED = "its worker was killed"
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def open_storage(url: str | None, journal: Path) -> BaseStorage:
    """The storage of a sweep: a journal file, or a database by URL.

    Raises:
        UserError: the database cannot be used, or the journal is damaged.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if url is None:
        return JournalStorage(Journal(journal))
    try:
        return _database(url)
    except Exception as error:  # SQLAlchemy's and the driver's errors have no common base
        raise UserError(f"sweep.storage: {shown(url)}: cannot be used: {line_of(error, url)[:240]}") from None


def _database(url: str) -> RDBStorage:
    """Two workers that find an empty database both make its tables, and one of them fails: it looks again."""
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    for _ in range(4):
        with contextlib.suppress(IntegrityError, ProgrammingError):
            return RDBStorage(url)
        time.sleep(1.0)
    return RDBStorage(url)


class Queue:
    """The trials of one study.

    Args:
        study: Optuna's, in ``storage``.
        trials: finished trials asked for.
        fixed: settings that the first slots are tried at, as draws by key, with a name for each.
        retries: how often a killed trial is tried again with the same settings.
        heartbeat: seconds between signs of life.
    """

    def __init__(
        self,
        study: optuna.Study,
        storage: BaseStorage,
        trials: int,
        fixed: Mapping[str, Mapping[str, Any]],
        retries: int,
        heartbeat: float,
    ) -> None:
        self._study, self._storage, self._trials = study, storage, trials
        self._fixed = list(fixed.items())
        self._retries, self._heartbeat = retries, heartbeat
        self._seen: dict[int, tuple[Any, float]] = {}

    def fill(self) -> None:
        """Put a trial into every slot that has none; where a worker was killed, one with the same settings."""
        trials = self._all()
        held = {trial.user_attrs["slot"] for trial in trials if trial.state in OCCUPIED}
        last = {trial.user_attrs["slot"]: trial for trial in trials}
        for slot in range(self._trials):
            if slot in held:
                continue
            if slot in last and last[slot].user_attrs.get("failure") == KILLED:
                self._succeed(last[slot])
                continue
            name, point = self._fixed[slot] if slot < len(self._fixed) else (None, {})
            self._enqueue(slot, point, {} if name is None else {"baseline": name})

    def claim(self) -> Trial | None:
        """Start the first waiting trial whose slot nobody else holds, or None if there is none now."""
        trials = self._all()
        for trial in trials:
            asked_for = trial.user_attrs["slot"] < self._trials
            if trial.state == TrialState.WAITING and asked_for and not self._second(trial, trials):
                with contextlib.suppress(UpdateFinishedTrialError):
                    if self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                        return self._begin(trial)
        return None

    def revive(self) -> list[int]:
        """Mark the trials of dead workers as failed and queue another for each of their slots; returns their numbers."""
        dead = [trial for trial in self._all() if trial.state == TrialState.RUNNING and self._dead(trial)]
        marked = [trial.number for trial in dead if self.fail(trial._trial_id, KILLED)]
        if marked:
            self.fill()
        return marked

    def fail(self, trial_id: int, reason: str) -> bool:
        """Mark a trial as failed, with a reason; false if another has finished it before."""
        try:
            self._storage.set_trial_user_attr(trial_id, "failure", reason)
            return self._storage.set_trial_state_values(trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            return False

    def give_back(self, trial_id: int) -> None:
        """End a trial whose worker was asked to stop: another one goes on with its trainings, and no attempt is lost."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(trial_id, "stopped", True)
        self.fail(trial_id, KILLED)

    def finished(self) -> int:
        """Slots whose trial has ended, completely or stopped by the pruner."""
        return len({trial.user_attrs["slot"] for trial in self._all() if trial.state in FINISHED})

    @property
    def done(self) -> bool:
        """Whether as many trials are finished as were asked for."""
        return self.finished() >= self._trials

    @contextlib.contextmanager
    def alive(self, trial: Trial) -> Iterator[None]:
        """Give signs of life for a trial while what is inside runs."""
        stop = threading.Event()

        def beat() -> None:
            count = 0
            while not stop.wait(self._heartbeat):
                count += 1
                # A beat that cannot be written is a missed one: a database may be away for a while, and whoever has
                # finished the trial meanwhile took this worker for dead, which the trial's own end will find out.
                with contextlib.suppress(Exception):
                    self._storage.set_trial_user_attr(trial._trial_id, "beat", count)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _all(self) -> list[FrozenTrial]:
        return [t for t in self._study.get_trials(deepcopy=False) if "slot" in t.user_attrs]

    def _succeed(self, trial: FrozenTrial) -> None:
        """Queue a killed trial's settings again, or, if they have been tried often enough, a new draw for its slot."""
        attempt = trial.user_attrs.get("attempt", 1)
        if attempt > self._retries and not trial.user_attrs.get("stopped"):
            self._enqueue(trial.user_attrs["slot"], {}, {"instead_of": trial.number})
            return
        attributes = {"retry_of": trial.number, "attempt": attempt + (not trial.user_attrs.get("stopped"))}
        if "baseline" in trial.user_attrs:
            attributes["baseline"] = trial.user_attrs["baseline"]
        # It may have been killed before all that was fixed was drawn.
        self._enqueue(trial.user_attrs["slot"], {**trial.user_attrs.get("fixed", {}), **trial.params}, attributes)

    def _enqueue(self, slot: int, point: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
        fixed = {"fixed": dict(point)} if point else {}
        self._study.enqueue_trial(dict(point), user_attrs={"slot": slot, **attributes, **fixed})

    def _second(self, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
        """Whether an earlier trial holds the slot: two workers have filled it at the same moment."""
        slot = trial.user_attrs["slot"]
        return any(t.user_attrs["slot"] == slot and t.number < trial.number and t.state in OCCUPIED for t in trials)

    def _begin(self, trial: FrozenTrial) -> Trial:
        own = psutil.Process()
        worker = {"host": socket.gethostname(), "pid": own.pid, "created": own.create_time()}
        self._storage.set_trial_user_attr(trial._trial_id, "worker", worker)
        return Trial(self._study, trial._trial_id)

    def _dead(self, trial: FrozenTrial) -> bool:
        worker = trial.user_attrs.get("worker")
        if worker is not None and worker["host"] == socket.gethostname():
            return not _running(worker["pid"], worker["created"])
        # Elsewhere, or killed before it said who it is: what counts is whether signs of life still come. They are
        # compared by change, not by the clock, because clocks of machines differ.
        beat = trial.user_attrs.get("beat")
        last, since = self._seen.get(trial.number, (None, 0.0))
        if trial.number not in self._seen or beat != last:
            self._seen[trial.number] = beat, time.monotonic()
            return False
        return time.monotonic() - since > SILENT_BEATS * self._heartbeat


def _running(pid: int, created: float) -> bool:
    """Whether that very process is there; a number may be in use again."""
    try:
        process = psutil.Process(pid)
        return bool(abs(process.create_time() - created) < 1.0 and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
