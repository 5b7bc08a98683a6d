"""How far one update moves the policy: KL(before || after) over the whole vocabulary, on a fixed sample of tokens.

It is measured in the first ``FIRST`` iterations in which the policy learns, and in those that end with a validation every
``validate_every``: a forward pass over the sample after each update is up to a tenth of such an iteration, and 1 to 3 % of a
training.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.model.policy import Policy
from pipeline.model.scoring import predicting_hidden
from pipeline.model.shards import gathered
from pipeline.training.tokens import TokenTable
from pipeline.training.update import Learner
from pipeline.trajectories.trajectory import Role

FIRST = 3
"""Iterations by whose mean methods are matched and compared."""
TRAJECTORIES, TOKENS = 16, 256
"""How many of an iteration's trajectories are looked at, and how many tokens of a role in all of them, at most."""
ROLES = {"kl_update_action": Role.ACTION, "kl_update_reasoning": Role.REASONING}
"""By the metric that it is measured as."""
CHUNK = 2**22
"""Numbers of a distribution that are in double precision at once."""


def measures_update_kl(learner: Learner, iteration: int) -> bool:
    """Whether an iteration's updates are measured; never while only heads learn."""
    learning = iteration - warmup_of(learner)
    return learning >= 0 and (learning < FIRST or (iteration + 1) % learner.config.train.validate_every == 0)


def warmup_of(learner: Learner) -> int:
    """Iterations before the policy learns."""
    return max((head.settings.warmup_iterations for head in learner.heads), default=0)


def first_updates(curve: Iterable[Mapping[str, float]], metric: str = "kl_update_action") -> list[float]:
    """What the first ``FIRST`` iterations of a training's curve that were measured say, in nats per token."""
    return [row[metric] for row in curve if metric in row][:FIRST]


class UpdateKL:
    """Tells after each update how far it has moved the policy on the same tokens, at ``rollout.temperature``.

    Logits of before the next update are held in main memory: (tokens, vocabulary) in float32, a few MB for small
    vocabularies, and 0.3 GB for one of 150,000.

    Args:
        learner: whose policy is updated.
        table: tokens that the iteration trains on.
        draws: choose trajectories, then tokens of each role; the same for every update.
    """

    def __init__(self, learner: Learner, table: TokenTable, draws: np.random.Generator) -> None:
        sample = table.select(np.sort(draws.permutation(len(table))[:TRAJECTORIES]))
        role = sample["role"].numpy()
        wanted = np.zeros(len(role), dtype=bool)
        for own in ROLES.values():
            wanted[draws.permutation(np.flatnonzero(role == own))[:TOKENS]] = True
        sample = sample.with_columns(wanted=torch.from_numpy(wanted))
        pieces = [sample.select(piece) for piece in learner.pieces(sample)]
        self._learner, self._pieces = learner, [piece for piece in pieces if bool(piece.columns["wanted"].any())]
        roles = [piece.columns["role"][piece.columns["wanted"]] for piece in self._pieces]
        self._role = torch.cat([torch.zeros(0, dtype=sample.columns["role"].dtype), *roles])
        self._before = self._logits()

    def after_update(self) -> dict[str, float]:
        """Mean KL(before || after) of the latest update, by ``ROLES``; a role without a token is left out."""
        after = self._logits()
        divergence, self._before = kl_divergence(self._before, after), after
        found = {name: divergence[self._role == role] for name, role in ROLES.items()}
        return {name: float(values.mean()) for name, values in found.items() if len(values)}

    @torch.no_grad()
    def _logits(self) -> Float[Tensor, "n v"]:
        policy, temperature = self._learner.policy, self._learner.config.rollout.temperature
        parts = [torch.zeros(0, policy.head.out_features)]
        for piece in self._pieces:
            logits = gathered(policy.model, _logits, policy, piece)
            parts.append(logits.float().cpu() / temperature)
        return torch.cat(parts)


def _logits(policy: Policy, piece: TokenTable) -> Float[Tensor, "n v"]:
    return policy.logits(predicting_hidden(policy, piece.sequences("ids"), piece.sequences("wanted")))


def kl_divergence(before: Float[Tensor, "n v"], after: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    """KL(p || q) in nats of distributions given by their logits, >= 0 but for rounding; in double precision.

    Of a policy and itself after a small step, float32 would leave too few digits of the difference.
    """
    size, found = max(1, CHUNK // before.shape[-1]), [torch.zeros(0, dtype=torch.float64)]
    for start in range(0, len(before), size):
        p, q = (torch.log_softmax(logits[start : start + size].double(), dim=-1) for logits in (before, after))
        found.append(torch.linalg.vecdot(p.exp(), p - q))
    return torch.cat(found)
