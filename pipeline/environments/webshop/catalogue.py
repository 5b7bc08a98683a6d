"""A shop: products, the goals of its customers and the search. From the WebShop release's JSON files, or generated.

The files are read product by product, so that memory holds what is kept and no more. Whatever is malformed in them is
skipped and counted, or, where nothing can be kept, refused.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.environments.webshop.generated import generate
from pipeline.environments.webshop.json_files import elements_of
from pipeline.environments.webshop.score import Goal, Product, option_counts, score
from pipeline.environments.webshop.search import Search, words
from pipeline.workspace.errors import UserError

LONGEST_TEXT = 100_000
"""Characters of a title, of a description, of all features; a product with more is skipped."""
LONGEST_INSTRUCTION = 1000
"""Characters; a goal with more is skipped."""
LONGEST_NAME = 150
"""Characters of an option's name or value; a longer one is skipped."""
NO_PRICE = 100.0
"""Dollars, of a product that the release knows no price of; as published."""
NO_BOUND = 1e6
"""Dollars; the published bound where an instruction names none."""
BOUNDS = tuple(10.0 * i for i in range(1, 100))
"""Dollars; prices that an instruction may name."""

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ud800-\udfff\ufeff]+")
_BRACKETS = str.maketrans("<[{>]}", "((()))")
_DOLLARS = re.compile(r"\$?\s*(\d[\d,]*(?:\.\d+)?)")
_BETWEEN = re.compile(r"\s*(?:-|to)\s*|(?<=\d)\s*(?=\$)")


class Shop:
    """Products with a search over them, and the goals that customers come with; immutable.

    Args:
        products: records in the release's format.
        attributes: records by asin, with what the products are like and synthetic instructions.
        human: lists of human instructions by asin; None for the synthetic ones.
        goals_per_product: most goals of a synthetic instruction: combinations of the product's options, drawn from all.
        cache: folder for the search's index, or None.
        source: what the products are from, for messages.

    Raises:
        UserError: no product or no goal is left.
    """

    def __init__(
        self,
        products: Iterable[Any],
        attributes: Iterable[tuple[str, Any]],
        human: Iterable[tuple[str, Any]] | None,
        goals_per_product: int,
        cache: Path | None,
        source: str,
    ) -> None:
        self.skipped: Counter[str] = Counter()
        """What was left out, by why."""
        self.products: dict[str, Product] = {}
        """By asin, in the order of the file."""
        for record in products:
            self._add(record)
        if not self.products:
            raise UserError(f"environments: {source}: no product can be used{self.counts()}")
        goals: dict[str, Goal] = {}
        for name, record in attributes:
            asin = name.lower()
            if asin in self.products and isinstance(record, dict):
                self.products[asin] = replace(self.products[asin], attributes=_texts(record.get("attributes")))
            if human is None:
                self._collect(goals, asin, [record], goals_per_product)
        for name, entries in human or ():
            self._collect(goals, name.lower(), entries, None)
        self.goals = list(goals.values())
        if not self.goals:
            raise UserError(f"environments: {source}: no goal can be used{self.counts()}")
        self._list = list(self.products.values())
        self._search = Search(_Searched(self._list), cache)
        self.best = lru_cache(maxsize=2**16)(self._best)

    def __deepcopy__(self, memo: Any) -> Shop:
        return self

    def find(self, query: str) -> list[Product]:
        """The best products for a query, at most 50, in order."""
        return [self._list[number] for number in self._search.find(tuple(words(query)))]

    def _best(self, product: Product, goal: Goal) -> tuple[float, dict[str, str]]:
        """The greatest score that buying a product can have, and the options to choose for it.

        Options count one by one, so that each is chosen by itself; of values that count, one that is asked for literally.
        """
        chosen = {}
        for name, values in product.options.items():
            counting = [value for value in values if option_counts(product, goal, name, value)]
            if counting:
                chosen[name] = next((value for value in counting if value in goal.options), counting[0])
        return score(product, goal, chosen).total, chosen

    def counts(self) -> str:
        """What was left out, in words; empty if nothing was."""
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
        return f"; skipped: {counts}" if counts else ""

    def _add(self, record: Any) -> None:
        try:
            asin = _asin(record)
            if asin in self.products:
                raise _Malformed("products met before")
            self.products[asin] = _product(asin, record, self.skipped)
        except _Malformed as error:
            self.skipped[str(error)] += 1

    def _collect(self, goals: dict[str, Goal], asin: str, entries: Any, combinations: int | None) -> None:
        """Add the goals of a product's entries by their instructions; ``combinations`` is None for human ones."""
        for entry in entries if isinstance(entries, list) else [entries]:
            if isinstance(entry, dict) and entry.get("instruction") is None:
                continue
            try:
                if not isinstance(entry, dict):
                    raise _Malformed("malformed instructions")
                if asin not in self.products:
                    raise _Malformed("instructions without product")
                for goal in _goals(self.products[asin], entry, combinations):
                    if goals.setdefault(goal.instruction, goal) is not goal:
                        self.skipped["goals with an instruction met before"] += 1
            except _Malformed as error:
                self.skipped[str(error)] += 1


