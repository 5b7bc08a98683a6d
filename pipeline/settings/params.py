"""The schema of ``params.yaml``: every setting, its unit, its range and its default.

``load`` reads a params file, checks it against the schema and returns a frozen ``Config``. Everything that is wrong is
reported at once, one line each, with the dotted key, the value and what is allowed (``UserError``).
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Union

from pydantic import AliasChoices, BeforeValidator, Field, ModelWrapValidatorHandler, ValidationError, model_validator

from pipeline.settings.credentials import committed_secrets
from pipeline.settings.heads import HeadSection
from pipeline.settings.method import Method
from pipeline.settings.mistakes import explain, nearest
from pipeline.settings.policy import PretrainedPolicy, ScratchPolicy
from pipeline.settings.processes import check_processes
from pipeline.settings.rollout import Rollout
from pipeline.settings.section import (
    Above,
    Count,
    Float,
    Folder,
    Int,
    Name,
    Number,
    Section,
    Seed,
    Temperature,
)
from pipeline.settings.seeds import SeedsUntil, first_seeds, only_a_mapping
from pipeline.settings.sweep import Sweep
from pipeline.settings.train import Train
from pipeline.workspace.errors import UserError, mistakes, shown
from pipeline.workspace.yaml_files import read_yaml

UNMATCHED = ("source", "status", "learning_rate", "matched_to")
"""Of a method what does not make it another one than what it is matched to."""
Family = Literal["holm", "screening"]


class Environment(Section):
    """One environment and the shape of its dialogue."""

    id: str
    """gymnasium id, ``module:Id-v0`` included; ours are ``actfocus/...`` (see pipeline/environments)."""
    settings: dict[str, Any] = Field(default={})
    """Keyword arguments of the environment's constructor."""
    layout: Literal["compact", "published"] = "compact"
    """Dialogue: ``compact`` sends the observation alone, ``published`` the wording of the published runs."""
    max_turns: Count = 8
    """Turns after which an episode is cut off."""
    actions_per_turn: Count = 1
    """Actions of one response that are executed; further ones are dropped."""
    response_tokens: Count = 48
    """Longest response of a turn, in tokens."""
    context_tokens: Count = 1024
    """Longest episode, in tokens; an episode that would outgrow it ends as ``context``."""
    format_penalty: Number = -0.1
    """Reward of a turn without a parsable, allowed action."""


class Bottleneck(Section):
    """The Action Bottleneck diagnostic."""

    groups: Count = 256
    """Groups in the annotated table, sampled by the reference policy; a multiple of rollout.groups."""
    resamples: Annotated[Int, Field(ge=100, le=1_000_000)] = 2000
    """Bootstrap resamples of its intervals."""


class Evaluation(Section):
    """Evaluation on held-out initial states."""

    states: Count = 64
    """Distinct initial states of the test split."""
    rollouts: Count = 4
    """Episodes per state, seed and temperature."""
    temperatures: list[Temperature] = Field(default=[0.5, 1.0], min_length=1)
    """Sampling temperatures; the first one is the headline."""
    validation_states: Count = 32
    """Initial states of the validation split, used during training."""
    validation_rollouts: Count = 4
    """Episodes per validation state."""

    def check(self) -> None:
        if len({f"{temperature:g}" for temperature in self.temperatures}) != len(self.temperatures):
            raise ValueError(f"temperatures must differ in their first six digits, got {self.temperatures}")


class Exclusion(Section):
    """A training that is left out of comparisons, for a reason that was there before its result was known."""

    environment: Name
    """A name of ``environments``."""
    method: Name
    """A name of ``methods``."""
    seed: Seed
    """The training's seed."""
    reason: Annotated[str, Field(min_length=1, max_length=500)]
    """In words, for the report."""


class Compare(Section):
    """The statistical comparison."""

    uniform: dict[str, str] = Field(default={})
    """Method -> its uniform counterpart. These and the next are the declared comparisons: of each there is a verdict."""
    control: dict[str, str] = Field(default={})
    """Method -> its matched control."""
    primary: str | None = None
    """Method of ``uniform`` or ``control`` whose comparisons are named first; null: the first one there."""
    smallest_effect: Annotated[Float, Field(gt=0.0, lt=1.0)] = 0.05
    """Difference in success below which two methods are as good as equal."""
    family: Family = "holm"
    """How verdicts are adjusted for the number of declared comparisons: ``holm`` bounds the chance of any wrong one,
    ``screening`` (Benjamini-Hochberg) the share of wrong ones, for dozens of rows."""
    exclusions: list[Exclusion] = Field(default=[])
    """Trainings that are left out of declared comparisons; still trained, played and shown."""


