"""Tables of what intervals and verdicts keep of what they promise, for docs/statistics.md."""

from collections.abc import Iterator, Sequence

from pipeline.analysis.looks_simulation import RULES, SPREADS, simulate_looks
from pipeline.analysis.simulation import MIXES, SEEDS, STATES, coverage, verdicts
from pipeline.progress.display import doing
from pipeline.report.tables import Table, markdown
from pipeline.settings.seeds import SeedsUntil

PLAYED = 32
"""Initial states in the tables of verdicts."""
MANY_STATES = 64
"""In that of equivalence: with fewer it is hardly ever declared."""
JUDGED = tuple(seeds for seeds in SEEDS if seeds > 5)
"""Numbers of seeds in the tables of verdicts; with five there are none."""
FAMILIES = (1, 6)
DIFFERENCES = (0.1, 0.15)


def simulated_blocks(trials: int) -> Iterator[tuple[str, str]]:
    """Name of a block and its Markdown, so many simulated comparisons a cell; equal for equal ``trials``."""
    for name, table in (
        ("coverage", _coverage(trials)),
        ("errors", _errors(trials)),
        ("power", _power(trials)),
        ("equivalence", _equivalence(trials)),
        ("looks", _looks(trials // 2)),
    ):
        yield name, f"{table.title}\n\n{markdown(table)}"


def _coverage(trials: int) -> Table:
    """Per mix and number of seeds, by number of states."""
    doing("simulating coverage")
    found = {(mix, n, m): coverage(mix, n, m, trials) for mix in MIXES for n in SEEDS for m in STATES}
    return Table(
        f"Percent of 95 % intervals that hold the true difference of 0.1; {trials} comparisons a cell: "
        f"{_percent(min(found.values()))} to {_percent(max(found.values()))}.",
        ["what varies most", "states", *(f"{n} seeds" for n in SEEDS)],
        [[mix, str(m), *(_percent(found[mix, n, m]) for n in SEEDS)] for mix in MIXES for m in STATES],
    )


def _errors(trials: int) -> Table:
    doing("simulating errors")
    return Table(
        f'Equal methods, {PLAYED} states: percent of families with any "better" or "worse" in them; {trials} families a cell.',
        ["what varies most", "comparisons", *(f"{n} seeds" for n in JUDGED)],
        [
            [mix, str(size), *_cells([verdicts(mix, n, PLAYED, trials, 0.0, size) for n in JUDGED], "different")]
            for mix in MIXES
            for size in FAMILIES
        ],
    )


def _power(trials: int) -> Table:
    doing("simulating power")
    return Table(
        f'One comparison, {PLAYED} states: percent of "better" where the method is better; {trials} comparisons a cell.',
        ["what varies most", "true difference", *(f"{n} seeds" for n in JUDGED)],
        [
            [mix, f"{true:g}", *_cells([verdicts(mix, n, PLAYED, trials, true) for n in JUDGED], "better")]
            for mix in MIXES
            for true in DIFFERENCES
        ],
    )


def _equivalence(trials: int) -> Table:
    doing("simulating equivalence")
    return Table(
        f'One comparison, {MANY_STATES} states, `smallest_effect` 0.05: percent of "equivalent". At a true difference of 0.05 '
        f"each is an error; {trials} comparisons a cell.",
        ["what varies most", "true difference", *(f"{n} seeds" for n in JUDGED)],
        [
            [mix, f"{true:g}", *_cells([verdicts(mix, n, MANY_STATES, trials, true) for n in JUDGED], "equivalent")]
            for mix in MIXES
            for true in (0.0, 0.05)
        ],
    )


def _cells(found: Sequence[dict[str, float]], word: str) -> list[str]:
    return [_percent(one[word]) if one else "no verdict" for one in found]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _looks(trials: int) -> Table:
    """Per spread and rule: how often it errs, and with how many seeds it ends."""
    doing("simulating looks while seeds are added")
    rule = SeedsUntil(until="decided")
    found = {(row["spread"], row["rule"], row["effect"]): row for row in simulate_looks(rule, trials=trials)}
    true = sorted({effect for *_, effect in found})
    rows = []
    for spread in SPREADS:
        for name in RULES:
            none, *others = (found[spread.name, name, effect] for effect in true)
            cells = [f"{none['wrong']:.1%}", f"{none['equivalent']:.0%}", f"{none['seeds']:.1f}"]
            rows.append([spread.name, name, *cells, *(f"{one['better']:.0%} ({one['seeds']:.1f})" for one in others)])
    called = [f"better at {effect:g}" for effect in true if effect]
    return Table(
        f"One comparison, {MANY_STATES} states, seeds until it is decided: {rule.at_least} to {rule.at_most} in batches of "
        f"{rule.batch}; {trials} runs a cell. In brackets the mean number of seeds at the end.",
        ["paired differences", "rule", "wrong at 0", "equivalent at 0", "seeds at 0", *called],
        rows,
    )
