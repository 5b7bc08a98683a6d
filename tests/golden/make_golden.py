"""Write tests/golden/golden.json: verl's advantages, losses and their gradients on one small ragged batch.

From the repository's root, with the project's own environment in .venv, whose torch and numpy are used (constraints.txt):

    .venv/bin/python -m venv .cache/verl
    .cache/verl/bin/pip install --no-deps -r tests/golden/requirements.txt
    echo ../../../../../.venv/lib/python3.11/site-packages > .cache/verl/lib/python3.11/site-packages/project.pth
    .cache/verl/bin/python tests/golden/make_golden.py

Every function is verl's own, called in float64. Rows are trajectories without their prompts, padded on the right; the
mask is 0 on observations and padding. Masked entries hold numbers too, so that ignoring the mask shows. The whole loss is
put together as in ``verl.workers.utils.losses.ppo_loss``, which itself wants verl's data containers.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import verl.utils.torch_functional as functional
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig

TURNS = [  # of each trajectory: (observation tokens, then sampled tokens) per turn
    [(0, 3), (2, 4)],
    [(0, 5)],
    [(0, 2), (1, 3), (2, 2)],
    [(0, 1)],
    [(0, 6), (1, 3)],
    [(0, 4), (3, 5)],
]
GROUPS = [0, 1, 0, 1, 1, 0]
VOCABULARY = 5
GAMMA, LAM = 0.97, 0.9
LOW, HIGH, DUAL = 0.2, 0.28, 3.0
SHARE, BAND, COEFFICIENT = 0.15, (0.05, 5.0), 0.7
ENTROPY, KL = 0.01, 0.05

Record = dict[str, Any]


def main() -> None:
    torch.manual_seed(0)
    numbers = np.random.default_rng(20)
    mask, reward = batch_shape(numbers)
    shape = mask.shape

    def normal(*last: int, scale: float = 1.0) -> Tensor:
        return torch.from_numpy(scale * numbers.standard_normal((*shape, *last)))

    logits, values, tokens = normal(VOCABULARY), normal(), torch.from_numpy(numbers.integers(0, VOCABULARY, shape))
    logprob = functional.logprobs_from_logits(logits, tokens)
    old, reference = logprob + normal(scale=0.4), logprob + normal(scale=0.5)
    assert float((logprob - old).exp()[mask > 0].max()) < DUAL  # verl's dual clip has a case of its own

    advantages, advantage_record = all_advantages(reward, values, mask)
    losses = [
        policy_loss("vanilla", "token-mean", "gae", {}, logprob, old, advantages, mask),
        policy_loss("vanilla", "seq-mean-token-mean", "group", {}, logprob, old, advantages, mask),
        policy_loss("vanilla", "seq-mean-token-sum-norm", "group_centred", {}, logprob, old, advantages, mask),
        policy_loss(
            "gspo", "seq-mean-token-mean", "group", {"low": 0.06, "high": 0.09}, logprob, old, advantages, mask
        ),
        policy_loss("gspo", "token-mean", "gae", {"low": 0.06, "high": 0.09}, logprob, old, advantages, mask),
        policy_loss("cispo", "token-mean", "gae", {"low": 1.0}, logprob, old, advantages, mask),
        policy_loss("cispo", "token-mean", "group", {}, logprob, old, advantages, mask),
        policy_loss("kl_cov", "token-mean", "gae", {"share": SHARE}, logprob, old, advantages, mask),
        policy_loss("kl_cov", "token-mean", "gae", {"share": 1e-3}, logprob, old, advantages, mask),
        policy_loss("clip_cov", "token-mean", "gae", {"share": SHARE}, logprob, old, advantages, mask),
        policy_loss("clip_cov", "token-mean", "gae", {"share": 1.0}, logprob, old, advantages, mask),
    ]
    golden = {
        "peer": {
            "name": "verl",
            "version": version("verl"),
            "module": "verl.trainer.ppo.core_algos",
            "torch": version("torch").split("+")[0],
            "dtype": "float64",
        },
        "batch": {
            "mask": mask,
            "group": GROUPS,
            "token": tokens,
            "logits": logits,
            "logprob": logprob,
            "old_logprob": old,
            "ref_logprob": reference,
            "reward": reward,
            "value": values,
        },
        "advantages": advantage_record,
        "edge_groups": edge_groups(),
        "rewards": rewards(reward, old, reference),
        "losses": losses,
        "whole_loss": [
            whole_loss(kind, logits, tokens, old, reference, advantages["gae"], mask) for kind in ("k1", "k2", "k3")
        ],
        "dual_clip": dual_clip(),
        "aggregation": aggregation(numbers),
        "kl_penalty": [kl_penalty(kind, logprob, reference) for kind in ("k1", "k2", "k3")],
        "value_loss": [value_loss(clip, values + normal(scale=0.5), values, normal(), mask) for clip in (0.2, 1e9)],
    }
    file = Path(__file__).with_name("golden.json")
    file.write_text(json.dumps(plain(golden), allow_nan=False) + "\n", encoding="utf-8")


def batch_shape(numbers: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Mask of sampled tokens, and a reward at the end of each turn."""
    width = 2 + max(sum(map(sum, turns)) for turns in TURNS)
    mask = torch.zeros(len(TURNS), width, dtype=torch.int64)
    reward = torch.zeros(len(TURNS), width, dtype=torch.float64)
    for row, turns in enumerate(TURNS):
        end = 0
        for observed, sampled in turns:
            mask[row, end + observed : end + observed + sampled] = 1
            end += observed + sampled
            reward[row, end - 1] = float(numbers.choice([-0.1, 0.0, 0.3, 1.0]))
    return mask, reward


