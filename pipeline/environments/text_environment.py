"""What an environment of this project is: gymnasium's interface in text, with four attributes more."""

from typing import Any, Protocol


class TextEnvironment(Protocol):
    """A ``gymnasium.Env`` with text observations and actions, and four attributes.

    ``reset(seed=, options={"state_seed": s})`` draws the initial state from ``state_seed`` and everything that happens
    afterwards from ``seed``, so that the members of a group share the state but not the noise. With no ``state_seed``
    the state is drawn from ``seed`` as well.
    """

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]: ...

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Also other numbers and truth values, of NumPy too: see ``transition``."""

    @property
    def instructions(self) -> str:
        """The task, its symbols, actions and limits, in the numbers of this instance."""

    @property
    def state_key(self) -> str:
        """The environment's own state, complete enough to tell two states apart."""

    @property
    def success(self) -> bool:
        """Whether the episode has reached its aim."""

    def parse_action(self, text: str) -> str | None:
        """The canonical form of an action that is allowed now, or None."""


def id_of(environment: Any) -> str:
    """The id by which ``make`` was asked for an environment; its class's name if ``make`` did not make it."""
    spec = getattr(environment, "spec", None)
    return str(spec.id) if spec is not None else type(environment).__name__
