"""WebShop in text: read an instruction, search, open a product, choose options, buy.

After Yao et al. 2022 (arXiv 2207.01206), without its web server: the same actions, pages and score, over the release's
files or over a generated catalogue.
"""

import re
from typing import Any

import gymnasium
import numpy as np

from pipeline.environments.draws import one_of, state_draws, wording
from pipeline.environments.episodic import Episodic, Expert, check_whole
from pipeline.environments.webshop import pages
from pipeline.environments.webshop.catalogue import Shop, generated, load
from pipeline.environments.webshop.generated import LEAST, MOST
from pipeline.environments.webshop.pages import BACK, BUTTONS, BUY, NEXT, PREVIOUS, SUBPAGES, Page, option_names
from pipeline.environments.webshop.score import Goal, Product, score
from pipeline.environments.webshop.search import words

LONGEST_QUERY = 200
"""Characters of a search; a longer one is no action."""

_ACTION = re.compile(r"(search|click)\s*\[(.*)\]", re.DOTALL)


class WebShop(Episodic):
    """Buy what an instruction asks for. The reward is the purchase's score, in [0, 1]; success is a score of 1.

    Buying ends the episode; nothing else is rewarded. Leaving a product's page forgets the options chosen there.

    Args:
        products: the release's file of products (``items_shuffle.json``); None for a generated catalogue.
        attributes: the release's file of attributes and synthetic instructions (``items_ins_v2.json``).
        human_goals: the release's file of human instructions (``items_human_ins.json``), for these instead.
        cache: folder for the search's index of these files; None computes it each time.
        generated_products: size of the generated catalogue, 100 to 140,000.
        catalogue_seed: of the generated catalogue.
        goals_per_product: combinations of a product's options, drawn from all, that a synthetic instruction is made into
            goals with; at least 1.
        page_size: products on a page of results, 1 to 20.
        page_characters: length that a page is cut to; 2,000 to 50,000. About four characters are a token.
        max_actions: actions after which the episode is cut off, at least 3.

    Raises:
        ValueError: a setting outside these limits, or one that is for the other kind of catalogue.
        UserError: files that cannot be used.
    """

    observation_space = gymnasium.spaces.Text(max_length=100_000)
    action_space = gymnasium.spaces.Text(max_length=400)
    allowed = "search[words] or a click[name] of the page"

    query: str | None
    found: list[Product]
    product: Product | None
    chosen: dict[str, str]
    page: Page

    def __init__(
        self,
        products: str | None = None,
        attributes: str | None = None,
        human_goals: str | None = None,
        cache: str | None = None,
        generated_products: int | None = None,
        catalogue_seed: int | None = None,
        goals_per_product: int = 1,
        page_size: int = 10,
        page_characters: int = 4000,
        max_actions: int = 15,
    ) -> None:
        count, seed = 1000 if generated_products is None else generated_products, catalogue_seed or 0
        check_whole(
            generated_products=(count, LEAST, MOST),
            catalogue_seed=(seed, 0, 2**31),
            goals_per_product=(goals_per_product, 1, 10_000),
            page_size=(page_size, 1, 20),
            page_characters=(page_characters, 2000, 50_000),
            max_actions=(max_actions, 3, 1000),
        )
        if (products is None) != (attributes is None):
            raise ValueError("products and attributes must be given together: files of one release")
        of_files = {"human_goals": human_goals, "cache": cache}
        of_generated = {"generated_products": generated_products, "catalogue_seed": catalogue_seed}
        for name, given in (of_files if products is None else of_generated).items():
            if given is not None:
                raise ValueError(f"{name} has no effect {'without' if products is None else 'with'} products")
        self.page_size, self.page_characters, self.max_actions = page_size, page_characters, max_actions
        self.shop: Shop = (
            generated(count, seed, goals_per_product)
            if products is None or attributes is None
            else load(products, attributes, human_goals, goals_per_product, cache)
        )
        self.bought, self.cut_characters, self.cut_actions = False, 0, 0
        self._return_to_search()

    def _begin(self, state_seed: int | None) -> str:
        self.goal: Goal = one_of(self.shop.goals, state_draws(self.np_random, state_seed))
        self.bought, self.cut_characters, self.cut_actions = False, 0, 0
        self._return_to_search()
        return self._show()

    def _act(self, action: str) -> tuple[str, float, bool]:
        kind, _, name = action.removesuffix("]").partition("[")
        if kind == "search":
            self.query, self.found = name, self.shop.find(name)
        elif name == BUY:
            return self._buy()
        else:
            self._click(name)
        return self._show(), 0.0, False

    def parse_action(self, text: str) -> str | None:
        """``search[words]`` on the search page, ``click[name]`` of what the page shows, in any case and spacing; else None.

        Of a search, words alone are kept: what is searched for, and nothing that could be read as something else.
        """
        match = _ACTION.fullmatch(text.strip().lower())
        if match is None or self.done:
            return None
        if match[1] == "click":
            name = " ".join(match[2].split())
            return f"click[{name}]" if name in self.page.clicks else None
        query = " ".join(words(match[2]))
        return f"search[{query}]" if 0 < len(query) <= LONGEST_QUERY and self.query is None else None

    @property
    def state_key(self) -> str:
        """Goal, page, query, product and options chosen; equal instructions are one goal."""
        parts = [self.goal.instruction]
        if self.query is not None:
            parts.append(f"results for {self.query}, page {self.number + 1}")
        if self.product is not None:
            parts += [self.product.asin, *(f"{name} = {self.chosen[name]}" for name in sorted(self.chosen))]
        if self.subpage or self.bought:
            parts.append("bought" if self.bought else self.subpage)
        return " / ".join(parts)

    @property
    def instructions(self) -> str:
        """Task, actions and limits."""
        return (
            "You are shopping. Find and buy a product that has all that the instruction asks for: kind, attributes, "
            "options, price.\nActions: search[words] on the search page; click[name] for a name that the page shows, such "
            f"as click[{BUY}]. Choose the options before you buy. Buying ends the episode and is scored from 0 to 1.\n"
            f"A page lists up to {self.page_size} products. You have {self.max_actions} actions."
        )

    @property
    def outcome(self) -> str:
        """How an episode has ended: ``bought``, whatever was bought, or ``failed``."""
        return "bought" if self.bought else "failed"

    def _return_to_search(self) -> None:
        self.query, self.found, self.number = None, [], 0
        self.product, self.chosen, self.subpage = None, {}, ""

    def _click(self, name: str) -> None:
        if name == BACK:
            self._return_to_search()
        elif name == NEXT:
            self.number += 1
        elif name == PREVIOUS:
            self._go_back()
        elif self.product is None:
            self.product = self.shop.products[name]
        elif name in SUBPAGES:
            self.subpage = name
        else:
            option, value = option_names(self.product)[name]
            self.chosen[option] = value

    def _go_back(self) -> None:
        if self.subpage:
            self.subpage = ""
        elif self.product is not None:
            self.product, self.chosen = None, {}
        else:
            self.number -= 1

    def _buy(self) -> tuple[str, float, bool]:
        assert self.product is not None
        parts, goal = score(self.product, self.goal, self.chosen), self.goal
        self.bought, self.success = True, parts.total == 1.0
        text = (
            f"bought {self.product.asin}, score {parts.total:.3g}: kind {parts.kind:g}, attributes {parts.attributes} of "
            f"{len(goal.attributes)}, options {parts.options} of {len(goal.options)}, price {int(parts.price)} of 1"
        )
        return text, parts.total, True

    def _show(self) -> str:
        said, limit = self.goal.instruction, self.page_characters
        if self.query is None:
            self.page = pages.search_page(said)
        elif self.product is None:
            self.page = pages.results_page(said, self.query, self.found, self.number, self.page_size, limit)
        elif self.subpage:
            self.page = pages.text_page(said, self.product, self.subpage, limit)
        else:
            self.page = pages.item_page(said, self.product, self.chosen, limit)
        self.cut_characters += self.page.cut_characters
        self.cut_actions += self.page.cut_actions
        return self.page.text

    def _information(self) -> dict[str, Any]:
        """What the episode's pages have not shown so far."""
        return {"cut_characters": self.cut_characters, "cut_actions": self.cut_actions}


