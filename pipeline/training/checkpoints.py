"""A training's last two checkpoints: where the last one is damaged, the training goes on from the one before."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.workspace.errors import warn
from pipeline.workspace.files import remove, replacing
from pipeline.workspace.seals import DamagedError, require_sealed_file, seal_file

LAST, BEFORE = "checkpoint.ckpt", "checkpoint.before.ckpt"


@contextmanager
def saving(folder: Path) -> Iterator[Path]:
    """Give a path for a training's next checkpoint; it is the last one when it is on the disk, with a checksum.

    The older one goes first: a large model's checkpoints need the room of two, not of three.
    """
    remove(folder / BEFORE)
    with replacing(folder / LAST) as partial:
        yield partial
        seal_file(partial, _name(folder))
        if (folder / LAST).is_file():
            (folder / LAST).replace(folder / BEFORE)


def sound(folder: Path) -> Iterator[Path]:
    """The checkpoints of a training that are as they were written, the last one first.

    Of those that are not a line tells, and they are removed.
    """
    for name in (LAST, BEFORE):
        if os.path.lexists(folder / name):
            try:
                require_sealed_file(folder / name, _name(folder))
            except DamagedError as error:
                pass_over(folder / name, str(error))
            else:
                yield folder / name


def pass_over(checkpoint: Path, reason: str) -> None:
    """Remove a checkpoint that cannot be gone on from, and say so."""
    one_before = checkpoint.name == LAST and checkpoint.with_name(BEFORE).exists()
    warn(f"{reason}; the training {'goes on from the checkpoint before' if one_before else 'begins anew'}")
    remove(checkpoint)


def drop(folder: Path) -> None:
    """Remove a training's checkpoints."""
    for name in (LAST, BEFORE):
        remove(folder / name)


def _name(folder: Path) -> str:
    """Both have it: one becomes the other. A training's folder is named by its key."""
    return f"{folder.absolute().name}/checkpoint"
