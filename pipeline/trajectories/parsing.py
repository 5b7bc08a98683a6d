"""What a policy has written: its text, the role of each of its tokens, and its actions.

What was sampled is decoded to be read, and never encoded again (invariant 1).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers.decoders import DecodeStream

from pipeline.trajectories.trajectory import Role

END_OF_RESPONSE = "</answer>"
"""A response is over once the policy has written this, its end-of-sequence token, or as many tokens as it may."""

TAG = r"</?(?:think|answer)>"
_TEXT = rf"(?:(?!{TAG}).)*"
_PREFIX = re.compile(
    rf"\s*(?P<think><think>)(?P<reasoning>{_TEXT})(?:(?P<think_end></think>)\s*"
    rf"(?:(?P<answer><answer>)(?:(?P<action>{_TEXT})(?P<answer_end></answer>))?)?)?",
    re.S,
)
"""The longest beginning of a response that follows the format; an answer counts as action once it is closed."""
_REGIONS = {
    "think": Role.THINK_TAG,
    "reasoning": Role.REASONING,
    "think_end": Role.THINK_TAG,
    "answer": Role.ANSWER_TAG,
    "action": Role.ACTION,
    "answer_end": Role.ANSWER_TAG,
}
_PRIORITY = {Role.ACTION: 4, Role.ANSWER_TAG: 3, Role.THINK_TAG: 2, Role.REASONING: 1, Role.OTHER: 0}


@dataclass(frozen=True)
class DecodedResponse:
    """A response's text, and which characters each token wrote."""

    text: str
    spans: list[tuple[int, int]]
    """Start and end character per token; tokens that write one character together share its span."""


def decode(tokenizer: Any, ids: Sequence[int]) -> DecodedResponse:
    """Decode token by token, so that each token's characters are known whatever the tokenizer's units."""
    stream = DecodeStream(skip_special_tokens=False)
    text, spans, pending = "", [], 0
    for token in ids:
        pending += 1
        piece = stream.step(tokenizer.backend_tokenizer, int(token))
        if piece is None:
            continue
        spans += [(len(text), len(text) + len(piece))] * pending
        text, pending = text + piece, 0
    spans += [(len(text), len(text))] * pending
    return DecodedResponse(text, spans)


def token_roles(response: DecodedResponse, ended: bool = False) -> list[Role]:
    """The role of each token of a response, from character offsets.

    The format is ``<think>`` reasoning ``</think><answer>`` action ``</answer>``. What follows it has its region's role;
    from the first deviation on everything is other: text between or after the parts, a tag where it does not belong, an
    answer that is never closed. What is thought is other as well if the response ends itself without ever having closed
    it; where a limit of tokens cuts the response, it is reasoning. A token across a border has the most consequential
    role it touches: action, then answer tag, think tag, reasoning, other.

    ``ended``: the policy has ended the response itself, by the stop text or its end-of-sequence token.
    """
    roles: list[Role] = [Role.OTHER] * len(response.text)
    followed = _PREFIX.match(response.text)
    inside = Role.OTHER
    if followed is not None:
        thinking = followed["think_end"] is None
        for region, role in _REGIONS.items():
            start, end = followed.span(region)
            if start >= 0 and not (role == Role.REASONING and thinking and ended):
                roles[start:end] = [role] * (end - start)
        if thinking and not ended and followed.end() == len(response.text):
            inside = Role.REASONING
    result = []
    for start, end in response.spans:
        touched = roles[start:end] or roles[start : start + 1] or [inside]
        result.append(max(touched, key=_PRIORITY.__getitem__))
    return result


def parse_response(text: str, limit: int) -> list[str] | None:
    """The actions of a response, at most ``limit`` of them; None unless it is exactly ``<think>…</think><answer>…</answer>``.

    Several actions are separated by ``||``; those beyond the limit are dropped.
    """
    match = _PREFIX.match(text)
    if match is None or match["answer_end"] is None or text[match.end() :].strip():
        return None
    actions = [part.strip() for part in match["action"].split("||")]
    return [action for action in actions if action][:limit] or None
