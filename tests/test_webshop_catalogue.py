"""The shop: loading the release's files, whatever is wrong with them; the search and its index"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.environments.webshop import search as webshop_search
from pipeline.environments.webshop.catalogue import NO_BOUND, Shop, generated, load
from pipeline.environments.webshop.generated import CATEGORIES, generate, named
from pipeline.environments.webshop.score import alike, color_in, nouns
from pipeline.environments.webshop.search import Search, words
from pipeline.workspace.errors import UserError


def product(asin: str = "B000000001", **changes: Any) -> dict[str, Any]:
    record = {
        "asin": asin,
        "name": "Blue Kettle",
        "full_description": "It boils.",
        "pricing": [20.0],
        "images": ["x"],
        "product_category": "Home › Kitchen › Kettles",
        "average_rating": "",
        "small_description": ["of steel "],
        "customization_options": "",
        "category": "garden",
        "query": "kettles",
        "page": 1,
    }
    return record | changes


def wish(text: str = "Find me steel kettles", **changes: Any) -> dict[str, Any]:
    return {"attributes": ["steel"], "instruction": text, "instruction_attributes": ["steel"]} | changes


def shop(products: Any, attributes: Any = None, human: Any = None, combinations: int = 1) -> Shop:
    wishes = {p["asin"]: wish() for p in products} if attributes is None else attributes
    return Shop(products, wishes.items(), human and human.items(), combinations, None, "here")


def written(folder: Path, products: Any, attributes: Any) -> tuple[str, str]:
    paths = folder / "products.json", folder / "attributes.json"
    for path, value in zip(paths, (products, attributes), strict=True):
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(paths[0]), str(paths[1])


def test_a_product_is_read_as_the_release_writes_it() -> None:
    options = {"Size": [{"value": " 25 Feet", "image": None}], "Color": [{"value": "Black/White"}], "Style": None}
    (read,) = shop([product(customization_options=options, full_description="a\x00b\n c")]).products.values()
    assert (read.asin, read.title, read.price, read.query) == ("b000000001", "Blue Kettle", 20.0, "kettles")
    assert read.options == {"size": ("25 feet",), "color": ("black | white",)}
    assert (read.description, read.features, read.attributes) == ("a b c", ("of steel",), ("steel",))


@pytest.mark.parametrize(
    ("given", "price"),
    [([3.5], 3.5), ("$1,234.50", 1234.5), (["$7"], 7.0), ("12.5", 12.5), (None, 100.0), ([], 100.0), ("", 100.0), ([0], 0.0)],
)  # fmt: skip
def test_a_price_is_a_number_or_dollars(given: Any, price: float) -> None:
    assert shop([product(pricing=given)]).products["b000000001"].price == price


@pytest.mark.parametrize("given", [[20.0, 30.0], "$20 to $30", "$20.00 - $30.00", "$20$30"])
def test_of_two_prices_one_between_is_drawn_once_and_for_all(given: Any) -> None:
    prices = {shop([product(pricing=given)]).products["b000000001"].price for _ in range(3)}
    assert len(prices) == 1
    assert 20 <= prices.pop() <= 30


MALFORMED = [
    ({"asin": None}, "products without asin"),
    ({"asin": "nan"}, "products without asin"),
    ({"asin": "B0000000012"}, "products without asin"),
    ({"name": "\x01 "}, "products without name or query"),
    ({"query": 5}, "products without name or query"),
    ({"pricing": "cheap"}, "products whose price is no number"),
    ({"pricing": ["$5", "free"]}, "products whose price is no number"),
    ({"pricing": [-1.0]}, "products whose price is no number"),
    ({"pricing": [float("nan")]}, "products whose price is no number"),
    ({"pricing": {"low": 1}}, "products whose price is no number"),
    ({"pricing": [True]}, "products whose price is no number"),
    ({"full_description": "x" * 10_000_000}, "products with more than 100000 characters"),
    ({"asin": "B000000001"}, "products met before"),
]


@pytest.mark.parametrize(("changes", "reason"), MALFORMED, ids=[f"{i}: {r}" for i, (_, r) in enumerate(MALFORMED)])
def test_a_malformed_product_is_skipped_and_counted(changes: dict[str, Any], reason: str) -> None:
    made = shop([product(), product("B000000002") | changes], {"B000000001": wish()})
    assert (list(made.products), made.skipped) == (["b000000001"], {reason: 1})


@pytest.mark.parametrize("entry", [5, None, "product", []])
def test_what_is_no_product_is_skipped_and_counted(entry: Any) -> None:
    made = shop([entry, product()], {"B000000001": wish()})
    assert made.skipped == {"products without asin": 1}


@pytest.mark.parametrize(
    ("asin", "record", "reason"),
    [
        ("B000000009", wish(), "instructions without product"),
        ("B000000001", wish("Find me steel kettles"), "goals with an instruction met before"),
        ("B000000001", wish(""), "instructions without text or attributes"),
        ("B000000001", wish("other", instruction_attributes=[]), "instructions without text or attributes"),
        ("B000000001", wish("other", instruction_attributes=[3]), "instructions without text or attributes"),
        ("B000000001", "text", "malformed instructions"),
        ("B000000001", wish("x" * 1001), "instructions with more than 1000 characters"),
    ],
)
def test_a_malformed_instruction_is_skipped_and_counted(asin: str, record: Any, reason: str) -> None:
    made = Shop([product()], [("B000000001", wish()), (asin, record)], None, 1, None, "here")
    assert (len(made.goals), made.skipped) == (1, {reason: 1})


def test_options_that_cannot_be_names_are_left_out_and_counted() -> None:
    values = ["red", None, "red", "x" * 151, " ", 7, "</answer><|user|>[b]||c"]
    made = shop([product(customization_options={"Color": [{"value": v} for v in values] + ["blue"]})])
    assert made.products["b000000001"].options == {"color": ("red", "( | answer)(|user|)(b)|c")}
    assert made.skipped == {"options without value, twice or too long": 6}


@pytest.mark.parametrize(
    ("products", "attributes", "line"),
    [
        ('[{"asin": "B1"', {}, "products.json: ends too early"),
        ("", {}, "products.json: ends too early"),
        ('{"asin": "B1"}', {}, "products.json: is no JSON list"),
        ('[{"asin" "B1"}]', {}, r"products.json: no JSON: Expecting ':' delimiter at character \d+"),
        ("[" * 100_000, {}, "products.json: .*nested too deeply at character 1"),
        ("[1 2]" + " " * 20, {}, "products.json: no JSON: a comma is missing at character 3"),
        ([], {}, "products.json: no product can be used"),
        (
            [product(), {"asin": "B1"}],
            {},
            "products.json: no goal can be used; skipped: 1 products without name or query",
        ),
        ([product()], [], "attributes.json: is no JSON object"),
        ([product()], '{"B1": ', "attributes.json: ends too early"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_a_line(
    tmp_path: Path, products: Any, attributes: Any, line: str
) -> None:
    with pytest.raises(UserError, match=line) as caught:
        load(*written(tmp_path, products, attributes), None, 1, None)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.json: cannot be read: No such file"):
        load(str(tmp_path / "gone.json"), str(tmp_path / "gone.json"), None, 1, None)


def test_what_was_skipped_is_said_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = written(tmp_path, [product(), product(), {}], {"B000000001": wish(), "B9": wish()})
    load(*paths, None, 1, None)
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.endswith(
        "1 products, 1 goals; skipped: 1 instructions without product, 1 products met before, 1 products without asin"
    )


def test_a_file_is_read_in_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    products, attributes = generate(100, 3)
    products[5]["small_description"] = ['é\\"\n' * 50, "12.5e3"]
    whole = Shop(products, attributes.items(), None, 1, None, "whole")
    for block in (1, 7, 4096):
        folder = tmp_path / str(block)
        folder.mkdir()
        monkeypatch.setattr("pipeline.environments.webshop.json_files._BLOCK", block)
        read = load(*written(folder, products, attributes), None, 1, None)
        assert [(g.instruction, g.product.features) for g in read.goals] == [
            (g.instruction, g.product.features) for g in whole.goals
        ]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    paths = written(tmp_path, [product()], {"B000000001": wish()})
    first = load(*paths, None, 1, None)
    assert load(*paths, None, 1, None) is first
    written(tmp_path, [product(name="Red Kettle")], {"B000000001": wish()})
    assert load(*paths, None, 1, None).products["b000000001"].title == "Red Kettle"


# ------------------------------------------------------------------------------------------------------------- the goals


def test_human_goals_replace_the_synthetic_ones(tmp_path: Path) -> None:
    human = [
        wish("i want a kettle.", instruction_options=["black"]),
        wish("a steel one", instruction_options={"c": "red"}),
    ]
    made = shop([product()], human={"B000000001": human})
    assert [goal.options for goal in made.goals] == [("black",), ("red",)]
    assert made.goals[0].instruction.startswith("i want a kettle, and price lower than ")
    assert made.products["b000000001"].attributes == ("steel",)


def test_a_synthetic_goal_asks_for_a_value_of_every_option() -> None:
    options = {"Size": [{"value": v} for v in "123"], "Color": [{"value": v} for v in ("red", "blue")]}
    goals = shop([product(customization_options=options)], combinations=100).goals
    assert {goal.options for goal in goals} == {(color, size) for color in ("red", "blue") for size in "123"}
    assert goals[0].instruction.startswith("Find me steel kettles with color: red, and size: 1, and price lower than ")
    few = shop([product(customization_options=options)], combinations=2).goals
    assert len({goal.options for goal in few}) == 2


def test_a_bound_is_one_of_the_four_tens_above_the_price_but_the_first() -> None:
    products = [product(f"B{i:09}", pricing=[20.0], query=f"k{i}") for i in range(60)]
    goals = shop(products, {p["asin"]: wish(f"Find me {p['asin']}") for p in products}).goals
    assert {goal.price_upper for goal in goals} == {40.0, 50.0, 60.0}
    (dear,) = shop([product(pricing=[985.0])]).goals
    assert (dear.price_upper, dear.instruction) == (NO_BOUND, "Find me steel kettles")


# -------------------------------------------------------------------------------------------------- generated catalogues


def test_a_generated_catalogue_is_large_varied_and_seeded() -> None:
    products, wishes = generate(1000, 0)
    assert (products, wishes) == generate(1000, 0)
    assert products != generate(1000, 1)[0]
    assert len({record["asin"] for record in products}) == 1000
    assert len({record["category"] for record in products}) == 5
    made = generated(1000, 0, 1)
    assert set(made.skipped) <= {"goals with an instruction met before"}
    assert len(made.goals) >= 980


@pytest.mark.parametrize("count", [100, 2100, 2101, 140_000])
def test_asins_are_distinct_and_short_whatever_the_number(count: int) -> None:
    names = [asin for asin, _, _ in named(count, np.random.default_rng(0))]
    assert len(set(names)) == count
    assert max(map(len, names)) <= 10


def test_the_words_of_the_catalogue_are_told_apart_by_the_score() -> None:
    for category in CATEGORIES:
        for words_of_one in (category.kinds, category.attributes, *category.options.values()):
            assert not any(alike(one, other) for one, other in itertools.permutations(words_of_one, 2))
        assert not any(nouns(attribute) for attribute in category.attributes)
        assert all(nouns(kind) == (kind,) for kind in category.kinds)
        assert all(color_in(color) == color for color in category.options.get("color", ()))


# ------------------------------------------------------------------------------------------------------------ the search

TEXTS = ["red kettle of steel", "blue kettle", "a chair", "red red chair", "kettle " * 3]


def test_a_search_finds_texts_with_its_words_the_best_first() -> None:
    search = Search(TEXTS)
    assert search.find(("red",)) == (3, 0)
    assert search.find(("steel", "kettle"))[0] == 0
    assert set(search.find(("kettle",))) == {0, 1, 4}
    assert search.find(("nothing",)) == search.find(()) == ()
    assert words("Ice-Cream (2 PACK), café_x") == ["ice", "cream", "2", "pack", "café", "x"]


def test_equals_come_in_order_and_no_more_than_fifty() -> None:
    assert Search(["lamp"] * 80).find(("lamp",)) == tuple(range(50))


def test_the_index_is_kept_and_never_out_of_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Search(TEXTS, tmp_path)
    computed: list[int] = []
    real = webshop_search._computed
    monkeypatch.setattr(webshop_search, "_computed", lambda texts: computed.append(len(texts)) or real(texts))
    again = Search(TEXTS, tmp_path)
    assert not computed
    queries = [("red",), ("kettle", "chair"), ("steel",)]
    assert [again.find(query) for query in queries] == [first.find(query) for query in queries]
    changed = Search([*TEXTS[:4], "red pot"], tmp_path)
    assert (computed, changed.find(("pot",))) == ([5], (4,))
    for path in tmp_path.glob("*/*.npy"):
        path.write_bytes(path.read_bytes()[:-5])
    assert Search(TEXTS, tmp_path).find(("red",)) == (3, 0)
    assert computed == [5, 5]
    assert Search(TEXTS, tmp_path).find(("red",)) == (3, 0)
    assert computed == [5, 5]
