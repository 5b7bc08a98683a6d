"""WebShop's score of a purchase, as published: type x (attributes + options + price) / what was asked for.

Yao et al. 2022 (arXiv 2207.01206), section 3.1, in the details of their implementation: text is compared by rapidfuzz's
``token_set_ratio``, rounded and above 85, after what thefuzz does to it. Three things differ, all on purpose:

* Nouns of a title, of which the type score needs some, come from a part-of-speech model there and from ``nouns`` here.
* An option's value is taken for the colour in it there and here, by a list of about a hundred words there and by half as
  many, plain colours only, here: ``charcoal heather`` is charcoal in both, ``sand camo`` is camo there and itself here.
* No more options count than were asked for, as in the paper's formula, so that a score never leaves [0, 1]. The published
  code counts every chosen option that looks right, even where none was asked for.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from rapidfuzz.fuzz import token_set_ratio
from rapidfuzz.utils import default_process

_COLORS = """
amber aqua beige black blue bronze brown burgundy camel charcoal chocolate copper coral cream cyan gold gray green grey
indigo ivory khaki lavender lilac magenta maroon mint mustard navy olive orange peach pink plum purple red rose ruby
rust salmon silver tan teal turquoise violet white yellow
"""
COLORS = tuple(_COLORS.split())
"""Words that stand for an option's value; the first in this order that occurs anywhere in it counts."""

ALIKE = 85
"""Texts match above this ``token_set_ratio``, rounded to a whole number, of 100."""

EXACT = ("size",)
"""Options whose values are compared letter by letter."""

_LATIN = dict.fromkeys(range(128, 256))
_PIECE = re.compile(r"[\w'’.]+")
_WORD = re.compile(r"[^\W\d_]+(?:['’.][^\W\d_]+)*")
_UNNAMING = """
a an and are as at be but by can do for from get has have he her his if in into is it its more most no not of off on
one only or our out over per she so such than that the their them then there these they this those to too two under up
us use very via was we were which while who will with within without you your
"""
_FUNCTION_WORDS = frozenset(_UNNAMING.split())
_DESCRIBING = re.compile(r"\w{4,}(?:able|ible)|\w{3,}(?:less|ful|ous|ed)")
"""Adjectives and participles by their ends. ``table`` and ``cable`` are not among them, ``vegetable`` is."""


@dataclass(frozen=True, eq=False, slots=True)
class Product:
    """A product as it is shown, searched and scored. Compared by identity: a catalogue holds each once."""

    asin: str
    """Its name on the pages, lower-case."""
    title: str
    price: float
    """In dollars."""
    query: str
    """The search that the release found it by, lower-case; products of one kind share it."""
    product_category: str
    """A path with › between its parts."""
    attributes: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    description: str = ""
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Values to choose from, by the option's name."""


@dataclass(frozen=True, eq=False, slots=True)
class Goal:
    """An instruction and what it asks for."""

    product: Product
    """The one that it was written for."""
    instruction: str
    attributes: tuple[str, ...]
    options: tuple[str, ...]
    """Values, in any order."""
    price_upper: float


class Score(NamedTuple):
    """The parts of a purchase's score."""

    kind: float
    """Type score: 0, 0.1, 0.5 or 1."""
    attributes: int
    options: int
    price: bool
    asked: int
    """Attributes, options, and 1 for the price."""

    @property
    def total(self) -> float:
        """In [0, 1]."""
        return self.kind * (self.attributes + self.options + self.price) / self.asked


def score(bought: Product, goal: Goal, chosen: Mapping[str, str]) -> Score:
    """Score a purchase with the options chosen, name -> value."""
    return Score(
        kind=type_score(bought, goal.product),
        attributes=attribute_matches(bought, goal),
        options=option_matches(bought, goal, chosen),
        price=bought.price <= goal.price_upper,
        asked=len(goal.attributes) + len(goal.options) + 1,
    )


@lru_cache(maxsize=2**16)
def type_score(bought: Product, target: Product) -> float:
    """1 if query, two parts of the category or more than 0.2 of the target title's nouns agree, else 0.5.

    Below a share of 0.1 of the nouns it is 0.1, and without any common noun 0, whatever else agrees.
    """
    title = title_score(nouns(bought.title), nouns(target.title))
    if title < 0.1:
        return 0.1 if title else 0.0
    parts, others = ({*map(str.strip, one.product_category.split("›"))} for one in (bought, target))
    return 1.0 if title > 0.2 or bought.query == target.query or len(parts & others) >= 2 else 0.5


def title_score(bought: Sequence[str], target: Sequence[str]) -> float:
    """Distinct nouns in common as a share of the target's nouns, repeated ones counted again; 0.2 if it has none."""
    return len(set(bought) & set(target)) / len(target) if target else 0.2


@lru_cache(maxsize=2**16)
def nouns(title: str) -> tuple[str, ...]:
    """In place of a part-of-speech model: the words of a title in lower case that may well be nouns or names.

    These are words of two letters or more, without digits, that are no function words and do not end as adjectives and
    participles do (-able, -ible, -less, -ful, -ous, -ed).
    """
    found = [word for word in words(title) if len(word) > 1 and not _DESCRIBING.fullmatch(word)]
    return tuple(word for word in found if word not in _FUNCTION_WORDS)


def words(title: str) -> list[str]:
    """All words of a title in lower case, without a possessive's 's; what holds a digit is no word."""
    pieces = (piece.strip("'’.") for piece in _PIECE.findall(title.lower()))
    return [re.sub("['’]s$", "", piece) for piece in pieces if _WORD.fullmatch(piece)]


@lru_cache(maxsize=2**16)
def attribute_matches(bought: Product, goal: Goal) -> int:
    """How many attributes a product has: alike one of its own, or literally in title, features or description."""
    return sum(
        any(alike(own, attribute) for own in bought.attributes) or _mentioned(bought, attribute)
        for attribute in goal.attributes
    )


def option_matches(bought: Product, goal: Goal, chosen: Mapping[str, str]) -> int:
    """How many chosen options are asked for, at most as many as are asked for."""
    return min(len(goal.options), sum(option_counts(bought, goal, name, value) for name, value in chosen.items()))


def option_counts(bought: Product, goal: Goal, name: str, value: str) -> bool:
    """Whether one chosen option counts: alike an asked one (equal, for a size), or literally in the product's texts.

    A value is taken for the first colour in it.
    """
    value = color_in(value)
    asked = [color_in(one) for one in goal.options]
    matched = value in asked if name.lower() in EXACT else any(alike(one, value) for one in asked)
    return matched or _mentioned(bought, value)


def color_in(value: str) -> str:
    """The first of ``COLORS`` in a value, or else the value."""
    return next((color for color in COLORS if color in value), value)


@lru_cache(maxsize=2**16)
def alike(one: str, other: str) -> bool:
    """thefuzz's ``token_set_ratio``: of letters and digits alone, without those from U+0080 to U+00FF, rounded."""
    ratio = token_set_ratio(default_process(one.translate(_LATIN)), default_process(other.translate(_LATIN)))
    return round(ratio) > ALIKE


def _mentioned(bought: Product, text: str) -> bool:
    return any(text in place for place in _places(bought))


@lru_cache(maxsize=2**12)
def _places(bought: Product) -> tuple[str, str, str]:
    return bought.title.lower(), " ".join(bought.features).lower(), bought.description.lower()
