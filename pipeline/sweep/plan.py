"""What one search is: a method of a study, everything that decides its trials, and the name under which it is stored."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.settings.params import Config, every_seed, parse
from pipeline.settings.sweep import Study, Value
from pipeline.sweep.space import changes, configured, current, from_value, to_value
from pipeline.training.seed_key import training_key
from pipeline.workspace.errors import UserError, listed, shown
from pipeline.workspace.yaml_files import read_yaml

STORAGE_VARIABLE = "SWEEP_STORAGE"
"""Environment variable with the storage's URL: a password does not belong into params.yaml."""


@dataclass(frozen=True)
class SearchPlan:
    """The search of one method in one study."""

    raw: Mapping[str, Any]
    """The params file as parsed YAML."""
    config: Config
    study: str
    method: str
    environment: str
    policy: Path
    """Directory of the reference policy."""

    @property
    def search(self) -> Study:
        """The study's settings."""
        return self.config.sweep.studies[self.study]

    @property
    def trials(self) -> int:
        """Finished trials that are asked for."""
        return self.search.trials or self.config.sweep.trials

    @property
    def name(self) -> str:
        """The study's name in the storage: a search whose trials would be other ones has another name."""
        sweep = self.config.sweep
        decides = {
            "trainings": [
                training_key(self.config, self.environment, self.method, seed, self.policy) for seed in sweep.seeds
            ],
            "search": self.search.model_dump(mode="json", include={"space", "baselines"}),
            "sweep": sweep.model_dump(mode="json", include={"score", "fewer_tokens", "constraints", "pruner", "seed"}),
        }
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.study}-{self.environment}-{self.method}-{digest}"

    @property
    def baselines(self) -> dict[str, dict[str, Value]]:
        """Settings of each baseline by key; what it does not name is as in params.yaml."""
        return {
            name: {key: point.get(key, current(self.config, self.method, key)) for key in self.search.space}
            for name, point in self.search.baselines.items()
        }

    def draws(self) -> dict[str, dict[str, Any]]:
        """The baselines as draws of the space."""
        return {
            name: {key: from_value(self.search.space[key], value) for key, value in point.items()}
            for name, point in self.baselines.items()
        }

    def configured(self, values: Mapping[str, Value]) -> Config:
        """The params file at a point of the space."""
        return configured(self.raw, self.method, values, f"study {self.study} at {dict(values)}")

    def overlay(self, values: Mapping[str, Value]) -> dict[str, Any]:
        """What ``params.yaml`` must be overlaid with to stand at a point of the space."""
        return changes(self.raw, self.method, values)

    @property
    def storage(self) -> str | None:
        """URL of the storage, None for the journal file."""
        return self.config.sweep.storage or os.environ.get(STORAGE_VARIABLE) or None


def plans(params: str | Path, study: str, policy: Path) -> list[SearchPlan]:
    """The searches of a study, a plan per method; every one has been checked.

    Raises:
        UserError: the study or one of its methods or keys is not there, a baseline is outside the space, the schema
            refuses a corner of the space, a seed of the sweep is one of the comparison's, a method is matched to another
            (``all`` leaves these out), or trials are to be stopped early that have a budget of tokens.
    """
    raw = read_yaml(params)
    config = parse(raw, str(params))
    where = f"{params}: sweep.studies"
    _require(study, config.sweep.studies, where)
    search = config.sweep.studies[study]
    environment = search.environment or next(iter(config.environments))
    _require(environment, config.environments, f"{where}.{study}.environment")
    both = sorted({*config.sweep.seeds, *config.sweep.confirm_seeds} & set(every_seed(config)))
    if both:
        raise UserError(f"{params}: sweep: {both} are seeds of the comparison; a sweep needs seeds of its own")
    own = [name for name, method in config.methods.items() if method.matched_to is None]
    methods = own if search.methods == "all" else search.methods
    for method in methods:
        _require(method, config.methods, f"{where}.{study}.methods")
        if method not in own:
            to = config.methods[method].matched_to
            raise UserError(f"{where}.{study}.methods: {method} is matched to {to}, so that there is nothing to search")
    found = [SearchPlan(raw, config, study, method, environment, policy) for method in methods]
    for plan in found:
        _check(plan, where)
    return found


def _require(name: str, there: Mapping[str, Any], where: str) -> None:
    if name not in there:
        raise UserError(f"{where}: {shown(name)} is not there; allowed: {listed(there) or 'none'}")


def _check(plan: SearchPlan, where: str) -> None:
    """Find what would stop a sweep only after hours: keys, baselines and both ends of every range."""
    search = plan.search
    for name, point in search.baselines.items():
        stray = [key for key in point if key not in search.space]
        if stray:
            allowed = ", ".join(search.space)
            raise UserError(f"{where}.{plan.study}.baselines.{name}: {stray[0]!r} is not searched; allowed: {allowed}")
    for key in search.space:
        try:
            current(plan.config, plan.method, key)
        except UserError as error:
            raise UserError(f"{where}.{plan.study}.space: {error}") from None
    for key, space in search.space.items():
        for name, point in plan.baselines.items():
            try:
                from_value(space, point[key])
            except ValueError as error:
                raise UserError(f"{where}.{plan.study}.baselines.{name}.{key}: {plan.method}: {error}") from None
    points = list(plan.baselines.items())
    for place, (name, point) in enumerate(points):
        twin = next((other for other, same in points[:place] if same == point), None)
        if twin is not None:
            raise UserError(f"{where}.{plan.study}.baselines.{name}: {plan.method}: the same settings as {twin}")
        if plan.configured(point).train.tokens is not None and plan.config.sweep.pruner.kind != "none":
            raise UserError(
                f"{where}.{plan.study}: train.tokens gives trials equal tokens, a pruner compares them after equal "
                "iterations; set sweep.pruner: {kind: none}"
            )
        for key, space in search.space.items():
            for value in _ends(space):
                _accepted(plan, {**point, key: value}, f"{where}.{plan.study}.space.{key} from baseline {name}")


def _ends(space: Any) -> list[Value]:
    if hasattr(space, "values"):
        return list(space.values)
    nearly = 1e-6  # zero itself is never drawn, and means something else in many settings
    low, high = (nearly, 1.0) if space.kind == "log_from_zero" else (space.low, space.high)
    if space.kind == "uniform":
        low += nearly * (high - low)
    return [to_value(space, low), to_value(space, high)]


def _accepted(plan: SearchPlan, values: Mapping[str, Value], what: str) -> None:
    try:
        plan.configured(values)
    except UserError as error:
        # A baseline may stand where another setting has no effect (strength 0); no draw does.
        if "has no effect" not in str(error):
            raise UserError(f"{what}: {error}") from None
