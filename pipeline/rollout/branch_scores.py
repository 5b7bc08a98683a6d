"""How good a place to branch each token is: the signals of ``branching``."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.settings.branching import Positions
from pipeline.trajectories.trajectory import Role, Trajectories


def branch_scores(
    section: Positions,
    trajectories: Trajectories,
    draws: np.random.Generator,
    moved: np.ndarray | None = None,
    blank: np.ndarray | None = None,
) -> np.ndarray:
    """A score per token of annotated trajectories, by the section's signal.

    Some signals draw. The branching score is of ``moved`` (see ``omega``), and puts none of the ``blank`` tokens forward,
    bool (N,).

    Returns:
        float64 (N,): the higher the better; -inf where nothing may branch.

    Raises:
        ValueError: the branching score without a policy that has moved, or the energy without annotation.
    """
    signal, sampled = section.signal, trajectories.sampled
    if signal == "action_start":
        sampled = action_starts(trajectories)
    elif signal in ("action_energy", "action_random"):
        sampled = sampled & (trajectories.role == Role.ACTION)
    if signal == "branching_score":
        if moved is None:
            raise ValueError("branching_score needs log-probabilities under a policy that has moved")
        places = sampled if blank is None else sampled & ~blank
        return _branching_scores(trajectories, omega(trajectories, moved, section), places)
    if signal in ("reference_energy", "action_energy"):
        if trajectories.energy is None:
            raise ValueError("trajectories are not annotated")
        values = trajectories.energy.astype(np.float64)
    elif signal == "entropy":
        values = trajectories.entropy.astype(np.float64)
    else:
        values = draws.random(len(sampled))
    return np.where(sampled, values, -np.inf)


def omega(trajectories: Trajectories, moved: np.ndarray, section: Positions) -> np.ndarray:
    """APPO (arXiv 2606.12384): ``Omega_t = clip(exp(sum_{k >= t} gamma^(k-t) (log pi_k - log pi_old_k)))``.

    The sum runs over the later sampled tokens of the same episode, whose ``moved``, (N,), is ``log pi - log pi_old``; gamma
    is the section's ``discount`` per sampled token, and its ``bounds`` are those of the clip. Before any update Omega is 1 up to rounding.

    Returns:
        float64 (N,), 1 where not sampled.
    """
    result = np.ones(len(moved))
    for chosen in _sampled_places(trajectories):
        following = 0.0
        for token in chosen[::-1]:
            following = float(moved[token]) + section.discount * following
            result[token] = np.exp(following)
    return np.asarray(np.clip(result, *section.bounds))


def _branching_scores(trajectories: Trajectories, leads: np.ndarray, places: np.ndarray) -> np.ndarray:
    """``z(H_t) * z(Omega_t)``, z over the sampled tokens of each episode; where not both are positive, behind all others.

    As in the released code: a position of the second kind, best first, is what is left where there are too few of the first.
    """
    product, qualified = np.zeros(len(leads)), np.zeros(len(leads), dtype=bool)
    for chosen in _sampled_places(trajectories):
        high, far = standardised(trajectories.entropy[chosen].astype(np.float64)), standardised(leads[chosen])
        product[chosen], qualified[chosen] = high * far, (high > 0) & (far > 0)
    behind = 2 * np.abs(product).max(initial=0.0) + 1
    return np.where(places, np.where(qualified, product, product - behind), -np.inf)


def _sampled_places(trajectories: Trajectories) -> Iterator[np.ndarray]:
    """Of each episode, where its sampled tokens are among all."""
    for episode in range(len(trajectories)):
        own = trajectories.tokens(episode)
        yield own.start + np.flatnonzero(trajectories.sampled[own])


def standardised(values: np.ndarray) -> np.ndarray:
    """``(x - mean) / (std + 1e-6)`` with the population's standard deviation: APPO's z, 0 for values that are all equal."""
    if len(values) == 0 or values.min() == values.max():
        return np.zeros(len(values))
    return np.asarray((values - values.mean()) / (values.std() + 1e-6))


def blank_tokens(tokenizer: Any, ids: np.ndarray) -> np.ndarray:
    """bool (N,): tokens whose text is whitespace alone, or nothing."""
    kinds, index = np.unique(ids, return_inverse=True)
    blank = np.array([not tokenizer.decode([int(token)]).strip() for token in kinds], dtype=bool)
    return np.asarray(blank[index])


def action_starts(trajectories: Trajectories) -> np.ndarray:
    """bool (N,): the first sampled action token of each response."""
    action = trajectories.sampled & (trajectories.role == Role.ACTION)
    places, found = np.flatnonzero(action), np.zeros(len(action), dtype=bool)
    _, first = np.unique(trajectories.token_turn()[places], return_index=True)
    found[places[first]] = True
    return found
