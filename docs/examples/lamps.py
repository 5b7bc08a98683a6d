"""A worked example: an environment in a module of its own, registered with gymnasium when it is imported."""

import gymnasium
import numpy as np

PRESSES = [f"press {lamp}" for lamp in range(1, 11)]


class Lamps(gymnasium.Env):
    """Ten lamps in a row, some of them lit: switch all off. Reward 1 when it is done, else 0."""

    observation_space = gymnasium.spaces.Text(max_length=100)
    action_space = gymnasium.spaces.Text(max_length=20)

    def __init__(self, faulty: float = 0.0, max_actions: int = 12):
        self.faulty, self.max_actions, self.done, self.success = faulty, max_actions, True, False
        self.instructions = (
            "Switch 10 lamps off (1 is on, 0 is off). Actions: press 1 to press 10. Pressing a lamp switches it and the "
            f"next one; with probability {faulty:g} a random lamp is pressed instead. You have {max_actions} actions."
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)  # self.np_random is the noise
        state = np.random.default_rng((options or {}).get("state_seed", seed))
        self.row = [int(digit) for digit in f"{state.integers(1, 2**10):010b}"]
        self.actions_left, self.done, self.success = self.max_actions, False, False
        return self.state_key, {}

    def step(self, action):
        if self.done:
            raise RuntimeError("step called after the episode's end: call reset")
        faulty = self.np_random.random() < self.faulty
        lamp = self.np_random.integers(10) if faulty else PRESSES.index(action)
        self.row[lamp : lamp + 2] = [1 - lit for lit in self.row[lamp : lamp + 2]]
        self.actions_left, self.success = self.actions_left - 1, not any(self.row)
        self.done = self.success or self.actions_left == 0
        return self.state_key, float(self.success), self.success, self.done and not self.success, {}

    def parse_action(self, text):
        action = " ".join(text.lower().split())
        return action if action in PRESSES else None

    @property
    def state_key(self):
        return "lamps " + " ".join(map(str, self.row))


class Expert:
    """Puts out the first lamp that is on, which changes none before it."""

    def act(self, environment, draws):
        return PRESSES[environment.row.index(1)]

    def random_action(self, environment, draws):
        return PRESSES[draws.integers(10)]

    def reason(self, environment, words, draws):
        facts = [f"{lamp} is {'on' if lit else 'off'}" for lamp, lit in enumerate(environment.row, start=1)]
        return " ".join(" ".join(draws.permutation(facts)).split()[:words])


expert = Expert
gymnasium.register(id="Lamps-v0", entry_point=Lamps, disable_env_checker=True)
