"""Whether a policy uses its reasoning: held-out states are played with its own, without any, and with somebody else's.

In the latter two a response is forced up to its answer, and the policy goes on from there. Forced tokens are recorded as not
sampled, and count towards ``response_tokens`` as sampled ones would. The three ways meet the same states, the same noise and
the same draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from pipeline.evaluation.evaluate import evaluation_specs
from pipeline.model.loading import load_trained
from pipeline.progress.display import within
from pipeline.rollout.collector import play
from pipeline.rollout.engine import RolloutEngine
from pipeline.rollout.episode import Episode, Setup
from pipeline.rollout.making import make_engine
from pipeline.rollout.specs import EpisodeSpec
from pipeline.settings.params import Config
from pipeline.trajectories.builder import build
from pipeline.trajectories.trajectory import Role, Trajectories
from pipeline.workspace.finite import located
from pipeline.workspace.processes import Tell
from pipeline.workspace.randomness import generator

Way = Literal["own", "none", "other"]
"""Whose reasoning an episode has: the policy's as it comes, no words at all, or words from an episode of another state."""
WAYS: tuple[Way, ...] = get_args(Way)


@dataclass(frozen=True)
class Thought:
    """What the policy has thought in a turn that ended in a readable answer."""

    group_id: str
    """Group, and with it the initial state, of the episode."""
    ids: tuple[int, ...]
    """Tokens between the think tags, as sampled."""


class Intervention(Setup):
    """What the episodes of one environment share, and the thoughts that are put in place of the policy's own."""

    def __init__(
        self, tokenizer: Any, config: Config, name: str, purpose: str, thoughts: Sequence[Thought] = ()
    ) -> None:
        """``purpose`` names the draws of which thought comes where. Without thoughts, none stands in any turn."""
        super().__init__(tokenizer, config, name)
        self.purpose, self.thoughts = purpose, thoughts
        opened = tokenizer.decode(self.dialogue.prefill_ids)
        self.head = self.dialogue.encode("" if "<think>" in opened else "<think>")
        self.tail = self.dialogue.encode("<answer>" if "</think>" in opened else "</think><answer>")

    def begin(self, spec: EpisodeSpec) -> Episode:
        """An episode before its first response, which is forced up to its answer."""
        return ForcedEpisode(self, spec)

    def forced(self, spec: EpisodeSpec, turn: int) -> list[int]:
        """Token ids that a turn's response begins with, behind the prefill."""
        others = [thought for thought in self.thoughts if thought.group_id != spec.group_id]
        draws = generator(spec.seed, "thoughts", self.purpose, spec.episode_id, turn)
        thought = others[int(draws.integers(len(others)))].ids if others else ()
        return [*self.head, *thought, *self.tail]


class ForcedEpisode(Episode):
    """An episode whose responses are begun for the policy."""

    setup: Intervention

    def _open_response(self) -> None:
        super()._open_response()
        forced = self.setup.forced(self.spec, self.turn)
        self.builder.append_text(forced, Role.REASONING)
        self._begun = forced


def played(
    engine: RolloutEngine, tokenizer: Any, config: Config, name: str, temperature: float
) -> dict[Way, Trajectories]:
    """Play the test split at one temperature in each way, as many states and episodes as ``evaluation`` says.

    Randomness does not depend on ``seeds``: the reference policy is one, whatever is trained.

    Raises:
        UserError: see ``collect``.
    """
    plan, purpose = config.evaluation, f"intervention at {temperature:g}"
    specs = evaluation_specs(config, name, "test", plan.states, plan.rollouts, 0, purpose)

    def collected(setup: Setup) -> Trajectories:
        engine.forget()
        episodes = play(engine, map(setup.begin, specs), temperature, len(specs))
        return build([episode.builder for episode in episodes])

    own = collected(Setup(tokenizer, config, name))
    none = collected(Intervention(tokenizer, config, name, purpose))
    other = collected(Intervention(tokenizer, config, name, purpose, thoughts_of(own)))
    return {"own": own, "none": none, "other": other}


def thoughts_of(trajectories: Trajectories) -> list[Thought]:
    """What was thought in each turn whose response could be read, whether or not its action was allowed."""
    found, base = list[Thought](), trajectories.offsets
    for episode, group in enumerate(trajectories.episodes["group_id"]):
        for turn in range(trajectories.turn_offsets[episode], trajectories.turn_offsets[episode + 1]):
            if trajectories.turns["well_formed"][turn] and trajectories.turns["ended"][turn] in ("stop", "eos"):
                first, last = (base[episode] + trajectories.turns[end][turn] for end in ("start", "end"))
                ids, roles = trajectories.input_ids[first:last], trajectories.role[first:last]
                found.append(Thought(group, tuple(ids[roles == Role.REASONING].tolist())))
    return found


def success_by_state(trajectories: Trajectories, rollouts: int) -> np.ndarray:
    """float64 (states,): share of each initial state's ``rollouts`` episodes that succeed, in the order played."""
    solved = np.array(trajectories.episodes["success"], dtype=np.float64)
    means: np.ndarray = solved.reshape(-1, rollouts).mean(axis=1)
    return means


@dataclass(frozen=True)
class InterventionTask:
    """One policy at one temperature."""

    config: Config
    environment: str
    policy: Path
    temperature: float


def intervene(task: InterventionTask, report: Tell) -> dict[str, np.ndarray]:
    """Load a policy in a process of its own and play the test split in each way; returns ``success_by_state``."""
    within(0.0, "loading the policy", insist=True)
    policy, plan = load_trained(task.policy, task.config), task.config.evaluation
    engine = make_engine(task.config, policy)
    report(0, 0, "episodes")
    with located(str(task.policy)):
        found = played(engine, policy.tokenizer, task.config, task.environment, task.temperature)
    return {way: success_by_state(trajectories, plan.rollouts) for way, trajectories in found.items()}
