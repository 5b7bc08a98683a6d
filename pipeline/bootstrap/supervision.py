"""Supervision of a policy by demonstrations, as the collector would have recorded them."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int

from pipeline.bootstrap.demonstrations import Demonstration, Turn
from pipeline.bootstrap.saving import Saving
from pipeline.model.policy import Policy
from pipeline.model.scoring import batches_of, predicting_hidden, score_tokens
from pipeline.progress.display import begin, within
from pipeline.settings.policy import Demonstrations
from pipeline.trajectories.builder import EpisodeBuilder
from pipeline.trajectories.parsing import decode, token_roles
from pipeline.trajectories.prompting import Dialogue
from pipeline.trajectories.trajectory import Role
from pipeline.workspace.finite import require_finite
from pipeline.workspace.stopping import asked, stop_if_asked, until_saved

LAST = 10
"""Steps by whose mean loss it is judged how a supervision has ended."""

StepReport = Callable[[int, int, float], None]
"""Told after each step: steps done, steps in all, the step's loss."""


class Example(NamedTuple):
    """A demonstrated episode of n tokens."""

    ids: Int[np.ndarray, " n"]
    roles: Int[np.ndarray, " n"]
    """As ``Role``."""
    learnt: Bool[np.ndarray, " n"]
    """What the policy would have chosen: responses without what is forced in them."""


def encode(dialogue: Dialogue, demonstration: Demonstration, context_tokens: int) -> Example:
    """A demonstrated episode as the collector would have recorded it, had the policy written this.

    It ends before the first turn, but for the very first, that would lead beyond ``context_tokens``. A response is over with
    its closing tag, so that no end token is learnt.
    """
    episode, prefill = EpisodeBuilder(), dialogue.prefill_ids
    forced = decode(dialogue.tokenizer, prefill).text
    for number, turn in enumerate(demonstration.turns, start=1):
        if number == 1:
            shown = dialogue.opening(demonstration.instructions, turn.observation, turn.actions_left)
        else:
            shown = dialogue.following(number, turn.observation, turn.reward, False, turn.actions_left)
        ids = dialogue.encode(_written(dialogue, forced, turn))
        if number > 1 and len(episode) + len(shown) + len(prefill) + len(ids) > context_tokens:
            break
        episode.append_text(shown, Role.PROMPT if number == 1 else Role.OBSERVATION)
        episode.append_text(prefill, Role.THINK_TAG)
        roles = token_roles(decode(dialogue.tokenizer, [*prefill, *ids]), ended=True)[len(prefill) :]
        episode.append_sampled(ids, roles, [0.0] * len(ids), [0.0] * len(ids))
    return Example(*(np.array(episode.tokens[name]) for name in ("input_ids", "role", "sampled")))


def _written(dialogue: Dialogue, forced: str, turn: Turn) -> str:
    """What of a demonstrated response stands behind what is ``forced`` at its beginning.

    A chat template may open the reasoning, or close it too.
    """
    answer = f"<answer>{dialogue.carried(turn.action)}</answer>"
    if "</think>" in forced:
        return answer
    return f"{'' if forced else '<think>'}{dialogue.carried(turn.reasoning)}</think>{answer}"


def supervise(
    policy: Policy,
    plan: Demonstrations,
    phases: Sequence[Sequence[Example]],
    learning_rate: float,
    warm_up: int,
    report: StepReport,
    tokens_per_forward: int | None = None,
    checkpoint: Path | None = None,
) -> None:
    """Train a policy's weights, those that ask for gradients, on the examples of each phase; it ends in evaluation mode.

    The ``learning_rate`` rises over ``warm_up`` steps and falls to zero as a cosine over all. No more than
    ``tokens_per_forward`` tokens of a batch pass through the policy at once; None: all of them. The gradients are the same.
    In the file ``checkpoint`` is kept how far it is: killed, it goes on from there, in the same bytes.

    Raises:
        NumericsError: a loss is not finite, or a weight at the end.
        Stopped: it was asked to stop, and has with its checkpoint.
    """
    weights = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    total = sum(phase.steps for phase in plan.phases)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / total)))
    )
    saving = Saving(checkpoint, weights, optimizer, schedule)
    policy.model.train()
    done = saving.restore()
    begin(done, total)
    batches = (
        (examples, batch) for examples, phase in zip(phases, plan.phases, strict=True) for batch in range(phase.steps)
    )
    with until_saved():
        for step, (examples, batch) in enumerate(batches, start=1):
            if step <= done:
                continue
            chosen = [examples[(batch * plan.batch_episodes + i) % len(examples)] for i in range(plan.batch_episodes)]
            optimizer.zero_grad(set_to_none=True)
            loss = _accumulate_gradients(policy, chosen, plan.action_weight, tokens_per_forward)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            require_finite(f"policy.demonstrations: the loss of step {step}", loss)
            report(step, total, loss)
            saving.save(step, insist=asked())
            stop_if_asked()
    optimizer.zero_grad(set_to_none=True)
    for name, weight in policy.model.named_parameters():
        require_finite(f"policy.demonstrations: {name} after the last step", weight)
    policy.model.eval()


def supervision_alarm(losses: Sequence[float], tokens: int) -> str:
    """What is wrong with a supervision whose last losses are worse than a guess among so many tokens; empty if nothing is.

    ``losses`` are those of all steps, in nats.
    """
    ended, guess = mean(losses[-LAST:]), math.log(tokens)
    if ended <= guess:
        return ""
    return (
        f"ALARM: the loss of policy.demonstrations ended at {ended:.3g} nats, and a guess has {guess:.3g}: try a smaller "
        "policy.demonstrations.learning_rate. "
    )


def _accumulate_gradients(
    policy: Policy, batch: Sequence[Example], action_weight: float, tokens_per_forward: int | None
) -> float:
    """Backward passes over a batch; returns its loss, the weighted mean of -log p over all that is learnt."""
    weights = [
        torch.where(torch.from_numpy(example.roles[example.learnt]) == Role.ACTION, action_weight, 1.0)
        for example in batch
    ]
    whole, loss, done = torch.cat(weights).sum(), 0.0, 0
    pieces = [np.arange(len(batch))]
    if tokens_per_forward is not None:
        pieces = batches_of(policy, [example.ids for example in batch], tokens_per_forward)
    for piece in pieces:
        within(done / len(batch), f"{done} of {len(batch)} episodes of the next step")
        some = [batch[index] for index in piece.tolist()]
        hidden = predicting_hidden(policy, [example.ids for example in some], [example.learnt for example in some])
        tokens = torch.from_numpy(np.concatenate([example.ids[example.learnt] for example in some])).to(hidden.device)
        scores = score_tokens(hidden, tokens, policy.head, temperature=1.0, cap=policy.cap)
        weight = torch.cat([weights[index] for index in piece.tolist()]).to(hidden.device)
        part = -(weight * scores.logprob).sum() / whole
        part.backward()
        loss += float(part.detach())
        done += len(piece)
    return loss
