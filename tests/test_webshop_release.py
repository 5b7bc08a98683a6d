"""WebShop on real products: 100 of the release's, with the records of 1,000.

They are not part of this repository. Set WEBSHOP_DATA to a folder with ``items_shuffle_100.json`` and
``items_ins_v2_1000.json``; without it these tests are skipped.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.contracts.environment import check_environment
from pipeline.environments.webshop.catalogue import Shop, load
from pipeline.environments.webshop.environment import WebShopExpert
from pipeline.environments.webshop.score import _FUNCTION_WORDS, Product, nouns, title_score, type_score, words
from pipeline.settings.params import Environment
from tests.test_webshop import ID, oracle, play, webshop

FOLDER = Path(os.environ.get("WEBSHOP_DATA", ""))
DOCUMENT = Path(__file__).parents[1] / "docs" / "environments.md"
pytestmark = pytest.mark.skipif("WEBSHOP_DATA" not in os.environ, reason="WEBSHOP_DATA is not set")

SETTINGS: dict[str, Any] = {
    "products": str(FOLDER / "items_shuffle_100.json"),
    "attributes": str(FOLDER / "items_ins_v2_1000.json"),
}

UNSURE = """
adjustable adult artificial auto automatic baggy best big black blue bottom brown casual ceramic classic clean comfortable
complete cosmetic cross daily dark decorative deep different digital dry dual easy electric empty essential extra facial
fashionable fast fine fit free fresh full furry glossy gold good gray great green hanging hard healthy heavy high hot
household indoor industrial large light lightweight long loose low magnetic makeup medical mens metal mini mobile modern
natural navy new nice non nylon off old one open organic original ornamental outdoor pink plain plastic plush portable
premium professional pure purple quick red relaxed right rustic salty sexy short silver slim small smart soft solid strong
super suitable sweet synthetic tall temporary thick thin tight top traditional transparent trendy universal urban vintage
virtual warm waterproof white wide wireless wooden yellow assemble carry compatible contains cook fits fitting grooming
heating help improve includes keep make mixing press repair roll running shut softening squeeze stand standing
strengthening supports throw try use wash wear moisturizing
"""
"""Words of these titles that ``nouns`` keeps and a part-of-speech model may take for adjectives or verbs."""

Reading = Callable[[str], tuple[str, ...]]


def most(title: str) -> tuple[str, ...]:
    """A model that takes every content word for a noun or name, as many are where titles are capitalised."""
    return tuple(word for word in words(title) if len(word) > 1 and word not in _FUNCTION_WORDS)


def least(title: str) -> tuple[str, ...]:
    """A model that takes none of the unsure words for one."""
    return tuple(word for word in nouns(title) if word not in UNSURE.split())


def shop() -> Shop:
    return load(SETTINGS["products"], SETTINGS["attributes"], None, 1, None)


def test_every_product_and_every_instruction_of_a_product_is_read() -> None:
    made = shop()
    assert (len(made.products), len(made.goals)) == (100, 44)
    assert made.skipped == {"instructions without product": 371}
    assert sum(bool(goal.options) for goal in made.goals) == 23  # of 24 with options, one has no value to choose


def test_the_expert_reaches_the_oracles_best() -> None:
    environment, expert, draws, reached = webshop(**SETTINGS), WebShopExpert(), np.random.default_rng(0), 0
    goals = environment.shop.goals
    for number, goal in enumerate(goals):
        seed = next(s for s in itertools.count() if np.random.default_rng(s).integers(len(goals)) == number)
        environment.reset(seed=0, options={"state_seed": seed})
        assert environment.goal is goal
        total = 0.0
        while not environment.done:
            total += play(environment, expert.act(environment, draws))[1]
        reached += total == pytest.approx(oracle(environment.shop, goal))
    assert reached / len(goals) >= 0.9


def test_the_contracts_hold_on_real_products() -> None:
    assert check_environment(Environment(id=ID, settings=SETTINGS)) == []


def types(bought: Product, target: Product, reading: Reading) -> float:
    """``type_score`` with other nouns."""
    title = title_score(reading(bought.title), reading(target.title))
    if title < 0.1:
        return 0.1 if title else 0.0
    parts = [{part.strip() for part in one.product_category.split("›")} for one in (bought, target)]
    return 1.0 if title > 0.2 or bought.query == target.query or len(parts[0] & parts[1]) >= 2 else 0.5


def test_where_the_type_score_could_differ_from_the_published_one() -> None:
    """The table of the document: the type by the substitute, and by the two readings that a model could be between."""
    products = shop().products
    found = Counter[tuple[float, float, float]]()
    for bought, target in itertools.permutations(products.values(), 2):
        assert types(bought, target, nouns) == type_score(bought, target)
        found[tuple(types(bought, target, reading) for reading in (nouns, most, least))] += 1  # type: ignore[index]
    differing = sum(count for kinds, count in found.items() if len(set(kinds)) > 1)
    bought_right = sum(count for kinds, count in found.items() if len(set(kinds)) > 1 and 1.0 in kinds)
    text = DOCUMENT.read_text(encoding="utf-8")
    assert f"{differing} of {found.total():,} pairs" in text
    assert f"in {bought_right} of them" in text
    rows = re.findall(r"^\| `(\w+)` .*? \| `(\w+)` .*? \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", text, re.M)
    assert len(rows) >= 8
    for bought_name, target_name, *kinds in rows:
        pair = products[bought_name], products[target_name]
        assert [types(*pair, reading) for reading in (nouns, most, least)] == [float(kind) for kind in kinds]


def test_on_its_own_product_every_goal_has_the_right_type_by_any_reading() -> None:
    for goal in shop().goals:
        assert {types(goal.product, goal.product, reading) for reading in (nouns, most, least)} == {1.0}
