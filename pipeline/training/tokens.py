"""What an update trains on: a ragged table of the tokens of whole trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from pipeline.objective.batch import TokenBatch
from pipeline.objective.estimates import AdvantageEstimate
from pipeline.objective.regularisers import EntropyTerms
from pipeline.trajectories.trajectory import Trajectories
from pipeline.workspace.finite import require_finite


@dataclass(frozen=True)
class TokenTable:
    """N tokens of E trajectories, one trajectory after the other: of an iteration, a minibatch, or a piece of one.

    ``table[name]`` is a column's part at the m trainable tokens; nothing else of it is ever read.
    """

    lengths: Int[Tensor, " e"]
    """Tokens of each trajectory, prompts and observations included."""
    columns: Mapping[str, Shaped[Tensor, "n ..."]]
    """By name, a value per token. ``ids``, ``trainable`` (the policy chose this token, and it counts) and ``place`` (among all tokens that
    were collected) are right for every token; any other column is right for the trainable ones alone."""
    names: Sequence[str] = ()
    """Of the trajectories' episodes, for errors; empty where they are not known."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, name: str) -> Shaped[Tensor, "m ..."]:
        return self.columns[name][self.columns["trainable"]]

    @property
    def trajectory(self) -> Int[Tensor, " m"]:
        """Index of each trainable token's trajectory, from 0, non-decreasing."""
        return torch.repeat_interleave(torch.arange(len(self)), self.lengths)[self.columns["trainable"]]

    def place(self, token: int) -> str:
        """Where a token is, counted over the trainable ones, in words."""
        index = int(self.columns["trainable"].nonzero().flatten()[token])
        row = int(torch.searchsorted(self.lengths.cumsum(0), index, right=True))
        episode = f"episode {self.names[row]}" if self.names else f"trajectory {row}"
        return f"token {index - int(self.lengths[:row].sum())} of {episode}"

    def sequences(self, name: str) -> list[np.ndarray]:
        """A column of all tokens, an array per trajectory."""
        return [own.numpy() for own in self.columns[name].split(self.lengths.tolist())]

    def with_columns(self, **columns: Shaped[Tensor, "m ..."]) -> TokenTable:
        """The table with columns more, or with others in their place, of which the trainable tokens' part is given."""
        trainable, whole = self.columns["trainable"], dict(self.columns)
        for name, values in columns.items():
            whole[name] = values.new_zeros((len(trainable), *values.shape[1:]))
            whole[name][trainable] = values
        return replace(self, columns=whole)

    def select(self, trajectories: Sequence[int] | np.ndarray) -> TokenTable:
        """Some trajectories' rows, in the order that is asked for."""
        chosen = torch.as_tensor(np.asarray(trajectories, dtype=np.int64))
        rows = torch.arange(int(self.lengths.sum())).split(self.lengths.tolist())
        index = torch.cat([torch.zeros(0, dtype=torch.long), *(rows[i] for i in chosen.tolist())])
        names = [self.names[row] for row in chosen.tolist()] if self.names else ()
        return TokenTable(self.lengths[chosen], {name: column[index] for name, column in self.columns.items()}, names)


def token_table(
    episodes: Trajectories,
    kept: np.ndarray,
    batch: TokenBatch,
    estimates: Mapping[str, Float[Tensor, " n"]],
    estimate: AdvantageEstimate,
    weight: Float[Tensor, " n"],
    terms: EntropyTerms,
) -> TokenTable:
    """What the slots have made of some trajectories, without those that are there for what they tell of others.

    Args:
        episodes: all that were collected.
        kept: int64: those that passed the filter, in order; all other arguments are of these.
        estimates: what each head said before the update; a column each.
        estimate: advantages, and the targets of the heads: columns ``<name>_target``, and ``<name>_mask`` where it has one. Tokens
            that do not count are not trained on, and have no entropy or KL term either.
        weight: token weights; each counts as often as ``estimate`` says.

    Raises:
        NumericsError: a number of a trainable token is not finite.
    """
    columns = {
        "role": batch.role,
        "logprob_old": batch.logprob,
        "ref_logprob": batch.ref_logprob,
        "advantage": estimate.advantage,
        "weight": weight if estimate.times is None else weight * estimate.times,
        "noise": batch.noise,
        **estimates,
        **{f"{name}_target": target for name, (target, _) in estimate.targets.items()},
        **{f"{name}_mask": mask.to(target.dtype) for name, (target, mask) in estimate.targets.items()},
    }
    place = np.flatnonzero(np.isin(episodes.token_episode, kept))
    trained = place[batch.trainable.numpy()]
    for name, values in columns.items():
        said = f"{name.removesuffix('_old')} of a token"
        require_finite(said, values[batch.trainable], lambda i: episodes.place(int(trained[i])))
    columns |= {
        "ids": torch.from_numpy(episodes.input_ids[place].astype(np.int64)),
        "place": torch.from_numpy(place),
        "trainable": batch.trainable if estimate.times is None else batch.trainable & (estimate.times > 0),
        "entropy_terms": torch.stack(terms, dim=-1),  # its bounds may be infinite
    }
    names = [episodes.episodes["episode_id"][row] for row in kept]
    table = TokenTable(torch.from_numpy(episodes.lengths[kept]), columns, names)
    if estimate.times is None:
        return table
    return table.select(np.flatnonzero(batch.per_trajectory(estimate.times) > 0))
