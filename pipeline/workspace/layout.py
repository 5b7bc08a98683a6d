"""Where everything lies: what a run makes in its folder ``out``, and what is kept in the root's cache."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pipeline.workspace.ours import CACHE


@dataclass(frozen=True)
class Layout:
    """The paths of one run, a params file's: data/, models/, reports/ and sweeps/ in its folder ``out``."""

    out: Path

    @property
    def folders(self) -> tuple[Path, ...]:
        """All that a run makes is in these."""
        return tuple(self.out / name for name in ("data", "models", "reports", "sweeps"))

    @property
    def sources(self) -> Path:
        """Folder of fingerprints of what the params file only names."""
        return self.out / "data" / "sources"

    @property
    def seeds_in_effect(self) -> Path:
        """The seeds that are trained, played and compared now."""
        return self.sources / "seeds.json"

    @property
    def looks(self) -> Path:
        """The looks at the comparison that ``make repro`` has taken, while seeds are added until it is decided."""
        return self.out / "data" / "looks.json"

    @property
    def hypotheses(self) -> Path:
        """What the comparison sets out to show, as registered before test states were opened."""
        return self.out / "hypotheses.yaml"

    @property
    def registration(self) -> Path:
        """The registration's hash, and what has changed since."""
        return self.sources / "registration.json"

    @property
    def registered(self) -> Path:
        """When it was registered and changed: times, beside the other ones."""
        return self.out / "data" / "timings" / "registration.json"

    @property
    def policy(self) -> Path:
        """Directory of the reference policy."""
        return self.out / "models" / "policy"

    @property
    def all_runs(self) -> Path:
        """Folder of what MLflow calls the trainings."""
        return self.out / "data" / "runs"

    @property
    def reports(self) -> Path:
        """Folder of the comparison and of all other reports."""
        return self.out / "reports"

    @property
    def comparison(self) -> Path:
        """The comparison's numbers."""
        return self.reports / "comparison.json"

    @property
    def plots(self) -> Path:
        """Folder of numbers for plots; its manifest has the checksums of the comparison's texts, too."""
        return self.reports / "plots"

    def trained(self, environment: str, method: str) -> Path:
        """Folder of a method's trained policies."""
        return self.out / "models" / "trained" / f"{environment}-{method}"

    def final_policy(self, environment: str, method: str, seed: int | str) -> Path:
        """Directory of a seed's trained policy; of the method ``reference`` the reference policy's."""
        return self.policy if method == "reference" else self.trained(environment, method) / f"seed-{seed}"

    @property
    def base(self) -> str:
        """Path of the reference policy from a trained one's directory, where adapters look for it."""
        return os.path.relpath(self.policy, self.final_policy("environment", "method", 0))

    def trajectories(self, environment: str) -> Path:
        """The reference policy's trajectories."""
        return self.out / "data" / "trajectories" / f"{environment}.parquet"

    def annotated(self, environment: str) -> Path:
        """The same trajectories with their token energies."""
        return self.out / "data" / "annotated" / f"{environment}.parquet"

    def interventions(self, environment: str) -> Path:
        """The reference policy's success with its own reasoning, with none and with another state's."""
        return self.out / "data" / "interventions" / f"{environment}.json"

    def curves(self, environment: str, method: str) -> Path:
        """Metrics of every iteration, by seed."""
        return self.out / "data" / "curves" / f"{environment}-{method}.json"

    def episodes(self, environment: str, method: str) -> Path:
        """The first seed's last episodes, as they were trained on."""
        return self.out / "data" / "episodes" / f"{environment}-{method}.parquet"

    def evaluations(self, environment: str, method: str) -> Path:
        """Results of every episode on test states; ``reference`` is a method here."""
        return self.out / "data" / "evaluations" / f"{environment}-{method}.parquet"

    def timings(self, environment: str, method: str) -> Path:
        """Wall-clock of every iteration, by seed."""
        return self.out / "data" / "timings" / f"{environment}-{method}.json"

    @property
    def timed(self) -> Path:
        """Folder of the report and of figures with wall-clock."""
        return self.out / "data" / "timings" / "report"

    def runs(self, environment: str, method: str) -> Path:
        """MLflow's runs of a method's trainings, by seed."""
        return self.all_runs / f"{environment}-{method}.json"

    def bottleneck(self, environment: str) -> Path:
        """Folder of the Action Bottleneck's numbers and pictures."""
        return self.reports / "bottleneck" / environment

    def replay(self, environment: str) -> Path:
        """Folder of ``make replay``."""
        return self.reports / "replay" / environment

    def decisions(self, environment: str) -> Path:
        """Folder of ``make decisions``."""
        return self.reports / "decisions" / environment

    def sweep(self, study: str) -> Path:
        """Folder of a study's trials, tables and pictures."""
        return self.reports / "sweep" / study

    def confirmation(self, study: str) -> Layout:
        """A study's confirmation: a run of its own."""
        return Layout(self.out / "sweeps" / f"confirm_{study}")


@dataclass(frozen=True)
class Cache:
    """What commands keep for later ones in the root's folder ``.cache``; it may be deleted."""

    folder: Path = CACHE

    @property
    def sweep(self) -> Path:
        """A cache of trials' trainings, so that one whose worker was killed goes on where it stopped."""
        return self.folder / "sweep"

    @property
    def matching(self) -> Path:
        """A cache of the short trainings by which learning rates are found."""
        return self.folder / "match"

    @property
    def journal(self) -> Path:
        """The sweeps' storage where no database is given."""
        return self.sweep / "journal.log"

    @property
    def tracking(self) -> Path:
        """Folder of runs that a tracking store does not have yet."""
        return self.folder / "tracking"

    @property
    def hashes(self) -> Path:
        """Hashes of large files, to be used again while these are untouched."""
        return self.folder / "sources.json"

    @property
    def home(self) -> Path:
        """The home of a user who has none."""
        return self.folder / "home"

    def training(self, key: str) -> Path:
        """Folder of a training: checkpoint while it runs, result when it is finished."""
        return self.folder / "train" / key

    def supervision(self, key: str) -> Path:
        """File that holds how far the supervision of a policy is, while it goes on."""
        return self.folder / "supervision" / key

    def slices(self, key: str) -> Path:
        """Folder of a table's slices that are finished, while the others are made."""
        return self.folder / "slices" / key

    def lock(self, name: str) -> Path:
        """The lock of whoever makes what has this name."""
        file = quote(name, safe="")
        return self.folder / "locks" / (file if len(file) < 200 else hashlib.sha256(name.encode()).hexdigest())
