"""An update: one optimizer step on a minibatch, and what is measured in it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.model.memory import tokens_per_forward
from pipeline.model.policy import Policy
from pipeline.model.scoring import TokenScores, batches_of, predicting_hidden, score_tokens
from pipeline.model.shards import gathered, own_part
from pipeline.objective.estimates import needed_behind
from pipeline.objective.methods import coefficients, policy_loss, surrogate_loss, surrogate_plan
from pipeline.objective.regularisers import kl_penalty
from pipeline.objective.surrogates import UpdateTokens
from pipeline.progress.display import within
from pipeline.settings.method import Method
from pipeline.settings.params import Config
from pipeline.training.heads import Head, Scene
from pipeline.training.masters import Masters, take_step
from pipeline.training.team import ALONE, Team
from pipeline.training.tokens import TokenTable
from pipeline.trajectories.trajectory import CUT_OFF, REPORTED_ROLES, Trajectories
from pipeline.workspace.finite import NotFiniteError, require_finite

SUMMED = ("non_finite_losses", "skipped_steps")
"""Of these a training is told how many there were, of all other metrics the mean."""


def averages(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of an iteration from those of its updates; each is in some of the rows."""
    sums, counts = dict[str, float](), Counter[str]()
    for row in rows:
        for key, value in row.items():
            sums[key] = sums.get(key, 0.0) + value
            counts[key] += key not in SUMMED
    return {key: total / (counts[key] or 1) for key, total in sums.items()}


