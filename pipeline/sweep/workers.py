"""Worker processes of a search on this machine; any number of machines may do the same on one storage."""

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import optuna
from optuna.exceptions import TrialPruned, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from pipeline.progress.display import Display, still, tell
from pipeline.sweep.plan import SearchPlan
from pipeline.sweep.queue import FINISHED, Queue, open_storage
from pipeline.sweep.sampler import NumberedSampler
from pipeline.sweep.trial import Objective, Outcome, run_trial
from pipeline.workspace.addresses import redacted
from pipeline.workspace.layout import Cache
from pipeline.workspace.processes import begin_worker, in_own_process
from pipeline.workspace.stopping import Stopped, asked, say_that_it_stops, stop_if_asked, until_saved

Observer = Callable[[FrozenTrial, Outcome | None], None]
"""Told of every trial that this machine has finished; None stands for the outcome of one stopped early."""

IDLE_SECONDS = 1.0


@dataclass(frozen=True)
class SearchRun:
    """A plan, what its trials do, and who is told of them."""

    plan: SearchPlan
    objective: Objective
    observer: Observer | None = None


def run_search(search: SearchRun, workers: int, threads: int = 1) -> list[FrozenTrial]:
    """Run a search until as many trials are finished as are asked for, or go on with one; returns all its trials.

    There are so many ``workers``, each with so many ``threads``.

    Raises:
        Stopped: it was asked to stop; the trainings at work have been saved.
        UserError: the storage cannot be used.
        BrokenProcessPool: every worker was killed; running again goes on.
        Exception: what a trial raised; the trial is marked as failed.
    """
    in_own_process(_prepare, search.plan)
    context = multiprocessing.get_context("fork")
    reading: dict[Connection, tuple[str, Any]] = {}
    with until_saved(), _ending(reading):
        with still():
            for index in range(workers):
                receiver, sender = context.Pipe(duplex=False)
                arguments = (search, sender, (*reading, receiver), os.getpid(), threads)
                process = context.Process(target=_work, args=arguments, name=f"worker {index}")
                process.start()
                sender.close()
                reading[receiver] = f"worker {index}", process
        labels = [label for label, _ in reading.values()]
        with Display(f"sweep {search.plan.study} {search.plan.method}", labels) as display:
            _follow(reading, display)
        stop_if_asked()
    trials = in_own_process(study_trials, search.plan)
    finished = sum(trial.state in FINISHED for trial in trials)
    if finished < search.plan.trials:
        raise BrokenProcessPool("every worker was killed")
    return trials


@contextlib.contextmanager
def _ending(reading: Mapping[Connection, tuple[str, Any]]) -> Iterator[None]:
    """Leave no worker."""
    try:
        yield
    finally:
        for _, process in reading.values():
            process.kill()
            process.join()


def study_trials(plan: SearchPlan) -> list[FrozenTrial]:
    """All trials of a search that have begun, in order of their numbers."""
    begun = [trial for trial in _open(plan)[0].get_trials() if trial.state != TrialState.WAITING]
    return [trial for trial in begun if "slot" in trial.user_attrs]


def _open(plan: SearchPlan) -> tuple[optuna.Study, Queue]:
    sweep = plan.config.sweep
    storage = open_storage(plan.storage, Cache().journal)
    pruner = (
        optuna.pruners.NopPruner()
        if sweep.pruner.kind == "none"
        else optuna.pruners.MedianPruner(sweep.pruner.after_trials, sweep.pruner.after_iterations)
    )
    study = optuna.create_study(
        study_name=plan.name,
        storage=storage,
        sampler=NumberedSampler(sweep.seed, sweep.startup_trials),
        pruner=pruner,
        directions=["maximize", "minimize"] if sweep.fewer_tokens else ["maximize"],
        load_if_exists=True,
    )
    return study, Queue(study, storage, plan.trials, plan.draws(), sweep.retries, sweep.heartbeat)


def _prepare(plan: SearchPlan) -> None:
    _, queue = _open(plan)
    queue.revive()
    queue.fill()


def _work(search: SearchRun, sender: Connection, inherited: Sequence[Connection], parent: int, threads: int) -> None:
    """A worker's life: claim, run, tell, until all that was asked for is finished."""
    begin_worker(parent)
    import torch

    torch.set_num_threads(threads)
    for receiver in inherited:
        receiver.close()  # else this worker itself would keep its pipe open when nobody else listens any more
    try:
        study, queue = _open(search.plan)
        while not queue.done and not asked():
            queue.revive()
            trial = queue.claim()
            if trial is not None:
                with queue.alive(trial):
                    _run(search, study, queue, trial, sender)
            else:
                queue.fill()  # in case somebody was killed between marking a trial and filling its slot
                time.sleep(IDLE_SECONDS)
    except BrokenPipeError:
        sys.exit(1)  # nobody is left to tell
    except Exception as error:
        with contextlib.suppress(BrokenPipeError):
            sender.send(error)
        sys.exit(1)


def _run(search: SearchRun, study: optuna.Study, queue: Queue, trial: Trial, sender: Connection) -> None:
    finished = queue.finished()
    sender.send((finished, search.plan.trials))
    own = f"trial {trial.number} ({finished} of {search.plan.trials} finished)"
    report = tell(lambda done, total, text: sender.send((done, total, f"{own} {text}")))
    report(0, 0, "starting")
    outcome: Outcome | None = None
    state = TrialState.PRUNED
    try:
        outcome = run_trial(trial, search.plan, search.objective, report)
        state = TrialState.COMPLETE
    except TrialPruned:
        pass
    except UpdateFinishedTrialError:
        return  # another worker has taken this one for dead; the trial's successor is what counts
    except Stopped:
        queue.give_back(trial._trial_id)
        return
    except BrokenPipeError:
        raise
    except Exception as error:
        queue.fail(trial._trial_id, redacted(f"{type(error).__name__}: {error}", search.plan.storage or ""))
        raise
    # It may also be found out here.
    with contextlib.suppress(UpdateFinishedTrialError):
        frozen = study.tell(trial, None if outcome is None else outcome.values, state, skip_if_finished=True)
        if search.observer is not None and frozen.state == state:
            search.observer(frozen, outcome)


def _follow(reading: Mapping[Connection, tuple[str, Any]], display: Display) -> None:
    """Show what workers report until all have ended; raises what one of them raised."""
    open_ends, told = dict(reading), False
    while open_ends:
        ready: Any = wait(list(open_ends), timeout=1.0)
        if asked() and not told:
            told = True
            say_that_it_stops("iterations at work")
        for receiver in ready:
            label, process = open_ends[receiver]
            try:
                message = receiver.recv()
            except EOFError:
                del open_ends[receiver]
                process.join()
                if process.exitcode:
                    killed = f"was killed (signal {-process.exitcode}); others go on with its trial"
                    how = killed if process.exitcode < 0 else f"ended with exit code {process.exitcode}"
                    print(label, how, file=sys.stderr, flush=True)
                else:
                    display.finish(label)
                continue
            if isinstance(message, Exception):
                raise message
            if len(message) == 2:
                display.whole(*message)
            else:
                display.update(label, *message)
