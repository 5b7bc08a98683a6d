"""What a policy reads: the wording of its prompts, rendered as token ids by the tokenizer's own chat template.

Each piece is encoded once. What an environment says is untrusted: it stays within its message, whatever it is.
"""

from __future__ import annotations

import re
from datetime import datetime
from functools import lru_cache
from textwrap import shorten
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError

from pipeline.trajectories.parsing import TAG
from pipeline.workspace.errors import UserError

PLAIN_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Used for a tokenizer without a chat template (base models). Its roles are ordinary words, which an observation can hold
too."""

TODAY = datetime(2024, 7, 26)
"""The date that templates are told: equal runs have equal prompts, whatever the day."""

INVALID = "Invalid response: the state is unchanged."
"""Opens the observation after a turn without a parsable, allowed action."""

_NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and line feed, bidirectional embeddings and overrides, lone surrogates."""

_OPENED = re.compile(r"<think>(?:\s*</think>)?\s*\Z")
"""What templates of reasoning models write behind the assistant's header: an open, or an empty, part of reasoning."""


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

    Only what stands before the first response and between two responses is rendered. Responses stay as sampled,
    whatever the template would make of earlier ones. What the environment says cannot leave its message: see
    ``carried``.

    Where the template itself opens the response with ``<think>``, that is part of the prefill. Where it knows no system
    message, or does not leave it at the beginning, the task stands in the first user message.

    Args:
        layout: ``compact`` sends observations alone; ``published`` adds task, turn, limits and format.
        prefill: text that opens each response, not sampled.
        response_tokens: the limit that the published layout states.

    Raises:
        UserError: the chat template cannot be used for a conversation that grows turn by turn, or contradicts the
            prefill.
    """

    def __init__(
        self, tokenizer: Any, layout: Literal["compact", "published"], prefill: str, response_tokens: int
    ) -> None:
        self.tokenizer, self.layout, self.response_tokens = tokenizer, layout, response_tokens
        self.template = _template(tokenizer)
        self._encode = lru_cache(maxsize=4096)(
            lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        )
        self._between = lru_cache(maxsize=4096)(  # rendering takes long, and small worlds repeat themselves
            lambda content: _behind(_REPLIES[0], self._render(self._messages(_TASK, [_SHOWN[0], content])))
        )
        for self._system in (True, False) if layout == "published" else (False,):
            probe, why_not = self._probe()
            if not why_not:
                break
        else:
            raise UserError(f"policy: its chat template {why_not}")
        self._opened, self._end = _opened_by(probe.opening), _end_of_turn(tokenizer, probe.closing)
        if prefill and "</think>" in self._opened:
            raise UserError(
                f"rollout.prefill: {prefill!r} does not go with the policy's chat template, which opens and closes the "
                "reasoning itself; leave it empty"
            )
        self.prefill_ids = self._forced(probe.opening.removesuffix(self._opened), self._opened or prefill)
        self._marker = _beginning_of(_markers(tokenizer, probe.whole))

    def opening(self, instructions: str, observation: str, actions_left: int | None = None) -> list[int]:
        """Token ids of everything before the first response (without the prefill)."""
        content = self._user(1, observation, actions_left)
        rendered = self._render(self._messages(self.carried(instructions), [content]))
        return self.encode(rendered.removesuffix(self._opened))

    def following(
        self, turn: int, observation: str, reward: float, ended_by_eos: bool, actions_left: int | None = None
    ) -> list[int]:
        """Token ids between a response and the next one (without the prefill), whose turn is numbered from 1.

        Where the policy has itself sampled an end-of-sequence token, the template's is left out.
        """
        content = self._user(turn, observation, actions_left)
        if self.layout == "published":
            content = f"Reward:\n{reward:g}\n{content}"
        rendered = self._between(content)
        return self.encode(rendered.removeprefix(self._end if ended_by_eos else "").removesuffix(self._opened))

    def carried(self, text: str) -> str:
        """Untrusted text as a message holds it: ``plain_text`` in which no special token and no chat marker is written.

        U+FFFD takes the place of the first character of each. Ordinary text and the protocol's tags stay as they are.
        """
        return self._marker.sub("\ufffd", plain_text(text))

    def _user(self, turn: int, observation: str, actions_left: int | None) -> str:
        return user_message(self.layout, turn, self.carried(observation), actions_left, self.response_tokens)

    def _forced(self, prompt: str, text: str) -> list[int]:
        """Token ids of a text behind a prompt, where the two have no token in common; else of the text alone."""
        before, whole = self.encode(prompt), self.encode(prompt + text)
        return whole[len(before) :] if whole[: len(before)] == before else self.encode(text)

    def _messages(self, instructions: str, shown: list[str], reply: bool = False) -> list[dict[str, str]]:
        """A conversation in which every message of the user but the last, or every one, has been replied to."""
        messages: list[dict[str, str]] = []
        if self.layout == "published" and self._system:
            messages = [{"role": "system", "content": instructions}]
        elif self.layout == "published":
            shown = [f"{instructions}\n\n{shown[0]}", *shown[1:]]
        for number, content in enumerate(shown):
            messages.append({"role": "user", "content": content})
            if reply or number < len(shown) - 1:
                messages.append({"role": "assistant", "content": _REPLIES[number]})
        return messages

    def _render(self, messages: list[dict[str, str]], opened: bool = True) -> str:
        """``opened``: up to where the next response begins."""
        options = {"chat_template": self.template, "tokenize": False, "add_generation_prompt": opened}
        return str(self.tokenizer.apply_chat_template(messages, **options))

    def _probe(self) -> tuple[_Probe, str]:
        """How the template renders a conversation, and why such a conversation cannot be led; empty if it can."""
        try:
            opening, second, whole = (self._render(self._messages(_TASK, list(_SHOWN[:n]))) for n in (1, 2, 3))
            told = self._render(self._messages(_TASK, [_SHOWN[0]]), opened=False)
            closed = self._render(self._messages(_TASK, [_SHOWN[0]], reply=True), opened=False)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            return _Probe("", "", ""), f"cannot write a conversation in turns: {shorten(str(error), 120)}"
        probe = _Probe(opening, whole, _behind(_REPLIES[0], closed))
        said = [*_SHOWN, *_REPLIES, *([_TASK] if self.layout == "published" else [])]
        if any(whole.count(text) != 1 for text in said):
            return probe, "does not write each message once, as it is"
        header = whole.removeprefix(opening).split(_REPLIES[0])[0]
        if opening == told and header.strip():
            return probe, "does not open the response: it leaves add_generation_prompt aside"
        between = _behind(_REPLIES[0], second)
        if not _continues(opening, whole) or not _continues(between, _behind(_REPLIES[0], whole)):
            return probe, "writes a turn otherwise once the next one follows"
        if _behind(_REPLIES[1], whole) != between.replace(_SHOWN[1], _SHOWN[2]):
            return probe, "writes the third turn otherwise than the second"
        if _opened_by(opening) != _opened_by(second):
            return probe, "opens the first response otherwise than the second"
        return probe, ""

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, nothing added."""
        return list(self._encode(text))