_FILLING = "find me i need want a an the with for and in of to is that looking color size style flavor scent"
FILLING = frozenset(_FILLING.split())
"""Words of an instruction that the expert does not search for."""


class WebShopExpert(Expert):
    """Searches with the instruction's words, opens what fits best, chooses the options and buys.

    It knows the goal's parts and every product's best score, which the policy has to make out from the pages.
    """

    def act(self, webshop: WebShop, draws: np.random.Generator) -> str:
        """The next action; nothing is left to ``draws``."""
        if webshop.query is None:
            return f"search[{self._query(webshop)}]"
        if webshop.product is None:
            return f"click[{self._towards(webshop)}]"
        if webshop.subpage:
            return f"click[{PREVIOUS}]"
        return f"click[{self._on_item(webshop, webshop.product)}]"

    def random_action(self, webshop: WebShop, draws: np.random.Generator) -> str:
        """Some words of the instruction, any product of a page of results, any option of a product or buying it.

        A demonstration's noise is then a mistake that a customer could make. Other clicks lead nowhere: with them, half of
        an episode would be ways back, chosen by what the expert knows and the policy cannot see.
        """
        if webshop.query is None:
            said = _said(webshop.goal)
            kept = sorted(draws.permutation(len(said))[: draws.integers(1, 4)].tolist())
            return f"search[{_fitted([said[i] for i in kept])}]"
        clicks = [name for name in webshop.page.clicks if name == BUY or name not in BUTTONS] or [BACK]
        return f"click[{one_of(clicks, draws)}]"

    def plan(self, webshop: WebShop, action: str, draws: np.random.Generator) -> str:
        """What the action is for, and behind it the words to search for or the name to click."""
        kind, _, name = action.removesuffix("]").partition("[")
        if kind == "search":
            return f"they want {name}"
        if name == BUY:
            return f"all is chosen {name}"
        if name in BUTTONS:
            return f"not here {name}"
        return f"{'this fits' if webshop.product is None else 'still to choose'} {name}"

    def _query(self, webshop: WebShop) -> str:
        """The instruction's words or, where they do not find a product as good or find it later, the product's title."""
        queries = [_fitted(_said(webshop.goal)), _fitted(words(webshop.goal.product.title))]
        return min(queries, key=lambda query: self._rank(webshop, webshop.shop.find(query)))

    def _rank(self, webshop: WebShop, found: list[Product], number: int = 0) -> tuple[float, int]:
        """How good a list is, less is better: minus its best product's score, and the pages from ``number`` to it."""
        values = [webshop.shop.best(product, webshop.goal)[0] for product in found]
        best = max(values, default=0.0)
        pages = [abs(index // webshop.page_size - number) for index, value in enumerate(values) if value == best]
        return -best, min(pages, default=0)

    def _best_search(self, webshop: WebShop) -> tuple[float, int]:
        return self._rank(webshop, webshop.shop.find(self._query(webshop)))

    def _towards(self, webshop: WebShop) -> str:
        """On a page of results: the best product, the way to its page, or back if another search is worth it."""
        value, distance = self._rank(webshop, webshop.found, webshop.number)
        aim, pages = self._best_search(webshop)
        if not webshop.found or (webshop.actions_left > 4 and (aim < value or (aim == value and pages + 2 < distance))):
            return BACK
        size, number = webshop.page_size, webshop.number
        values = [-webshop.shop.best(product, webshop.goal)[0] for product in webshop.found]
        on_page = values[number * size : (number + 1) * size]
        if value in on_page:
            return webshop.found[number * size + on_page.index(value)].asin
        before = value in values[max(0, number - distance) * size : number * size]
        return PREVIOUS if before else NEXT

    def _on_item(self, webshop: WebShop, product: Product) -> str:
        """On a product's page: back if another is better, else the next option to choose, and at last to buy it."""
        value, wanted = webshop.shop.best(product, webshop.goal)
        best = -min(self._rank(webshop, webshop.found), self._best_search(webshop))[0]
        if value < best and webshop.actions_left > 3:
            return PREVIOUS
        for name, (option, choice) in option_names(product).items():
            missing = wanted.get(option) == choice and webshop.chosen.get(option) != choice
            if missing and name in webshop.page.clicks and webshop.actions_left > 1:
                return name
        return BUY

    def _facts(self, webshop: WebShop, draws: np.random.Generator) -> list[str]:
        """No word of the instruction: a small policy that has begun to copy from it would go on with the search."""
        pick = wording(draws)
        goal, product = webshop.goal, webshop.product
        facts = [
            f"{pick('they want', 'it must have', 'asked for')} {len(goal.attributes)} attributes",
            f"{pick('with', 'and', 'to choose')} {len(goal.options)} options",
            f"{pick('at most', 'no more than', 'the limit is')} {goal.price_upper:.15g} dollars",
            f"{pick('clicks here', 'choices', 'ways on')} {len(webshop.page.clicks)}",
            f"{pick('actions left', 'still', 'I have')} {webshop.actions_left}",
            pick("let me think", "hmm", "read again", "careful with the price", "so", "what is missing"),
        ]
        if product is not None:
            facts.append(f"{pick('it costs', 'its price is', 'for')} {product.price:.15g}")
            facts.append(f"{pick('options chosen', 'chosen so far', 'set')} {len(webshop.chosen)}")
        elif webshop.query is not None:
            facts.append(f"{pick('found', 'there are', 'results')} {len(webshop.found)}")
        return facts


def _said(goal: Goal) -> list[str]:
    """The words of an instruction that are worth searching for."""
    said = goal.instruction.partition(", and price lower than")[0]
    return [word for word in words(said) if word not in FILLING] or [goal.product.query]


def _fitted(searched: list[str]) -> str:
    """As many of the words as a search may have, which is at least one."""
    while len(" ".join(searched)) > LONGEST_QUERY and len(searched) > 1:
        searched = searched[:-1]
    return " ".join(searched)[:LONGEST_QUERY]


expert = WebShopExpert
