"""What `actfocus check` says of a policy: whether it is ready, what it is, and how long the comparison takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.analysis.readiness import Tried, hours, iteration_seconds, training_seconds
from pipeline.progress.display import duration
from pipeline.settings.params import Config
from pipeline.trajectories.learnable import why_nothing_to_learn
from pipeline.trajectories.trajectory import RESPONSES, Role

LONG = 3.0
"""Hours from which it is said how a comparison becomes shorter."""
PARTS = {
    "policy": "warm start",
    "table": "reference episodes",
    "matching": "matching",
    "training": "trainings",
    "evaluation": "evaluation",
}


@dataclass(frozen=True)
class Checked:
    """A policy that has been tried."""

    source: str
    """Where it is from."""
    begun: bool
    """Whether its warm start is still to come."""
    facts: Mapping[str, Any]
    tried: Mapping[str, Tried]
    memory: int
    """Bytes at the highest."""


def readiness_text(config: Config, checked: Checked) -> str:
    """The answer, then what it rests on."""
    facts, tried = checked.facts, checked.tried
    parts = hours(config, {name: one.pace for name, one in tried.items()})
    context = max(section.context_tokens for section in config.environments.values())
    positions = "any number of" if facts["positions"] is None else facts["positions"]
    shared = ", times workers" if config.workers > 1 else ""
    lines = [
        _answer(config, checked, sum(parts.values())),
        f"policy: {checked.source}{', before its warm start' if checked.begun else ''}: {facts['family']}, {facts['parameters'] / 1e6:.2f} M parameters, {facts['dtype']}; "
        f"{positions} positions, context_tokens {context}",
        f"dialogue: {'its own chat template' if facts['template'] else 'it has no chat template, plain words instead'}"
        f"{', which opens the reasoning itself' if facts['opens'] else ''}; a response ends with {', '.join(facts['ends'])}",
        *(environment_line(name, one) for name, one in tried.items()),
        f"memory: {checked.memory / 1e9:.1f} GB at its highest{shared}; keys and values of a token "
        f"{facts['token_bytes'] / 1e3:.1f} kB",
        *(pace_line(config, name, one) for name, one in tried.items()),
        "whole: " + ", ".join(f"{PARTS[part]} {duration(3600 * own)}" for part, own in parts.items() if own),
    ]
    if sum(parts.values()) > LONG:
        lines.append(
            "shorter by fewer train.iterations, seeds, methods or rollout.groups, smaller response_tokens, train.lora, or a "
            "GPU"
        )
    return "\n".join(lines)


def _answer(config: Config, checked: Checked, total: float) -> str:
    """In one line: ready, and for how long; or not, and what to do."""
    reasons = {name: why for name, one in checked.tried.items() if (why := why_nothing_to_learn(one.episodes))}
    time = f"about {duration(3600 * total)} for the whole comparison"
    if not reasons:
        return f"ready: {time}"
    said = "; ".join(f"{name}: {why}" for name, why in reasons.items())
    if checked.begun:
        return f"before its warm start there is nothing to learn from ({said}): check again after it; {time}"
    cut = any(one.episodes.responses.count("cut") > len(one.episodes.responses) / 2 for one in checked.tried.values())
    has = getattr(config.policy, "demonstrations", None) is not None
    advice = "raise response_tokens, and " if cut else ""
    advice += "give policy.demonstrations more steps" if has else "add policy.demonstrations (docs/usage.md)"
    return f"not ready: there is nothing to learn from ({said}); {advice}"


def environment_line(name: str, tried: Tried) -> str:
    """What was played there."""
    episodes = tried.episodes
    responses, tokens = episodes.responses, len(episodes.input_ids)
    turns = ", ".join(f"{responses.count(kind)} {kind}" for kind in RESPONSES)
    prompt = (episodes.role == Role.PROMPT).sum() / tokens
    return (
        f"{name}: of {len(responses)} turns {turns}; {sum(episodes.episodes['success'])} of {len(episodes)} episodes succeed; "
        f"{tokens / len(episodes):.0f} tokens an episode, {prompt:.0%} of them prompt"
    )


def pace_line(config: Config, name: str, tried: Tried) -> str:
    """How long an iteration and a training take."""
    episodes, pace = config.rollout.groups * config.rollout.group_size, tried.pace
    phases = {"sampling": pace.sampled, "annotation": pace.annotated, "updates": config.train.passes * pace.updated}
    shown = ", ".join(f"{phase} {duration(episodes * own)}" for phase, own in phases.items())
    return (
        f"{name}: an iteration of {episodes} episodes about {duration(iteration_seconds(config, pace))} ({shown}), "
        f"a training about {duration(training_seconds(config, pace))}"
    )
