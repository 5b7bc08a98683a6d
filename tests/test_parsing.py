"""Roles of tokens, decoding, and actions parsed from responses."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.trajectories.parsing import DecodedResponse, decode, parse_response, token_roles
from pipeline.trajectories.trajectory import Role
from tests.prompting_cases import BASE, COMPACT, QWEN, TOKENIZERS, properties

PIECES = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "Left", " 12", "a<b", "\n", "√", "<", ">", "</"]
)


RESPONSES = st.lists(PIECES, max_size=10).map("".join)


IMPORTANCE = [Role.OTHER, Role.REASONING, Role.THINK_TAG, Role.ANSWER_TAG, Role.ACTION]


# -------------------------------------------------------------------------------------------------------- roles


def character_roles(text: str, ended: bool = True) -> list[Role]:
    """The format, read part by part from the left; what is left over when a part does not come is other."""
    roles: list[Role] = []

    def take(length: int, role: Role) -> None:
        roles.extend([role] * length)

    def rest() -> str:
        return text[len(roles) :]

    def until_tag() -> int:
        return min((rest().index(tag) for tag in TAGS if tag in rest()), default=len(rest()))

    def blank() -> int:
        return len(rest()) - len(rest().lstrip())

    start = len(text) - len(text.lstrip())
    if text[start:].startswith("<think>"):
        take(start, Role.OTHER)
        take(len("<think>"), Role.THINK_TAG)
        thought = until_tag()
        closed = rest()[thought:].startswith("</think>")
        take(thought, Role.REASONING if closed or not ended else Role.OTHER)
        if rest().startswith("</think>"):
            take(len("</think>"), Role.THINK_TAG)
            if rest()[blank() :].startswith("<answer>"):
                take(blank(), Role.OTHER)
                take(len("<answer>"), Role.ANSWER_TAG)
                length = until_tag()
                if rest()[length:].startswith("</answer>"):
                    take(length, Role.ACTION)
                    take(len("</answer>"), Role.ANSWER_TAG)
    return roles + [Role.OTHER] * (len(text) - len(roles))


TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@st.composite
def segmented(draw: st.DrawFn) -> DecodedResponse:
    """A text cut into tokens at random places."""
    text = draw(RESPONSES)
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=12)))
    bounds = [0, *[cut for cut in cuts if 0 < cut < len(text)], len(text)]
    return DecodedResponse(text, list(itertools.pairwise(bounds)) if text else [])


@properties
@given(RESPONSES, st.booleans())
def test_roles_of_single_characters_equal_reference(text: str, ended: bool) -> None:
    spans = [(i, i + 1) for i in range(len(text))]
    assert token_roles(DecodedResponse(text, spans), ended) == character_roles(text, ended)


@properties
@given(segmented(), st.booleans())
def test_roles_do_not_depend_on_the_segmentation(response: DecodedResponse, ended: bool) -> None:
    """A token has the most consequential role of its characters, whatever the other tokens are."""
    characters = character_roles(response.text, ended)
    expected = [max(characters[start:end], key=IMPORTANCE.index) for start, end in response.spans]
    assert token_roles(response, ended) == expected


@TOKENIZERS
@given(RESPONSES, st.booleans())
@properties
def test_roles_of_real_tokens_follow_their_characters(tokenizer: Any, text: str, ended: bool) -> None:
    """Tags are one token each in the project's tokenizer and several in the others."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    response = decode(tokenizer, ids)
    assert response.text == text
    characters = character_roles(text, ended)
    for role, (start, end) in zip(token_roles(response, ended), response.spans, strict=True):
        assert role == max(characters[start:end], key=IMPORTANCE.index)


