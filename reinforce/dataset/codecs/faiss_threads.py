"""faiss with one thread, so that k-means gives the same numbers again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from reinforce.processes.imports import require


@contextlib.contextmanager
def faiss_of_codec(name: str) -> Iterator[Any]:
    """The module, with one thread. Raises UserError if it is not installed."""
    require("select", f"codec {name}", "faiss")
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(threads)
