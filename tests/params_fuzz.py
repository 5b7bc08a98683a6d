"""Params files and overlays gone wrong, each named by a seed; ``python -m tests.params_fuzz 10000`` tries so many."""

from __future__ import annotations

import copy
import random
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.settings.params import Config, load, parse
from pipeline.settings.presets import made_files, preset_values
from pipeline.workspace.errors import UserError
from pipeline.workspace.yaml_files import parse_yaml, yaml_text
from tests.config_cases import PRESETS, ROOT

Spoil = Callable[[random.Random, str], str | bytes]
LONGEST = 300
"""Characters of a line that a terminal shows."""
SECONDS = 1.0
"""Of computing, for a file."""

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 0.5, -0.0, 1e-300, 1e308, 2**31, 2**63, 2**64, -(2**70), 10**400),
    *("", " ", "x", "0", "nan", "1e999", "..", "../x", "/etc", "~", "a" * 5000, "ä", "\u202e", "x; touch y #", "$(y)"),
    *("module:name", "package:x", "http://h:1", "sqlite:///x", "none", "custom", "method.learning_rate", "all"),
    *([], [[]], [None], [0, 0], list(range(300)), {}, {"": {}}, {"kind": "custom"}, {"kind": []}, {"a": {"a": {}}}),
)
RAW = (
    *("!!float x", "!!int ''", "!!int _", "!!bool x", "!!binary x", "!!timestamp x", "!!set {x, y}", "!!omap [x]"),
    *("!!str 1", "!!null x", "!x 1", "!<tag:yaml.org,2002:python/name:os.system> x", "&a [*a]", "*a", "&a x", "<<"),
    *(".nan", "-.inf", "1e999", "9" * 5000, "0x" + "f" * 5000, "0o8", "1_0", "1:60", "2001-13-45", "2001-01-01"),
    *(
        '"\\ud800"',
        '"\\U00110000"',
        '"\\0"',
        '"\\e[31m"',
        "'",
        '"',
        "? x",
        "- - - x",
        "|\n x",
        ">2\n x",
        "{a: [}",
        "@x",
    ),
    *(
        "[" * 3000,
        "{a: " * 3000,
        "[" + "1," * 9000 + "]",
        "- " * 3000,
        "? " * 3000,
        "[[" * 20 + "]]" * 20,
        "x" * 70_000,
    ),
)
"""What may stand behind a key, as text."""


class Tried(NamedTuple):
    """What became of a file."""

    config: Config | None
    lines: list[str]
    """Of the refusal."""
    seconds: float


