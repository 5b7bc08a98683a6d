"""Two revisions of one comparison beside each other, for a terminal."""

from pipeline.analysis.comparison import headline
from pipeline.analysis.revisions import Revision, changed_settings, changes
from pipeline.report.comparison_tables import success_text
from pipeline.report.differences import difference_text, seeds_advice
from pipeline.report.tables import aligned


def revisions_text(a: Revision, b: Revision) -> str:
    """Both revisions for a terminal: a table per environment, and the settings that changed."""
    rows_a, rows_b = headline(a.comparison), headline(b.comparison)
    changed = changes(a, b)
    family = sum(one.paired is not None for one in changed.values())
    parts = [f"A: {a.name}\nB: {b.name}"]
    for environment in dict.fromkeys([*rows_a, *rows_b]):
        mine, theirs = rows_a.get(environment, {}), rows_b.get(environment, {})
        temperatures = sorted({row["temperature"] for row in (*mine.values(), *theirs.values())})
        lines, unpaired, few = [["method", "A", "B", "B − A", "paired over"]], [], []
        for method in dict.fromkeys([*mine, *theirs]):
            shown, over = "–", "–"
            if (found := changed.get((environment, method))) is not None:
                if found.paired is None:
                    shown = f"{found.value:+.3f}"
                    unpaired.append(method)
                else:
                    shown = difference_text(found.paired)
                    over = f"{len(found.paired.by_seed)} seeds × {found.states} states"
                    few += [] if found.paired.verdict else [method]
            lines.append([method, success_text(mine.get(method)), success_text(theirs.get(method)), shown, over])
        text = (
            f"{environment}, success at temperature {' and '.join(f'{t:g}' for t in temperatures)}: A, B and B − A "
            f"with 95 % intervals over seeds and states; p adjusted for {family} methods (Holm)\n"
            f"{aligned(lines)}"
        )
        if few:
            text += f"\n{seeds_advice(family)} in both revisions, the same ones: {', '.join(few)}"
        if unpaired:
            text += (
                f"\nnot paired, a difference of means without a verdict: {', '.join(unpaired)} (episodes of one "
                "revision are not in the cache, or there is no common seed, state or temperature)"
            )
        parts.append(text)
    settings = changed_settings(a.params, b.params)
    table = aligned([["changed setting", "A", "B"], *map(list, settings)])
    return "\n\n".join([*parts, table if settings else "no setting changed"]) + "\n"
