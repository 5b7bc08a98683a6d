"""Where the policy's gradient comes from, measured token by token."""

import numpy as np
import torch
from torch import Tensor

from pipeline.objective.methods import surrogate_loss
from pipeline.training.tokens import TokenTable
from pipeline.training.update import Learner
from pipeline.trajectories.trajectory import REPORTED_ROLES, RESPONSE_ROLES

TOKENS_PER_ROLE = 4
"""How many tokens of each role are looked at in a trajectory."""


def gradient_share(learner: Learner, minibatch: TokenTable, draws: np.random.Generator) -> dict[str, float]:
    """Share of each role in ``sum_t |grad (c_t * surrogate_t)|``, from the gradients of a sample of tokens.

    The norm is over all of the policy's parameters that are trained. A role's sum is estimated as its number of tokens in the minibatch
    times the mean norm over its sampled tokens; a role without a token in the sample counts as 0.

    Returns:
        ``measured_gradient_share_<role>``, adding up to 1 unless no token has a gradient.
    """
    minibatch = learner.planned(minibatch)
    norms: dict[int, list[float]] = {}
    for index in sorted(draws.permutation(len(minibatch))[: learner.config.train.gradient_trajectories].tolist()):
        trajectory = minibatch.select([index])
        if len(trajectory["role"]) == 0:
            continue
        _, tokens, plan = learner.read(trajectory)
        loss = tokens.coefficient * surrogate_loss(learner.method, tokens, plan).loss
        for role in RESPONSE_ROLES:
            own = torch.nonzero(trajectory["role"] == role).squeeze(-1).numpy()
            for token in draws.permutation(own)[:TOKENS_PER_ROLE]:
                norms.setdefault(int(role), []).append(_norm(learner.policy.model, loss[int(token)]))
    everyone = minibatch["role"]
    sums = {role: int((everyone == role).sum()) * float(np.mean(sampled)) for role, sampled in norms.items()}
    total = sum(sums.values()) or 1.0
    return {
        f"measured_gradient_share_{name}": sum(sums.get(int(role), 0.0) for role in roles) / total
        for name, roles in REPORTED_ROLES.items()
    }


def _norm(model: torch.nn.Module, loss: Tensor) -> float:
    """Norm of a scalar's gradient by the parameters that are trained, whose own gradients are left alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients if g is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms)))  # in float64 the squares of great gradients are finite