def test_a_tag_may_be_one_token_or_several() -> None:
    text = "<think>so</think><answer>Up</answer>"
    counts = {}
    for name, tokenizer in (("compact", COMPACT), ("base", BASE)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        roles = token_roles(decode(tokenizer, ids))
        assert list(dict.fromkeys(roles)) == [Role.THINK_TAG, Role.REASONING, Role.ANSWER_TAG, Role.ACTION]
        counts[name] = roles.count(Role.THINK_TAG)
    assert counts["compact"] == 2 < counts["base"]


T, R, X, A, G = Role.THINK_TAG, Role.REASONING, Role.OTHER, Role.ACTION, Role.ANSWER_TAG


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["<think>", "a", "</think>", "<answer>", "Up", "</answer>"], [T, R, T, G, A, G]),
        (["<think>a", "</think><answer>", "Up</answer>"], [T, G, A]),
        (["<think>a</think>\n", "<answer>Up</answer>\n"], [T, A]),
        (["a</think>", "<answer>"], [X, X]),
        (["hello", " world"], [X, X]),
        (["<think>", "never", " closed"], [T, R, R]),
        (["<think>", "</think>", "<answer>", "Up", "<|end|>"], [T, T, G, X, X]),
        (["<think>", "</think>", "<answer>", "Up", "</answer>", "<|end|>"], [T, T, G, A, G, X]),
        (["<think>", "a", "<answer>", "Up", "</answer>"], [T, R, X, X, X]),
        (["<think>", "a", "</think>", "b", "<answer>", "Up", "</answer>"], [T, R, T, X, X, X, X]),
        (["<think>", "a", "</think>", "<answer>", "</think>", "x"], [T, R, T, G, X, X]),
        (["<answer>", "Up", "</answer>"], [X, X, X]),
        (["<thi", "nk", "a>"], [X, X, X]),
        (["<thi", "nk>", "a"], [T, T, R]),
        (["<think>", "</think>", "<", "answer", ">", "Up", "</", "answer", ">"], [T, T, G, G, G, A, G, G, G]),
    ],
)
def test_golden_roles(pieces: list[str], expected: list[Role]) -> None:
    spans, position = [], 0
    for piece in pieces:
        spans.append((position, position + len(piece)))
        position += len(piece)
    assert token_roles(DecodedResponse("".join(pieces), spans)) == expected


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["<think>", "never", " closed", "<|end|>"], [T, X, X, X]),
        (["<think>", "never", " closed", "</answer>"], [T, X, X, X]),
        (["<think>", "a", "<answer>", "Up", "</answer>"], [T, X, X, X, X]),
        (["<think>", "a", "<think>", "b", "</think>", "<answer>", "Up", "</answer>"], [T, X, X, X, X, X, X, X]),
        (["<think>", "a", "</think>", "<|end|>"], [T, R, T, X]),
        (["<think>", "a", "</think>", "<answer>", "Up", "<answer>", "Up", "</answer>"], [T, R, T, G, X, X, X, X]),
        (["<think>", "a", "</think>", "<answer>", "</answer>"], [T, R, T, G, G]),
        (["<think>", "a", "</think>", "<answer>", "Fly", "</answer>!"], [T, R, T, G, A, G]),
    ],
)
def test_thoughts_that_a_response_ends_without_closing_them_are_no_reasoning(
    pieces: list[str], expected: list[Role]
) -> None:
    spans = list(itertools.pairwise(itertools.accumulate(map(len, pieces), initial=0)))
    assert token_roles(DecodedResponse("".join(pieces), spans), ended=True) == expected


def test_tokens_without_characters_get_the_role_of_their_place() -> None:
    assert token_roles(DecodedResponse("<think>", [(0, 7), (7, 7)])) == [T, R]
    assert token_roles(DecodedResponse("<think>a", [(0, 7), (7, 7), (7, 8)])) == [T, R, R]
    assert token_roles(DecodedResponse("", [(0, 0)])) == [X]
    assert token_roles(DecodedResponse("<think>a", [(0, 7), (7, 8), (8, 8)]), ended=True) == [T, X, X]


def test_bytes_of_one_character_share_its_role() -> None:
    ids = BASE("<think>√日</think>", add_special_tokens=False)["input_ids"]
    response = decode(BASE, ids)
    first = response.text.index("√")
    assert response.spans.count((first, first + 1)) == 3
    roles = token_roles(response)
    assert [role for role, span in zip(roles, response.spans, strict=True) if span[0] in (first, first + 1)] == [R] * 6


# ------------------------------------------------------------------------------------------------------- decode


