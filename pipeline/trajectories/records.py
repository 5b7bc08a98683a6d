"""Episodes as records that a reader can follow: per turn what was shown, what was done, and every token's numbers."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.trajectories.parsing import decode
from pipeline.trajectories.prompting import plain_text
from pipeline.trajectories.trajectory import Role, Trajectories, response_kind

NUMBERS = ("energy", "logprob", "shift", "advantage", "weight", "coefficient")
"""A token's numbers: energy, log-probability under the behaviour policy, its difference from the reference policy's,
advantage, weight of the weight slot, and c_t after aggregation."""


def episode_records(
    trajectories: Trajectories, tokenizer: Any, columns: Mapping[str, np.ndarray] | None = None
) -> list[dict[str, Any]]:
    """A JSON-ready record per episode; its texts are untrusted, but hold no control characters (see ``plain_text``).

    ``columns`` are further numbers of all tokens (N,), by their names in ``NUMBERS``; NaN where a token has none.

    Returns:
        Per episode ``id``, ``group``, ``parent`` and ``split`` (of a branch, else null: the episode that it branched from,
        and how many tokens it shares with that), ``seed``, ``iteration``, ``state``, ``return``, ``success``, ``end`` and
        ``turns``: ``shown`` (all text since the last response), ``state`` (before the turn), ``action``, ``valid``,
        ``response`` (one of ``RESPONSES``), ``ended`` (how it did), ``reward`` and ``tokens``, the response as columns of
        equal length: ``text``, ``role``, ``sampled`` and ``NUMBERS``, with 5 significant digits, null where a token has none. Where several tokens wrote one character, the first has it.
    """
    undefined = dict.fromkeys(NUMBERS, np.full(len(trajectories.input_ids), np.nan))
    numbers = undefined | _numbers(trajectories) | dict(columns or {})
    return [_record(trajectories, tokenizer, numbers, episode) for episode in range(len(trajectories))]


def _numbers(trajectories: Trajectories) -> dict[str, np.ndarray]:
    found = {"logprob": trajectories.logprob}
    if trajectories.energy is not None and trajectories.ref_logprob is not None:
        found |= {"energy": trajectories.energy, "shift": trajectories.logprob - trajectories.ref_logprob}
    return {name: np.where(trajectories.sampled, values, np.nan) for name, values in found.items()}


def _record(
    trajectories: Trajectories, tokenizer: Any, numbers: Mapping[str, np.ndarray], episode: int
) -> dict[str, Any]:
    outcome = {name: column[episode] for name, column in trajectories.episodes.items()}
    base, position, turns = int(trajectories.offsets[episode]), 0, []
    for turn in range(trajectories.turn_offsets[episode], trajectories.turn_offsets[episode + 1]):
        own = {name: column[turn] for name, column in trajectories.turns.items()}
        shown = trajectories.input_ids[base + position : base + own["start"]].tolist()
        span = slice(base + own["start"], base + own["end"])
        response = decode(tokenizer, trajectories.input_ids[span].tolist())
        tokens = {
            "text": _texts(response.text, response.spans),
            "role": [Role(role).name.lower() for role in trajectories.role[span]],
            "sampled": trajectories.sampled[span].tolist(),
            **{name: [rounded(value) for value in numbers[name][span]] for name in NUMBERS},
        }
        turns.append(
            {
                "shown": plain_text(decode(tokenizer, shown).text),
                "state": plain_text(own["state_key"]),
                "action": plain_text(own["action"]),
                "valid": bool(own["valid"]),
                "response": response_kind(own["valid"], own["well_formed"], own["ended"]),
                "ended": own["ended"],
                "reward": rounded(own["reward"]),
                "tokens": tokens,
            }
        )
        position = own["end"]
    return {
        "id": outcome["episode_id"],
        "group": outcome["group_id"],
        **{name: outcome[name] for name in ("parent", "split", "seed", "iteration")},
        "state": plain_text(outcome["state_key"]),
        "return": rounded(outcome["return"]),
        "success": bool(outcome["success"]),
        "end": outcome["end_reason"],
        "turns": turns,
    }


def _texts(text: str, spans: list[tuple[int, int]]) -> list[str]:
    """What each token wrote; of tokens that share a span the first has it."""
    return [
        plain_text(text[start:end]) if index == 0 or spans[index - 1] != (start, end) else ""
        for index, (start, end) in enumerate(spans)
    ]


def rounded(value: float) -> float | None:
    """Five significant digits, so that equal results are equal text; None if undefined, because JSON has no NaN."""
    return float(f"{value:.5g}") + 0.0 if math.isfinite(value) else None
