"""Search over texts: BM25, with the index kept on disk under the hash of what is indexed."""

import hashlib
import re
import shutil
import tempfile
from array import array
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import bm25s
import numpy as np

from pipeline.workspace.errors import UserError, warn
from pipeline.workspace.files import remove
from pipeline.workspace.manifest import require_whole, write_manifest

K1, B = 0.9, 0.4
"""Parameters of BM25, those of the published shop's search engine. It reduces words to stems; here they stay whole."""

RESULTS = 50
"""Most results of a search, as published."""

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """What is searched for: letters and digits in a row, in lower case."""
    return _WORD.findall(text.lower())


class Search:
    """BM25 over texts.

    Args:
        texts: what is searched, by number; gone through twice where there is a cache, and never held together.
        cache: folder for the index, which is then computed once for equal texts; None computes it anew. The index's name
            is a hash of all that it depends on, so that one which is there is never out of date.
    """

    def __init__(self, texts: Iterable[str], cache: Path | None = None) -> None:
        self._index = _computed(texts) if cache is None else _kept(texts, cache)
        self.find = lru_cache(maxsize=4096)(self._find)

    def _find(self, query: tuple[str, ...]) -> tuple[int, ...]:
        """Numbers of at most ``RESULTS`` texts with one of the words or more, the best first; of equals, the first."""
        known = self._index.get_tokens_ids(list(query))
        if not known:
            return ()
        scores = self._index.get_scores_from_ids(known)
        least = np.partition(scores, -RESULTS)[-RESULTS] if len(scores) > RESULTS else 0.0
        found = np.flatnonzero((scores > 0) & (scores >= least))
        return tuple(found[np.argsort(-scores[found], kind="stable")][:RESULTS].tolist())


def _computed(texts: Iterable[str]) -> Any:
    vocabulary: dict[str, int] = {}
    ids = [array("i", (vocabulary.setdefault(word, len(vocabulary)) for word in words(text))) for text in texts]
    index = bm25s.BM25(k1=K1, b=B)
    index.index((ids, vocabulary), show_progress=False)
    return index


def _kept(texts: Iterable[str], cache: Path) -> Any:
    """The index of these texts from the cache; computed and put there if it is missing or cannot be read."""
    digest, count = _digest(texts)
    folder = cache / digest
    if folder.exists():
        try:
            require_whole(folder)
            index = bm25s.BM25.load(folder, show_progress=False)
            if index.scores["num_docs"] == count:
                return index
        except UserError as error:
            warn(f"{error}; the index is made again")
        remove(folder)
    index = _computed(texts)
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=cache))
    index.save(partial, show_progress=False)
    write_manifest(partial, later=folder)
    try:
        partial.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(partial)
    return index


def _digest(texts: Iterable[str]) -> tuple[str, int]:
    """A hash of all that the index is computed from, and how many texts there are."""
    count = 0
    digest = hashlib.blake2b(repr((bm25s.__version__, _WORD.pattern, K1, B)).encode(), digest_size=16)
    for text in texts:
        count += 1
        encoded = text.encode(errors="surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest(), count
