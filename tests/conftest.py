"""One thread per test process, as the suite runs one per core; what takes seconds to make and many tests begin with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from pipeline.model.policy import Policy

# Before anything of them is imported: a call must fit its annotations, shapes included; an int may be a float (PEP 484).
# Not the trunk, its kernels and the engine, of which the functions run per layer and token: they would take twice as long.
# Nor the contracts, which look whether anybody draws from the global generators: beartype does.
SHAPED = ("analysis", "model.scoring", "objective", "training")
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook([f"pipeline.{name}" for name in SHAPED], CHECKER)
torch.set_num_threads(1)
# The same examples everywhere, and as long as they take: what fails on a slow machine fails on every other, too.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
GROUPS = ("dag", "settings", "team", "sweep", "ray", "tracking", "browser")
"""Of tests that one process runs, the longest first; what is left at the end should be small."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Processes are given work in this order (pyproject.toml: ``--no-loadscope-reorder``)."""
    items.sort(key=place)


def place(item: pytest.Item) -> int:
    """Of its group; tests of no group come last."""
    group = item.get_closest_marker("xdist_group")
    return len(GROUPS) if group is None else GROUPS.index(group.args[0])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Also after a test that ran code which takes more; float sums depend on the number of threads."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny reference policy is saved: one for a process and all its tests, which leave it as it is."""
    from tests.trainings import configured, supervised  # importing what trains takes seconds

    target = tmp_path_factory.mktemp("models") / "policy"
    supervised(configured()).save(target)
    return target


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables and an experiment "any", to be copied; making one takes seconds."""
    from pipeline.tracking.store import open_store
    from pipeline.tracking.training import Store
    from tests.tracked import apart

    folder = tmp_path_factory.mktemp("migrated")
    apart(open_store, Store(f"sqlite:///{folder / 'mlflow.db'}", folder / ".cache"), "any")
    return folder / "mlflow.db"


@pytest.fixture
def policy(directory: Path) -> Policy:
    """The tiny reference policy, to be trained."""
    from pipeline.model.loading import load_policy

    return load_policy(directory)