def all_advantages(reward: Tensor, values: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], Record]:
    whitened, returns = core_algos.compute_gae_advantage_return(reward, values, mask, gamma=GAMMA, lam=LAM)
    index = np.array(GROUPS)
    group, _ = core_algos.compute_grpo_outcome_advantage(reward, mask, index)
    centred, _ = core_algos.compute_grpo_outcome_advantage(reward, mask, index, norm_adv_by_std_in_grpo=False)
    record = {
        "gae": {"gamma": GAMMA, "lam": LAM, "whitened": whitened, "returns": returns},
        "group": {"eps": 1e-6, "advantage": group},
        "group_centred": {"advantage": centred},
    }
    return {"gae": whitened, "group": group, "group_centred": centred}, record


def edge_groups() -> Record:
    """A group of equal returns, and a group of one."""
    returns, group = [1.0, 1.0, 1.0, 0.7, 0.2, -0.4], [0, 0, 0, 1, 2, 2]
    grid = torch.tensor(returns, dtype=torch.float64).unsqueeze(-1)
    advantage, _ = core_algos.compute_grpo_outcome_advantage(grid, torch.ones_like(grid), np.array(group))
    return {"returns": returns, "group": group, "advantage": advantage.squeeze(-1)}


def rewards(reward: Tensor, old: Tensor, reference: Tensor) -> Record:
    return {"coefficient": 0.2, "reward": core_algos.compute_rewards(reward, old, reference, 0.2)}


def actor(low: float = LOW, high: float = HIGH, share: float = SHARE) -> ActorConfig:
    policy = PolicyLossConfig(
        clip_cov_ratio=share,
        clip_cov_lb=BAND[0],
        clip_cov_ub=BAND[1],
        kl_cov_ratio=share,
        ppo_kl_coef=COEFFICIENT,
    )
    return ActorConfig(
        strategy="fsdp",
        rollout_n=3,
        use_dynamic_bsz=True,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=DUAL,
        policy_loss=policy,
    )


def policy_loss(
    name: str,
    mode: str,
    advantage: str,
    changed: dict[str, float],
    logprob: Tensor,
    old: Tensor,
    advantages: dict[str, Tensor],
    mask: Tensor,
) -> Record:
    """One registered loss with its gradient by log-probability."""
    settings = {"low": LOW, "high": HIGH, "share": SHARE} | changed
    leaf = logprob.clone().requires_grad_(True)
    function, config = core_algos.get_policy_loss_fn(name), actor(**settings)
    loss, metrics = function(old, leaf, advantages[advantage], mask, loss_agg_mode=mode, config=config)
    loss.backward()
    return {
        "name": name,
        "mode": mode,
        "advantage": advantage,
        "settings": settings | {"band": BAND, "coefficient": COEFFICIENT},
        "loss": loss,
        "gradient": leaf.grad,
        "clip_fraction": metrics.get("actor/pg_clipfrac"),
    }