def load(products: str, attributes: str, human: str | None, goals_per_product: int, cache: str | None) -> Shop:
    """The shop of files of the release; one that has been loaded is kept as long as the files stay as they are.

    Raises:
        UserError: a file cannot be read, is no JSON or has the wrong form, or see ``Shop``.
    """
    stamps = (_stamp(products), _stamp(attributes), None if human is None else _stamp(human))
    return _loaded(*stamps, goals_per_product, cache)


@lru_cache(maxsize=4)
def generated(count: int, seed: int, goals_per_product: int) -> Shop:
    """The shop of a generated catalogue."""
    products, attributes = generate(count, seed)
    return Shop(products, attributes.items(), None, goals_per_product, None, "the generated catalogue")


FileStamp = tuple[str, int, int]
"""Path, size and time of change: an equal one is an unchanged file."""


def _stamp(path: str) -> FileStamp:
    try:
        found = Path(path).stat()
    except OSError as error:
        raise UserError(f"environments: {path}: cannot be read: {error.strerror}") from None
    return path, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=2)
def _loaded(
    products: FileStamp, attributes: FileStamp, human: FileStamp | None, goals_per_product: int, cache: str | None
) -> Shop:
    shop = Shop(
        (value for _, value in elements_of(products[0], "[")),
        elements_of(attributes[0], "{"),
        None if human is None else elements_of(human[0], "{"),
        goals_per_product,
        None if cache is None else Path(cache),
        products[0],
    )
    if shop.skipped:
        message = f"WebShop: {products[0]}: {len(shop.products)} products, {len(shop.goals)} goals{shop.counts()}"
        logging.getLogger(__name__).warning(message)
    return shop


class _Malformed(Exception):
    """Says what is skipped, in the plural."""


def _text(value: Any) -> str:
    """Text on one line without control characters, whatever it was."""
    return " ".join(_CONTROL.sub(" ", value).split()) if isinstance(value, str) else ""


def _name(value: Any) -> str:
    """Text that can be an action's name: nothing in it is a tag, a special token of a tokenizer, or the separator."""
    return re.sub(r"\|\|+", "|", _text(value).lower().translate(_BRACKETS))


def _texts(value: Any) -> tuple[str, ...]:
    entries = value if isinstance(value, list) else [value]
    return tuple(text for text in map(_text, entries) if text)


def _asin(record: Any) -> str:
    asin = _name(record.get("asin")) if isinstance(record, dict) else ""
    if not asin or asin == "nan" or len(asin) > 10:
        raise _Malformed("products without asin")
    return asin


def _product(asin: str, record: Mapping[str, Any], skipped: Counter[str]) -> Product:
    title, query = _text(record.get("name")), _text(record.get("query")).lower()
    if not title or not query:
        raise _Malformed("products without name or query")
    features, description = _texts(record.get("small_description")), _text(record.get("full_description"))
    if max(len(title), sum(map(len, features)), len(description)) > LONGEST_TEXT:
        raise _Malformed(f"products with more than {LONGEST_TEXT} characters")
    return Product(
        asin=asin,
        title=title,
        price=_price(record.get("pricing"), asin),
        query=query,
        product_category=_text(record.get("product_category")),
        features=features,
        description=description,
        options=_options(record.get("customization_options"), skipped),
    )


