"""WebShop's score: purchases of real products worked out by hand, the published examples, and what replaces the tagger.

The products are real ones of the WebShop release, without their descriptions and features but for a sentence that is used.
"""

from __future__ import annotations

import pytest

from pipeline.environments.webshop.score import (
    Goal,
    Product,
    Score,
    alike,
    attribute_matches,
    color_in,
    nouns,
    option_matches,
    score,
    title_score,
    type_score,
)

HDMI = Product(
    "b01mqh5vgr",
    "QualGear High Speed Long HDMI 2.0 Cable with Ethernet (50 Feet) - 100% OFC Copper, 24 Awg, 24K Gold Plated Contacts, "
    "CL3 Rated, Triple-Shielded. Supports 4K UHD, 3D, 18 Gbps, ARC (QG-CBL-HD20-50FT)",
    39.45,
    "hdmi cables",
    "Electronics › Accessories & Supplies › Audio & Video Accessories › Cables & Interconnects › Video Cables › HDMI Cables",
    ("gold plated", "hdmi cable", "high speed"),
)
BOOSTER = Product(
    "b09swlppvq",
    "2022 WiFi Extender - Wireless Signal Repeater Booster up to 4500 sq.ft - 1200Mbps Wall-Through Strong WiFi "
    "Booster-Dual Band 2.4G and 5G - 4 Antennas 360° Full C6541-11",
    100.0,
    "signal boosters",
    "Electronics › Computers & Accessories › Networking Products › Repeaters",
    ("dual band", "smart tv", "signal booster", "high speed"),
)
PHONE_BOOSTER = Product(
    "b0813c1c4j",
    "ATT 5G Phone Signal Booster Home Verizon Straight Talk 4G LTE Cell Phone Signal Booster 700MHz Band 13/12/17 FDD "
    "Mobile Signal Repeater Amplifier, up to 4500 SqFt Improve Data and Calls, FCC Approved",
    100.0,
    "signal boosters",
    "Cell Phones & Accessories › Accessories › Signal Boosters",
    ("4g lte", "signal booster", "cell phone", "heavy duty"),
)
SET = Product(
    "b09b7g7p58",
    "3-Piece Dining Table Set, Farmhouse Counter Height Dining Table Set, Wood Dining Table Set with Drop Leaf Table/2 "
    "Cross Back Padded Chairs/One Shelf",
    319.0,
    "living room sets",
    "Home & Kitchen › Furniture › Dining Room Furniture › Table & Chair Sets",
    ("dining table", "table set", "dining room", "space saving", "easy assemble"),
)
WOODEN = Product(
    "b06y3vldfb",
    "Vhomes Lights Reclaimed Wood Console Table The Genessis Collection Sofa-Tables",
    877.8,
    "console tables",
    "Home & Kitchen › Furniture › Living Room Furniture › Tables › Sofa & Console Tables",
    ("console table", "solid wood"),
)
CONSOLE = Product(
    "b09dg92ljl",
    'HSJWOSA Decorative Rustic Entryway Console Table, 60" Long Sofa Table with Two Different Size Drawers and Bottom '
    "Shelf for Storage Ornamental (Color : Black)",
    557.72,
    "console tables",
    "Home & Kitchen › Furniture › Living Room Furniture › Tables › Sofa & Console Tables",
    ("console table", "metal legs", "sofa table"),
)
DRESS = Product(
    "b08zrr3dzt",
    "SheIn Women's Sexy One Shoulder Sleeveless Cutout Mini Club Pencil Bodycon Dress",
    26.35,
    "women's dresses",
    "Clothing, Shoes & Jewelry › Women › Clothing › Dresses › Club & Night Out",
    ("polyester spandex", "daily wear"),
)
TIGHTS = Product(
    "b08kybvq46",
    "adidas Originals Women's Adicolor Essentials Tights",
    20.52,
    "women's pants",
    "Clothing, Shoes & Jewelry › Women › Clothing › Active › Leggings",
    ("elastic waist", "machine wash"),
)
POPS = Product(
    "b085rrl27j",
    "Taali NEW Sweet and Savory Variety Popped Water Lily Pops (6 Resealable Bags) - Try 6 Flavors! | Sweet, Salty, "
    "Savory Assortment | Protein Boost | Snack on the Go (2 oz/2.3 oz. bags)",
    38.99,
    "wasabi peas",
    "Grocery & Gourmet Food › Snacks & Sweets › Snack Foods › Puffed Snacks",
    ("white cheddar", "soy free", "plant based", "dairy free", "artificial flavors", "non gmo", "gluten free"),
)
PESTO = Product(
    "b01n37fsyx",
    "Delicious & Sons - Organic - Non-GMO - Gluten-free - Italian Basil Pesto Genovese Sauce with Parmigiano Reggiano PDO "
    "Cheese (6.70 oz.)",
    14.99,
    "cheeses",
    "Grocery & Gourmet Food › Pantry Staples › Sauces, Gravies & Marinades › Sauces › Italian › Pesto",
    ("non gmo", "gluten free", "easy use", "natural ingredients"),
)
TRIMMER = Product(
    "b087tr48kk",
    "Minkissy Eyebrow Hair Razors Eyebrow Trimmer Portable Facial Hair Remover Facail Hair Trimmer Hair Beauty Grooming "
    "Tool for Women and Men 4pcs",
    11.99,
    "shave & hair removal",
    "Beauty & Personal Care › Shave & Hair Removal › Men's › Eyebrow Trimmers",
    ("hair trimmer", "non slip", "stainless steel"),
    ("Lightweight and non-slip grip for easy control.",),
)
TWEEZERS = Product(
    "b0892y9f83",
    "Minkissy 2pcs Stainless Steel Eyebrow Tweezers Blackhead Acne Remover Portable Makeup Tweezers (Silver)",
    10.39,
    "makeup remover",
    "Beauty & Personal Care › Shave & Hair Removal › Women's › Tweezers",
    ("stainless steel", "false eyelashes", "easy use", "high quality"),
)
SNEAKER = Product(
    "b08t84r7v2", "Levi's Mens Lance Lo Mono UL Casual Sneaker Shoe",
    43.87, "men's fashion sneakers", "Clothing, Shoes & Jewelry › Men › Shoes › Fashion Sneakers",
    ("lace closure", "rubber outsole", "rubber sole"),
)  # fmt: skip


