"""A sampler whose draws are named by the trial's number."""

from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from pipeline.workspace.randomness import key


class NumberedSampler(BaseSampler):
    """TPE, seeded anew for each trial by (seed, number of the trial).

    A sampler that is seeded once repeats its draws when a sweep is resumed, and gives two workers the same ones. A trial's
    number is unique over all workers and machines of a study, so no two draws have the same name, and a study of one
    worker can be repeated exactly.

    Args:
        seed: of the study.
        startup_trials: trials drawn at random first.
    """

    def __init__(self, seed: int, startup_trials: int) -> None:
        self._seed, self._startup_trials = seed, startup_trials
        self._of: tuple[int, TPESampler] | None = None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._sampler(trial).sample_independent(study, trial, param_name, param_distribution)

    def _sampler(self, trial: FrozenTrial) -> TPESampler:
        if self._of is None or self._of[0] != trial.number:
            seed = key(self._seed, "sweep", trial.number) % 2**32
            sampler = TPESampler(seed=seed, n_startup_trials=self._startup_trials)
            self._of = trial.number, sampler
        return self._of[1]
