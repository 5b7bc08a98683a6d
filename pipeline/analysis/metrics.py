"""The comparison in the flat shapes that DVC reads: a metrics file per method, and the learning curves as one table."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.analysis.comparison import headline
from pipeline.analysis.curves import Curves
from pipeline.workspace.files import read_json, write_json, write_text

RATES = ("valid_action_rate", "disallowed_rate", "malformed_rate", "cut_rate")

METRICS = (
    "success_mean", "success_ci_low", "success_ci_high", "return_mean", *RATES, "collapsed_seeds", "alarmed_seeds",
    "difference_to_uniform", "difference_to_uniform_ci_low", "difference_to_uniform_ci_high",
)  # fmt: skip
"""Keys of a comparison's row; to `dvc metrics`, means are called by what they are of."""

CURVES = (
    "success", "validation_success", "return", *RATES, "entropy_action", "entropy_reasoning", "kl_reference",
    "kl_update_action", "gradient_norm", "clip_fraction", "gradient_share_action", "tokens",
)  # fmt: skip
"""Columns of the table of learning curves: keys of the curves, as means over seeds."""


def write_metrics(comparison: Mapping[str, Any], curves: Mapping[tuple[str, str], Curves], reports: Path) -> None:
    """Write ``metrics/<environment>/<method>.json`` and ``plots/curves.csv``; equal input gives equal bytes.

    Metrics of methods that are no longer compared are removed: files that hold nothing but ``METRICS``.
    """
    for file in (reports / "metrics").glob("*/*.json"):
        if set(read_json(file)) <= {key.removesuffix("_mean") for key in METRICS}:
            file.unlink()
    for environment, methods in headline_metrics(comparison).items():
        for method, values in methods.items():
            write_json(reports / "metrics" / environment / f"{method}.json", values)
    write_text(reports / "plots" / "curves.csv", curves_csv(curves))


def headline_metrics(comparison: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Environment -> method -> ``METRICS`` at the headline temperature; what does not apply is left out."""
    return {
        environment: {
            method: {key.removesuffix("_mean"): row[key] for key in METRICS if row.get(key) is not None}
            for method, row in rows.items()
        }
        for environment, rows in headline(comparison).items()
    }


def curves_csv(curves: Mapping[tuple[str, str], Curves]) -> str:
    """A line per environment, method and iteration: ``CURVES`` as means over the seeds that have the key there.

    Numbers have 6 significant digits; a cell is empty where no seed has the key, such as validation between two of them.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["environment", "method", "iteration", "seeds", *CURVES])
    for (environment, method), seeds in curves.items():
        for iteration in range(max(len(rows) for rows in seeds.values())):
            rows = [rows[iteration] for rows in seeds.values() if iteration < len(rows)]
            found = [[row[key] for row in rows if key in row] for key in CURVES]
            means = [f"{np.mean(values):.6g}" if values else "" for values in found]
            writer.writerow([environment, method, iteration, len(rows), *means])
    return text.getvalue()
