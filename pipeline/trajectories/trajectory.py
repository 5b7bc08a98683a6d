"""The data type of the pipeline: episodes as ragged arrays of tokens and turns.

``Trajectories`` holds E episodes. Per-token arrays are flat, of length N = ``offsets[-1]``; the tokens of episode e are
``[offsets[e], offsets[e + 1])``, the layout of variable-length attention. Per-turn arrays are flat likewise, with
``turn_offsets``; a turn's ``start`` and ``end`` count from the episode's first token.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.workspace.errors import UserError


class Role(enum.IntEnum):
    """What a token is. The two tag roles differ because ActFocus weighs them differently."""

    PROMPT = 0
    OBSERVATION = 1
    REASONING = 2
    ACTION = 3
    THINK_TAG = 4
    ANSWER_TAG = 5
    OTHER = 6


RESPONSE_ROLES = (Role.REASONING, Role.ACTION, Role.THINK_TAG, Role.ANSWER_TAG, Role.OTHER)
REPORTED_ROLES = {
    "reasoning": (Role.REASONING,),
    "action": (Role.ACTION,),
    "tag": (Role.THINK_TAG, Role.ANSWER_TAG),
    "other": (Role.OTHER,),
}
"""Name -> roles of a response that are reported together."""

CUT_OFF = ("turns", "context")
"""Reasons why an episode ends that its environment has not ended: no turn is left, or no room in ``context_tokens``."""

CUT = ("response_tokens", "context_tokens")
"""What a response may be cut by before it has ended itself: the limits of that name in params.yaml."""

RESPONSES = ("valid", "disallowed", "malformed", "cut")
"""What a turn's response was: valid if its actions were executed. Of the others, cut if it has not ended itself, whatever
it had said by then; malformed if it has, but no action can be read from it; disallowed if one may not be done."""


class TrajectoryError(UserError):
    """A trajectory file that cannot be used, in one line."""


PER_EPISODE = {
    "episode_id": pa.string(),
    "group_id": pa.string(),
    "environment": pa.string(),
    "state_key": pa.string(),
    "seed": pa.int64(),
    "iteration": pa.int64(),
    "policy_version": pa.int64(),
    "temperature": pa.float64(),
    "parent": pa.string(),
    "split": pa.int32(),
    "return": pa.float64(),
    "success": pa.bool_(),
    "end_reason": pa.string(),
}
PER_TURN = {
    "start": pa.int32(),
    "end": pa.int32(),
    "reward": pa.float64(),
    "action": pa.string(),
    "valid": pa.bool_(),
    "state_key": pa.string(),
    "well_formed": pa.bool_(),
    "ended": pa.string(),
}
PER_TOKEN: dict[str, np.dtype[Any]] = {
    "input_ids": np.dtype(np.int32),
    "role": np.dtype(np.uint8),
    "sampled": np.dtype(np.bool_),
    "logprob": np.dtype(np.float32),
    "entropy": np.dtype(np.float32),
}
ANNOTATION = ("energy", "ref_logprob", "ref_entropy")


@dataclass(frozen=True)
class Trajectories:
    """E episodes with T turns and N tokens in all; see the module's text for the layout."""

    episodes: dict[str, list[Any]]
    """Columns of E values: episode_id, group_id, environment, state_key, seed, iteration, policy_version, temperature (of
    sampling), parent and split (branches only, else None: the episode that it branched from, and how many tokens it
    shares with that), return, success, end_reason (goal, failed or the
    environment's ``outcome``, or one of ``CUT_OFF``)."""
    offsets: np.ndarray
    """int64 (E + 1,): token offsets."""
    turn_offsets: np.ndarray
    """int64 (E + 1,): turn offsets."""
    turns: dict[str, list[Any]]
    """Columns of T values: start and end of the response, reward, action as executed, valid (it was executed), state_key
    before it, well_formed (actions can be read from the response, allowed or not), and how the response ended: by the
    ``stop`` text, by an end-of-sequence token (``eos``), or one of ``CUT``."""
    input_ids: np.ndarray
    """int32 (N,): token ids exactly as prompted or sampled."""
    role: np.ndarray
    """uint8 (N,): a ``Role``."""
    sampled: np.ndarray
    """bool (N,): the policy chose this token; everything else is never trained on."""
    logprob: np.ndarray
    """float32 (N,): log-probability under the behaviour policy, at the sampling temperature; 0 where not sampled."""
    entropy: np.ndarray
    """float32 (N,): entropy in nats of the behaviour policy's distribution; 0 where not sampled, NaN until it is computed
    where the engine could not tell it."""
    energy: np.ndarray | None = None
    """float32 (N,): -logsumexp of the reference policy's raw logits; 0 where not sampled."""
    ref_logprob: np.ndarray | None = None
    """float32 (N,): log-probability under the reference policy, same temperature."""
    ref_entropy: np.ndarray | None = None
    """float32 (N,): entropy of the reference policy's distribution, same temperature."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 (E,): tokens per episode."""
        return np.diff(self.offsets)

    def tokens(self, episode: int) -> slice:
        """Where an episode's tokens are."""
        return slice(self.offsets[episode], self.offsets[episode + 1])

    def place(self, token: int) -> str:
        """Where a token is, counted over all episodes, in words."""
        episode = int(np.searchsorted(self.offsets, token, side="right")) - 1
        return f"token {token - self.offsets[episode]} of episode {self.episodes['episode_id'][episode]}"

    @property
    def sequences(self) -> list[np.ndarray]:
        """Token ids, an array per episode."""
        return [self.input_ids[self.tokens(episode)] for episode in range(len(self))]

    @property
    def annotated(self) -> bool:
        """Whether the reference policy's energy, log-probability and entropy are present."""
        return self.energy is not None

    @property
    def token_episode(self) -> np.ndarray:
        """int64 (N,): the episode of each token."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def splits(self) -> np.ndarray:
        """int64 (E,): tokens that each episode shares with the one that it branched from; 0 for those that did not."""
        return np.array([split or 0 for split in self.episodes["split"]], dtype=np.int64)

    @property
    def parents(self) -> np.ndarray:
        """int64 (E,): index of the episode that each one branched from, -1 for those that did not.

        Raises:
            TrajectoryError: that episode is not among these.
        """
        index = {name: number for number, name in enumerate(self.episodes["episode_id"])}
        missing = [name for name in self.episodes["parent"] if name is not None and name not in index]
        if missing:
            raise TrajectoryError(f"episode {missing[0]!r}, which others branch from, is missing")
        return np.array([-1 if name is None else index[name] for name in self.episodes["parent"]], dtype=np.int64)

    @property
    def trainable(self) -> np.ndarray:
        """bool (N,): sampled, and in this episode first: a token that branches share is trained where it was sampled."""
        place = np.arange(len(self.input_ids)) - np.repeat(self.offsets[:-1], self.lengths)
        return np.asarray(self.sampled & (place >= np.repeat(self.splits, self.lengths)))

    @property
    def groups(self) -> np.ndarray:
        """int64 (E,): index of each episode's group, numbered by first appearance."""
        order: dict[str, int] = {}
        return np.array([order.setdefault(g, len(order)) for g in self.episodes["group_id"]], dtype=np.int64)

    @property
    def returns(self) -> np.ndarray:
        """float64 (E,): sum of rewards per episode."""
        return np.array(self.episodes["return"], dtype=np.float64)

    @property
    def responses(self) -> list[str]:
        """What each turn's response was, of ``RESPONSES``: T values."""
        columns = (self.turns[name] for name in ("valid", "well_formed", "ended"))
        return [response_kind(*turn) for turn in zip(*columns, strict=True)]

    def token_rewards(self) -> np.ndarray:
        """float64 (N,): each turn's reward on the last sampled token of its response, 0 elsewhere.

        Raises:
            TrajectoryError: a turn has a reward but no sampled token to carry it.
        """
        rewards = np.zeros(len(self.input_ids))
        for turn, (first, last) in enumerate(self._responses()):
            if (reward := self.turns["reward"][turn]) != 0:
                chosen = np.flatnonzero(self.sampled[first:last])
                if len(chosen) == 0:
                    raise TrajectoryError(f"turn {turn} has reward {reward} but no sampled token")
                rewards[first + chosen[-1]] += reward
        return rewards

    def token_turn(self) -> np.ndarray:
        """int64 (N,): index of the turn (over all episodes) whose response holds the token, -1 outside responses."""
        owner = np.full(len(self.input_ids), -1, dtype=np.int64)
        for turn, (first, last) in enumerate(self._responses()):
            owner[first:last] = turn
        return owner

    def _responses(self) -> list[tuple[int, int]]:
        """Each turn's first token of its response, and the one behind its last, counted over all episodes."""
        base = np.repeat(self.offsets[:-1], np.diff(self.turn_offsets)).tolist()
        return [(b + s, b + e) for b, s, e in zip(base, self.turns["start"], self.turns["end"], strict=True)]

    def select(self, index: Sequence[int] | np.ndarray) -> Trajectories:
        """The episodes at ``index``, in that order."""
        chosen = [int(i) for i in index]
        tokens = _ragged_take(self.offsets, chosen)
        turns = _ragged_take(self.turn_offsets, chosen)
        changes: dict[str, Any] = {
            name: getattr(self, name)[tokens] for name in (*PER_TOKEN, *ANNOTATION) if getattr(self, name) is not None
        }
        return replace(
            self,
            episodes={name: [column[i] for i in chosen] for name, column in self.episodes.items()},
            offsets=offsets_of(self.lengths[chosen]),
            turn_offsets=offsets_of(np.diff(self.turn_offsets)[chosen]),
            turns={name: [column[i] for i in turns] for name, column in self.turns.items()},
            **changes,
        )


