"""Whether the files of a policy in a local directory are whole, before a library reads them."""

import json
from collections.abc import Iterable
from pathlib import Path
from textwrap import shorten

from safetensors import SafetensorError, safe_open

from pipeline.workspace.errors import UserError

_UNSAFE = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check_pointers(directory: Path) -> None:
    """Refuse what git-LFS has left in the place of files."""
    for file in sorted(directory.iterdir()):
        if file.is_file():
            with file.open("rb") as opened:
                if opened.read(23) == b"version https://git-lfs":
                    raise UserError(f"policy: {file}: only a git-LFS pointer to the file; run `git lfs pull`")


def check_files(directory: Path) -> None:
    """Refuse weights that are cut or may hold code, and a directory without a tokenizer."""
    vocabularies = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
    if not any(file for pattern in vocabularies for file in directory.glob(pattern)):
        raise UserError(f"policy: {directory}: no tokenizer.json, nor another tokenizer's files")
    settings = directory / "generation_config.json"
    if settings.is_file() and _mapping(settings) is None:  # the library would go on without the end tokens
        raise UserError(f"policy: {settings}: not JSON, or no mapping")
    files = _weights(directory)
    unsafe = [file.name for pattern in _UNSAFE for file in directory.glob(pattern) if file.name != "training_args.bin"]
    if not files and unsafe:
        raise UserError(
            f"policy: {directory}: {some_of(unsafe)} may hold code and are not read; convert the weights to safetensors: "
            "`model.save_pretrained(directory)` where they were made"
        )
    for file in sorted(files):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"policy: {file}: cut, or not safetensors: {short(error)}") from None


def _weights(directory: Path) -> set[Path]:
    """Files of safetensors, which are all there."""
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    files = {whole} if whole.is_file() else set[Path]()
    if not files and index.is_file():
        try:
            weights = {key: directory / file for key, file in json.loads(index.read_bytes())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"policy: {index}: not an index of weights") from None
        files = set(weights.values())
        missing = sorted(file.name for file in files if not file.is_file())
        if missing:
            lost = some_of(key for key, file in weights.items() if file.name in missing)
            raise UserError(f"policy: {index}: {some_of(missing)} not there; without {lost}")
    return files


def _mapping(file: Path) -> dict[str, object] | None:
    try:
        found = json.loads(file.read_bytes())
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def some_of(names: Iterable[str]) -> str:
    """Two of them, in order, and how many more there are."""
    ordered = sorted(names)
    return ", ".join(ordered[:2]) + (f" and {len(ordered) - 2} more" if len(ordered) > 2 else "")


def short(error: BaseException) -> str:
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return shorten(line, 160, placeholder=" …")
