"""The shop's pages as text: every admissible action stands where it belongs, as ``click[its name]``.

A page is cut to a number of characters, not of tokens. An environment does not know the tokenizer, and that of a policy
from scratch is trained on these very pages; so one state shows one page whatever reads it, and episodes can be compared
between policies and continued. The limit in tokens is ``context_tokens``, where tokens are known. A token is about four
characters of English.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pipeline.environments.webshop.score import Product

BUY, BACK, NEXT, PREVIOUS = "buy now", "back to search", "next >", "< prev"
SUBPAGES = ("description", "features")
BUTTONS = (BUY, BACK, NEXT, PREVIOUS, *SUBPAGES)

NOTICE = 60
"""Characters kept free for what a page says about what was cut."""


class Piece(NamedTuple):
    """A part of a page."""

    text: str
    kind: Literal["fixed", "text", "option"] = "fixed"
    """Text may be cut anywhere, an option's action is shown whole or not at all, the rest always is."""


class Page(NamedTuple):
    """What is seen, and what can be done there beside searching."""

    text: str
    clicks: tuple[str, ...]
    """Names in lower case."""
    cut_characters: int
    """Of text that is not shown."""
    cut_actions: int
    """Options that are not shown, and cannot be chosen."""


def search_page(instruction: str) -> Page:
    """Where everything begins."""
    return Page(f"{instruction}\nsearch[words]", (), 0, 0)


def results_page(instruction: str, query: str, found: Sequence[Product], number: int, size: int, limit: int) -> Page:
    """Some of what was found; ``number`` is the page's, from 0."""
    start, shown = number * size, found[number * size : (number + 1) * size]
    counted = f"{start + 1} to {start + len(shown)} of {len(found)}" if found else "nothing found"
    lines = [[Piece(instruction)], [Piece(f"results for {query}: {counted}")]]
    lines += [[Piece(f"click[{one.asin}]"), Piece(f" {one.title}", "text"), _price(one)] for one in shown]
    buttons = [NEXT] * (start + size < len(found)) + [PREVIOUS] * (start > 0) + [BACK]
    return _page(lines, [one.asin for one in shown], buttons, limit)


def item_page(instruction: str, product: Product, chosen: dict[str, str], limit: int) -> Page:
    """A product with its options; what is chosen stands behind the option's name."""
    lines = [[Piece(instruction)], [Piece(product.title, "text"), _price(product)]]
    names = option_names(product)
    for option in product.options:
        said = f"{option} = {chosen[option]}" if option in chosen else option
        own = [name for name, (of, _) in names.items() if of == option]
        lines.append([Piece(f"{said}:", "text"), *(Piece(f" click[{name}]", "option") for name in own)])
    return _page(lines, list(names), [BUY, *SUBPAGES, PREVIOUS, BACK], limit)


def text_page(instruction: str, product: Product, subpage: str, limit: int) -> Page:
    """A product's description or features."""
    text = product.description if subpage == "description" else "\n".join(product.features)
    lines = [[Piece(instruction)], [Piece(f"{subpage}: "), Piece(text or "none", "text")]]
    return _page(lines, [], [PREVIOUS, BACK], limit)


def option_names(product: Product) -> dict[str, tuple[str, str]]:
    """Option and value by what is clicked on: the value, with the option before it where that alone would be ambiguous."""
    pairs = [(option, value) for option, values in product.options.items() for value in values]
    count = Counter([*BUTTONS, *(value for _, value in pairs)])
    return {f"{option}: {value}" if count[value] > 1 else value: (option, value) for option, value in pairs}


def _price(product: Product) -> Piece:
    return Piece(f" ${product.price:.15g}")


def _page(lines: list[list[Piece]], names: list[str], buttons: list[str], limit: int) -> Page:
    """Lay a page out within a limit of characters: first what is fixed, then options in order, then equal parts of texts.

    What can be clicked on are ``names``, which stand in the lines, and the buttons below them.
    """
    lines, clicks = [*lines, [Piece(" ".join(f"click[{button}]" for button in buttons))]], [*names, *buttons]
    pieces = [piece for line in lines for piece in line]
    if sum(len(piece.text) for piece in pieces) + len(lines) <= limit:
        return Page("\n".join("".join(piece.text for piece in line) for line in lines), tuple(clicks), 0, 0)
    room = limit - NOTICE - len(lines) - sum(len(piece.text) for piece in pieces if piece.kind == "fixed")
    lost: set[Piece] = set()
    for piece in pieces:
        if piece.kind == "option":
            if len(piece.text) > room:
                lost.add(piece)
            else:
                room -= len(piece.text)
    most = _level([len(piece.text) for piece in pieces if piece.kind == "text"], room)
    cut = sum(max(0, len(piece.text) - most) for piece in pieces if piece.kind == "text")
    shown = [
        "".join(piece.text[:most] if piece.kind == "text" else piece.text for piece in line if piece not in lost)
        for line in lines
    ]
    gone = {piece.text.removeprefix(" click[").removesuffix("]") for piece in lost}
    kept = tuple(name for name in clicks if name not in gone)
    return Page("\n".join([*shown, f"(cut: {cut} characters, {len(lost)} actions)"]), kept, cut, len(lost))


def _level(lengths: Sequence[int], room: int) -> int:
    """The greatest length that texts can be cut to so that together they take no more than ``room``."""
    room, left = max(0, room), sorted(lengths)
    for index, length in enumerate(left):
        share = room // (len(left) - index)
        if length > share:
            return share
        room -= length
    return max(lengths, default=0)
