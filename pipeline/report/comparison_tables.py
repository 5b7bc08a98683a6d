"""The comparison as tables that people read: cells for the report, Markdown, and text for a terminal."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from pipeline.analysis.comparison import REFERENCE, Row, difference_of, places, rows_at
from pipeline.analysis.curves import Curves
from pipeline.analysis.intervals import Interval
from pipeline.analysis.timings import environment_shares, phase_seconds
from pipeline.analysis.verdicts import Difference
from pipeline.report.answers import efficiency_texts, notes, opening
from pipeline.report.declared import declared_lines
from pipeline.report.differences import difference_text
from pipeline.report.tables import Table, aligned, markdown
from pipeline.trajectories.trajectory import CUT_OFF, RESPONSES

READING = (
    "Success on held-out initial states at the final step, as mean [95 % interval], over new seeds and new initial states: "
    "a two-way t-interval with Satterthwaite's degrees of freedom (docs/statistics.md). IQM is the mean of the middle half "
    "of the successes of single seeds on single states. Differences are paired over common seeds and states and have the "
    "same interval. Declared ones (compare.uniform and compare.control, at the headline temperature) also have p_adj, the "
    "greater one of the exact sign-flip test over seeds and the t test, adjusted for all that were declared, and a verdict: "
    "better, worse, equivalent (smaller than compare.smallest_effect) or undecided. P(> uniform) is the share of pairs of "
    "trainings in which the method scores above its uniform counterpart. Intervals are not corrected for the number of "
    "comparisons. Of all turns, valid ones did what their response says; a disallowed one names an action that may not be "
    "done; a malformed one holds no action to be read; a cut one was ended by response_tokens or context_tokens."
)
"""How to read the results, for the head of a report."""

BRACKETS = (
    "[95 % interval over new seeds and initial states]; p_adj: of no difference, adjusted for all declared comparisons"
)
"""What stands in brackets, for a terminal."""

LINE = 120
"""Columns of a text for a terminal."""

ENDS = {"goal", "failed", *CUT_OFF}
"""How episodes end unless their environment has outcomes of its own."""

UNDONE = [kind for kind in RESPONSES if kind != "valid"]
"""What a response was that no action was executed of; a comparison that was made when this was not counted lacks it."""


def result_table(comparison: Mapping[str, Any], environment: str, temperature: float) -> Table:
    """What the methods reach at one temperature, with all intervals.

    Where the environment has outcomes of its own, a column for each, after the score: the return without penalties.
    """
    rows = rows_at(comparison, environment, temperature)
    outcomes = sorted({reason for row in rows for reason in row["ends"]} - ENDS)
    headline = " (headline)" if rows[0]["headline"] else ""
    return Table(
        f"{environment}, temperature {temperature:g}{headline}",
        [
            "method", "seeds × states × episodes", "success", "IQM", "− reference", "− uniform",
            "P(> uniform)", "− control", "return", *(["score", *outcomes] if outcomes else []), "valid actions",
            *UNDONE, "action tokens", "truncated", "collapsed seeds",
        ],
        [
            [
                row["method"],
                _size(row),
                success_text(row),
                _number(row["success_iqm"]),
                _difference(row, "reference"),
                _difference(row, "uniform"),
                _number(row["probability_of_improvement"]),
                _difference(row, "control"),
                _number(row["return_mean"]),
                *([_number(row["score_mean"])] if outcomes else []),
                *(_number(row["ends"].get(outcome, 0.0)) for outcome in outcomes),
                _number(row["valid_action_rate"]),
                *(_number(row.get(f"{kind}_rate")) for kind in UNDONE),
                _number(row["action_token_share"]),
                _number(row["truncated_rate"]),
                "–" if row["collapsed_seeds"] is None else f"{row['collapsed_seeds']} of {row['seeds']}",
            ]
            for row in rows
        ],
    )  # fmt: skip


def training_table(comparison: Mapping[str, Any], environment: str) -> Table:
    """How the methods were trained, and what they were given: means over seeds of iterations, episodes, sampled tokens.

    Entropy and KL terms are a column only if they differ, status and source if given, functions of one's own if there are any.
    """
    rows = [r for r in comparison["rows"] if r["environment"] == environment and r["headline"] and r["regulariser"]]
    differ, sourced = len({_terms(row["regulariser"]) for row in rows}) > 1, any(row["source"] for row in rows)
    custom, alarmed = any("custom" in row for row in rows), any("alarms" in row for row in rows)
    return Table(
        f"{environment}, training" + (f" to {comparison['tokens']} sampled tokens" if comparison["tokens"] else ""),
        ["method", *(["status", "source"] if sourced else []), "iterations", "episodes per training",
         "sampled tokens per training", "paths per initial state", "learning rate",
         "KL per update on action tokens, first 3 iterations", "action tokens' share of the gradient, measured",
         "skipped non-finite updates", *(["entropy and KL terms"] if differ else []), *(["own functions"] if custom else []),
         *(["alarms"] if alarmed else [])],
        [
            [
                row["method"],
                *([row["status"], row["source"] or "–"] if sourced else []),
                f"{row['iterations']:g}",
                f"{row['training_episodes']:.0f}",
                f"{row['training_tokens']:.0f}",
                f"{row['paths_per_state']:g}",
                _rate(row),
                "–" if row["kl_update_action_first3"] is None else f"{row['kl_update_action_first3']:.3g}",
                "–" if row["gradient_share_action"] is None else f"{row['gradient_share_action']:.2f}",
                str(row["non_finite_losses"]),
                *([_terms(row["regulariser"])] if differ else []),
                *([_functions(row.get("custom", {}))] if custom else []),
                *([", ".join(row.get("alarms", {})) or "–"] if alarmed else []),
            ]
            for row in rows
        ],
    )  # fmt: skip


def time_table(environment: str, timings: Mapping[tuple[str, str], Curves]) -> Table:
    """Shares of an iteration by phase, a row per method of an environment; the longest phases first."""
    spent = {method: phase_seconds(curves) for (place, method), curves in timings.items() if place == environment}
    total = {method: sum(phases.values()) for method, phases in spent.items()}
    names = sorted({phase for phases in spent.values() for phase in phases})
    names.sort(key=lambda name: -sum(phases.get(name, 0.0) for phases in spent.values()))
    return Table(
        f"{environment}, time of an iteration",
        ["method", "seconds", *names, "resets in rollouts", "steps in rollouts"],
        [
            [
                method,
                f"{total[method]:.2f}",
                *(f"{phases.get(name, 0.0) / total[method]:.1%}" for name in names),
                *(f"{share:.1%}" for share in environment_shares(timings[environment, method]).values()),
            ]
            for method, phases in spent.items()
            if total[method]
        ],
    )


def verdicts_markdown(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """The declared comparisons of several params files as Markdown: a row each."""
    rows = []
    for comparison in comparisons:
        for one in comparison["hypotheses"]:
            found = comparison.get("interventions", {}).get(one["environment"], {})
            interval = None if one["ci_low"] is None else Interval(one["ci_low"], one["ci_high"])
            difference = Difference(
                one["value"], interval, tuple(one["by_seed"]), one["p"], one["p_adjusted"], verdict=one["verdict"],
                alarmed=tuple(one.get("alarmed", ())),
            )  # fmt: skip
            pair = f"`{one['method']}` − `{one['against']}`"
            kind = found.get("reasoning") or "–"
            rows.append([comparison["comparison"], one["environment"], kind, pair, difference_text(difference)])
    header = ["comparison", "environment", "reasoning", "methods", "difference in success"]
    return markdown(Table("verdicts", header, rows))


def interventions_markdown(played: Mapping[str, Mapping[str, Any]]) -> str:
    """Success of reference policies with their own reasoning, without any and with another state's, as Markdown.

    Args:
        played: comparison -> environment -> what ``analysis.interventions.intervention`` found.
    """

    rows = []
    for comparison, environments in played.items():
        for environment, found in environments.items():
            for at in found["temperatures"]:
                fall = at["none_minus_own"]
                interval = None if fall["ci_low"] is None else Interval(fall["ci_low"], fall["ci_high"])
                rates = (f"{at[way]['success']:.3f}" for way in ("own", "none", "other"))
                place = (comparison, environment, found["reasoning"] or "–", f"{at['temperature']:g}")
                rows.append([*place, *rates, difference_text(Difference(fall["value"], interval, ()))])
    header = ["comparison", "environment", "reasoning", "temperature", "own", "none", "another's", "none − own"]
    return markdown(Table("reasoning", header, rows))


def common_terms(comparison: Mapping[str, Any]) -> str:
    """The entropy and KL terms, in one sentence if all methods share them."""
    terms = {row["method"]: _terms(row["regulariser"]) for row in comparison["rows"] if row["regulariser"]}
    if len(set(terms.values())) == 1:
        return f"All methods share the same entropy and KL terms: {next(iter(terms.values()))}."
    return "The methods differ in their entropy and KL terms; the tables of their training list them."


def short_table(comparison: Mapping[str, Any], environment: str) -> Table:
    """What most readers want of an environment, at the headline temperature: success, and the declared differences.

    Against whom is said by the answers above it and by the whole table.
    """
    rows = rows_at(comparison, environment, places(comparison)[environment][0])
    kinds = [kind for kind in ("uniform", "control") if any(difference_of(row, kind) for row in rows)] or [REFERENCE]
    return Table(
        f"{environment}, temperature {rows[0]['temperature']:g}",
        ["method", "success", *(f"− {kind}" for kind in kinds)],
        [[row["method"], success_text(row), *(_difference(row, kind, named=False) for kind in kinds)] for row in rows],
    )


def comparison_markdown(comparison: Mapping[str, Any], checklist: Sequence[Table] = ()) -> str:
    """The whole comparison as Markdown: answers, a short table per environment, warnings, all numbers, the checklist."""
    parts = [f"# Comparison `{comparison['comparison']}`", _listed([*opening(comparison), *declared_lines(comparison)])]
    for environment in places(comparison):
        table = short_table(comparison, environment)
        parts += [f"## {table.title}", markdown(table)]
    if comparison["warnings"]:
        parts += ["**Warnings**", _listed(comparison["warnings"])]
    if efficient := efficiency_texts(comparison):
        parts += ["## Sample efficiency", _listed(efficient)]
    parts += ["## How to read the numbers", *notes(comparison), READING, common_terms(comparison)]
    for environment, temperatures in places(comparison).items():
        tables = [result_table(comparison, environment, temperature) for temperature in temperatures]
        for table in [*tables, training_table(comparison, environment)]:
            parts += [f"## {table.title}", markdown(table)]
    for table in checklist:
        parts += [f"## {table.title}", markdown(table)]
    return "\n\n".join(parts) + "\n"


def _listed(lines: Sequence[str]) -> str:
    """Lines as a list; those that are points already are points of the one before."""
    return "\n".join(f"  {line}" if line.startswith("- ") else f"- {line}" for line in lines)


def comparison_text(comparison: Mapping[str, Any], minutes: Mapping[tuple[str, str], float] | None = None) -> str:
    """The comparison for a terminal: answers, a short table per environment with how much was played, and warnings.

    Args:
        minutes: see ``costs_text``; a file that is to be equal for equal runs has none.
    """
    parts = [
        wrapped(line) for line in (*opening(comparison, minutes), *declared_lines(comparison), *notes(comparison))
    ] + [""]
    for environment, temperatures in places(comparison).items():
        table = short_table(comparison, environment)
        rows = {row["method"]: row for row in rows_at(comparison, environment, temperatures[0])}
        cells, title = [table.header, *table.rows], table.title
        sizes = [_size(row) for row in rows.values()]
        if len(set(sizes)) == 1:
            title = f"{title}, {sizes[0]} seeds × states × episodes"
        else:
            more = ["seeds × states × episodes", *sizes]
            cells = [[*line, size] for line, size in zip(cells, more, strict=True)]
        if any(row["source"] for row in comparison["rows"]):
            statuses = {"method": "status", **{name: row["status"] or "–" for name, row in rows.items()}}
            cells = [[line[0], statuses[line[0]], *line[1:]] for line in cells]
        parts += [title, aligned(cells), ""]
    warnings = [wrapped(f"warning: {warning}") for warning in comparison["warnings"]]
    return "\n".join([*parts, BRACKETS, "", *warnings]).rstrip() + "\n"


def wrapped(line: str) -> str:
    """A sentence for a terminal, in lines that fit it."""
    return fill(line, LINE, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _size(row: Row) -> str:
    return f"{row['seeds']} × {row['states']} × {row['episodes'] // (row['seeds'] * row['states'])}"


def _difference(row: Row, other: str, named: bool = True) -> str:
    found = difference_of(row, other)
    against = f" vs {row[other]}" if named and other != REFERENCE else ""
    return "–" if found is None else difference_text(found, against)


def success_text(row: Row | None) -> str:
    """A row's success with its interval; a dash where there is no row."""
    return "–" if row is None else f"{_number(row['success_mean'])} {_bounds(row, 'success_ci')}"