def places(values: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key and list's index in there."""
    for key in values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ():
        yield (*place, key)
        yield from places(values[key], (*place, key))


def restructured(draws: random.Random, text: str) -> str:
    """With some values, keys and parts changed, moved, renamed or removed."""
    values = parse_yaml(text.encode(), "begun with")
    for _ in range(draws.choice((1, 1, 2, 5))):
        every = list(places(values))
        *path, last = draws.choice(every) if every else [0]
        part = values
        for key in path:
            part = part[key]
        found = part[last]
        kind = draws.randrange(6)
        if kind == 0:
            del part[last]
        elif kind == 1 and isinstance(part, dict):
            letter = draws.choice((*string.printable, "é", "\x1b", "\x00", "\ud800", "." * 400))
            part[last[: draws.randrange(4)] + letter + last[1:]] = part.pop(last)
        elif kind == 2:
            source: Any = values
            for key in draws.choice(every):
                source = source[key]
            part[last] = copy.deepcopy(source)
        elif kind == 3:
            for _ in range(draws.choice((1, 5, 40))):
                found = draws.choice(([found], {"a": found}))
            part[last] = found
        elif kind == 4 and isinstance(found, int | float):
            part[last] = draws.choice((-found, found * 10**9, found / 3, str(found), float(found), found + 1))
        else:
            part[last] = copy.deepcopy(draws.choice(ODD))
    try:
        return yaml_text(values)
    except Exception:  # the writer refuses some of these
        return repr(values)


def replaced(draws: random.Random, text: str) -> str:
    """With something else as some keys' values."""
    lines = text.splitlines()
    for _ in range(draws.choice((1, 1, 3))):
        number = draws.randrange(len(lines))
        key, colon, _ = lines[number].partition(":")
        lines[number] = f"{key}{colon} {draws.choice(RAW)}"
    return "\n".join(lines)


def shuffled(draws: random.Random, text: str) -> str:
    """With lines that are doubled, left out, moved, indented or joined."""
    lines = text.splitlines()
    for _ in range(draws.choice((1, 2, 9))):
        number, other = draws.randrange(len(lines)), draws.randrange(len(lines))
        line = lines[number]
        lines[number : number + 1] = draws.choice(
            (
                [line, line],
                [],
                [f" {line}"],
                [line.strip()],
                [line, lines[other]],
                [f"{line}{lines[other]}"],
                [f"\t{line}"],
            )
        )
        lines = lines or ["x"]
    return "\n".join(lines)


def damaged(draws: random.Random, text: str) -> bytes:
    """With bytes that are changed, left out or put in."""
    found = bytearray(text, "utf-8", "surrogatepass")
    for _ in range(draws.choice((1, 3, 30))):
        place = draws.randrange(len(found))
        found[place : place + draws.randrange(3)] = draws.choice(
            (b"", b"\0", b"\xff", b"\xc3", draws.randbytes(2), b"*a", b"]")
        )
    return bytes(found)


def encoded(draws: random.Random, text: str) -> bytes:
    """In another encoding, or with other ends of lines."""
    kind = draws.choice(("utf-16", "utf-32", "utf-8-sig", "latin-1", "cp037", "crlf", "cr", "nel"))
    ends = {"crlf": "\r\n", "cr": "\r", "nel": "\x85"}
    if kind in ends:
        return text.replace("\n", ends[kind]).encode()
    return f"{text}# é\n".encode(kind)


def enlarged(draws: random.Random, text: str) -> str:
    """With a great many of something."""
    count = draws.choice((300, 3000, 30_000))
    more = draws.choice(
        ("  m{0}: {{}}\n", "k{0}: 1\n", "# {0}\n", "\n", "- {0}\n", "? {0}\n", "  m{0}: &a{0} x\n", "--- \n", "\x07")
    )
    begun, slot, rest = text.partition(draws.choice(("methods:\n", "environments:\n", "rollout:\n")))
    return begun + slot + "".join(more.format(number) for number in range(count)) + rest


def headed(draws: random.Random, text: str) -> str:
    """With a directive, another document or a tag before all."""
    heads = (
        "%YAML 1.1\n---\n",
        "%YAML 9.9\n---\n",
        "%TAG ! tag:x,2000:\n---\n",
        "--- x\n---\n",
        "!!map\n",
        "!!set\n",
        "&a\n",
        "...\n",
    )
    return draws.choice(heads) + text


SPOILS: tuple[Spoil, ...] = (
    *(restructured, restructured, restructured, replaced, replaced, shuffled, damaged, encoded, enlarged, headed),
)


def beginnings() -> list[tuple[str, str]]:
    """params.yaml and overlays as they are, by the name of the preset; the former has none."""
    overlays = [(name, (ROOT / "presets" / name / "overlay.yaml").read_text(encoding="utf-8")) for name in PRESETS]
    whole = [("", yaml_text(preset_values(name, ROOT))) for name in ("smoke", "methods")]
    return [("", (ROOT / "params.yaml").read_text(encoding="utf-8"))] * 6 + whole + overlays


def spoilt(seed: int, begun: list[tuple[str, str]]) -> tuple[str, bytes]:
    """A preset's name, empty for params.yaml itself, and the file that a seed makes of it."""
    draws = random.Random(seed)
    preset, text = draws.choice(begun)
    made = draws.choice(SPOILS)(draws, text)
    return preset, made if isinstance(made, bytes) else made.encode("utf-8", "surrogatepass")


def tried(folder: Path, preset: str, content: bytes) -> Tried:
    """Read a params file or overlay in a project's root; what loads is written and read once more, and is the same."""
    file = folder / "presets" / preset / "overlay.yaml" if preset else folder / "params.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    if preset:
        (folder / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    (folder / "dvc.yaml").touch()
    before = time.process_time()
    try:
        config = parse(read_preset(folder, preset)) if preset else load(file)
    except UserError as error:
        return Tried(None, str(error).split("\n"), time.process_time() - before)
    seconds = time.process_time() - before
    assert parse(parse_yaml(yaml_text(config.model_dump(mode="json", by_alias=True)).encode(), "again")) == config
    return Tried(config, [], seconds)


def read_preset(folder: Path, preset: str) -> Any:
    """A preset's params file, as it is made."""
    return parse_yaml(made_files(preset, folder)["params.yaml"].encode(), preset)


def wrong(found: Tried) -> list[str]:
    """What is wrong with a refusal: lines that are empty, long, or that no terminal shows."""
    lines = [line for line in found.lines if not line.strip(" :") or len(line) >= LONGEST or not line.isprintable()]
    return lines + ([f"{found.seconds:.2f} s"] if found.seconds > SECONDS else [])


def main(count: int, first: int = 0) -> None:
    begun, loaded, longest, slowest = beginnings(), 0, 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + count):
            try:
                found = tried(Path(folder), *spoilt(seed, begun))
            except Exception as error:
                print(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                continue
            if lines := wrong(found):
                print(f"seed {seed}: {lines[0][:300]!r}", flush=True)
            loaded += found.config is not None
            longest, slowest = max([longest, *map(len, found.lines)]), max(slowest, found.seconds)
    print(
        f"{count} files: {loaded} loaded, the longest line has {longest} characters, the slowest took {slowest:.2f} s"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
