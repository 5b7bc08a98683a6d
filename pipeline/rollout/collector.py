"""Playing episodes: environments on one side, an engine on the other, ``Trajectories`` out."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.progress.display import beat, on_beat, within
from pipeline.progress.timing import Phases
from pipeline.rollout.engine import Continuation, Request, RolloutEngine, Sampling
from pipeline.rollout.episode import Episode, Setup
from pipeline.rollout.specs import EpisodeSpec
from pipeline.settings.params import Config
from pipeline.trajectories.builder import build
from pipeline.trajectories.parsing import END_OF_RESPONSE
from pipeline.trajectories.trajectory import Trajectories


def collect(
    engine: RolloutEngine,
    tokenizer: Any,
    config: Config,
    name: str,
    specs: Sequence[EpisodeSpec],
    temperature: float,
    phases: Phases | None = None,
    closing: bool = False,
) -> Trajectories:
    """Play episodes to their end, and return them in the order of ``specs``; of the rest see ``Setup``.

    Raises:
        UserError: the environment raised, or returned what it must not (see ``playing.step``); its openings differ
            within a group, or leave no room in ``context_tokens``.
    """
    at_once = config.rollout.environments_at_once
    setup = Setup(tokenizer, config, name, phases if at_once == 1 else None, closing)
    engine.forget()
    if at_once > 1:
        episodes = play_in_rounds(engine, setup, specs, temperature, at_once)
    else:
        episodes = play(engine, map(setup.begin, specs), temperature, len(specs))
    return build([episode.builder for episode in episodes])


def play(engine: RolloutEngine, episodes: Iterable[Episode], temperature: float, count: int = 0) -> list[Episode]:
    """Play episodes to their end, each begun when the engine has room for it; returns them in order.

    What the engine has computed for their beginnings, in this call or an earlier one, is not computed again. ``count`` is
    how many there are, where that is known and not to be seen; it is for telling how far it is.
    """
    count = len(episodes) if isinstance(episodes, Sized) else count
    played: list[Episode] = []
    sampled = unfinished = 0

    def requests() -> Iterator[Request]:
        for episode in episodes:
            episode.builder.identity["temperature"] = temperature
            played.append(episode)
            yield episode.request()

    def follow(number: int, answer: Continuation) -> Request | None:
        nonlocal sampled, unfinished
        episode = played[number]
        episode.take(answer)
        sampled, unfinished = sampled + len(answer.ids), max(0, unfinished - len(answer.ids))
        beat(unfinished)
        return None if episode.done else episode.request()

    def said(tokens: int) -> None:
        nonlocal unfinished
        unfinished = tokens
        within(*_course(played, max(count, len(played)), sampled, unfinished))

    with on_beat(said):
        engine.generate(requests(), Sampling(temperature, END_OF_RESPONSE), follow)
    return played


def play_in_rounds(
    engine: RolloutEngine, setup: Setup, specs: Sequence[EpisodeSpec], temperature: float, at_once: int
) -> list[Episode]:
    """Play episodes to their end, round by round: all that go on are given a response, then their environments act, so many
    at the same time, each in a thread."""
    sampling = Sampling(temperature, END_OF_RESPONSE)
    with ThreadPoolExecutor(at_once) as threads:
        episodes = list(threads.map(setup.begin, specs))
        for episode in episodes:
            episode.builder.identity["temperature"] = temperature
        going = episodes
        while going:
            answers = engine.generate([episode.request() for episode in going], sampling)
            list(threads.map(Episode.take, going, answers))
            going = [episode for episode in going if not episode.done]
    return episodes


def _course(played: Sequence[Episode], count: int, sampled: int, unfinished: int) -> tuple[float, str]:
    """How far episodes are: a fraction, in which one that goes on counts by its turns and tokens; and in words."""
    section = played[0].section
    turns = [len(episode.builder.turns) for episode in played]
    ended = sum(episode.done for episode in played)
    going = sum(own for own, episode in zip(turns, played, strict=True) if not episode.done)
    part = ended + going / section.max_turns + unfinished / (section.max_turns * section.response_tokens)
    words = f"{ended} of {count} episodes ended, {sum(turns)} turns, {sampled + unfinished} tokens"
    return min(part / count, 1.0), words