def goal(product: Product, attributes: str, options: str, upper: float) -> Goal:
    return Goal(product, "", tuple(attributes.split("; ")), tuple(options.split("; ")) if options else (), upper)


CABLE = goal(HDMI, "gold plated; high speed", "30 feet", 50.0)
BAND = goal(BOOSTER, "dual band; high speed", "", 110.0)
DINING = goal(SET, "space saving; easy assemble; dining room", "gray + beige", 1000.0)
CLUB = goal(DRESS, "polyester spandex; daily wear", "large; light blue", 40.0)
SNACK = goal(POPS, "soy free; non gmo; artificial flavors", "4-flavor variety; 0.8 ounce (pack of 20)", 50.0)
RUBBER = goal(SNEAKER, "rubber sole", "9.5; white | black", 60.0)

PURCHASES = [
    # what is shown, product, goal, options chosen, (kind, attributes, options, price, asked), total
    ("all of it: 1 x (2 + 1 + 1) / 4", HDMI, CABLE, {"size": "30 feet"}, (1, 2, 1, 1, 4), 1.0),
    ("no option chosen", HDMI, CABLE, {}, (1, 2, 0, 1, 4), 3 / 4),
    ("a size has to be equal, however alike", HDMI, CABLE, {"size": "25 feet"}, (1, 2, 0, 1, 4), 3 / 4),
    ("a value that the title names counts, asked for or not", HDMI, CABLE, {"size": "50 feet"}, (1, 2, 1, 1, 4), 1.0),
    ("39.45 is above 30", HDMI, goal(HDMI, "gold plated", "30 feet", 30.0), {"size": "30 feet"}, (1, 1, 1, 0, 3), 2 / 3),
    ("39.45 is not above 39.45", HDMI, goal(HDMI, "gold plated", "", 39.45), {}, (1, 1, 0, 1, 2), 1.0),
    # of the target's 15 nouns: signal repeater booster band; 4 / 15 = 0.27 > 0.2
    ("another booster: neither attribute", PHONE_BOOSTER, BAND, {}, (1, 0, 0, 1, 3), 1 / 3),
    ("wrong category, no noun in common: 0 x (1 + 1) / 3", HDMI, BAND, {}, (0, 1, 0, 1, 3), 0.0),
    ("gray + beige is beige, the first in the list", SET, DINING, {"color": "gray + beige"}, (1, 3, 1, 1, 5), 1.0),
    ("espresso is another colour", SET, DINING, {"color": "espresso"}, (1, 3, 0, 1, 5), 4 / 5),
    ("gray-1 is gray, and gray is not beige", SET, DINING, {"color": "gray-1"}, (1, 3, 0, 1, 5), 4 / 5),
    # of the target's 21 nouns: table wood; 2 / 21 = 0.095 < 0.1, though two parts of the category agree
    ("a sofa table for a dining set: 0.1 x 1 / 5", WOODEN, DINING, {}, (0.1, 0, 0, 1, 5), 1 / 50),
    # of the target's 9 nouns: console table sofa; 3 / 9
    ("another console table", CONSOLE, goal(WOODEN, "console table; solid wood", "", 900.0), {}, (1, 1, 0, 1, 3), 2 / 3),
    ("two options as asked", DRESS, CLUB, {"size": "large", "color": "light blue"}, (1, 2, 2, 1, 5), 1.0),
    ("one of two options", DRESS, CLUB, {"size": "large", "color": "khaki"}, (1, 2, 1, 1, 5), 4 / 5),
    ("plain black is black", DRESS, goal(DRESS, "daily wear", "black", 40.0), {"color": "plain black"}, (1, 1, 1, 1, 3), 1.0),
    # of the target's 10 nouns: women; 0.1 is not below 0.1, and three parts of the category agree
    ("tights for a dress, in its size", TIGHTS, CLUB, {"size": "large", "color": "orbit green"}, (1, 0, 1, 1, 5), 2 / 5),
    # of the target's 6: women; 0.17
    ("a dress for tights", DRESS, goal(TIGHTS, "elastic waist; machine wash", "", 30.0), {}, (1, 0, 0, 1, 3), 1 / 3),
    # flavor variety, 14 letters, against flavor variety 3, 16: 28 of 30 letters, 93 > 85
    ("3-flavor variety is alike 4-flavor variety", POPS, SNACK, {"flavor": "3-flavor variety"}, (1, 3, 1, 1, 6), 5 / 6),
    # of the target's 22 nouns: oz; 0.045; one part of the category agrees
    ("pesto for pops: 0.1 x (1 + 1) / 6", PESTO, SNACK, {}, (0.1, 1, 0, 1, 6), 1 / 30),
    # of the target's 10 nouns: minkissy eyebrow remover; 0.3
    ("a trimmer for tweezers, too dear", TRIMMER, goal(TWEEZERS, "easy use; high quality; stainless steel", "", 11.0), {},
     (1, 1, 0, 0, 4), 1 / 4),
    ("easy control stands in the features", TRIMMER, goal(TRIMMER, "easy control", "", 20.0), {}, (1, 1, 0, 1, 2), 1.0),
    ("black | white is white | black: both are black", SNEAKER, RUBBER, {"size": "9.5", "color": "black | white"},
     (1, 1, 2, 1, 4), 1.0),
    ("size 9 is not 9.5", SNEAKER, RUBBER, {"size": "9", "color": "white | black"}, (1, 1, 1, 1, 4), 3 / 4),
]  # fmt: skip


