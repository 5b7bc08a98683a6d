"""Whether a policy is ready for a comparison, and how long that will take: from one small iteration on each environment."""

import resource
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.model.policy import Policy
from pipeline.progress.display import doing
from pipeline.settings.filter import AllGroups
from pipeline.settings.params import Config, every_seed
from pipeline.training.matching import SEEDS, shortened
from pipeline.training.module import PolicyGradient
from pipeline.training.run import try_iteration
from pipeline.trajectories.prompting import Dialogue
from pipeline.trajectories.trajectory import Trajectories

GROUPS, GROUP_SIZE = 2, 8
"""Of the iteration that is tried."""
TRIES = 3
"""Learning rates that a search usually tries."""
WAYS = 3
"""In which the reference policy is played to see whether it uses its reasoning."""


@dataclass(frozen=True)
class Pace:
    """Seconds that an episode takes one process."""

    sampled: float
    annotated: float
    updated: float
    """In one pass."""


@dataclass(frozen=True)
class Tried:
    """What one small iteration on an environment has shown."""

    episodes: Trajectories
    """Annotated."""
    pace: Pace


def try_environment(config: Config, environment: str, policy: Policy) -> Tried:
    """Sample, annotate and train on a few episodes; the policy is another one afterwards.

    The method is the first that does not branch; it trains on all groups here, so that there is an update to be timed.
    """
    unbranched = [name for name, row in config.methods.items() if row.branching.kind == "none"]
    name = next(iter([*unbranched, *config.methods]))
    row = config.methods[name].model_copy(update={"filter": AllGroups(kind="all"), "matched_to": None})
    size = min(GROUP_SIZE, config.rollout.group_size)
    count = GROUPS * size
    small = {
        "methods": {name: row},
        "rollout": config.rollout.model_copy(update={"groups": GROUPS, "group_size": size}),
        "train": config.train.model_copy(
            update={"iterations": 1, "tokens": None, "passes": 1, "minibatch": count, "schedule": "constant"}
        ),
    }
    doing(f"one small iteration on {environment}")
    module = PolicyGradient(config.model_copy(update=small), environment, name, 0, policy)
    spent = try_iteration(module)
    assert module.last_episodes is not None
    episodes = len(module.last_episodes)
    seconds = [spent.get(f"seconds_{phase}", 0.0) for phase in ("annotate", "update")]
    sampling = sum(spent.get(f"seconds_{phase}", 0.0) for phase in ("collect", "reset", "step"))
    return Tried(module.last_episodes, Pace(sampling / episodes, *(part / episodes for part in seconds)))


def hours(config: Config, paces: Mapping[str, Pace]) -> dict[str, float]:
    """Hours that each part of the comparison takes at each environment's pace, with the seeds that are in effect.

    Every process is taken to keep its pace beside the other ``workers``, every episode to cost what those cost that were
    tried, and a demonstration what an episode costs that is trained on.
    """
    plan, demonstrations, total = (
        config.evaluation,
        getattr(config.policy, "demonstrations", None),
        defaultdict[str, float](float),
    )
    matched = [name for name, row in config.methods.items() if row.matched_to is not None]
    short = sum(shortened(config, name).train.iterations for name in matched)
    steps = sum(phase.steps for phase in demonstrations.phases) * demonstrations.batch_episodes if demonstrations else 0
    played = _rounds(config, len(config.seeds) * len(plan.temperatures)) * (1 + len(config.methods))
    played += _rounds(config, len(plan.temperatures)) * WAYS
    searches = _rounds(config, min(SEEDS, len(every_seed(config)))) * (1 + TRIES)
    table = config.bottleneck.groups * config.rollout.group_size / config.workers
    for pace in paces.values():
        total["policy"] += steps / len(paces) * pace.updated
        total["table"] += table * (pace.sampled + pace.annotated)
        total["matching"] += searches * short * iteration_seconds(config, pace)
        total["training"] += len(config.methods) * _rounds(config, len(config.seeds)) * training_seconds(config, pace)
        total["evaluation"] += played * plan.states * plan.rollouts * pace.sampled
    return {part: seconds / 3600 for part, seconds in total.items()}


def iteration_seconds(config: Config, pace: Pace) -> float:
    """Of one iteration of a training."""
    episodes = config.rollout.groups * config.rollout.group_size
    return episodes * (pace.sampled + pace.annotated + config.train.passes * pace.updated)


def training_seconds(config: Config, pace: Pace) -> float:
    """Of one training with its validations: before the first iteration, now and then, and after the last."""
    plan, evaluation = config.train, config.evaluation
    validations = 1 + -(-plan.iterations // plan.validate_every)
    validated = validations * evaluation.validation_states * evaluation.validation_rollouts * pace.sampled
    return plan.iterations * iteration_seconds(config, pace) + validated


def _rounds(config: Config, tasks: int) -> int:
    """How often one task follows another where ``workers`` are done at once."""
    return -(-tasks // config.workers)


def facts(policy: Policy, config: Config) -> dict[str, Any]:
    """What a policy is: ``family``, ``parameters``, ``dtype``, ``positions`` (None: no limit), ``template`` (whether it has
    its own), ``ends`` (tokens that end a response), ``opens`` (whether its template opens the reasoning), ``token_bytes`` (of
    a token's keys and values)."""
    shape, tokenizer = policy.model.config.get_text_config(), policy.tokenizer
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    section = next(iter(config.environments.values()))
    return {
        "family": policy.model.config.model_type,
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "dtype": str(policy.model.dtype).removeprefix("torch."),
        "positions": getattr(shape, "max_position_embeddings", None),
        "template": bool(tokenizer.chat_template),
        "ends": sorted(map(str, tokenizer.convert_ids_to_tokens(sorted(policy.ends)))),
        "opens": bool(Dialogue(tokenizer, section.layout, "", section.response_tokens).prefill_ids),
        "token_bytes": 2 * shape.num_hidden_layers * heads * size * policy.model.dtype.itemsize,
    }


def try_policy(config: Config, load: Callable[[], Policy]) -> tuple[dict[str, Any], dict[str, Tried]]:
    """The facts of a policy, and what each environment has shown; ``load`` gives the same policy each time."""
    found, about = dict[str, Tried](), dict[str, Any]()
    for environment in config.environments:
        doing(f"loading the policy, to try it on {environment}")
        policy = load()
        about = about or facts(policy, config)
        found[environment] = try_environment(config, environment, policy)
    return about, found


def peak_memory() -> int:
    """Bytes that this process has had in memory at its highest; of a GPU's memory, where that is more."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return max(resident, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
