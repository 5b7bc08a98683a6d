"""Between text and tokens: the chat layout, the roles of sampled tokens, and the action parser.

Prompts are rendered with the tokenizer's own chat template and encoded once, piece by piece; what was sampled is decoded
to be read, and never encoded again (invariant 1). What an environment says is untrusted: it stays within its message,
whatever it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from tokenizers.decoders import DecodeStream

from pipeline.trajectory import Role

END_OF_RESPONSE = "</answer>"
"""A response is over once the policy has written this, its end-of-sequence token, or as many tokens as it may."""

PLAIN_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Used for a tokenizer without a chat template (base models). Its roles are ordinary words, which an observation can hold
too."""

_NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and line feed, bidirectional embeddings and overrides, lone surrogates."""

_TAG = r"</?(?:think|answer)>"
_TEXT = rf"(?:(?!{_TAG}).)*"
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

    Args:
        response: what was written, an end-of-sequence token included.
        ended: the policy has ended the response itself, by the stop text or its end-of-sequence token.
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


def plain_text(text: str) -> str:
    """Untrusted text, made fit to be encoded, stored and shown; ordinary text stays as it is.

    U+FFFD takes the place of each control character but tab and line feed, of each bidirectional embedding, override and
    isolate, and of each lone surrogate. A carriage return before a line feed is left out.
    """
    return _NOT_TEXT.sub("\ufffd", text.replace("\r\n", "\n"))


def user_message(
    layout: Literal["compact", "published"], turn: int, observation: str, actions_left: int | None, response_tokens: int
) -> str:
    """What a layout says in a turn, from 1, without the reward of the turn before."""
    if layout == "compact":
        return observation
    left = "" if actions_left is None else f"You have {actions_left} actions left. "
    return (
        f"Turn {turn}:\nState:\n{observation}\n{left}Always output: <think> [Your thoughts] </think> <answer> "
        "[your answer] </answer> with no extra text. Strictly follow this format. Max response length: "
        f"{response_tokens} words (tokens)."
    )


class Dialogue:
    """Renders an environment's texts as token ids, by the tokenizer's chat template.

    What the environment says cannot leave its message: see ``carried``.

    Args:
        tokenizer: a fast transformers tokenizer.
        layout: ``compact`` sends observations alone; ``published`` adds task, turn, limits and format.
        prefill: text that opens each response, not sampled.
        response_tokens: the limit that the published layout states.
    """

    def __init__(
        self, tokenizer: Any, layout: Literal["compact", "published"], prefill: str, response_tokens: int
    ) -> None:
        self.tokenizer, self.layout, self.response_tokens = tokenizer, layout, response_tokens
        self.template = None if tokenizer.chat_template else PLAIN_TEMPLATE
        self._encode = lru_cache(maxsize=4096)(
            lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        )
        self.prefill_ids = self.encode(prefill) if prefill else []
        marks = ("\x01observation\x01", "\x01response\x01", "\x01next\x01")
        rendered = self._render(
            [
                {"role": "user", "content": marks[0]},
                {"role": "assistant", "content": marks[1]},
                {"role": "user", "content": marks[2]},
            ]
        )
        self._before, self._after = rendered.split(marks[1], 1)[1].split(marks[2], 1)
        self._marker = _beginning_of(_markers(tokenizer, rendered))

    def opening(self, instructions: str, observation: str, actions_left: int | None = None) -> list[int]:
        """Token ids of everything before the first response (without the prefill)."""
        messages = [{"role": "user", "content": self._user(1, observation, actions_left)}]
        if self.layout == "published":
            messages.insert(0, {"role": "system", "content": self.carried(instructions)})
        return self.encode(self._render(messages))

    def following(
        self, turn: int, observation: str, reward: float, ended_by_eos: bool, actions_left: int | None = None
    ) -> list[int]:
        """Token ids between a response and the next one (without the prefill).

        Args:
            turn: number of the coming turn, from 1.
            observation: what the environment showed.
            reward: the last turn's reward.
            ended_by_eos: the policy has itself sampled its end-of-sequence token, which is then not repeated.
            actions_left: stated by the published layout if the environment knows it.
        """
        content = self._user(turn, observation, actions_left)
        if self.layout == "published":
            content = f"Reward:\n{reward:g}\n{content}"
        before = self._before
        if ended_by_eos and self.tokenizer.eos_token:
            before = before.removeprefix(self.tokenizer.eos_token)
        return self.encode(before + content + self._after)

    def carried(self, text: str) -> str:
        """Untrusted text as a message holds it: ``plain_text`` in which no special token and no chat marker is written.

        U+FFFD takes the place of the first character of each. Ordinary text and the protocol's tags stay as they are.
        """
        return self._marker.sub("\ufffd", plain_text(text))

    def _user(self, turn: int, observation: str, actions_left: int | None) -> str:
        return user_message(self.layout, turn, self.carried(observation), actions_left, self.response_tokens)

    def _render(self, messages: list[dict[str, str]]) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
            )
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, nothing added."""
        return list(self._encode(text))


def _markers(tokenizer: Any, rendered: str) -> set[str]:
    """What a message must not hold: the special tokens, and what else of a template's own writing is one token.

    The protocol's tags are no markers, nor are words: a message may hold both.
    """
    added = [(str(token), token.special) for token in tokenizer.added_tokens_decoder.values()]
    written = {text for text, special in added if special or (text in rendered and not text.isalnum())}
    return {t for t in written.union(tokenizer.all_special_tokens) if t.strip() and not re.fullmatch(_TAG, t)}


def _beginning_of(texts: set[str]) -> re.Pattern[str]:
    """Matches the first character of each of these texts."""
    rests: dict[str, list[str]] = {}
    for text in sorted(texts):
        rests.setdefault(text[0], []).append(re.escape(text[1:]))
    return re.compile("|".join(f"{re.escape(c)}(?={'|'.join(ends)})" for c, ends in rests.items()) or "(?!)")