@pytest.mark.parametrize(
    ("bought", "asked", "chosen", "parts", "total"), [p[1:] for p in PURCHASES], ids=[p[0] for p in PURCHASES]
)
def test_a_purchase_is_scored_as_by_hand(
    bought: Product, asked: Goal, chosen: dict[str, str], parts: tuple[float, int, int, int, int], total: float
) -> None:
    found = score(bought, asked, chosen)
    kind, attributes, options, price, count = parts
    assert found == Score(kind, attributes, options, bool(price), count)
    assert found.total == pytest.approx(total)


def titled(title: str, query: str = "a", category: str = "") -> Product:
    return Product("x", title, 1.0, query, category)


@pytest.mark.parametrize(
    ("query", "category", "bought", "kind"),
    [
        ("a", "", "kettle", 1.0),  # 1 of 8 nouns: 0.125, the query agrees
        ("b", "", "kettle", 0.5),  # nothing agrees
        ("b", "Home › Kitchen", "kettle", 1.0),  # two parts of the path
        ("b", "Home › Office", "kettle", 0.5),  # one
        ("b", "", "kettle lid", 1.0),  # 2 of 8: 0.25
        ("a", "Home › Kitchen", "bag", 0.0),  # no noun in common
    ],
)
def test_the_type_is_by_query_category_or_title(query: str, category: str, bought: str, kind: float) -> None:
    target = titled("kettle lid cord stand tea maker filter timer", "a", "Home › Kitchen › Tea")
    assert type_score(titled(bought, query, category), target) == kind