def _template(tokenizer: Any) -> str:
    """The tokenizer's chat template, with ``TODAY`` for the day on which it is rendered."""
    try:
        template = str(tokenizer.get_chat_template()) if tokenizer.chat_template else PLAIN_TEMPLATE
    except ValueError as error:
        raise UserError(f"policy: its chat template cannot be chosen: {shorten(str(error), 120)}") from None
    if "strftime_now" not in template:
        return template
    dated = "".join(f" | replace('%{code}', '{TODAY.strftime('%' + code)}')" for code in "aAbBdeFHIjmMpSyY")
    return "{% macro strftime_now(format) %}{{ format" + dated + " }}{% endmacro %}{{ '' }}" + template


_TASK, *_SHOWN = (f"\x01{name}\x01" for name in ("task", "first", "second", "third"))
_REPLIES = ("\x01reply\x01", "\x01another\x01")
"""Stand for messages where a template is tried out; ``carried`` keeps them out of real ones."""


class _Probe(NamedTuple):
    """What a template has made of the marks above."""

    opening: str
    """One turn, up to the response."""
    whole: str
    """Three turns, up to the third response."""
    closing: str
    """What follows the last reply of a conversation that ends with it."""


def _behind(mark: str, rendered: str) -> str:
    return rendered.partition(mark)[2]


def _continues(rendered: str, longer: str) -> bool:
    """Whether a conversation that has gone on begins as it was, but for reasoning that the template has opened."""
    common = next((i for i, (a, b) in enumerate(zip(rendered, longer, strict=False)) if a != b), len(longer))
    return not rendered[common:].removesuffix(_opened_by(rendered)).strip()


def _opened_by(rendered: str) -> str:
    """What of a rendered prompt is already part of the response."""
    found = _OPENED.search(rendered)
    return found[0] if found else ""


def _end_of_turn(tokenizer: Any, closing: str) -> str:
    """The end marker that a template writes behind a reply, with the space before it; empty if there is none."""
    behind = closing.lstrip()
    ends = [text for text in (str(token) for token in tokenizer.added_tokens_decoder.values()) if text.strip()]
    found = max((text for text in ends if behind.startswith(text)), key=len, default="")
    return closing[: len(closing) - len(behind)] + found if found else ""


def _markers(tokenizer: Any, rendered: str) -> set[str]:
    """What a message must not hold: the special tokens, and what else of a template's own writing is one token.

    The protocol's tags are no markers, nor are words: a message may hold both.
    """
    added = [(str(token), token.special) for token in tokenizer.added_tokens_decoder.values()]
    written = {text for text, special in added if special or (text in rendered and not text.isalnum())}
    return {t for t in written.union(tokenizer.all_special_tokens) if t.strip() and not re.fullmatch(TAG, t)}


def _beginning_of(texts: set[str]) -> re.Pattern[str]:
    """Matches the first character of each of these texts."""
    rests: dict[str, list[str]] = {}
    for text in sorted(texts):
        rests.setdefault(text[0], []).append(re.escape(text[1:]))
    return re.compile("|".join(f"{re.escape(c)}(?={'|'.join(ends)})" for c, ends in rests.items()) or "(?!)")
