"""The notebooks: how they are committed, the sweep's on a real search, and the one of the runs with 1,000 of them.

That all of them run on a pipeline's outputs is tested where these are: tests/test_dag.py.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.sweep.plan import plans
from pipeline.sweep.result import SearchResult, summary, trials_table
from pipeline.workspace.yaml_files import read_yaml
from tests.test_sweep_quality import search

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RUNS, ITERATIONS = 1000, 36
COMPARISON = read_yaml(ROOT / "params.yaml")["comparison"]
WATCHED = ["success", "validation_success", "valid_action_rate", "entropy_action", "kl_reference"]
METRICS = [*WATCHED, *(f"metric_{number}" for number in range(35))]
SECONDS = 10.0
"""What a person waits for a table of 1,000 runs."""


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def execute(script: str, **variables: str) -> str:
    """Run a script in the project's root, as a kernel would the cells."""
    kept = {k: v for k, v in os.environ.items() if k not in ("OUT", "MLFLOW_TRACKING_URI")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**kept, "MPLBACKEND": "agg", **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_notebooks_are_numbered() -> None:
    assert [path.name[:3] for path in NOTEBOOKS] == ["01-", "02-", "03-", "04-"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_with_what_it_answers_and_is_committed_without_outputs(notebook: Path) -> None:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    identities = [cell["id"] for cell in content["cells"]]
    assert len(set(identities)) == len(identities)
    first = content["cells"][0]
    assert first["cell_type"] == "markdown"
    assert first["source"][0].startswith("# ")
    assert first["source"][0].strip().endswith("?")
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells(notebook))
    assert len(code_cells(notebook)) <= 6


def test_the_sweep_notebook_shows_a_search(tmp_path: Path) -> None:
    policy = tmp_path / "models" / "policy"
    policy.mkdir(parents=True)
    (policy / "config.json").write_text("{}")
    plan = plans(ROOT / "params.yaml", "actfocus", policy)[0]
    found, _ = search(plan, 0, 12)
    assert isinstance(found, SearchResult)
    folder = tmp_path / "reports" / "sweep" / "actfocus"
    folder.mkdir(parents=True)
    trials_table([found]).to_csv(folder / "trials.csv", index=False)
    (folder / "summary.json").write_text(json.dumps({"study": "actfocus", "searches": [summary(found)]}))
    before = sorted(tmp_path.rglob("*"))
    shown = execute("\n".join("".join(cell["source"]) for cell in code_cells(NOTEBOOKS[2])), OUT=str(tmp_path))
    assert "actfocus, grpo_actfocus on frozen_lake" in shown
    assert "ped_anova" in shown
    best = next(line for line in shown.splitlines() if line.startswith("best "))
    assert best.split()[2] in ("1", "1.0")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.xdist_group("tracking")
def test_the_main_cell_of_the_runs_takes_seconds_with_a_thousand_runs(migrated: Path, tmp_path: Path) -> None:
    store = Path(shutil.copy(migrated, tmp_path / "mlflow.db"))
    fill(store)
    first, main, *_ = code_cells(NOTEBOOKS[1])
    assert main["metadata"]["tags"] == ["main"]
    lines = "".join(main["source"]).splitlines()
    timed = [
        "".join(first["source"]),
        "import time",
        "start, worked = time.perf_counter(), time.process_time()",
        *lines,
        "print(time.perf_counter() - start, time.process_time() - worked, len(found), len(trainings), *methods['seeds'])",
    ]
    out = execute("\n".join(timed), MLFLOW_TRACKING_URI=f"sqlite:///{store}")
    seconds, worked, found, trainings, *seeds = out.split()
    print(f"{RUNS} runs: {float(seconds):.1f} s, {float(worked):.1f} s of them computing")
    assert (int(found), int(trainings)) == (RUNS, RUNS)
    assert sum(map(int, seeds)) == RUNS
    assert float(worked) < SECONDS, "the store is in a file: without other load it waits for nothing"


def fill(store: Path) -> None:
    """As many finished trainings as ``RUNS``, of the size that the pipeline's have, inserted in bulk into a new store.

    The history of the metrics that are not looked at is left out: it takes a minute to write, and no query reads it.
    """
    connection = sqlite3.connect(store)
    renamed = "UPDATE experiments SET name = 'frozen_lake' WHERE name = 'any' RETURNING experiment_id"
    (experiment,), draws = connection.execute(renamed).fetchone(), random.Random(0)
    runs, tags, params, latest, history = [], [], [], [], []
    for number in range(RUNS):
        run, method, seed = f"{number:032x}", f"method_{number % 20}", str(number // 20)
        runs.append(
            (run, f"smoke {method} seed {seed}", "LOCAL", "me", "FINISHED", number, number + 1, "active", experiment)
        )
        named = {"comparison": COMPARISON, "environment": "frozen_lake", "method": method, "seed": seed}
        tags += [(key, value, run) for key, value in named.items()]
        tags += [(f"dvc.{key}", "0" * 32, run) for key in range(4)]
        params += [(f"method.setting_{key}", f"{method if key < 5 else key}", run) for key in range(59)]
        params.append(("seed", seed, run))
        for metric in METRICS:
            values = [draws.random() for _ in range(ITERATIONS)]
            if metric in WATCHED:
                history += [(metric, value, step, run, step, False) for step, value in enumerate(values)]
            latest.append((metric, values[-1], ITERATIONS, ITERATIONS - 1, False, run))
    with connection:
        for table, columns, rows in (
            (
                "runs",
                "run_uuid, name, source_type, user_id, status, start_time, end_time, lifecycle_stage, experiment_id",
                runs,
            ),
            ("tags", "key, value, run_uuid", tags),
            ("params", "key, value, run_uuid", params),
            ("latest_metrics", "key, value, timestamp, step, is_nan, run_uuid", latest),
            ("metrics", "key, value, timestamp, run_uuid, step, is_nan", history),
        ):
            marks = ", ".join("?" * len(rows[0]))
            connection.executemany(f"INSERT INTO {table} ({columns}) VALUES ({marks})", rows)
    connection.close()
