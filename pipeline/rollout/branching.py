"""Where the episodes of a tree begin, a budget of them per initial state.

A choice is a generator over one initial state's tree, written as the sources write their loops: it yields where the next
episodes begin, and is resumed when they have been played. It never sees the engine; ``Forest`` plays all trees of an
iteration together, wave by wave, and holds them to their budget.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from pipeline.rollout.tree import ROOT, Candidate, Origin, Tree
from pipeline.settings.branching import Branching, EntropyRise, Independent, Positions, TemperatureShift, TreeSearch
from pipeline.trajectories.trajectory import Role

Growth = Iterator[list[Origin]]


def entropy_rise(tree: Tree, section: EntropyRise) -> Growth:
    """ARPO (arXiv 2507.19849) and AEPO (arXiv 2510.14545): branch where an observation has raised the entropy.

    At the beginning of each response but the first, dH is the mean entropy of its first ``tokens`` tokens less that of the
    episode's first response. Turn by turn, and within a turn in the order of the episodes, ``rises`` decides whether
    ``width`` more episodes begin there. A turn is a round of decisions: l of the prompt is the same for all of it, and then
    one more if anything has branched, else 0 (AEPO's code).
    """
    if section.initial == "monitored":
        yield [ROOT]
        root, *tools = [opening_entropy(tree, 0, turn, section.tokens) for turn in range(len(tree.turns(0)))]
        yield [ROOT] * (monitored_budget(root, tools, len(tree.specs), section.monitor_slope) - 1)
    else:
        yield [ROOT] * section.initial
    streak: dict[int, int] = {}  # l of each path
    rounds = 0  # l of the prompt: rounds of decisions in a row in which anything has branched
    for turn in itertools.count(1):
        if not any(len(tree.turns(path)) > turn for path in range(len(tree.episodes))):
            return
        grown: list[Origin] = []
        for path in range(len(tree.episodes)):
            own = tree.turns(path)
            if len(own) <= turn or len(positions := tree.sampled(path, turn)) == 0:
                continue
            length = streak.get(path, 0) if section.penalty_per == "path" else rounds
            rise = opening_entropy(tree, path, turn, section.tokens) - opening_entropy(tree, path, 0, section.tokens)
            draw = float(tree.draws.random()) if section.base is None else section.base
            branching = rises(rise, length, draw, section.slope, section.threshold, section.penalty)
            streak[path] = length + 1 if branching else 0
            if branching:
                grown += [Origin(path, int(positions[0]))] * section.width
        rounds, before = rounds + 1 if grown else 0, len(tree.episodes)
        yield grown
        for child in range(before, len(tree.episodes)):  # a branch takes its path's streak along
            parent = tree.origins[child].parent
            streak[child] = streak.get(parent, 0) if parent is not None else 0


def opening_entropy(tree: Tree, episode: int, turn: int, tokens: int) -> float:
    """Mean entropy in nats of the first sampled tokens of a response; 0 if it has none."""
    chosen = tree.sampled(episode, turn)[:tokens]
    return float(tree.column(episode, "entropy")[chosen].mean()) if len(chosen) else 0.0


def rises(rise: float, streak: int, draw: float, slope: float, threshold: float, penalty: float) -> bool:
    """AEPO's code: ``(draw + slope * dH) * max(0, 1 - penalty * l) >= threshold``, draw uniform in [0, 1).

    dH is the ``rise`` in nats, l the ``streak`` of branchings before. ARPO's ``a + b * dH > tau`` is the same with a
    constant for the draw and no penalty. At dH = 0, threshold 0.5 and penalty 0.05 the chance is
    ``1 - 0.5 / (1 - 0.05 l)``: 0.5, 0.33, 0.09 for l = 0, 5, 9.
    """
    return (draw + slope * rise) * max(0.0, 1 - penalty * streak) >= threshold


def monitored_budget(root: float, tools: Sequence[float], budget: int, slope: float) -> int:
    """AEPO: how many episodes of a budget k begin at the initial state, the monitored one among them.

    ``int(k * sigmoid(slope * (H_root - mean H_tool))) + 1``, within [1, k] (the released code; slope 0.5). H is the mean
    entropy at the beginning of the first response, and of each later one; without these the difference is 0.
    """
    difference = root - float(np.mean(tools)) if len(tools) else 0.0
    sigmoid = (1 + math.tanh(slope * difference / 2)) / 2  # as this it cannot overflow
    return min(budget, int(budget * sigmoid) + 1)


def positions(tree: Tree, section: Positions) -> Growth:
    """APPO (arXiv 2606.12384) and TLPO (arXiv 2604.26553): branch at the tokens of highest score.

    The initial episodes come first; ``tree.scores`` then has a score per token (see ``branch_scores``), -inf where none may be.
    ``width`` episodes begin at each of as many positions as the budget asks for, best first; where there are fewer
    positions, they are gone through again. Before all of them come the errors, if these are asked for.
    """
    yield [ROOT] * section.initial
    failed = [not episode.builder.outcome["success"] for episode in tree.episodes]
    chosen = list(range(len(tree.episodes)))
    if section.among == "erroneous" and any(failed):
        chosen = [path for path in chosen if failed[path]]
    scored = ranked_positions(
        [tree.scores[path] for path in chosen], [tree.sampled(path) for path in chosen], section.side
    )
    ranked = [(chosen[row], split) for row, split in scored]
    if section.among == "erroneous":
        errors = [(path, error) for path in chosen if failed[path] and (error := first_error(tree, path)) is not None]
        ranked = list(dict.fromkeys([*errors, *ranked]))
    if ranked:
        asked = -(-tree.room // section.width)
        if section.candidates == "likeliest":
            yield [origin for place in ranked[:asked] for origin in others(tree, *place)[: section.width]]
        else:
            wanted = [ranked[i % len(ranked)] for i in range(asked)]
            yield [Origin(path, split) for path, split in wanted for _ in range(section.width)]


def first_error(tree: Tree, episode: int) -> int | None:
    """The first erroneous token of an episode, in the first of its responses that could not be executed.

    That is the first token of its action, if it has one; else the first that left the format. None if no response was
    invalid, or this one was cut before it had done either: nothing names the token then.
    """
    role = tree.column(episode, "role")
    for number, turn in enumerate(tree.turns(episode)):
        if not turn["valid"]:
            own = tree.sampled(episode, number)
            found = next(
                (own[role[own] == wanted] for wanted in (Role.ACTION, Role.OTHER) if (role[own] == wanted).any()),
                own[:0],
            )
            return int(found[0]) if len(found) else None
    return None


def others(tree: Tree, episode: int, split: int) -> list[Origin]:
    """Branches at a place, likeliest first, each with another token than the one that stands there."""
    tokens, logprobs = (column[split].tolist() for column in tree.likeliest[episode])
    there, entropy = tree.episodes[episode].builder.ids[split], float(tree.column(episode, "entropy")[split])
    found = [Candidate(token, own, entropy) for token, own in zip(tokens, logprobs, strict=True) if token != there]
    return [Origin(episode, split, candidate=candidate) for candidate in found]


def updates_first(section: Branching) -> bool:
    """Whether the policy is updated on the initial episodes first, because branches are placed by how that moves it."""
    return isinstance(section, Positions) and section.signal == "branching_score"


def ranked_positions(
    scores: Sequence[np.ndarray], sampled: Sequence[np.ndarray], side: Literal["before", "after"]
) -> list[tuple[int, int]]:
    """Episode and split of all tokens with a finite score, highest first, then in order.

    ``scores`` and positions of ``sampled`` tokens are given by episode. The scored token is sampled again, or what comes
    after it; an episode's last has nothing after it.
    """
    found = []
    for row, (own, places) in enumerate(zip(scores, sampled, strict=True)):
        pairs = zip(places, places, strict=True) if side == "before" else itertools.pairwise(places)
        found += [(-float(own[scored]), row, int(split)) for scored, split in pairs if math.isfinite(own[scored])]
    return [(row, split) for _, row, split in sorted(found)]


def tree_search(tree: Tree, section: TreeSearch) -> Growth:
    """SEEA-R1 (arXiv 2506.21669): Monte-Carlo tree search over turns, with whole episodes as simulations.

    From the initial state the child of highest ``Q + exploration * sqrt(ln N / (1 + n))`` is followed down to the first
    state with fewer than ``width`` children, and episodes begin there until it has as many. Q is the mean discounted return
    from the child's turn on, as it is. Children beneath which nothing is left to expand are passed over.
    """
    yield [ROOT] * section.width
    while (found := expandable(tree, section)) is not None:
        yield found


def expandable(tree: Tree, section: TreeSearch) -> list[Origin] | None:
    """What ``tree_search`` asks for next; None if every state that was reached has its children."""
    values = [returns_ahead(tree, episode, section.discount) for episode in range(len(tree.episodes))]
    paths = [turn_path(tree, episode) for episode in range(len(tree.episodes))]

    def below(node: tuple[int, ...]) -> list[int]:
        return [episode for episode, path in enumerate(paths) if path[: len(node)] == node]

    def descend(node: tuple[int, ...]) -> list[Origin] | None:
        inside = below(node)
        deeper = [episode for episode in inside if len(paths[episode]) > len(node)]
        if not deeper:
            return None  # the episode is over there
        children = list(dict.fromkeys(paths[episode][: len(node) + 1] for episode in deeper))
        if len(children) < section.width:
            first = deeper[0]
            place = Origin(first, int(tree.sampled(first, len(node))[0])) if node else ROOT
            return [place] * (section.width - len(children))

        def bound(child: tuple[int, ...]) -> float:
            own = below(child)
            known = math.log(len(inside)) / (1 + len(own))
            return float(np.mean([values[e][len(node)] for e in own])) + section.exploration * math.sqrt(known)

        for child in sorted(children, key=lambda child: -round(bound(child), 12)):  # of equal ones the first
            if (found := descend(child)) is not None:
                return found
        return None

    return descend(())


def returns_ahead(tree: Tree, episode: int, discount: float) -> list[float]:
    """Discounted return of an episode from each of its turns on."""
    found = [0.0]
    for turn in reversed(tree.turns(episode)):
        found.append(turn["reward"] + discount * found[-1])
    return found[:0:-1]


def turn_path(tree: Tree, episode: int) -> tuple[int, ...]:
    """An episode's turns as the numbers of the episodes that have sampled them first: equal beginnings are shared turns."""
    parent, split = tree.origins[episode][:2]
    if parent is None:
        return (episode,) * len(tree.turns(episode))
    shared = sum(bool(turn["end"] <= split) for turn in tree.turns(episode))
    return turn_path(tree, parent)[:shared] + (episode,) * (len(tree.turns(episode)) - shared)


def temperature_shift(tree: Tree, section: TemperatureShift) -> Growth:
    """SCOPE-RL (arXiv 2510.08141): a share of the budget at ``T = clip(1 + target - H_prev, low, high)``.

    H_prev is the mean entropy of the iteration before, 0 in the first one, as in the first version's code.
    """
    size = len(tree.specs)
    others = min(size - 1, math.floor(section.share * size + float(tree.draws.random())))
    temperature = min(section.high, max(section.low, 1 + section.target - tree.entropy_before))
    yield [ROOT] * (size - others) + [Origin(temperature=temperature)] * others


def independent(tree: Tree, section: Independent) -> Growth:
    """No branches."""
    yield [ROOT] * tree.room


GROWTHS: dict[str, Callable[..., Growth]] = {
    "none": independent,
    "entropy_rise": entropy_rise,
    "positions": positions,
    "tree_search": tree_search,
    "temperature_shift": temperature_shift,
}
"""From a choice's ``kind`` to its generator."""
