"""The data type of the pipeline: episodes as ragged token arrays, and their Parquet form.

``Trajectories`` holds E episodes. Per-token arrays are flat, of length N = ``offsets[-1]``; the tokens of episode e are
``[offsets[e], offsets[e + 1])``, the layout of variable-length attention. Per-turn arrays are flat likewise, with
``turn_offsets``; a turn's ``start`` and ``end`` count from the episode's first token.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA_VERSION = 3


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


class TrajectoryError(Exception):
    """A trajectory file that cannot be used, in one line."""


_EPISODE = {
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
_TURN = {
    "start": pa.int32(),
    "end": pa.int32(),
    "reward": pa.float64(),
    "action": pa.string(),
    "valid": pa.bool_(),
    "state_key": pa.string(),
    "well_formed": pa.bool_(),
    "ended": pa.string(),
}
_TOKEN: dict[str, np.dtype[Any]] = {
    "input_ids": np.dtype(np.int32),
    "role": np.dtype(np.uint8),
    "sampled": np.dtype(np.bool_),
    "logprob": np.dtype(np.float32),
    "entropy": np.dtype(np.float32),
}
_ANNOTATION = ("energy", "ref_logprob", "ref_entropy")


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
    """float32 (N,): entropy in nats of the behaviour policy's distribution; 0 where not sampled."""
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
        for episode in range(len(self)):
            for turn in range(self.turn_offsets[episode], self.turn_offsets[episode + 1]):
                reward = self.turns["reward"][turn]
                if reward == 0:
                    continue
                first, last = (self.offsets[episode] + self.turns[key][turn] for key in ("start", "end"))
                chosen = np.flatnonzero(self.sampled[first:last])
                if len(chosen) == 0:
                    raise TrajectoryError(f"turn {turn} has reward {reward} but no sampled token")
                rewards[first + chosen[-1]] += reward
        return rewards

    def token_turn(self) -> np.ndarray:
        """int64 (N,): index of the turn (over all episodes) whose response holds the token, -1 outside responses."""
        owner = np.full(len(self.input_ids), -1, dtype=np.int64)
        for episode in range(len(self)):
            for turn in range(self.turn_offsets[episode], self.turn_offsets[episode + 1]):
                base = self.offsets[episode]
                owner[base + self.turns["start"][turn] : base + self.turns["end"][turn]] = turn
        return owner

    def select(self, index: Sequence[int] | np.ndarray) -> Trajectories:
        """The episodes at ``index``, in that order."""
        chosen = [int(i) for i in index]
        tokens = _ragged_take(self.offsets, chosen)
        turns = _ragged_take(self.turn_offsets, chosen)
        changes: dict[str, Any] = {
            name: getattr(self, name)[tokens] for name in (*_TOKEN, *_ANNOTATION) if getattr(self, name) is not None
        }
        return replace(
            self,
            episodes={name: [column[i] for i in chosen] for name, column in self.episodes.items()},
            offsets=_offsets(self.lengths[chosen]),
            turn_offsets=_offsets(np.diff(self.turn_offsets)[chosen]),
            turns={name: [column[i] for i in turns] for name, column in self.turns.items()},
            **changes,
        )

    def to_table(self) -> pa.Table:
        """One row per episode, as ``design`` of the Parquet file: scalars, a list of turns, lists of token values."""
        columns: dict[str, pa.Array] = {
            name: pa.array(self.episodes[name], type=kind) for name, kind in _EPISODE.items()
        }
        struct = pa.StructArray.from_arrays(
            [pa.array(self.turns[name], type=kind) for name, kind in _TURN.items()], names=list(_TURN)
        )
        columns["turns"] = pa.ListArray.from_arrays(pa.array(self.turn_offsets, type=pa.int32()), struct)
        token_offsets = pa.array(self.offsets, type=pa.int32())
        for name in (*_TOKEN, *_ANNOTATION):
            values = getattr(self, name)
            if values is not None:
                columns[name] = pa.ListArray.from_arrays(token_offsets, pa.array(values))
        return pa.table(columns).replace_schema_metadata({"trajectory_schema": str(SCHEMA_VERSION)})

    @classmethod
    def from_table(cls, table: pa.Table) -> Trajectories:
        """Inverse of ``to_table``.

        Raises:
            TrajectoryError: a column is missing, or the schema's version is another one.
        """
        version = (table.schema.metadata or {}).get(b"trajectory_schema", b"none").decode()
        if version != str(SCHEMA_VERSION):
            again = "another version of this code wrote it, `dvc repro` makes it again"
            raise TrajectoryError(f"{again}: trajectory schema {version} found, {SCHEMA_VERSION} expected")
        missing = [name for name in (*_EPISODE, "turns", *_TOKEN) if name not in table.column_names]
        if missing:
            raise TrajectoryError(f"missing columns: {', '.join(missing)}")
        table = table.combine_chunks()

        def ragged(name: str) -> tuple[np.ndarray, pa.Array]:
            column = table.column(name)
            array = column.chunk(0) if column.num_chunks else pa.array([], type=column.type)
            return _offsets(np.asarray(array.value_lengths(), dtype=np.int64)), array.flatten()

        offsets, _ = ragged("input_ids")
        turn_offsets, struct = ragged("turns")
        absent = [f"turns.{name}" for name in _TURN if struct.type.get_field_index(name) < 0]
        if absent:
            raise TrajectoryError(f"missing columns: {', '.join(absent)}")
        tokens: dict[str, np.ndarray] = {}
        for name in (*_TOKEN, *(a for a in _ANNOTATION if a in table.column_names)):
            own_offsets, values = ragged(name)
            if not np.array_equal(own_offsets, offsets):
                raise TrajectoryError(f"column {name} differs in length from input_ids")
            tokens[name] = values.to_numpy(zero_copy_only=False)
        return cls(
            episodes={name: table.column(name).to_pylist() for name in _EPISODE},
            offsets=offsets,
            turn_offsets=turn_offsets,
            turns={name: struct.field(name).to_pylist() for name in _TURN},
            **tokens,
        )

    def write(self, path: str | Path) -> None:
        """Write as zstd Parquet; equal trajectories give equal bytes. An existing file is replaced at once."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        pq.write_table(self.to_table(), partial, compression="zstd", row_group_size=1024, write_page_checksum=True)
        partial.replace(target)


def read(path: str | Path) -> Trajectories:
    """Read a Parquet file written by ``Trajectories.write``.

    Raises:
        TrajectoryError: the file is missing, corrupt or of another schema; the message names the file.
    """
    try:
        return Trajectories.from_table(pq.read_table(path, page_checksum_verification=True))
    except FileNotFoundError:
        raise TrajectoryError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError) as error:
        raise TrajectoryError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None
    except TrajectoryError as error:
        raise TrajectoryError(f"{path}: {error}") from None


def response_kind(valid: bool, well_formed: bool, ended: str) -> str:
    """What a response was, of ``RESPONSES``, by its turn's columns."""
    if valid:
        return "valid"
    return "cut" if ended in CUT else "disallowed" if well_formed else "malformed"