class Report(Section):
    """Episodes of the report's trajectory viewer, from the first seed's last iteration of every method."""

    states: Annotated[Int, Field(ge=0, le=1_000_000)] = 2
    """Initial states: those whose returns vary most over the methods. 0 leaves the viewer out."""
    episodes: Count = 4
    """Episodes of each: half of them those with the highest returns, half those with the lowest."""


class Tracking(Section):
    """MLflow."""

    uri: str | None = None
    """Tracking URI, without a password; null is MLFLOW_TRACKING_URI or else mlflow.db in the project's root."""
    traces: Annotated[Int, Field(ge=0, le=1_000_000)] = 4
    """Episodes of a training's last iteration that are stored as traces, with a span per turn and every token's energy."""
    episodes: Annotated[Int, Field(ge=0, le=1_000_000)] = 16
    """Episodes of it that are stored as a table of texts, ``episodes.json``."""


class Config(Section):
    """All of ``params.yaml``."""

    root: Above = "."
    """Path from the params file's folder to the project's root; every other relative path is meant from there."""
    out: Folder = "."
    """Folder under the root that receives data/, models/ and reports/."""
    params_file: Folder = "params.yaml"
    """This file, relative to the root."""
    overwrite_outside_root: bool = False
    """Whether what is made may go through links that lead out of the root, or to a ``rollout.engine.weights`` that lies
    elsewhere; what is there is then overwritten and deleted like all else."""
    comparison: Name
    """Name that groups the comparison's runs in MLflow."""
    seeds: Annotated[list[Seed], BeforeValidator(first_seeds)] = Field(min_length=1)
    """Training seeds; every method is trained once per seed. Written as ``{from: 0, at_least: 6, at_most: 30, batch: 4,
    until: decided}`` they are those in effect so far: at first the least (``pipeline/settings/seeds.py``)."""
    seeds_until: Annotated[SeedsUntil | None, BeforeValidator(only_a_mapping)] = Field(
        default=None, validation_alias=AliasChoices("seeds_until", "seeds")
    )
    """The rule by which seeds are added: ``seeds``, where it is written as a mapping; null where it is a list."""
    environments: dict[Name, Environment] = Field(min_length=1)
    """What is compared on."""
    policy: Annotated[Union[ScratchPolicy, PretrainedPolicy], Field(discriminator="kind")]
    """The reference policy."""
    rollout: Rollout = Rollout()
    bottleneck: Bottleneck = Bottleneck()
    train: Train = Train()
    method_defaults: Method
    """Slots of a method that ``methods`` does not name."""
    methods: dict[Name, Method] = Field(min_length=1)
    """What is compared."""
    evaluation: Evaluation = Evaluation()
    compare: Compare = Compare()
    report: Report = Report()
    tracking: Tracking = Tracking()
    sweep: Sweep = Sweep()
    workers: Count = 2
    """Processes that sample, train and evaluate, each on tasks of its own: seeds, slices, temperatures."""
    threads: Count = 1
    """Threads of each of these processes; ``workers`` times ``threads`` is best no more than there are cores. A policy above
    some 10 M parameters trains fastest alone, in all of them: ``workers: 1``. The number decides the order of sums."""

    @property
    def trainings(self) -> int:
        """How many trainings go on at once."""
        return self.workers // self.train.processes.number

    @model_validator(mode="wrap")
    @classmethod
    def _inherit_slots(cls, raw: Any, made: ModelWrapValidatorHandler[Self]) -> Self:
        """Fill each method's missing slots from ``method_defaults``; a slot is inherited whole, never merged."""
        if not isinstance(raw, dict) or not isinstance(raw.get("methods"), dict):
            return made(raw)
        defaults = raw.get("method_defaults")
        if not isinstance(defaults, dict):
            return made(raw)
        methods = {name: {**defaults, **own} if isinstance(own, dict) else own for name, own in raw["methods"].items()}
        found = made({**raw, "methods": methods})
        for name, own in raw["methods"].items():
            own_rate = isinstance(own, dict) and own.get("learning_rate", defaults.get("learning_rate"))
            if found.methods[name].matched_to is not None and own_rate != defaults.get("learning_rate"):
                raise ValueError(
                    f"methods.{name}.learning_rate: found by matching it to {own['matched_to']}; leave one of the two out"
                )
        return found

    def check(self) -> None:
        self.refuse_repeated("seeds")
        if self.seeds != every_seed(self)[: len(self.seeds)]:
            raise ValueError(f"seeds: {self.seeds} are not the first ones of seeds_until")
        if self.bottleneck.groups % self.rollout.groups:
            raise ValueError(
                f"bottleneck.groups ({self.bottleneck.groups}) must be a multiple of rollout.groups ({self.rollout.groups})"
            )
        episodes = self.rollout.groups * self.rollout.group_size
        if self.train.minibatch > episodes:
            raise ValueError(f"train.minibatch ({self.train.minibatch}) exceeds an iteration's {episodes} episodes")
        check_processes(self.train.processes, self.workers, self.rollout.groups, self.train.lora is not None)
        for field in ("uniform", "control"):
            for method, baseline in getattr(self.compare, field).items():
                if method == baseline:
                    raise ValueError(f"compare.{field}: {method} is compared with itself; name another method")
                for name in (method, baseline):
                    if name not in self.methods:
                        raise ValueError(f"compare.{field}: unknown method {shown(name)}{nearest(name, self.methods)}")
        self._sampler()
        declared = {*self.compare.uniform, *self.compare.control}
        if declared and self.compare.primary not in (None, *declared):
            raise ValueError(
                f"compare.primary: {shown(self.compare.primary)} is not a method of compare.uniform or compare.control"
                f"{nearest(str(self.compare.primary), declared)}"
            )
        for place, one in enumerate(self.compare.exclusions):
            for key, value, there in (
                ("environment", one.environment, self.environments),
                ("method", one.method, self.methods),
                ("seed", one.seed, every_seed(self)),
            ):
                if value not in there:
                    raise ValueError(
                        f"compare.exclusions.{place}.{key}: {shown(value)} is not there{nearest(str(value), there)}"
                    )
        if "reference" in self.methods:
            raise ValueError("methods: 'reference' is the reference policy's own name; choose another")
        for name, method in self.methods.items():
            self._branches(name, method)
            self._updates_twice(name, method)
            self._adapters(name, method)
            self._workers(name, method)
        self._ahead()
        self._matched()

    def _sampler(self) -> None:
        """What samples, and what corrects for it."""
        if self.rollout.engine.kind == "vllm" and self.rollout.engine.url is not None and self.workers > 1:
            raise ValueError(
                f"rollout.engine.url: one server has the weights of one process; workers ({self.workers}) must be 1"
            )
        exactly = getattr(self.policy, "dtype", "float32") == "float32" and not self.train.asynchronous
        if self.train.correction is not None and exactly and self.rollout.engine.kind != "vllm":
            raise ValueError(
                "train.correction: the policy samples itself, in the precision that it is trained in, so that there is "
                "nothing to correct; allowed: null"
            )

    def _matched(self) -> None:
        """What a method is matched to must have a learning rate of its own, and be another method."""
        if self.method_defaults.matched_to is not None:
            raise ValueError("method_defaults.matched_to: of single methods only")
        for name, method in self.methods.items():
            to, where = method.matched_to, f"methods.{name}.matched_to"
            if to is None:
                continue
            if to not in self.methods:
                raise ValueError(f"{where}: unknown method {shown(to)}{nearest(to, self.methods)}")
            if to == name:
                raise ValueError(f"{where}: {name} is matched to itself; name another method")
            if self.methods[to].matched_to is not None:
                raise ValueError(f"{where}: {to} is matched itself; name the method that it is matched to")
            one, other = (m.model_dump(exclude=set(UNMATCHED)) for m in (method, self.methods[to]))
            if one == other:
                raise ValueError(
                    f"{where}: {to} has the same slots, so that there is nothing to match; change one of them"
                )

    def _updates_twice(self, name: str, method: Method) -> None:
        """Rules on the ratio do nothing in the first update after a rollout: there must be another one."""
        if method.surrogate.kind in ("soft_q", "custom") and method.regulariser.skip_above_kl is None:
            return
        # A filter leaves so many groups at most, prefix credit only the initial episodes of each.
        groups = math.ceil(round(getattr(method.filter, "keep", 1.0) * self.rollout.groups, 9))
        initial = getattr(method.branching, "initial", None) if method.advantage.kind == "prefix_credit" else None
        kept = groups * (initial or self.rollout.group_size)
        whole, rest = divmod(kept, self.train.minibatch)
        # By this score branches are placed where the policy has moved: it is updated once before there are any.
        moved = getattr(method.branching, "signal", None) == "branching_score"
        if (self.train.passes + moved) * max(1, whole + (2 * rest >= self.train.minibatch)) == 1:
            rule = "regulariser.skip_above_kl" if method.surrogate.kind in ("soft_q", "custom") else "surrogate"
            raise ValueError(
                f"methods.{name}.{rule}: a rule on the ratio does nothing with one update per "
                f"iteration of {kept} episodes; lower train.minibatch or raise train.passes"
            )

    def _adapters(self, name: str, method: Method) -> None:
        """A trunk of its own would be trained in full, beside adapters that spare just that."""
        for key, section in method.advantage:
            if self.train.lora is not None and isinstance(section, HeadSection) and section.kind == "model":
                raise ValueError(
                    f"methods.{name}.advantage.{key}.kind: 'model' is not allowed with train.lora: all of its trunk would be "
                    "trained; allowed: trunk"
                )

    def _workers(self, name: str, method: Method) -> None:
        """A tree grows where what its branches begin with has been computed: in one engine, wave by wave."""
        if self.rollout.workers is not None and self.train.processes.number > 1:
            raise ValueError(
                "rollout.workers: not allowed with several processes of a training, which sample themselves"
            )
        if self.rollout.workers is not None and method.branching.kind != "none":
            raise ValueError(
                f"methods.{name}.branching.kind: {method.branching.kind!r} is not allowed with rollout.workers, which play "
                "whole episodes; allowed: none"
            )

    def _ahead(self) -> None:
        """Sampling ahead wants somebody who samples meanwhile, and a part of the episodes to be looked at before an update."""
        rollout, most = self.rollout, (self.rollout.groups - 1) * self.rollout.group_size
        if self.train.asynchronous and rollout.workers is None:
            raise ValueError(
                "train.asynchronous: 1 needs rollout.workers, which play meanwhile; set these, or leave it at 0"
            )
        if self.train.asynchronous and (rollout.unit_episodes or most + 1) > most:
            raise ValueError(
                "rollout.unit_episodes: with train.asynchronous an update waits for the next iteration's first unit of work; "
                f"allowed: at most {most}, the episodes of all groups but one"
            )

    def _branches(self, name: str, method: Method) -> None:
        """What a method's branching asks of the rollout."""
        section, size = method.branching, self.rollout.group_size
        where = f"methods.{name}.branching"
        most = size if section.kind in ("entropy_rise", "tree_search") else size - 1
        for key in ("initial", "width"):
            value = getattr(section, key, None)
            if isinstance(value, int) and value > most:
                raise ValueError(f"{where}.{key}: {value} episodes of rollout.group_size ({size}); at most {most}")


