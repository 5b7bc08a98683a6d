"""Params and players for tests of optional environments."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from pipeline.environments import make
from pipeline.environments.making import EXTRAS
from pipeline.settings.params import Environment

ROOT = Path(__file__).parents[1]
REASONING, ARENA = EXTRAS


def installed(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def section(name: str, **settings: Any) -> Environment:
    return Environment(id=name, settings=settings)


def started(name: str, state: int = 0, seed: int = 0, **settings: Any) -> Any:
    environment = make(section(name, **settings))
    environment.reset(seed=seed, options={"state_seed": state})
    return environment
