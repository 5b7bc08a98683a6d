"""The report as one HTML file that needs nothing beside it.

What models, environments and params files say is untrusted. Jinja escapes it in the page; in the scripts' data it is JSON
without ``<``, ``>`` and ``&``; the scripts set it as text only; and the page's policy lets no other script run.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from pipeline.analysis.bottleneck import token_counts
from pipeline.analysis.comparison import Inputs, places
from pipeline.analysis.timings import training_minutes
from pipeline.report.answer_figures import answer_chart
from pipeline.report.answers import (
    NOTHING_DECLARED,
    alarm_lines,
    answers,
    costs_text,
    efficiency_texts,
    leader_text,
    notes,
    reasoning_texts,
)
from pipeline.report.charts import Chart, difference_charts, plain, success_chart
from pipeline.report.checklist import checklist_tables
from pipeline.report.comparison_tables import (
    READING,
    common_terms,
    result_table,
    short_table,
    time_table,
    training_table,
)
from pipeline.report.curve_charts import training_charts
from pipeline.report.declared import declared_lines
from pipeline.report.style import PAGE_COLOURS
from pipeline.report.token_charts import token_charts
from pipeline.settings.params import Config
from pipeline.trajectories.trajectory import Trajectories

FOLDER = Path(__file__).parent
SHOWN_ANSWERS, SHOWN_WARNINGS = 2, 2
"""Answers and warnings of the first screen; further ones are folded."""


def report_html(
    config: Config,
    comparison: Mapping[str, Any],
    inputs: Inputs,
    bottleneck: Mapping[str, Mapping[str, Any]] | None = None,
    annotated: Mapping[str, Trajectories] | None = None,
    episodes: Mapping[str, Any] | None = None,
    sweeps: Sequence[Mapping[str, Any]] = (),
    parameters: int | None = None,
    registration: Sequence[str] = (),
) -> str:
    """Answers, warnings, tables, charts and the trajectory viewer of a comparison as a self-contained page.

    Args:
        inputs: what the comparison was made from; without timings the page has no wall-clock, and equal runs have equal pages.
        bottleneck: environment -> its Action Bottleneck diagnostics (``analysis.bottleneck.bottleneck``).
        annotated: environment -> the episodes that were diagnosed.
        episodes: what ``viewer_data`` gave; without it there is no viewer.
        sweeps: what ``read_sweeps`` gave.
        parameters: of the policy, see ``policy_size``.
        registration: lines with dates for the foot, see ``registration_foot``.
    """
    sections = [
        _section(config, comparison, inputs, name, (bottleneck or {}).get(name), (annotated or {}).get(name))
        for name in places(comparison)
    ]
    studies = [{**study, "charts": _swept(number, study)} for number, study in enumerate(sweeps)]
    answer = answer_chart(comparison)
    charts = [chart for part in (*sections, *studies) for chart in (*part["charts"], *part.get("token_charts", ()))]
    branching = [name for name, method in config.methods.items() if method.branching.kind != "none"]
    scripts = [_file(f"{name}.js") for name in ("page", "forest", "viewer", "charts")]
    plotly = Markup(get_plotlyjs())
    page = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    ).get_template("report.html.j2")  # fmt: skip
    return page.render(
        comparison=comparison,
        **_first_screen(comparison, inputs),
        answer_chart=answer,
        registration=registration,
        checklist=checklist_tables(config, comparison, inputs, parameters, timed=bool(inputs.timings)),
        reading=READING,
        terms=common_terms(comparison),
        sections=sections,
        studies=studies,
        colours=PAGE_COLOURS,
        style=_file("report.css"),
        scripts=scripts,
        plotly=plotly,
        script_hashes=" ".join(_hash(script) for script in (*scripts, plotly)),
        charts_data=embedded({c.name: {"views": c.views} for c in (*charts, *([answer] if answer else []))}),
        viewer_data=embedded(episodes) if episodes else "",
        viewer_caption=viewer_caption(config),
        viewer_method=[*branching, *config.compare.uniform, *config.methods][0],
    )


def _first_screen(comparison: Mapping[str, Any], inputs: Inputs) -> dict[str, Any]:
    """What the page begins with."""
    return {
        "answers": answers(comparison),
        "alarms": alarm_lines(comparison),
        "shown_answers": SHOWN_ANSWERS,
        "nothing_declared": NOTHING_DECLARED,
        "leaders": [leader_text(comparison, name) for name in places(comparison)],
        "costs": [costs_text(comparison, name, training_minutes(inputs.timings)) for name in places(comparison)],
        "reasoning": reasoning_texts(comparison),
        "declared": declared_lines(comparison),
        "notes": [*notes(comparison), *efficiency_texts(comparison)],
        "shown_warnings": SHOWN_WARNINGS,
    }


def _section(
    config: Config,
    comparison: Mapping[str, Any],
    inputs: Inputs,
    name: str,
    diagnosed: Mapping[str, Any] | None,
    annotated: Trajectories | None,
) -> dict[str, Any]:
    """What the page shows of one environment."""
    tokens = {} if diagnosed is None else token_counts(diagnosed)
    bottleneck = () if diagnosed is None or annotated is None else token_charts(config, name, annotated, diagnosed)
    return {
        "name": name,
        "short": short_table(comparison, name),
        "tables": [result_table(comparison, name, temperature) for temperature in places(comparison)[name]],
        "training": training_table(comparison, name),
        "time": time_table(name, inputs.timings),
        "charts": [
            success_chart(config, comparison, name),
            *difference_charts(config, comparison, name),
            *training_charts(config, inputs, name, tokens),
        ],
        "bottleneck": diagnosed,
        "token_charts": list(bottleneck),
    }


def embedded(value: Any) -> Markup:
    """JSON that can stand in a script element, whatever its texts hold: they cannot end the element or open a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII alone, U+2028 and its like escaped
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def viewer_caption(config: Config) -> dict[str, str]:
    """How the viewer's episodes were ``chosen``, and what their ``numbers`` are."""
    plan, trees = config.report, ""
    if any(method.branching.kind != "none" for method in config.methods.values()):
        trees = (
            " Where a method branches, its episodes of an initial state are drawn as trees over their tokens; what an "
            "episode branched from can be read too."
        )
    return {
        "chosen": (
            "Episodes of every method, from its first seed's last iteration (training states, temperature "
            f"{config.rollout.temperature:g}): {plan.states} initial states, those whose returns vary most over the "
            f"methods, and {plan.episodes} episodes of each, half with its highest returns and half with its lowest. "
            f"They show what happens, not how often. The reference policy's are from its own table, with other states.{trees}"
        ),
        "numbers": (
            "Energy is −logsumexp of the reference policy's logits: high where it is less confident. The "
            "shift is the log-probability under the policy that sampled the episode minus that under the reference "
            "policy. The advantage and the weight are those of the update that followed; c is the weight after "
            "aggregation. Episodes that a filter dropped have neither, nor have those of the reference policy."
        ),
    }


def _swept(number: int, study: Mapping[str, Any]) -> list[Chart]:
    return [
        Chart(f"sweep-{number}-{place}", figure["title"], figure["caption"], {"all": plain(figure["plotly"])})
        for place, figure in enumerate(study["figures"])
    ]


def _file(name: str) -> Markup:
    return Markup((FOLDER / name).read_text(encoding="utf-8"))


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
