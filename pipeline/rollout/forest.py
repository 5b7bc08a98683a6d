"""The trees of an iteration, played together wave by wave."""

from collections.abc import Sequence

import numpy as np

from pipeline.progress.display import span
from pipeline.rollout.branching import GROWTHS, Growth
from pipeline.rollout.candidates import Likeliest
from pipeline.rollout.collector import play
from pipeline.rollout.engine import RolloutEngine
from pipeline.rollout.episode import Episode, Setup
from pipeline.rollout.specs import EpisodeSpec
from pipeline.rollout.tree import ROOT, Origin, Tree
from pipeline.settings.branching import Branching
from pipeline.trajectories.builder import build
from pipeline.trajectories.trajectory import REPORTED_ROLES, Trajectories
from pipeline.workspace.randomness import generator


class Forest:
    """The trees of an iteration while they grow, by a choice of branching; a group's budget is as many episodes as it has specs.

    What the engine has computed must still hold.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        setup: Setup,
        specs: Sequence[EpisodeSpec],
        section: Branching,
        temperature: float,
        entropy_before: float = 0.0,
    ) -> None:
        self.engine, self.setup, self.temperature = engine, setup, temperature
        groups: dict[str, list[EpisodeSpec]] = {}
        for spec in specs:
            groups.setdefault(spec.group_id, []).append(spec)
        self.trees = [
            Tree(own, generator(own[0].seed, "branches", group), entropy_before=entropy_before)
            for group, own in groups.items()
        ]
        self._growths = [GROWTHS[section.kind](tree, section) for tree in self.trees]

    def wave(self) -> Trajectories | None:
        """Play what every tree asks for next; returns these episodes tree by tree, or None if all budgets are spent.

        A tree that asks for nothing more has the rest of its budget spent on independent episodes.
        """
        wanted = [self._next(tree, growth) for tree, growth in zip(self.trees, self._growths, strict=True)]
        planned = [(tree, origin) for tree, origins in zip(self.trees, wanted, strict=True) for origin in origins]
        if not planned:
            return None
        budget, earlier = sum(len(tree.specs) for tree in self.trees), sum(len(tree.episodes) for tree in self.trees)
        begun = [self._begin(tree, origin) for tree, origin in planned]
        temperatures = [origin.temperature or self.temperature for _, origin in planned]
        for temperature in dict.fromkeys(temperatures):
            chosen = [episode for episode, own in zip(begun, temperatures, strict=True) if own == temperature]
            later = earlier + len(chosen)
            with span(f"({earlier} of {budget} before)" if earlier else "", earlier / budget, later / budget):
                play(self.engine, chosen, temperature)
            earlier = later
        return build([episode.builder for episode in begun])

    def score(self, trajectories: Trajectories, scores: np.ndarray, found: Likeliest | None = None) -> None:
        """Tell the trees a score, float64 (N,), of every token of all episodes so far, and the likeliest ones in its place."""
        own = {name: trajectories.tokens(e) for e, name in enumerate(trajectories.episodes["episode_id"])}
        for tree in self.trees:
            spans = [own[episode.spec.episode_id] for episode in tree.episodes]
            tree.scores = [scores[span] for span in spans]
            if found is not None:
                tree.likeliest = [Likeliest(*(column[span] for column in found)) for span in spans]

    def tell_entropies(self, wave: Trajectories) -> None:
        """Tell the trees the entropies of a wave's tokens, where the engine could not."""
        by_id = {name: wave.entropy[wave.tokens(e)].tolist() for e, name in enumerate(wave.episodes["episode_id"])}
        for tree in self.trees:
            for episode in tree.episodes:
                if episode.spec.episode_id in by_id:
                    episode.builder.tokens["entropy"] = by_id[episode.spec.episode_id]

    def _next(self, tree: Tree, growth: Growth) -> list[Origin]:
        if not tree.room:
            return []
        for origins in growth:
            if playable := [origin for origin in origins if self._goes_on(tree, origin)]:
                return [tree.owner(origin) for origin in playable[: tree.room]]
        return [ROOT] * tree.room

    def _goes_on(self, tree: Tree, origin: Origin) -> bool:
        """Whether there is something to be sampled: behind a candidate that ends its response there is not."""
        if origin.candidate is None or origin.parent is None:
            return True
        return tree.episodes[origin.parent].goes_on_with(origin.split, origin.candidate.token)

    def _begin(self, tree: Tree, origin: Origin) -> Episode:
        """The tree's next episode."""
        spec, parent = tree.specs[len(tree.episodes)], origin.parent
        tree.episodes.append(
            self.setup.begin(spec)
            if parent is None
            else Episode.branch(tree.episodes[parent], spec, origin.split, origin.candidate)
        )
        tree.origins.append(origin)
        return tree.episodes[-1]


def branches_by_role(trajectories: Trajectories) -> dict[str, float]:
    """How many episodes branch at a token of each role, as the episode that they branch from has it."""
    parents, splits = trajectories.parents, trajectories.splits
    roles = trajectories.role[(trajectories.offsets[parents] + splits)[parents >= 0]]
    return {name: float(np.isin(roles, own).sum()) for name, own in REPORTED_ROLES.items()}