@dataclass(frozen=True)
class Learner:
    """What an update trains, and by which settings."""

    config: Config
    method: Method
    policy: Policy
    reference: Policy
    """Frozen."""
    heads: Sequence[Head]
    masters: Sequence[Masters]
    """Of the policy, then of each head."""
    sampled: Policy
    """What is sampled from: the policy itself, or a copy of it as it was when the iteration began."""
    team: Team = ALONE
    """Each of its processes computes the loss of some of a minibatch's trajectories."""

    @property
    def whole(self) -> Learner:
        """The same with all weights of the policy as it was when the iteration began, for gradients of single tokens."""
        return replace(self, policy=self.sampled) if self.team.sharded else self

    @property
    def tokens_per_forward(self) -> int:
        """See ``Train.tokens_per_forward``."""
        return tokens_per_forward(self.config, self.policy)

    def scene(self, sequences: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> Scene:
        """Sequences with the policy's hidden states that predict the wanted tokens."""
        hidden = predicting_hidden(self.policy, sequences, wanted)
        return Scene(self.policy, self.reference, self.config.rollout.temperature, sequences, wanted, hidden)

    @torch.inference_mode()
    def estimate(self, sequences: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> dict[str, Float[Tensor, " n"]]:
        """What the heads say of the wanted tokens, a column per estimate."""
        return gathered(self.policy.model, self._estimate, sequences, wanted)

    def _estimate(
        self, sequences: Sequence[np.ndarray], wanted: Sequence[np.ndarray]
    ) -> dict[str, Float[Tensor, " n"]]:
        scene = self.scene(sequences, wanted)
        return {name: column for head in self.heads for name, column in head.estimate(scene).items()}

    def estimates(self, trajectories: Trajectories) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The heads' columns over all tokens, 0 where not trainable; and behind the last ones.

        The second are ``<name>_behind`` of what the advantage asks for, one number per episode: of the state behind the
        last token where the episode was cut off, 0 elsewhere. A head reads them where the next response would begin, as it
        reads the value of any response's first token: what is collected for that is ``closing``.
        """
        flat, trainable, tokens = dict[str, Tensor](), trajectories.trainable, len(trajectories.input_ids)
        asked = needed_behind(self.method.advantage)
        more = np.isin(trajectories.episodes["end_reason"], CUT_OFF) & bool(asked)
        # Which token is put behind the last does not matter: what predicts it has not seen it.
        sequences = [
            np.append(ids, ids[-1:]) if behind else ids
            for ids, behind in zip(trajectories.sequences, more, strict=True)
        ]
        for batch in batches_of(self.policy, sequences, self.tokens_per_forward) if self.heads else ():
            wanted, index = list[np.ndarray](), list[np.ndarray]()
            for e in batch:
                span = np.arange(trajectories.offsets[e], trajectories.offsets[e + 1])
                chosen = trainable[span]
                wanted.append(np.append(chosen, True) if more[e] else chosen)
                index += [span[chosen], np.array([tokens + e] if more[e] else [], dtype=span.dtype)]
            places = torch.from_numpy(np.concatenate(index))
            for name, values in self.estimate([sequences[e] for e in batch], wanted).items():
                column = flat.setdefault(name, torch.zeros(tokens + len(trajectories)))
                column[places] = values.float().cpu()
        columns = {name: column[:tokens] for name, column in flat.items()}
        return columns, {f"{name}_behind": flat[name][tokens:] for name in asked}

    def score(self, piece: TokenTable) -> tuple[Scene, TokenScores]:
        """The trainable tokens' scores under the policy as it is.

        Raises:
            NumericsError: a log-probability is not finite.
        """
        scene = self.scene(piece.sequences("ids"), piece.sequences("trainable"))
        scores = score_tokens(scene.hidden, scene.tokens, self.policy.head, scene.temperature, self.policy.cap)
        require_finite("a log-probability in the update", scores.logprob, piece.place)
        return scene, scores

    def pieces(self, minibatch: TokenTable) -> list[np.ndarray]:
        """Trajectories that are scored at once, by their indices."""
        return self._pieces(minibatch, np.arange(len(minibatch)))

    def own_pieces(self, minibatch: TokenTable) -> list[tuple[np.ndarray, bool]]:
        """This process's share of a minibatch, in ``pieces``, and whether they count.

        Where the processes gather weights together, all have equally many; those that do not count make up the number.
        """
        shares = self.team.shares(minibatch.lengths.tolist())
        own = self._pieces(minibatch, shares[self.team.rank])
        most = max(len(self._pieces(minibatch, share)) for share in shares) if self.team.sharded else 0
        return [(piece, True) for piece in own] + [(np.arange(1), False)] * (most - len(own))

    def _pieces(self, minibatch: TokenTable, rows: np.ndarray) -> list[np.ndarray]:
        sequences = minibatch.sequences("ids")
        own = [sequences[row] for row in rows]
        return [rows[piece] for piece in batches_of(self.policy, own, self.tokens_per_forward)]

    def with_coefficients(self, minibatch: TokenTable) -> TokenTable:
        """The minibatch with c_t of its tokens, what corrects for the sampler among them."""
        weight = minibatch["weight"]
        everything = torch.ones_like(weight, dtype=torch.bool)
        factors = coefficients(self.method, weight, everything, minibatch.trajectory, minibatch["advantage"])
        if "correction" in minibatch.columns:
            factors = factors * minibatch["correction"]
        return minibatch.with_columns(coefficient=factors)

    @torch.no_grad()
    def planned(self, minibatch: TokenTable) -> TokenTable:
        """The minibatch with c_t, and with the surrogate's plan for all of it as the policy scores it now."""
        minibatch, plan = self.with_coefficients(minibatch), surrogate_plan(self.method)
        if plan is None:
            return minibatch
        pieces = self.pieces(minibatch)
        scores = [gathered(self.policy.model, self._scores, minibatch.select(piece)) for piece in pieces]
        logprob, entropy = (torch.cat([getattr(s, name).cpu() for s in scores]) for name in ("logprob", "entropy"))
        order = np.concatenate(pieces)
        now = minibatch.select(order).with_columns(logprob=logprob, entropy=entropy).select(np.argsort(order))
        return minibatch.with_columns(plan=plan(update_tokens(now, now["logprob"], now["entropy"])))

    def _scores(self, piece: TokenTable) -> TokenScores:
        return self.score(piece)[1]

    def read(self, piece: TokenTable) -> tuple[Scene, UpdateTokens, Tensor | None]:
        """Planned trajectories as the policy reads them now, with gradient, and their rows of the plan."""
        scene, scores = self.score(piece)
        soft = next((s for head in self.heads if (s := head.soft_objective(scene)) is not None), None)
        plan = piece["plan"].to(scene.hidden.device) if "plan" in piece.columns else None
        return scene, update_tokens(piece, scores.logprob, scores.entropy, soft), plan

    def terms(self, piece: TokenTable) -> dict[str, Tensor]:
        """Of each trainable token of a planned piece what makes its loss, by what it is called in errors."""
        scene, tokens, plan = self.read(piece)
        columns = {name: piece[name].to(scene.hidden.device) for name in piece.columns} if self.heads else {}
        return {
            "advantage": tokens.advantage,
            "coefficient": tokens.coefficient,
            "entropy": tokens.entropy,
            "surrogate": surrogate_loss(self.method, tokens, plan).loss,
            "KL": kl_penalty(tokens.logprob, tokens.ref_logprob, self.method.regulariser.kl_estimator),
            **{f"{head.name}_loss": head.loss(scene, columns, train_trunk=False) for head in self.heads},
        }

    def loss(self, piece: TokenTable, whole: TokenTable, warming: bool) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """A planned piece's part of its minibatch's loss, of policy and heads, and of what is measured in it.

        Means of the ``whole`` minibatch divide by all its tokens, or all that a head has a target for. While ``warming``,
        only the heads learn, and a trunk that they share with the policy does not.
        """
        scene, tokens, plan = self.read(piece)
        parts = policy_loss(self.method, tokens, plan, int(whole.columns["trainable"].sum()))
        terms = {
            "loss": parts.surrogate,
            "policy_entropy": parts.entropy,
            "kl_loss": parts.kl,
            "kl_behaviour": parts.moved,
            "clip_fraction": parts.clipped,
        }
        total = parts.total * 0.0 if warming else parts.total
        columns = {name: piece[name].to(scene.hidden.device) for name in piece.columns} if self.heads else {}
        for head in self.heads:
            errors = head.loss(scene, columns, train_trunk=not warming) * columns[f"{head.name}_mask"]
            error = errors.sum() / max(1.0, float(whole[f"{head.name}_mask"].sum()))
            terms[f"{head.name}_loss"] = error
            total = total + head.settings.coefficient * error
        return total, terms


def update_tokens(
    table: TokenTable, logprob: Float[Tensor, " m"], entropy: Float[Tensor, " m"], soft: Tensor | None = None
) -> UpdateTokens:
    """A table's trainable tokens as the objective wants them, where their scores are."""
    names = ("logprob_old", "ref_logprob", "advantage", "coefficient", "entropy_terms", "noise")
    columns = {name: table[name].to(logprob.device) for name in names}
    return UpdateTokens(logprob, entropy, trajectory=table.trajectory.to(logprob.device), soft=soft, **columns)


def update(
    learner: Learner, optimizer: Any, minibatch: TokenTable, iteration: int, skipped_before: int = 0
) -> dict[str, float]:
    """One optimizer step; gradients of the pieces add up to the minibatch's exactly.

    So do those of several processes, each of which has some of the trajectories. The step is left out where a loss or a
    gradient is not finite, and the policy's part of it where the policy has gone further
    than ``skip_above_kl``. ``skipped_before`` is how many updates right before this one were not finite.

    Returns:
        What is measured; of an update that is not finite only that it is none. ``weights_moved``, and the same of each head,
        is in the first that moves any: the share of those with a gradient (see ``take_step``).

    Raises:
        NumericsError: a log-probability is not finite, or ``train.non_finite_updates`` updates in a row are not.
        UserError: a first step is lost in rounding (see ``take_step``).
    """
    optimizer.zero_grad(set_to_none=True)
    minibatch = learner.planned(minibatch)
    totals = learner.team.summed(_accumulate_gradients(learner, minibatch, iteration))
    learner.team.sum_gradients(weight for masters in learner.masters for weight in masters.weights)
    owners = ["", *(f"{head.name}_" for head in learner.heads)]
    for owner, masters in zip(owners, learner.masters, strict=True):
        totals[f"{owner}gradient_norm"] = masters.clip(learner.config.train.gradient_clip)
    finite = all(map(math.isfinite, totals.values()))
    limit = learner.method.regulariser.skip_above_kl
    skipped = limit is not None and not totals["kl_behaviour"] <= limit
    if skipped:  # the policy stands still, heads go on
        learner.masters[0].stand_still()
    counted = {"non_finite_losses": float(not finite), "skipped_steps": float(skipped)}
    if not finite:
        _leave_out(not_finite(learner, minibatch, totals), skipped_before + 1, learner.config.train.non_finite_updates)
        return counted
    moved = take_step(optimizer.step, learner.masters)
    totals |= {f"{owner}weights_moved": m for owner, m in zip(owners, moved, strict=True) if m is not None}
    for head in learner.heads:
        head.after_step()
    return totals | gradient_asked(minibatch) | counted


def _leave_out(what: str, in_a_row: int, most: int) -> None:
    """Tell at once why an update is left out; of too many in a row the last is an error."""
    within(0.0, f"an update was left out: {what}", insist=True)
    if in_a_row >= most:
        raise NotFiniteError(
            f"{what}: {in_a_row} updates in a row had to be left out, which ends a training (train.non_finite_updates); a "
            "smaller learning rate may help"
        )


@torch.no_grad()
def not_finite(learner: Learner, minibatch: TokenTable, totals: Mapping[str, float]) -> str:
    """What of an update is not finite, in words: the first such number of a token, or else of a mean, or a gradient.

    ``totals`` are what was measured in it. Of several processes all must ask.
    """
    for rows in learner.pieces(minibatch):
        piece = minibatch.select(rows)
        for name, values in gathered(learner.policy.model, learner.terms, piece).items():
            try:
                require_finite(f"{name} of a token", values, piece.place)
            except NotFiniteError as error:
                return str(error)
    for name, value in totals.items():
        if not math.isfinite(value) and not name.endswith("gradient_norm"):
            return f"{name} is {value}"
    named = [("model.", learner.policy.model), *((f"{head.name}.", head) for head in learner.heads)]
    for owner, module in named:
        for name, weight in module.named_parameters():
            if weight.grad is not None and not bool(own_part(weight.grad).isfinite().all()):
                return f"the gradient of {owner}{name} is not finite"
    return f"the gradient's norm is {max(value for name, value in totals.items() if name.endswith('gradient_norm'))}"


def _accumulate_gradients(learner: Learner, minibatch: TokenTable, iteration: int) -> dict[str, float]:
    """Backward passes over this process's pieces of a planned minibatch; returns the sums of what is measured in them."""
    warming = any(iteration < head.settings.warmup_iterations for head in learner.heads)
    totals, done = dict[str, float](), 0
    for piece, counts in learner.own_pieces(minibatch):
        within(done / len(minibatch), f"{done} of {len(minibatch)} episodes of the next")
        done += len(piece)
        loss, terms = gathered(learner.policy.model, learner.loss, minibatch.select(piece), minibatch, warming)
        (loss if counts else loss * 0.0).backward()
        for key, value in terms.items() if counts else ():
            totals[key] = totals.get(key, 0.0) + float(value.detach())
    return totals


def gradient_asked(minibatch: TokenTable) -> dict[str, float]:
    """Share of ``|c_t A_t|`` by role: where the surrogate's gradient is asked to go before any clipping."""
    role, pull = minibatch["role"], (minibatch["coefficient"] * minibatch["advantage"]).abs()
    total = float(pull.sum()) or 1.0
    return {
        f"gradient_share_{name}": sum(float(pull[role == r].sum()) / total for r in roles)
        for name, roles in REPORTED_ROLES.items()
    }
