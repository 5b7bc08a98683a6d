"""A worked example: an environment in a module of its own, registered with gymnasium when it is imported."""

import gymnasium
import numpy as np

LAMPS = 10
PRESSES = [f"press {lamp}" for lamp in range(1, LAMPS + 1)]


def press(row, lamp):
    """Switch a lamp (from 1) and its neighbours."""
    return [1 - lit if abs(number - lamp) <= 1 else lit for number, lit in enumerate(row, start=1)]


class Lamps(gymnasium.Env):
    """A row of lamps, some of them lit: switch all off. Reward 1 when it is done, else 0."""

    observation_space = gymnasium.spaces.Text(max_length=100)
    action_space = gymnasium.spaces.Text(max_length=20)

    def __init__(self, faulty: float = 0.0, max_actions: int = 12):
        self.faulty, self.max_actions, self.done, self.success = faulty, max_actions, True, False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)  # self.np_random is the noise
        state = np.random.default_rng((options or {}).get("state_seed", seed))
        self.row = [int(digit) for digit in f"{state.integers(1, 2**LAMPS):0{LAMPS}b}"]
        self.actions_left, self.done, self.success = self.max_actions, False, False
        return self.state_key, {}

    def step(self, action):
        if self.done:
            raise RuntimeError("step called after the episode's end: call reset")
        faulty = self.np_random.random() < self.faulty
        self.row = press(self.row, int(self.np_random.integers(LAMPS)) + 1 if faulty else PRESSES.index(action) + 1)
        self.actions_left, self.success = self.actions_left - 1, not any(self.row)
        self.done = self.success or self.actions_left == 0
        return self.state_key, float(self.success), self.success, self.done and not self.success, {}

    def parse_action(self, text):
        action = " ".join(text.lower().split())
        return action if action in PRESSES else None

    @property
    def state_key(self):
        return "lamps " + " ".join(map(str, self.row))

    @property
    def instructions(self):
        return (
            f"Switch {LAMPS} lamps off (1 is on, 0 is off). Actions: press 1 to press {LAMPS}. Pressing a lamp switches "
            f"it and its neighbours; with probability {self.faulty:g} another lamp is pressed. You have "
            f"{self.max_actions} actions."
        )


class Expert:
    """Whether lamp 1 is pressed decides about all others: each has to switch its left neighbour off."""

    def act(self, environment, draws):
        for first in (0, 1):
            row, plan = environment.row, []
            for lamp in range(1, LAMPS + 1):
                if first if lamp == 1 else row[lamp - 2]:
                    row, plan = press(row, lamp), [*plan, lamp]
            if not any(row):
                return PRESSES[plan[int(draws.integers(len(plan)))] - 1]

    def random_action(self, draws):
        return PRESSES[int(draws.integers(LAMPS))]

    def reason(self, environment, words, draws):
        facts = [f"{number} is {'on' if lit else 'off'}" for number, lit in enumerate(environment.row, start=1)]
        return " ".join(" ".join(facts[int(draws.integers(LAMPS))] for _ in range(words)).split()[:words])


expert = Expert
gymnasium.register(id="Lamps-v0", entry_point=Lamps, disable_env_checker=True)
