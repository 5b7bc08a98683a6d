"""How good a place to branch each token is: the signals of slot S1."""

from __future__ import annotations

import numpy as np

from pipeline.trajectory import Role, Trajectories


def branch_scores(
    signal: str,
    trajectories: Trajectories,
    draws: np.random.Generator,
    moved: np.ndarray | None = None,
    discount: float = 0.99,
    bounds: tuple[float, float] = (0.8, 1.2),
) -> np.ndarray:
    """A score per token by a signal's name (``slots.Positions.signal``).

    Args:
        signal: which.
        trajectories: annotated.
        draws: named generator of the signals that draw.
        moved: ``log pi - log pi_old`` of each token, for the branching score.
        discount: of Omega.
        bounds: of Omega.

    Returns:
        float64 (N,): the higher the better; -inf where nothing may branch.

    Raises:
        ValueError: the branching score without a policy that has moved, or the energy without annotation.
    """
    sampled = trajectories.sampled
    if signal == "action_start":
        sampled = action_starts(trajectories)
    elif signal in ("action_energy", "action_random"):
        sampled = sampled & (trajectories.role == Role.ACTION)
    if signal == "branching_score":
        if moved is None:
            raise ValueError("branching_score needs log-probabilities under a policy that has moved")
        return _branching_scores(trajectories, omega(trajectories, moved, discount, bounds))
    if signal in ("reference_energy", "action_energy"):
        if trajectories.energy is None:
            raise ValueError("trajectories are not annotated")
        values = trajectories.energy.astype(np.float64)
    elif signal == "entropy":
        values = trajectories.entropy.astype(np.float64)
    else:
        values = draws.random(len(sampled))
    return np.where(sampled, values, -np.inf)


def omega(trajectories: Trajectories, moved: np.ndarray, discount: float, bounds: tuple[float, float]) -> np.ndarray:
    """APPO (arXiv 2606.12384): ``Omega_t = clip(exp(sum_{k >= t} gamma^(k-t) (log pi_k - log pi_old_k)))``.

    The sum runs over the later sampled tokens of the same episode. Before any update Omega is 1 up to rounding.

    Args:
        trajectories: any.
        moved: (N,) ``log pi - log pi_old``.
        discount: gamma, per sampled token.
        bounds: Omega is clipped to these.

    Returns:
        float64 (N,), 1 where not sampled.
    """
    result = np.ones(len(moved))
    for episode in range(len(trajectories)):
        chosen = trajectories.offsets[episode] + np.flatnonzero(
            trajectories.sampled[trajectories.offsets[episode] : trajectories.offsets[episode + 1]]
        )
        following = 0.0
        for token in chosen[::-1]:
            following = float(moved[token]) + discount * following
            result[token] = np.exp(following)
    return np.asarray(np.clip(result, *bounds))


def _branching_scores(trajectories: Trajectories, leads: np.ndarray) -> np.ndarray:
    """``z(H_t) * z(Omega_t)`` within each group where both are positive; where none is, only the best product counts."""
    scores = np.full(len(leads), -np.inf)
    group = trajectories.groups[trajectories.token_episode]
    for own in range(int(group.max()) + 1):
        chosen = np.flatnonzero((group == own) & trajectories.sampled)
        high, far = standardised(trajectories.entropy[chosen].astype(np.float64)), standardised(leads[chosen])
        product = high * far
        qualified = (high > 0) & (far > 0)
        if not qualified.any():
            qualified = np.arange(len(chosen)) == np.argmax(product)
        scores[chosen[qualified]] = product[qualified]
    return scores


def standardised(values: np.ndarray) -> np.ndarray:
    """Zero mean and unit (population) standard deviation; 0 everywhere if all are equal."""
    spread = values.std()
    return np.asarray((values - values.mean()) / spread) if spread > 0 else np.zeros(len(values))


def action_starts(trajectories: Trajectories) -> np.ndarray:
    """bool (N,): the first sampled action token of each response."""
    action = trajectories.sampled & (trajectories.role == Role.ACTION)
    turn = trajectories.token_turn()
    places = np.flatnonzero(action)
    first = np.r_[True, turn[places][1:] != turn[places][:-1]] if len(places) else np.zeros(0, dtype=bool)
    found = np.zeros(len(action), dtype=bool)
    found[places[first]] = True
    return found
