"""Spools that are damaged: what is whole is kept, what is not is set aside, and nothing else ever comes out of one."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking.records import Record
from pipeline.tracking.spool import Spool, SpoolError, forget, run_record, waiting
from pipeline.workspace.layout import Cache

FLIPS = int(os.environ.get("FAULTS", "1")) * 60
"""Bits that are flipped, one at a time: ``FAULTS=200`` for more."""
RECORDS: list[Record] = [
    run_record(
        "lake", "grpo seed 0", {"tracking.id": "a"}, {"name": "smoke", "identity": {"kind": "comparison"}}, 1000
    ),
    {"kind": "tags", "values": {"method": "grpo", "name": "ä"}},
    {"kind": "params", "values": {"train.iterations": 4, "train.rate": 1e-4, "train.none": None, "train.on": True}},
    {"kind": "metrics", "values": {"success": 0.25, "lost": float("inf"), "count": 3}, "step": 0, "time": 1001},
    {"kind": "metrics", "values": {"success": 0.5}, "step": 1, "time": 1002},
    {"kind": "text", "path": "params.yaml", "text": "seeds: [0]\n"},
    {"kind": "end", "status": "FINISHED", "time": 1003},
]


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    found = Spool(Cache(tmp_path).training("a") / "tracking")
    found.append(*RECORDS)
    return found


def file_of(spool: Spool) -> Path:
    return spool.folder / "records.jsonl"


def flipped(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def unsealed(*records: Any) -> bytes:
    """Lines as an earlier version wrote them, without checksums."""
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def in_place_of(number: int, line: bytes) -> Callable[[bytes], bytes]:
    return lambda data: b"".join([*data.splitlines(True)[:number], line, *data.splitlines(True)[number + 1 :]])


TYPES: dict[str, Any] = {
    "list": [],
    "number": 3,
    "null": None,
    "no_kind": {"values": {}},
    "another_kind": {"kind": "metrix", "values": {}},
    "kind_of_another_type": {"kind": ["metrics"]},
    "values_as_list": {"kind": "metrics", "values": [0.5], "step": 0, "time": 1},
    "value_as_text": {"kind": "metrics", "values": {"success": "0.5"}, "step": 0, "time": 1},
    "step_as_text": {"kind": "metrics", "values": {"success": 0.5}, "step": "0", "time": 1},
    "time_beyond_all": {"kind": "metrics", "values": {"success": 0.5}, "step": 0, "time": 10**30},
    "half_a_character": {"kind": "tags", "values": {"name": "\ud800"}},
    "more": {"kind": "end", "status": "FINISHED", "time": 1, "more": 1},
    "unknown_status": {"kind": "end", "status": "DONE", "time": 1},
    "trace_without_turns": {"kind": "trace", "episode": {"id": "e"}, "time": 1},
}
CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "cut_within_a_line": lambda data: data[:-20],
    "cut_within_the_first_line": lambda data: data[:50],
    "cut_in_the_middle": lambda data: data[: len(data) // 2],
    "flipped": lambda data: flipped(data, 8 * (len(data) // 2)),
    "nothing_but_zeros": lambda data: bytes(len(data)),
    "a_page_of_zeros": lambda data: data[:300] + bytes(200) + data[500:],
    "not_utf_8": in_place_of(3, b'{"kind": "tags", "values": {"a": "\xff\xfe"}}\n'),
    "not_json": in_place_of(3, b"records\n"),
    "empty_line": in_place_of(3, b"\n"),
    "nested_without_end": in_place_of(3, b"[" * 200_000 + b"\n"),
    "digits_without_end": in_place_of(3, b'{"kind": ' + b"9" * 10_000 + b"}\n"),
    "no_first_line": in_place_of(0, b""),
    "another_file": lambda data: random.Random(0).randbytes(5_000) + b"\n",
    **{f"type_{name}": in_place_of(4, unsealed(value)) for name, value in TYPES.items()},
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_damaged_spool_is_set_aside_in_a_line_and_its_whole_records_are_kept(
    name: str, spool: Spool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = Spool(Cache(tmp_path).tracking / "lake-study" / "trial-1")
    other.append(RECORDS[0], RECORDS[-1])
    whole = file_of(spool).read_bytes()
    damaged = CONTENTS[name](whole)
    file_of(spool).write_bytes(damaged)
    found = waiting(tmp_path)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"warning: tracking: {file_of(spool)}: ")
    assert "set aside as records.jsonl.damaged" in line
    assert len(line) < 300 + len(str(tmp_path))
    assert (spool.folder / "records.jsonl.damaged").read_bytes() == damaged
    kept = spool.records
    assert [record for record in RECORDS if record in kept] == kept
    assert bool(kept) == (damaged[:200] == whole[:200])
    assert [one.folder for one in found] == [other.folder, *([spool.folder] if kept else [])]
    assert waiting(tmp_path)
    assert capfd.readouterr().err == "", "it has been said"


@pytest.mark.parametrize("name", ["folder", "pipe", "dangling", "loop"])
def test_what_is_no_file_in_a_spools_place_is_set_aside(
    name: str, spool: Spool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = file_of(spool)
    place.unlink()
    if name == "folder":
        (place / "deep").mkdir(parents=True)
    elif name == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(place.name if name == "loop" else "nowhere")
    assert spool.records == []
    assert waiting(tmp_path) == []
    (line,) = capfd.readouterr().err.splitlines()
    assert "set aside as records.jsonl.damaged, nothing of it can be sent" in line
    spool.append(*RECORDS)
    assert spool.records == RECORDS


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_spool_is_set_aside(spool: Spool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file_of(spool).chmod(0)
    assert waiting(tmp_path) == []
    assert "cannot be read (Permission denied); set aside" in capfd.readouterr().err


def test_a_spool_that_cannot_be_set_aside_is_passed_over_in_a_line(
    spool: Spool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = Spool(Cache(tmp_path).training("b") / "tracking")
    other.append(*RECORDS)
    file_of(spool).write_bytes(b"damaged\n")
    (spool.folder / "writing").unlink()
    (spool.folder / "writing").mkdir()
    assert [one.folder for one in waiting(tmp_path)] == [other.folder]
    (line,) = capfd.readouterr().err.splitlines()
    assert str(spool.folder) in line
    assert line.endswith("; passed over")
    with pytest.raises(SpoolError):
        spool.append(RECORDS[-1])


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_bit_never_gives_another_record(
    seed: int, spool: Spool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, draws = file_of(spool).read_bytes(), random.Random(seed)
    for _ in range(FLIPS // 3):
        file_of(spool).write_bytes(flipped(data, draws.randrange(8 * len(data))))
        waiting(tmp_path)
        kept = spool.records if file_of(spool).exists() else []
        assert [record for record in RECORDS if record in kept] == kept != RECORDS
        (line,) = capfd.readouterr().err.splitlines()
        assert "set aside" in line


def test_records_that_were_sent_and_are_gone_are_noticed(
    spool: Spool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ends = [end for end, _ in spool.read()]
    spool.mark(ends[-1], "run")
    file_of(spool).write_bytes(file_of(spool).read_bytes()[: ends[2]])
    assert [one.folder for one in waiting(tmp_path)] == [spool.folder]
    assert spool.sent.offset == 0
    assert spool.sent.run_id == "run"
    assert spool.records == RECORDS[:3]
    assert "shorter than" in capfd.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '{"offset": "0", "run_id": null}', '{"offset": -1, "run_id": null}', "{}",
     '{"offset": true, "run_id": null}', '{"offset": 5, "run_id": 7}', '{"offset": 1e3, "run_id": null}', "[" * 100_000],
)  # fmt: skip
def test_what_a_store_has_is_sent_again_if_the_note_of_it_is_damaged(text: str, spool: Spool) -> None:
    spool.mark(spool.read()[-1][0], "run")
    assert not spool.waiting
    (spool.folder / "sent.json").write_text(text)
    assert spool.waiting
    assert [record for _, record in spool.read(spool.sent.offset)] == RECORDS


def test_a_note_with_another_number_is_not_believed(spool: Spool) -> None:
    ends = [end for end, _ in spool.read()]
    spool.mark(ends[1], "run")
    noted = json.loads((spool.folder / "sent.json").read_text())
    for changed in ({"offset": ends[-1]}, {"run_id": "another"}, {"crc32": "00000000"}):
        (spool.folder / "sent.json").write_text(json.dumps({**noted, **changed}))
        assert spool.sent.offset == 0
    (spool.folder / "sent.json").write_text(json.dumps(noted))
    assert (spool.sent.offset, spool.sent.run_id) == (ends[1], "run")


def test_a_spool_of_an_earlier_version_is_read(spool: Spool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file_of(spool).write_bytes(unsealed(*RECORDS))
    (spool.folder / "sent.json").write_text('{"offset": 0, "run_id": "run"}')
    assert [one.records for one in waiting(tmp_path)] == [RECORDS]
    assert spool.sent.run_id == "run"
    assert capfd.readouterr().err == ""


def test_a_new_store_is_sent_everything(spool: Spool, tmp_path: Path) -> None:
    spool.mark(spool.read()[-1][0], "run")
    assert waiting(tmp_path) == []
    forget(tmp_path)
    assert [one.folder for one in waiting(tmp_path)] == [spool.folder]
