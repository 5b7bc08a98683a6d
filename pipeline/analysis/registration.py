"""What a comparison sets out to show, written down before test states are opened, and what has changed since.

The first run writes ``hypotheses.yaml``; later ones leave it as it is. What a params file declares is held against it: a
change is no mistake, but it is shown. The file's SHA-256 and the changes decide bytes of the report; when that was is kept
apart, beside the other times.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.settings.params import Config
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import read_record, write_text
from pipeline.workspace.yaml_files import read_yaml, yaml_text

HEAD = """\
# What this comparison sets out to show, written by its first run before any test state was played. Commit it: the report
# shows its hash, and every later change. To register anew, delete it; Git knows when.
"""


def declaration(config: Config) -> dict[str, Any]:
    """What a params file declares, as plain values: what is compared, on what, and when a verdict falls."""
    plan, played, rule = config.compare, config.evaluation, config.seeds_until
    return {
        "comparison": config.comparison,
        "primary": plan.primary or next(iter({**plan.uniform, **plan.control}), None),
        "uniform": dict(plan.uniform),
        "control": dict(plan.control),
        "environments": {name: one.id for name, one in config.environments.items()},
        "smallest_effect": plan.smallest_effect,
        "family": plan.family,
        "seeds": list(config.seeds) if rule is None else rule.model_dump(mode="json"),
        "exclusions": [one.model_dump(mode="json") for one in plan.exclusions],
        "headline": {"temperature": played.temperatures[0], "states": played.states, "rollouts": played.rollouts},
        "budget": {"iterations": config.train.iterations, "tokens": config.train.tokens},
    }


def register(config: Config, file: Path) -> dict[str, Any]:
    """Write ``hypotheses.yaml`` unless it is there; its hash, and what the params file has changed since.

    Returns:
        ``sha256`` of the file, and ``changes``, a list of ``field``, ``registered`` and ``now``, in the order of fields.

    Raises:
        UserError: the file is no mapping.
    """
    declares = declaration(config)
    if not file.exists():
        write_text(file, HEAD + yaml_text(declares))
    registered = read_yaml(file)
    if not isinstance(registered, dict):
        raise UserError(f"{file}: must be a mapping, as the first run writes it; delete it to register anew")
    return {
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "changes": list(differences(registered, declares)),
    }


def differences(registered: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Fields that are not as registered; what one of the two does not have is null."""
    for field in dict.fromkeys([*now, *registered]):
        before, after = registered.get(field), now.get(field)
        if before != after:
            yield {"field": field, "registered": before, "now": after}


def journal(found: Mapping[str, Any], earlier: Path, opened: bool, at: str) -> list[dict[str, Any]]:
    """Every state of the registration in order, with the time at which a run first saw it; the last one is this.

    Args:
        found: as ``register`` returns it.
        earlier: file of the states before; it need not be there.
        opened: whether test states have been played by now.
        at: the time now, ISO 8601.
    """
    entries = registered_states(earlier)
    if not entries or any(entries[-1][key] != found[key] for key in ("sha256", "changes")):
        entries = [*entries, {**found, "at": at, "opened": opened}]
    return list(entries)


def registered_states(file: Path) -> list[dict[str, Any]]:
    """What ``journal`` gave when it was last kept; nothing where there is no file.

    Raises:
        UserError: it is damaged.
    """
    if not os.path.lexists(file):
        return []
    try:
        record = read_record(file)
    except UserError as error:
        raise UserError(f"{error}; it holds times alone: delete it to go on without them") from None
    return list(record["states"] if isinstance(record, dict) else record)  # earlier versions wrote the list itself
