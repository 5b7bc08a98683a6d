"""Growing episodes token by token and turn by turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.trajectories.trajectory import PER_EPISODE, PER_TOKEN, PER_TURN, Role, Trajectories, offsets_of


class EpisodeBuilder:
    """Grows one episode: append tokens, close each turn, then ``build`` many into ``Trajectories``."""

    def __init__(self, **identity: Any) -> None:
        self.identity = identity
        self.tokens: dict[str, list[Any]] = {name: [] for name in PER_TOKEN}
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
        size = len(ids)
        self._append(ids, [role] * size, [False] * size, [0.0] * size, [0.0] * size)

    def append_sampled(
        self, ids: Sequence[int], roles: Sequence[int], logprob: Sequence[float], entropy: Sequence[float]
    ) -> None:
        """Tokens that the policy chose."""
        self._append(ids, roles, [True] * len(ids), logprob, entropy)

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

    def _append(self, *columns: Sequence[Any]) -> None:
        for name, values in zip(PER_TOKEN, columns, strict=True):
            self.tokens[name].extend(values)

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
        turn = (start, len(self), reward, action, valid, state_key, well_formed, ended)
        self.turns.append(dict(zip(PER_TURN, turn, strict=True)))

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
        name: np.array([v for b in builders for v in b.tokens[name]], dtype=dtype) for name, dtype in PER_TOKEN.items()
    }
    return Trajectories(
        episodes={name: [row[name] for row in rows] for name in PER_EPISODE},
        offsets=offsets_of(np.array([len(b) for b in builders], dtype=np.int64)),
        turn_offsets=offsets_of(np.array([len(b.turns) for b in builders], dtype=np.int64)),
        turns={name: [turn[name] for b in builders for turn in b.turns] for name in PER_TURN},
        **flat,
    )
