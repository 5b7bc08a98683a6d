"""A catalogue made of word lists, in the WebShop release's format: every instruction has a product that fulfils it."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np


class Category(NamedTuple):
    """What one part of the catalogue is made of. No two words of a list match each other by the published score."""

    name: str
    path: str
    kinds: tuple[str, ...]
    """As many in each category; seven letters at most, and not two with the first five in common."""
    attributes: tuple[str, ...]
    """They describe: ``score.nouns`` leaves them out, so that a shared one makes no type."""
    options: dict[str, tuple[str, ...]]


COLORS = ("black", "white", "red", "blue", "green", "pink", "gray", "brown")
PACKS = ("single", "double", "triple", "family")

CATEGORIES = (
    Category(
        "fashion",
        "Clothing › Everyday",
        ("jacket", "skirt", "sweater", "scarf", "coat", "vest"),
        ("padded", "quilted", "washable", "hooded", "pleated", "striped", "sleeveless", "breathable", "lined", "cropped"),
        {"color": COLORS, "size": ("small", "medium", "large", "jumbo")},
    ),
    Category(
        "electronics",
        "Electronics › Devices",
        ("speaker", "printer", "charger", "camera", "monitor", "router"),
        ("wireless", "portable", "foldable", "rechargeable", "shielded", "braided", "mounted", "adjustable", "curved",
         "dimmable"),
        {"color": COLORS, "style": ("compact", "classic", "deluxe", "basic")},
    ),
    Category(
        "garden",
        "Home › Furniture",
        ("lamp", "mirror", "bench", "basket", "shelf", "cushion"),
        ("tufted", "carved", "polished", "stackable", "frameless", "weathered", "glazed", "extendable", "fluted",
         "seamless"),
        {"color": COLORS, "size": ("small", "medium", "large", "jumbo")},
    ),
    Category(
        "beauty",
        "Beauty › Care",
        ("soap", "lotion", "shampoo", "perfume", "mascara", "serum"),
        ("scented", "tinted", "refillable", "reusable", "whipped", "concentrated", "medicated", "weightless", "waterless",
         "rinsable"),
        {"scent": ("citrus", "cedar", "mint", "vanilla", "lavender", "jasmine"), "size": PACKS},
    ),
    Category(
        "grocery",
        "Grocery › Pantry",
        ("coffee", "biscuit", "almonds", "noodles", "popcorn", "granola"),
        ("roasted", "salted", "smoked", "dried", "sweetened", "seedless", "spiced", "candied", "sugarless", "microwavable"),
        {"flavor": ("honey", "maple", "ginger", "garlic", "lemon", "pepper"), "size": PACKS},
    ),
)  # fmt: skip

BRANDS = ("norvik", "talso", "quill and co", "harrow", "bexley", "umbra lane", "fjell", "ostra")

LEAST = 100
"""Products of the smallest catalogue: below, a split may be without goals."""
MOST = 140_000

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
SYLLABLES = tuple(consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS)


def generate(count: int, seed: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """``count`` products, ``LEAST`` to ``MOST``, and, by asin, their attributes and instructions.

    A product has three attributes, two of them in its title and one in its features alone, and some values of each option.
    Its instruction asks for two of the attributes, and for nothing that the product lacks.
    """
    draws = np.random.default_rng([seed, 5])
    products, instructions = [], {}
    for asin, category, kind in named(count, draws):
        has = [category.attributes[i] for i in draws.permutation(len(category.attributes))[:3]]
        asked = [has[i] for i in sorted(draws.permutation(3)[:2].tolist())]
        products.append(_record(asin, category, kind, has, draws))
        instructions[asin] = {
            "attributes": has,
            "instruction": f"Find me {', '.join(asked)} {kind}",
            "instruction_attributes": asked,
        }
    return products, instructions


def named(count: int, draws: np.random.Generator) -> Iterator[tuple[str, Category, str]]:
    """An asin for each product, with its category and kind; all kinds are equally frequent.

    An asin is its product's kind and a syllable, or two where there are not enough. So a small policy that is to click on a
    product finds the one part in the instruction, and the other is one token, which that page alone can tell it.
    """
    kinds = [(category, kind) for category in CATEGORIES for kind in category.kinds]
    length = 1 if count <= len(SYLLABLES) * len(kinds) else 2
    codes = ["".join(code) for code in itertools.product(SYLLABLES, repeat=length)]
    order = draws.permutation(len(codes)).tolist()
    for number in range(count):
        category, kind = kinds[number % len(kinds)]
        code = codes[order[number // len(kinds)]]
        yield f"{kind[: 9 - len(code)]} {code}".upper(), category, kind


def _record(
    asin: str, category: Category, kind: str, attributes: list[str], draws: np.random.Generator
) -> dict[str, Any]:
    options = {}
    for name, values in category.options.items():
        offered = sorted(draws.permutation(len(values))[: draws.integers(2, 5)].tolist())
        options[name.capitalize()] = [{"value": values[i], "image": None} for i in offered]
    brand = BRANDS[draws.integers(len(BRANDS))]
    return {
        "asin": asin,
        "name": f"{attributes[0]} {attributes[1]} {kind}",
        "full_description": f"A {kind} made by {brand}.",
        "pricing": [float(draws.integers(4, 100))],
        "images": [],
        "product_category": f"{category.path} › {kind}",
        "average_rating": "",
        "small_description": [f"This {kind} is {attributes[2]}.", f"Brand: {brand}"],
        "customization_options": options,
        "category": category.name,
        "query": kind,
        "page": 1,
    }