def every_seed(config: Config) -> list[int]:
    """All seeds that a comparison may ever have, in the order in which they are used."""
    rule = config.seeds_until
    return list(config.seeds) if rule is None else rule.seeds(rule.at_most)


def load(path: str | Path = "params.yaml") -> Config:
    """Read and check a params file.

    Raises:
        UserError: with one line per mistake, ``file: dotted.key: what is wrong; what is allowed``.
    """
    return parse(read_yaml(path), str(path))


def parse(raw: Any, source: str = "params.yaml") -> Config:
    """Check a parsed params file; ``source`` is what errors call it. Raises ``UserError`` like ``load``."""
    if not isinstance(raw, dict):
        raise UserError(f"{source}: must be a mapping of settings, got {type(raw).__name__}")
    secrets = committed_secrets(raw, source)
    if secrets:
        raise mistakes(secrets)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        found = [item for item in error.errors(include_url=False) if not _inherited(item["loc"], raw)]
        raise mistakes(explain(Config, source, item) for item in found) from None


def _inherited(location: tuple[Any, ...], raw: dict[str, Any]) -> bool:
    """Whether a method's mistake is in a slot that it has not written: ``method_defaults`` is where it is reported."""
    if len(location) < 3 or location[0] != "methods" or location[2] == "[key]":
        return False
    own = raw["methods"].get(location[1])
    return isinstance(own, dict) and location[2] not in own