def response_kind(valid: bool, well_formed: bool, ended: str) -> str:
    """What a response was, of ``RESPONSES``, by its turn's columns."""
    if valid:
        return "valid"
    return "cut" if ended in CUT else "disallowed" if well_formed else "malformed"


def concatenate(parts: Sequence[Trajectories]) -> Trajectories:
    """The episodes of all parts, in order; annotated if all are."""
    names = [*PER_TOKEN, *(ANNOTATION if all(part.annotated for part in parts) else ())]
    return Trajectories(
        episodes={name: [v for part in parts for v in part.episodes[name]] for name in PER_EPISODE},
        offsets=offsets_of(np.concatenate([part.lengths for part in parts])),
        turn_offsets=offsets_of(np.concatenate([np.diff(part.turn_offsets) for part in parts])),
        turns={name: [v for part in parts for v in part.turns[name]] for name in PER_TURN},
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names},
    )


def require_known_ids(trajectories: Trajectories, count: int) -> None:
    """Refuse token ids that a policy of ``count`` tokens does not have.

    Raises:
        TrajectoryError: the greatest one is not below that.
    """
    greatest = int(trajectories.input_ids.max(initial=0))
    if greatest >= count:
        raise TrajectoryError(
            f"token id {greatest} is none of the policy's, which end at {count - 1}: another one sampled it"
        )


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """int64 (n + 1,): where each of n stretches of these lengths begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _ragged_take(offsets: np.ndarray, index: Sequence[int]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *(np.arange(offsets[i], offsets[i + 1]) for i in index)])