def test_below_a_tenth_of_the_nouns_nothing_else_helps() -> None:
    target = titled("kettle " + " ".join(f"part{letter}" for letter in "abcdefghij"))
    assert type_score(titled("kettle"), target) == 0.1


CORD = "BRST AC Power Cord Outlet Socket Cable Plug Lead for Panasonic SC-HT830V DVD/VCR Combo Home Theater System"
PRONG = "Saireed UL Listed 2 Prong Power Cord for JBL Bar 3.1 Bar 2.1 Channel 4K Ultra HD Soundbar"


@pytest.mark.parametrize(
    ("target", "bought", "published"),
    [
        ("adidas Unisex-Adult D.o.n. Issue 2 Basketball Shoe", "adidas Unisex-Adult D.o.n. Issue 2 Indoor Court Shoe", 0.85),
        (f"{PRONG} Home Theater System Subwoofer", CORD, 0.31),
        (PRONG, CORD, 0.17),
        ("Rusticware 921ORB Kitchen and Bath Cabinet Knob", "Minkissy 2pcs Stainless Steel Eyebrow Tweezers (Silver)", 0.0),
    ],
)  # fmt: skip
def test_the_substitute_agrees_with_the_published_tagger_where_its_values_are_known(
    target: str, bought: str, published: float
) -> None:
    """The values stand in the published implementation's own tests, from its part-of-speech model."""
    assert title_score(nouns(bought), nouns(target)) == pytest.approx(published, abs=0.03)


def test_alike_is_rounded_and_without_latin_letters_beyond_ascii() -> None:
    assert alike("essential oils", "Essential Oil!")
    assert alike("cool powder snow", "powder snow")
    assert not alike("tea tree", "tea bag")
    assert alike("crème", "crme")  # as published: è is left out


def test_a_value_is_taken_for_the_first_colour_in_it() -> None:
    for value, color in {
        "matte black": "black",
        "yellow on blue": "blue",
        "no7teal": "teal",
        "sand camo": "sand camo",
    }.items():
        assert color_in(value) == color


def test_no_more_options_count_than_are_asked_for() -> None:
    both = Product("x", "black case", 1.0, "a", "", options={"color": ("black",), "style": ("black",)})
    chosen = {"color": "black", "style": "black"}
    assert option_matches(both, goal(both, "a", "black", 1.0), chosen) == 1
    assert option_matches(both, goal(both, "a", "", 1.0), chosen) == 0


def test_an_attribute_is_looked_for_in_all_texts() -> None:
    for place in ({"title": "With Tea Tree"}, {"features": ("a", "TEA TREE")}, {"description": "of tea tree oil"}):
        product = Product(**{"asin": "x", "title": "y", "price": 1.0, "query": "", "product_category": ""} | place)
        assert attribute_matches(product, goal(product, "tea tree; essential oils", "", 1.0)) == 1
