"""YAML as this project reads and writes it: without aliases, so that an edit of one place changes one place.

`dvc exp run -S` and other tools edit what an alias stands for, and with it, silently, every other place that shares it.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from pipeline.workspace.addresses import redacted
from pipeline.workspace.errors import UserError

WRITE_OUT = "an edit of its values would change every place that shares them: write them out here"


def read_yaml(path: str | Path) -> Any:
    """Parse a YAML 1.2 file (``1e-4`` is a number).

    Raises:
        UserError: the file is missing, not YAML, or has an alias; a line for each alias.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        aliased = list(_aliases(YAML(typ="safe", pure=True).compose(text))) if "*" in text else []
        if not aliased:
            return YAML(typ="safe", pure=True).load(text)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {redacted(' '.join(str(error).split()))}") from None
    raise UserError("\n".join(f"{path}: {key}: *{anchor} is an alias; {WRITE_OUT}" for key, anchor in aliased))


def yaml_text(values: Any) -> str:
    """Plain values as YAML without aliases, in blocks and in the order of their keys."""
    yaml, stream = YAML(), io.StringIO()
    yaml.width, yaml.default_flow_style = 120, False
    yaml.representer.ignore_aliases = lambda _: True
    yaml.dump(values, stream)
    return stream.getvalue()


def _aliases(root: Node | None) -> Iterator[tuple[str, str]]:
    """Dotted key and anchor of every alias, in their order; composed, an alias is a node that has been met before."""
    met: set[int] = set()
    waiting: list[tuple[tuple[str, ...], Node]] = [] if root is None else [((), root)]
    while waiting:
        path, node = waiting.pop()
        if id(node) in met:
            yield ".".join(path), node.anchor
            continue
        met.add(id(node))
        below: list[tuple[str, Node]] = []
        if isinstance(node, MappingNode):
            below = [(str(key.value), part) for key, value in node.value for part in (key, value)]
        elif isinstance(node, SequenceNode):
            below = [(str(place), part) for place, part in enumerate(node.value)]
        waiting += [((*path, name), part) for name, part in reversed(below)]
