"""TextArena's games for one player."""

from __future__ import annotations

import functools
import json
from typing import Any

import gymnasium
import numpy as np
import textarena
from textarena.envs.registration import ENV_REGISTRY

from pipeline.environments.draws import state_draws
from pipeline.environments.episodic import Episodic, check_whole
from pipeline.environments.foreign import Enclosure, check_known, free_text


class TextArenaGame(Episodic):
    """Play a game. Its reward, from -1 to 1, comes with the last action; success is a reward of 1.

    Args:
        game: its id in TextArena.
        config: keyword arguments of the game.
        max_actions: actions after which an unfinished game is cut off, with reward 0; at least 1.

    Raises:
        ValueError: max_actions is below 1; or the game is unknown, cannot be made, is not for one player, always starts
            in one state, or fails at an action that it does not understand.
    """

    observation_space = gymnasium.spaces.Text(max_length=100_000)
    action_space = gymnasium.spaces.Text(max_length=1000)
    allowed = "text that a game can be given"

    def __init__(
        self, game: str = "GuessTheNumber-v0", config: dict[str, Any] | None = None, max_actions: int = 100
    ) -> None:
        check_whole(max_actions=(max_actions, 1, None))
        check_known("game", game, "TextArena", ENV_REGISTRY)
        self.name, self.max_actions = game, max_actions
        self.numbered = not _openings_differ(game, json.dumps(config or {}))
        self.enclosure = Enclosure(0)
        with self.enclosure.entered():
            self.game = textarena.make(game, **(config or {}))
        self.opening, self.state_key = "", ""

    def _begin(self, state_seed: int | None) -> str:
        """A game that opens with the same words whatever it hides gets a number, drawn apart from what it hides."""
        draws = state_draws(self.np_random, state_seed, 1)
        start, number = int(draws.integers(2**31)), int(draws.integers(10**6))
        with Enclosure(start).entered():
            self.game.reset(num_players=1, seed=start)
        self.enclosure = Enclosure(int(self.np_random.integers(2**31)))
        self.opening = f"Game {number}.\n" * self.numbered + _news(self.game)
        self.state_key = f"{self.opening}\n{_plain(self.game.state.game_state)}"
        return self.opening

    def _act(self, text: str) -> tuple[str, float, bool]:
        """The game itself judges what the text means."""
        with self.enclosure.entered():
            over, _ = self.game.step(action=text)
        reward = float(self.game.state.rewards[0]) if over else 0.0
        self.success = over and reward >= 1
        self.state_key = f"{self.opening}\n{_plain(self.game.state.game_state)}"
        return _news(self.game), reward, over

    def parse_action(self, text: str) -> str | None:
        """Any text without the space around it (see ``free_text``)."""
        return free_text(text, self.action_space.max_length)

    @property
    def instructions(self) -> str:
        """Task, actions and limit; the game's own rules open the first observation."""
        return (
            f"You are playing the game {self.name} of TextArena, alone. Its rules are in the first message.\n"
            f"Actions: text in the form that the rules ask for. You have {self.max_actions} actions."
        )


@functools.cache
def _openings_differ(game: str, config: str) -> bool:
    """Whether a game's first words tell its states apart, found out by playing it a little.

    Raises:
        ValueError: it cannot be played here, see ``TextArenaGame``.
    """
    openings, states = set[str](), set[str]()
    try:
        with Enclosure(0).entered():
            made = textarena.make(game, **json.loads(config))
            for seed in range(4):
                made.reset(num_players=1, seed=seed)
                openings.add(_news(made))
                states.add(_plain(made.state.game_state))
            alone = isinstance(made.state, textarena.SinglePlayerState)
            for _ in range(10 if alone else 0):
                over, _ = made.step(action="?")
                _news(made)
                if over:
                    float(made.state.rewards[0])
                    break
    except Exception as error:
        reason = " ".join(str(error).replace("*", "").split()[:30])
        raise ValueError(f"game {game!r} cannot be played alone: {type(error).__name__}: {reason}") from error
    if not alone:
        raise ValueError(f"game {game!r} is for several players")
    if len(openings) == len(states) == 1:
        raise ValueError(f"game {game!r} always starts in the same state: there is nothing to split")
    return len(openings) > 1


def _news(game: Any) -> str:
    """What a game has said since it was asked last, without the player's own words."""
    state, own = game.state, textarena.ObservationType.PLAYER_ACTION
    said = [message for _, message, kind in state.get_current_player_observation() if kind is not own]
    if state.done:
        said.append(state.game_info[0].get("reason") or "")
    return "\n".join(said).strip() or "nothing new"


def _plain(value: Any) -> str:
    """A value as text that is the same in every process: sets in order, objects by what they hold."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_plain(key)}: {_plain(item)}" for key, item in value.items()) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(_plain, value))) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    names = getattr(value, "__dict__", None) or getattr(value, "__slots__", ())
    return type(value).__name__ + _plain({name: getattr(value, name) for name in names}) if names else repr(value)