def whole_loss(
    kind: str, logits: Tensor, tokens: Tensor, old: Tensor, reference: Tensor, advantage: Tensor, mask: Tensor
) -> Record:
    """PPO's loss, entropy bonus and KL to the reference, from logits; as in ``verl.workers.utils.losses.ppo_loss``."""
    leaf = logits.clone().requires_grad_(True)
    logprob, entropy = functional.logprobs_from_logits(leaf, tokens), functional.entropy_from_logits(leaf)
    logprob.retain_grad()
    entropy.retain_grad()
    surrogate, _ = core_algos.compute_policy_loss_vanilla(old, logprob, advantage, mask, config=actor())
    entropy_mean = core_algos.agg_loss(entropy, mask, "token-mean")
    kl = core_algos.agg_loss(core_algos.kl_penalty(logprob, reference, kind), mask, "token-mean")
    total = surrogate - ENTROPY * entropy_mean + KL * kl
    total.backward()
    return {
        "settings": {"entropy": ENTROPY, "kl": KL, "kl_estimator": kind, "low": LOW, "high": HIGH},
        "entropy": entropy,
        "total": total,
        "surrogate": surrogate,
        "entropy_mean": entropy_mean,
        "entropy_mean_of_logits": core_algos.compute_entropy_loss(logits, mask),
        "kl_mean": kl,
        "gradient": {"logprob": logprob.grad, "entropy": entropy.grad, "logits": leaf.grad},
    }


def dual_clip() -> Record:
    """Three tokens, of which one has A < 0 and a ratio above verl's dual clip."""
    ratio, advantage = [4.0, 2.0, 4.0], [-1.5, -1.0, 0.5]
    old = torch.zeros(1, 3, dtype=torch.float64)
    leaf = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_(True)
    given = torch.tensor([advantage], dtype=torch.float64)
    loss, _ = core_algos.compute_policy_loss_vanilla(old, leaf, given, torch.ones(1, 3).long(), config=actor())
    loss.backward()
    return {
        "ratio": ratio,
        "advantage": advantage,
        "low": LOW,
        "high": HIGH,
        "bound": DUAL,
        "loss": loss,
        "gradient": leaf.grad[0],
    }


def aggregation(numbers: np.random.Generator) -> Record:
    """Given losses under every mode, with a trajectory in which nothing was sampled."""
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]])
    loss = torch.from_numpy(numbers.standard_normal(mask.shape))
    modes = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")
    scaled = {"loss_scale_factor": 7}
    return {
        "mask": mask,
        "loss": loss,
        "modes": {mode: core_algos.agg_loss(loss, mask, mode) for mode in modes},
        "scaled": scaled | {"total": core_algos.agg_loss(loss, mask, modes[-1], **scaled)},
    }


def kl_penalty(kind: str, logprob: Tensor, reference: Tensor) -> Record:
    leaf = logprob.clone().requires_grad_(True)
    penalty = core_algos.kl_penalty(leaf, reference, kind)
    penalty.sum().backward()
    return {"kind": kind, "penalty": penalty, "gradient": leaf.grad}


def value_loss(clip: float, values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> Record:
    leaf = values.clone().requires_grad_(True)
    loss, fraction = core_algos.compute_value_loss(leaf, returns, old, mask, clip)
    loss.backward()
    return {
        "clip": clip,
        "value": values,
        "returns": returns,
        "loss": loss,
        "gradient": leaf.grad,
        "clip_fraction": fraction,
    }


def plain(value: Any) -> Any:
    """Tensors as nested lists, whose floats JSON writes exactly."""
    if isinstance(value, Tensor):
        return value.detach().tolist()
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


if __name__ == "__main__":
    main()
