"""What can happen to a file, and the kinds of files that this project writes for itself, each with its reader."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import optuna
import pyarrow as pa

from pipeline.analysis.registration import registered_states
from pipeline.environments.webshop.search import Search
from pipeline.sources import hashes
from pipeline.sources.dvc_cache import OBJECTS, drop_damaged
from pipeline.sweep.queue import open_storage
from pipeline.training.checkpoints import LAST, saving, sound
from pipeline.trajectories.builder import build
from pipeline.trajectories.results import COLUMNS, read_results, write_results
from pipeline.trajectories.table import kept, read, read_with, write
from pipeline.workspace.files import read_record, write_json, write_record
from pipeline.workspace.layout import Layout
from pipeline.workspace.manifest import copy_whole, listed_text, require_whole, write_manifest
from tests.trajectory_cases import one_episode


class Kind(NamedTuple):
    """A kind of file."""

    write: Callable[[int], Path]
    """Write one of several different files of the kind, each to a place of its own, from the working directory on."""
    read: Callable[[int], Any]
    """Read it as the project does."""
    allowed: Callable[[int], list[Any]] = lambda _: []
    """What else may be read in its place: what was there before it."""


# ------------------------------------------------------------------------------------------------------ what can happen


def truncated(path: Path, draws: Random, _: Path) -> None:
    path.write_bytes(path.read_bytes()[: draws.randrange(path.stat().st_size)])


def flipped(path: Path, draws: Random, _: Path) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draws.choice([1, 1, 2, 8])):
        content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    path.write_bytes(content)


def overwritten(path: Path, draws: Random, _: Path) -> None:
    content = bytearray(path.read_bytes())
    start = draws.randrange(len(content))
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    path.write_bytes(content)


def emptied(path: Path, draws: Random, _: Path) -> None:
    path.write_bytes(b"")


def swapped(path: Path, draws: Random, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def not_utf8(path: Path, draws: Random, _: Path) -> None:
    path.write_bytes(b"\xff\xfe\x80" + path.read_bytes()[3:])


def a_folder(path: Path, draws: Random, _: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").write_text("in it")


def unreadable(path: Path, draws: Random, _: Path) -> None:
    """Of root, who may read everything, a link that leads to itself."""
    if os.getuid():
        path.chmod(0)
        return
    path.unlink()
    path.symlink_to(path.name)


DAMAGES = (truncated, flipped, overwritten, emptied, swapped, not_utf8, a_folder, unreadable)


# --------------------------------------------------------------------------------------------------------- kinds of files


def content(which: int) -> dict[str, Any]:
    """Of a record: numbers, texts, nested."""
    rows = [{"iteration": float(i), "loss": 0.125 * which + i, "name": f"é {which}"} for i in range(6)]
    return {"seeds": {str(which): rows}}


def episodes(which: int) -> Any:
    return build([one_episode(episode_id=f"{which}-{i}", seed=which, temperature=1.0) for i in range(4)])


def plain(trajectories: Any) -> Any:
    """To be compared."""
    parts = vars(trajectories)
    return {name: part.tolist() if isinstance(part, np.ndarray) else part for name, part in parts.items()}


def record(place: Callable[[int], Path]) -> Kind:
    def written(which: int) -> Path:
        write_record(place(which), content(which))
        return place(which)

    return Kind(written, lambda which: read_record(place(which)))


def states(which: int) -> Path:
    path = Path(f"timings{which}/registration.json")
    write_record(path, {"states": [content(which)]})
    return path


LAYOUT = Layout(Path())


def comparison(which: int) -> Path:
    layout = Layout(Path(str(which)))
    write_json(layout.comparison, content(which))
    layout.plots.mkdir(parents=True)
    (layout.plots / "curves.csv").write_text(f"a,b\n1,{which}\n")
    write_manifest(layout.plots, [layout.comparison])
    return layout.comparison


def read_comparison(which: int) -> Any:
    layout = Layout(Path(str(which)))
    return json.loads(listed_text(layout.plots, layout.comparison))


def table(which: int) -> Path:
    path = LAYOUT.annotated(f"lake{which}")
    write(episodes(which), path)
    return path


def last_episodes(which: int) -> Path:
    path, made = LAYOUT.episodes("lake", f"m{which}"), episodes(which)
    write(made, path, {"advantage": np.arange(len(made.input_ids), dtype=np.float32)})
    return path


def read_last(which: int) -> Any:
    made, columns = read_with(LAYOUT.episodes("lake", f"m{which}"), ["advantage", "weight"])
    return plain(made), {name: values.tolist() for name, values in columns.items()}


def results(which: int) -> Path:
    def column(kind: pa.DataType) -> list[Any]:
        return [f"t{which}"] * 3 if kind == pa.string() else [True] * 3 if kind == pa.bool_() else [which, 2, 3]

    path = LAYOUT.evaluations("lake", f"m{which}")
    write_results(pa.table({name: pa.array(column(kind), kind) for name, kind in COLUMNS.items()}), path)
    return path


def slice_of(which: int) -> Path:
    path = Path(f".cache/slices/key{which}/0.parquet")
    write(episodes(which), path)
    return path


def a_policy(which: int, seed: str) -> Path:
    folder = Path(f"models/trained/lake-m{which}") / seed
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(Random(which).randbytes(3000))
    (folder / "config.json").write_text(json.dumps({"layers": which}))
    (folder / "tokenizer.json").write_text(json.dumps({"vocabulary": [f"é{which}"]}))
    write_manifest(folder)
    return folder


def policy_file(name: str) -> Kind:
    def seen(which: int) -> Any:
        folder = Path(f"models/trained/lake-m{which}/seed-0")
        require_whole(folder)
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    return Kind(lambda which: a_policy(which, "seed-0") / name, seen)


def copied_policy(which: int) -> Path:
    folder = a_policy(which, "policy")
    shutil.rmtree(folder.with_name("seed-0"), ignore_errors=True)
    return folder / "model.safetensors"


def read_copied(which: int) -> Any:
    target = Path(f"models/trained/lake-m{which}/seed-0")
    copy_whole(target.with_name("policy"), target)
    return sorted(require_whole(target).items())


def checkpoint(which: int) -> Path:
    folder = Path(f".cache/train/key{which}")
    for iteration in range(3):
        with saving(folder) as partial:
            partial.write_bytes(Random(10 * which + iteration).randbytes(9000))
    return folder / LAST


def read_checkpoint(which: int) -> Any:
    held = next(sound(Path(f".cache/train/key{which}")))
    return held.read_bytes()[:9000]


def journal(which: int) -> Path:
    path = Path(f".cache/sweep{which}/journal.log")
    for number in range(3):
        study = optuna.create_study(storage=open_storage(None, path), study_name=f"{which}-{number}")
        study.enqueue_trial({"x": 0.5}, user_attrs={"slot": number})
    return path


def read_journal(which: int) -> Any:
    storage = open_storage(None, Path(f".cache/sweep{which}/journal.log"))
    return [(study.study_name, len(storage.get_all_trials(study._study_id))) for study in storage.get_all_studies()]


def shorter_journals(which: int) -> list[Any]:
    """A journal whose end is missing is that of a search that was killed earlier."""
    full = [(f"{which}-{number}", 1) for number in range(3)]
    return [[*full[:kept_], *last] for kept_ in range(3) for last in ([], [(f"{which}-{kept_}", 0)])]


def memo(which: int) -> Path:
    big = Path(f"big{which}")
    big.write_bytes(bytes([which]) * hashes.LARGE)
    os.utime(big, (1, 1))
    write_record(hashes.KNOWN, {"files": {str(big.resolve()): [*hashes.stamp_of(big), read_memo_anew(which)]}})
    copy = Path(f"{which}") / hashes.KNOWN.name
    copy.parent.mkdir(exist_ok=True)
    if which:  # the other one's, to be swapped with; there is one memo
        return Path(shutil.copy(hashes.KNOWN, copy))
    return hashes.KNOWN


def read_memo_anew(which: int) -> str:
    return hashlib.sha256(Path(f"big{which}").read_bytes()).hexdigest()


TEXTS = [["red shoe", "blue shoe", "green hat"], ["one", "two", "three words here"]]


def index(which: int) -> Path:
    before = set(Path("index").glob("*"))
    Search(TEXTS[which], Path("index"))
    (folder,) = set(Path("index").glob("*")) - before
    return max(folder.glob("*.npy"))


def read_index(which: int) -> Any:
    search = Search(TEXTS[which], Path("index"))
    return [search.find((word,)) for word in ("shoe", "hat", "two", "words")]


def dvc_object(which: int) -> Path:
    made = f"content {which} ".encode() * 99
    name = hashlib.md5(made).hexdigest()
    held = OBJECTS / name[:2] / name[2:]
    held.parent.mkdir(parents=True, exist_ok=True)
    held.write_bytes(made)
    noted = {"stages": {"s": {"outs": [{"path": "x", "md5": name}]}}}
    Path(f"dvc{which}.lock").write_text(json.dumps(noted))
    return held


def read_dvc_object(which: int) -> Any:
    drop_damaged(Path(f"dvc{which}.lock"))
    name = json.loads(Path(f"dvc{which}.lock").read_text())["stages"]["s"]["outs"][0]["md5"]
    held = OBJECTS / name[:2] / name[2:]
    return held.read_bytes() if held.exists() else None


def kinds() -> Mapping[str, Kind]:
    """By name."""
    records: dict[str, Callable[[int], Path]] = {
        "curves": lambda which: LAYOUT.curves("lake", f"m{which}"),
        "runs": lambda which: LAYOUT.runs("lake", f"m{which}"),
        "interventions": lambda which: LAYOUT.interventions(f"lake{which}"),
        "bottleneck": lambda which: LAYOUT.bottleneck(f"lake{which}") / "bottleneck.json",
        "sweep": lambda which: LAYOUT.sweep(f"study{which}") / "summary.json",
    }
    return {
        **{name: record(place) for name, place in records.items()},
        "registration": Kind(states, lambda which: registered_states(Path(f"timings{which}/registration.json"))),
        "comparison": Kind(comparison, read_comparison),
        "trajectories": Kind(table, lambda which: plain(read(LAYOUT.annotated(f"lake{which}")))),
        "episodes": Kind(last_episodes, read_last),
        "evaluations": Kind(results, lambda which: read_results(LAYOUT.evaluations("lake", f"m{which}")).to_pydict()),
        "slices": Kind(
            slice_of,
            lambda which: plain(kept(Path(f".cache/slices/key{which}/0.parquet"), lambda: episodes(which))),
        ),
        **{f"policy, {name}": policy_file(name) for name in ("model.safetensors", "config.json", "manifest.json")},
        "policy, copied": Kind(copied_policy, read_copied),
        "checkpoint": Kind(checkpoint, read_checkpoint, lambda which: [Random(10 * which + 1).randbytes(9000)]),
        "journal": Kind(journal, read_journal, shorter_journals),
        "hashes": Kind(memo, lambda which: hashes.file_hash(Path(f"big{which}"))),
        "search index": Kind(index, read_index),
        "DVC's cache": Kind(dvc_object, read_dvc_object, lambda _: [None]),
    }