def _price(given: Any, asin: str) -> float:
    """Dollars: one price, or one drawn between the first two, as published; numbers, or texts like $3.99 to $5.99."""
    if not given:
        return NO_PRICE
    prices = [price for entry in (given if isinstance(given, list) else [given]) for price in _prices(entry)]
    if not all(math.isfinite(price) and price >= 0 for price in prices):
        raise _Malformed("products whose price is no number")
    return prices[0] if len(prices) == 1 else round(_draws("price", asin).uniform(*prices[:2]), 2)


def _prices(entry: Any) -> list[float]:
    """One or more numbers; not finite where there is something else."""
    if isinstance(entry, str):
        found = [_DOLLARS.fullmatch(piece) for piece in _BETWEEN.split(entry.strip())]
        return [float(match[1].replace(",", "")) if match else math.nan for match in found]
    return [float(entry) if isinstance(entry, int | float) and not isinstance(entry, bool) else math.nan]


def _options(given: Any, skipped: Counter[str]) -> dict[str, tuple[str, ...]]:
    """Values by name, both lower-case; a value's / becomes |, as published."""
    options: dict[str, tuple[str, ...]] = {}
    for name, entries in given.items() if isinstance(given, dict) else ():
        entries = entries if isinstance(entries, list) else []
        written = [entry.get("value") for entry in entries if isinstance(entry, dict)]
        values = [_name(value.replace("/", " | ")) for value in written if isinstance(value, str)]
        kept = [value for value in dict.fromkeys(values) if 0 < len(value) <= LONGEST_NAME]
        if len(kept) < len(entries):
            skipped["options without value, twice or too long"] += len(entries) - len(kept)
        if kept and 0 < len(_name(name)) <= LONGEST_NAME:
            options[_name(name)] = tuple(kept)
    return options


def _goals(product: Product, entry: Mapping[str, Any], most: int | None) -> Iterator[Goal]:
    """The goal of a human's instruction or, up to ``most``, of a synthetic one with combinations of all options."""
    instruction, names = _text(entry.get("instruction")), sorted(product.options)
    if most is None:
        options = entry.get("instruction_options") or []
        asked = tuple(map(_name, options.values() if isinstance(options, dict) else options))
        yield _goal(product, entry, instruction.strip("."), asked)
        return
    choices = [product.options[name] for name in names]
    total, draws = math.prod(map(len, choices)), _draws("options", product.asin)
    for number in range(total) if total <= most else sorted(draws.sample(range(total), most)):
        values = []
        for choice in choices:
            number, index = divmod(number, len(choice))
            values.append(choice[index])
        said = ", and ".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
        yield _goal(product, entry, f"{instruction}{' with ' if said else ''}{said}", tuple(values))


def _goal(product: Product, entry: Mapping[str, Any], instruction: str, options: tuple[str, ...]) -> Goal:
    attributes = _texts(entry.get("instruction_attributes"))
    if not instruction or not attributes:
        raise _Malformed("instructions without text or attributes")
    above = list(itertools.islice((bound for bound in BOUNDS if bound > product.price), 4))
    upper = NO_BOUND
    if len(above) > 1:
        upper = max(_draws("bound", product.asin, instruction).sample(above, 2))
        instruction += f", and price lower than {upper:.2f} dollars"
    if len(instruction) > LONGEST_INSTRUCTION:
        raise _Malformed(f"instructions with more than {LONGEST_INSTRUCTION} characters")
    return Goal(product, instruction, attributes, options, upper)


@dataclass(frozen=True)
class _Searched:
    """What is searched of each product, made anew each time: together these texts are as large as the file."""

    products: list[Product]

    def __iter__(self) -> Iterator[str]:
        for product in self.products:
            options = (f"{name} {' '.join(values)}" for name, values in product.options.items())
            yield " ".join([product.title, product.description, *product.features, *options])


def _draws(*name: str) -> random.Random:
    """What the published shop draws anew in each process, here drawn once and for all by what it is for."""
    return random.Random(int.from_bytes(hashlib.blake2b("\n".join(name).encode(), digest_size=8).digest(), "little"))