@TOKENIZERS
@given(st.text(max_size=20))
@properties
def test_any_text_survives_encoding_and_decoding(tokenizer: Any, text: str) -> None:
    """But for U+FFFD at its end, which looks like a character that is still incomplete."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    response = decode(tokenizer, ids)
    assert response.text == text.rstrip("\ufffd")
    assert len(response.spans) == len(ids)


def test_invisible_characters_survive() -> None:
    text = "a\u200b\ufeff\u00ad e\u0301\u202e\u00a0\t\r\n 👩‍👩‍👧 \x01\x00  ."
    for tokenizer in (COMPACT, QWEN, BASE):
        assert decode(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"]).text == text


@TOKENIZERS
@given(st.data())
@properties
def test_any_tokens_can_be_decoded(tokenizer: Any, data: st.DataObject) -> None:
    """A random policy writes broken characters; what is decoded is the whole text, up to one that is still incomplete."""
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=20))
    response = decode(tokenizer, ids)
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    assert whole.startswith(response.text)
    assert set(whole[len(response.text) :]) <= {"\ufffd"}
    assert len(response.spans) == len(ids)
    assert len(token_roles(response)) == len(ids)
    pieces = list(dict.fromkeys([(0, 0), *response.spans, (len(response.text),) * 2]))
    assert all(earlier[1] == later[0] for earlier, later in itertools.pairwise(pieces))


# -------------------------------------------------------------------------------------------------------- parser


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("<think>a</think><answer>Up</answer>", 1, ["Up"]),
        (" <think>a\nb</think>\n <answer> Up \n</answer>\n", 1, ["Up"]),
        ("<think></think><answer>Up</answer>", 1, ["Up"]),
        ("<think>a</think><answer>Up||Left</answer>", 2, ["Up", "Left"]),
        ("<think>a</think><answer>Up || Left||Down</answer>", 2, ["Up", "Left"]),
        ("<think>a</think><answer>||Up||  ||Left||</answer>", 5, ["Up", "Left"]),
        ("<think>a</think><answer>Up|Left</answer>", 2, ["Up|Left"]),
        ("<think>1 < 2 > 0 <b></think><answer>Up</answer>", 1, ["Up"]),
        ("<think>a</think><answer></answer>", 1, None),
        ("<think>a</think><answer> || </answer>", 2, None),
        ("<answer>Up</answer>", 1, None),
        ("<think>a</think>", 1, None),
        ("<think>a</think><answer>Up", 1, None),
        ("<think>a<answer>Up</answer>", 1, None),
        ("<think>a</think> so <answer>Up</answer>", 1, None),
        ("well <think>a</think><answer>Up</answer>", 1, None),
        ("<think>a</think><answer>Up</answer>.", 1, None),
        ("<think>a<think>b</think></think><answer>Up</answer>", 1, None),
        ("<think>a<answer>Up</answer></think><answer>Up</answer>", 1, None),
        ("<think>a</think><answer><answer>Up</answer></answer>", 1, None),
        ("<think>a</think><answer>Up</answer><answer>Left</answer>", 2, None),
        ("<THINK>a</THINK><ANSWER>Up</ANSWER>", 1, None),
        ("", 1, None),
    ],
)
def test_parse_response(text: str, limit: int, expected: list[str] | None) -> None:
    assert parse_response(text, limit) == expected


@properties
@given(RESPONSES, st.integers(1, 3))
def test_only_one_strict_pair_of_regions_is_parsed(text: str, limit: int) -> None:
    """Whatever is parsed has exactly four tags, in order, with nothing but space outside them."""
    actions = parse_response(text, limit)
    tags = re.findall(r"</?(?:think|answer)>", text)
    outside = [c for c, role in zip(text, character_roles(text), strict=True) if role is Role.OTHER and not c.isspace()]
    well_formed = tags == ["<think>", "</think>", "<answer>", "</answer>"] and not outside
    if not well_formed:
        assert actions is None
        return
    written = [part.strip() for part in text.split("<answer>")[1].split("</answer>")[0].split("||")]
    assert actions == ([part for part in written if part][:limit] or None)