def _bounds(row: Row, interval: str) -> str:
    low, high = row[f"{interval}_low"], row[f"{interval}_high"]
    return "–" if low is None or high is None else f"[{low:.3f}, {high:.3f}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _functions(custom: Mapping[str, Mapping[str, Any]]) -> str:
    """Each slot's function with its settings."""
    parts = []
    for slot, section in custom.items():
        settings = ", ".join(f"{name} {value}" for name, value in section["settings"].items())
        shuffled = ", shuffled" if section.get("shuffle") else ""
        parts.append(f"{slot} {section['function']}" + (f" ({settings})" if settings else "") + shuffled)
    return "; ".join(parts) or "–"


def _rate(row: Row) -> str:
    """The learning rate, and how far the KL of an update is from that of the method that it was matched to."""
    found = row.get("matched")
    return f"{row['learning_rate']:g}" + (
        f" (matched to {found['matched_to']}: {found['off']:.1%} off)" if found else ""
    )


def _terms(regulariser: Mapping[str, Any]) -> str:
    kl = f"{regulariser['kl']:g} ({regulariser['kl_estimator']})" if regulariser["kl"] else "none"
    own = "" if regulariser["kind"] == "fixed" else f"{regulariser['kind']}, "
    return f"{own}entropy bonus {regulariser['entropy']:g}, KL to the reference {kl}"
