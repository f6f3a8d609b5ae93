"""``make bench-codecs``: bytes and CPU of vectors by codec, on one core.

The vectors are made: of unit norm, around a common mean, with a spectrum that decays. Their cosines say nothing about a
model's; the times and bytes depend on the codec and the dimension alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.stored import write_results
from reinforce.dataset.codecs.base import FittedCodec, Floats
from reinforce.dataset.codecs.codebooks import Codebook, find_codec, find_fitted
from reinforce.dataset.codecs.plain import Standardised
from reinforce.dataset.kinds.patches import PickedGrid
from reinforce.dataset.vectors import normalized

RESULTS = Path(__file__).parent / "results" / "codecs.json"
CODECS = ("float16", "int8", "first384", "pca192", "pca128", "pq96", "pq48", "rq32", "rq16")
DIM, SAMPLE, ENCODED = 768, 8192, 2048
GRID = 196  # vectors that a loader decodes together
_SECONDS = 0.5  # of each measurement


def made_vectors(rows: int, dim: int, seed: int = 0) -> Floats:
    """Correlated unit vectors [rows, dim]."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(dim, dim)) * np.exp(-np.arange(dim) / 150)[:, None]
    values = rng.normal(size=(rows, dim)) @ mixing + 6 * rng.normal(size=dim)
    return normalized(values.astype(np.float32))


def microseconds(work: Callable[[], Any], vectors: int) -> float:
    """CPU time of a vector."""
    work()
    start, calls = time.process_time(), 0
    while time.process_time() < start + _SECONDS:
        work()
        calls += 1
    return 1e6 * (time.process_time() - start) / calls / vectors


def measure(name: str, sample: Floats, values: Floats) -> dict[str, float]:
    """Bytes of a vector, CPU seconds of fitting, CPU microseconds of a vector, and the mean cosine."""
    codec, dim = find_codec(name), values.shape[1]
    found: dict[str, float] = {"bytes": codec.bytes(dim)}
    if not isinstance(codec, FittedCodec):
        stored = (127 * codec.prepare(values)).astype(codec.numbers)
        found["decode"] = microseconds(lambda: normalized(stored[:GRID].astype(np.float32)), GRID)
        return found
    start = time.process_time()
    codebook = Codebook(codec, codec.fit(codec.prepare(sample), 0))
    found["fit"] = time.process_time() - start
    codes = codebook.encode(values)
    found["encode"] = microseconds(lambda: codebook.encode(values), len(values))
    found["decode"] = microseconds(lambda: normalized(codebook.decode(codes[:GRID])), GRID)
    found["decode of one"] = microseconds(lambda: normalized(codebook.decode(codes[:1])), 1)
    found["cosine"] = float((normalized(codebook.decode(codes)) * values).sum(1).mean())
    return found


def grid_milliseconds(name: str, dim: int) -> float:
    """CPU time of a grid of 14 x 14 patches as a loader puts it into a batch, float16; with any codebook."""
    rng, codec = np.random.default_rng(0), find_fitted(f"{Standardised.prefix}-{name}")
    arrays = {key: rng.normal(size=shape).astype(np.float32) for key, shape in codec.shapes(dim).items()}
    codebook = Codebook(codec, arrays, {"grid": [14, 14]})
    stored = rng.integers(0, 256, (64, GRID * codec.width(dim))).astype(codec.numbers)
    grids: list[Any] = [PickedGrid(one, codebook) for one in stored]
    batch = np.empty((len(grids), *grids[0].shape), np.float16)
    return microseconds(lambda: np.stack(grids, out=batch), len(grids)) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=DIM)
    parser.add_argument("--sample", type=int, default=SAMPLE)
    parser.add_argument("--codecs", nargs="*", default=CODECS)
    chosen = parser.parse_args()
    every = made_vectors(chosen.sample + ENCODED, chosen.dim)
    results = {name: measure(name, every[: chosen.sample], every[chosen.sample :]) for name in chosen.codecs}
    for name, found in results.items():
        if find_codec(name).fitted or name == "float16":
            found["grid"] = grid_milliseconds(name, chosen.dim)
    table = Table("codec", "bytes", "fit, s", "encode, us", "decode, us", "of one, us", "grid, ms", "cosine", box=None)
    for name, found in results.items():
        keys = ("bytes", "fit", "encode", "decode", "decode of one", "grid", "cosine")
        table.add_row(name, *(f"{found[key]:.4g}" if key in found else "-" for key in keys))
    Console().print(table)
    write_results(RESULTS, ["numpy", "faiss-cpu"], {"dim": chosen.dim, "sample": chosen.sample, "codecs": results})


if __name__ == "__main__":
    main()
