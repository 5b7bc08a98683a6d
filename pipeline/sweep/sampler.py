"""A sampler whose draws are named by the trial's number."""

from optuna.samplers import TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from pipeline.workspace.randomness import key


class NumberedSampler(TPESampler):
    """TPE, made anew for each trial and seeded by (seed of the study, number of the trial).

    A sampler that is seeded once repeats its draws when a sweep is resumed, and gives two workers the same ones. A trial's
    number is unique over all workers and machines of a study, so no two draws have the same name, and a study of one
    worker can be repeated exactly.

    Args:
        seed: of the study.
        startup_trials: trials drawn at random first.
    """

    def __init__(self, seed: int, startup_trials: int) -> None:
        super().__init__(seed=seed, n_startup_trials=startup_trials)
        self._seed, self._startup_trials = seed, startup_trials

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        seed = key(self._seed, "sweep", trial.number) % 2**32
        super().__init__(seed=seed, n_startup_trials=self._startup_trials)