def concatenate(parts: Sequence[Trajectories]) -> Trajectories:
    """The episodes of all parts, in order; annotated if all are."""
    first = parts[0]
    annotated = all(part.annotated for part in parts)
    names = [f.name for f in fields(first) if f.name in _TOKEN or (annotated and f.name in _ANNOTATION)]
    return Trajectories(
        episodes={name: [v for part in parts for v in part.episodes[name]] for name in _EPISODE},
        offsets=_offsets(np.concatenate([part.lengths for part in parts])),
        turn_offsets=_offsets(np.concatenate([np.diff(part.turn_offsets) for part in parts])),
        turns={name: [v for part in parts for v in part.turns[name]] for name in _TURN},
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names},
    )


class EpisodeBuilder:
    """Grows one episode: ``append`` tokens, close each turn, then ``build`` many into ``Trajectories``."""

    def __init__(self, **identity: Any) -> None:
        self.identity = identity
        self.tokens: dict[str, list[Any]] = {name: [] for name in _TOKEN}
        self.turns: list[dict[str, Any]] = []
        self.outcome: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.tokens["input_ids"])

    @property
    def ids(self) -> list[int]:
        """All token ids so far."""
        return self.tokens["input_ids"]

    def append_text(self, ids: Sequence[int], role: Role) -> None:
        """Tokens that the policy did not choose."""
        self._append(ids, [role] * len(ids), False, [0.0] * len(ids), [0.0] * len(ids))

    def append_sampled(
        self, ids: Sequence[int], roles: Sequence[int], logprob: Sequence[float], entropy: Sequence[float]
    ) -> None:
        """Tokens that the policy chose."""
        self._append(ids, roles, True, logprob, entropy)

    def before(self, split: int, **identity: Any) -> EpisodeBuilder:
        """A branch: another episode with the first ``split`` tokens and the turns that were over by then.

        Raises:
            ValueError: the policy did not choose the token at ``split``.
        """
        if not (0 < split < len(self) and self.tokens["sampled"][split]):
            raise ValueError(f"token {split} of {self.identity.get('episode_id')} is not one that the policy chose")
        branch = EpisodeBuilder(**identity, parent=self.identity["episode_id"], split=split)
        branch.tokens = {name: values[:split] for name, values in self.tokens.items()}
        branch.turns = [dict(turn) for turn in self.turns if turn["end"] <= split]
        return branch

    def change_roles(self, roles: Sequence[int]) -> None:
        """Give the last tokens other roles."""
        self.tokens["role"][len(self) - len(roles) :] = roles

    def _append(
        self,
        ids: Sequence[int],
        roles: Sequence[int],
        sampled: bool,
        logprob: Sequence[float],
        entropy: Sequence[float],
    ) -> None:
        self.tokens["input_ids"] += list(ids)
        self.tokens["role"] += list(roles)
        self.tokens["sampled"] += [sampled] * len(ids)
        self.tokens["logprob"] += list(logprob)
        self.tokens["entropy"] += list(entropy)

    def close_turn(
        self,
        start: int,
        reward: float,
        action: str,
        valid: bool,
        state_key: str,
        well_formed: bool = True,
        ended: str = "stop",
    ) -> None:
        """End the turn whose response began at token ``start``."""
        self.turns.append(
            {
                "start": start,
                "end": len(self),
                "reward": reward,
                "action": action,
                "valid": valid,
                "state_key": state_key,
                "well_formed": well_formed,
                "ended": ended,
            }
        )

    def finish(self, success: bool, end_reason: str) -> None:
        """Record the outcome; the return is the sum of the turns' rewards."""
        self.outcome = {
            "return": float(sum(turn["reward"] for turn in self.turns)),
            "success": success,
            "end_reason": end_reason,
        }


def build(builders: Sequence[EpisodeBuilder]) -> Trajectories:
    """Finished episodes as one ``Trajectories``."""
    rows = [{"temperature": None, "parent": None, "split": None, **b.identity, **b.outcome} for b in builders]
    flat = {
        name: np.array([v for b in builders for v in b.tokens[name]], dtype=dtype) for name, dtype in _TOKEN.items()
    }
    return Trajectories(
        episodes={name: [row[name] for row in rows] for name in _EPISODE},
        offsets=_offsets(np.array([len(b) for b in builders], dtype=np.int64)),
        turn_offsets=_offsets(np.array([len(b.turns) for b in builders], dtype=np.int64)),
        turns={name: [turn[name] for b in builders for turn in b.turns] for name in _TURN},
        **flat,
    )


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _ragged_take(offsets: np.ndarray, index: Sequence[int]) -> np.ndarray:
    parts = [np.arange(offsets[i], offsets[i + 1]) for i in index]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
