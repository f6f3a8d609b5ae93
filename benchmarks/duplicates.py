"""``python -m benchmarks.duplicates``: what `deduplicate` and `decontaminate` find, and what they and `balance` cost.

The vectors are made: topics within topics, with the spectrum of embeddings, and near duplicates at cosines from 0.93 to
0.999. Recall is that of comparing all pairs. Each rule runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

import schemas
from benchmarks.processes import in_own_process, own_peak
from benchmarks.stored import write_results
from reinforce.dataset.layers import SAMPLES, embeddings_layer
from reinforce.explore import duplicates, neighbours
from reinforce.explore.config import SelectConfig
from reinforce.explore.select import select

RESULTS = Path(__file__).parent / "results" / "duplicates.json"
BUILD = Path("build/duplicates")
DIM, SHARD_ROWS, GROUP_ROWS = 128, 5000, 500
THRESHOLD = 0.95
NEAR: dict[str, Any] = {"deduplicate": {"teacher": "teacher", "threshold": THRESHOLD}}
CLUSTERED: dict[str, Any] = {"balance": {"teacher": "teacher", "clusters": [1000, 50], "keep": 0.5}}
TEACHER = embeddings_layer("teacher", "images")
#: DFN-5B as it is published: samples and shards, and vectors of ViT-L/14.
DFN_ROWS, DFN_SHARDS, DFN_DIM = 2_000_000_000, 190_735, 768


def make_vectors(rows: int, seed: int = 0) -> np.ndarray:
    """Unit vectors [rows, DIM] float16, a fifth of them near duplicates of others."""
    rng = np.random.default_rng(seed)
    spectrum = (1 / np.sqrt(1 + np.arange(DIM))).astype(np.float32)

    def noise(count: int, size: float) -> np.ndarray:
        return rng.standard_normal((count, DIM), dtype=np.float32) * spectrum * np.float32(size)

    parents = rows // 10 + 1
    topics = noise(300, 1.0)[rng.integers(0, 300, parents)] + noise(parents, 0.7)
    found = topics[rng.integers(0, parents, rows)] + noise(rows, 0.6)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    copies = rows // 5
    of = found[rng.integers(0, rows - copies, copies)]
    cosines = rng.uniform(0.93, 0.999, copies).astype(np.float32)[:, None]
    away = noise(copies, 1.0)
    away -= (away * of).sum(axis=1, keepdims=True) * of
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    found[rows - copies :] = cosines * of + np.sqrt(1 - cosines**2) * away
    rng.shuffle(found)
    return found.astype(np.float16)


def write_dataset(folder: Path, vectors: np.ndarray) -> str:
    """A dataset with these vectors, and images of 100 bytes, of which a tenth are equal to others."""
    shutil.rmtree(folder, ignore_errors=True)
    layers = {SAMPLES: schemas.samples_schema("embed"), TEACHER: schemas.embeddings_schema(1, DIM, "float16")}
    for layer in layers:
        (folder / layer).mkdir(parents=True)
    rng = np.random.default_rng(1)
    for first in range(0, len(vectors), SHARD_ROWS):
        part = vectors[first : first + SHARD_ROWS]
        keys = pa.array([f"{first + n:09d}" for n in range(len(part))])
        images = [bytes(rng.bytes(100)) if n % 10 else b"the same" * 12 for n in range(len(part))]
        flat = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), DIM)
        tensors = pa.ExtensionArray.from_storage(layers[TEACHER].field("embeddings").type, flat)
        texts, sides = pa.nulls(len(part), pa.string()), pa.array(np.full(len(part), 224, np.int32))
        augmentations = pa.array([[]] * len(part), layers[SAMPLES].field("augmentations").type)
        columns = {SAMPLES: [keys, texts, texts, sides, sides, images, augmentations], TEACHER: [keys, tensors]}
        for layer, schema in layers.items():
            footer = {"reinforce.schema_version": "1", "reinforce.fingerprint": layer[:4]}
            table = pa.table(columns[layer], schema=schema.with_metadata(footer))
            pq.write_table(table, folder / layer / f"{first // SHARD_ROWS:05d}.parquet", row_group_size=GROUP_ROWS)
    of_teacher = {"kind": "images", "fingerprint": TEACHER[:4], "teacher": "teacher", "texts": None, "count": 1}
    manifest = {
        "format": "reinforced-dataset",
        "schema_version": 1,
        "images": "embed",
        "seed": 0,
        "policies": {},
        "input": {},
        "augmentations": {"count": 1, "size": 224},
        "teachers": {"teacher": {"model": {"name": "made"}, "logit_scale": 70.0, "logit_scale_from": "model"}},
        "captioners": {},
        "layers": {
            SAMPLES: {"kind": "samples", "fingerprint": SAMPLES[:4]},
            TEACHER: {**of_teacher, "dim": DIM, "dtype": "float16"},
        },
    }
    (folder / "dataset.json").write_text(json.dumps(manifest))
    return str(folder)


def run(url: str, rule: dict[str, Any], name: str = "view") -> dict[str, float]:
    """Write a view by one rule in this process -> what it costs."""
    config = SelectConfig.model_validate({"dataset": url, "name": name, "rules": [rule]})
    start, cpu = time.perf_counter(), time.process_time()
    view = select(config, processes=1)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    samples = sum(view.counts.values())
    size = sum(path.stat().st_size for path in Path(url, "views", name).rglob("*") if path.is_file())
    of_sample = {"CPU us a sample": 1e6 * cpu / samples, "bytes a sample": size / samples}
    counts = {"samples": samples, "left out": samples - len(view)}
    return {**counts, "seconds": seconds, **of_sample, "MB": own_peak() / 1e6}


def left_out(url: str) -> np.ndarray:
    """Which samples the view leaves out."""
    paths = sorted(Path(url, "views/view").glob("rows-*/*.parquet"))
    return np.concatenate([np.asarray(pq.read_table(path)["left_out"].is_valid()) for path in paths])


def foreign(against: str) -> dict[str, Any]:
    return {"decontaminate": {"against": [against], "teacher": "teacher", "threshold": THRESHOLD}}


def recall(found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    return {
        "wanted": int(wanted.sum()),
        "recall": float(found[wanted].mean()),
        "wrong": int((found & ~wanted).sum()),
    }


def compared(vectors: np.ndarray, others: np.ndarray, earlier: bool) -> np.ndarray:
    """Which vectors have one of the others, or of the ``earlier`` ones, within the threshold, by all pairs."""
    values, against = vectors.astype(np.float32), others.astype(np.float32)
    found = np.zeros(len(values), bool)
    for start in range(0, len(values), 1000):
        near = values[start : start + 1000] @ against.T >= THRESHOLD
        if earlier:
            near &= np.arange(len(against)) < np.arange(start, start + len(near))[:, None]
        found[start : start + 1000] = near.any(axis=1)
    return found


def speeds() -> dict[str, float]:
    """Seconds of CPU for a multiplication and addition of one number, where vectors find cells, and are compared."""
    vectors = make_vectors(8192)
    wide = np.tile(vectors, (1, DFN_DIM // DIM))
    wide = (wide / np.linalg.norm(wide.astype(np.float32), axis=1, keepdims=True)).astype(np.float16)
    centroids = wide[:4096].astype(np.float32)
    start = time.process_time()
    neighbours.assign(wide, centroids, THRESHOLD)
    assign = (time.process_time() - start) / (len(wide) * len(centroids) * DFN_DIM)
    home, best = np.ones(len(wide), np.bool_), np.zeros(len(wide), np.float32)
    start = time.process_time()
    neighbours.worse_duplicates(wide, home, best, np.arange(len(wide)), THRESHOLD)
    compare = (time.process_time() - start) / (len(wide) ** 2 / 2 * DFN_DIM)
    return {"assign": assign, "compare": compare}


def at_dfn(places: float) -> dict[str, float]:
    """Hours and memory at the size of DFN-5B by arithmetic, of vectors that are in ``places`` cells."""
    speed, buckets = speeds(), duplicates.Buckets(DFN_ROWS, DFN_DIM)
    assign = speed["assign"] * DFN_ROWS * buckets.cells * DFN_DIM
    cell = DFN_ROWS / buckets.cells
    compare = speed["compare"] * DFN_ROWS * (places - 0.5) * cell * DFN_DIM
    trained = buckets.cells * duplicates._TRAINED_ROWS
    chunks = DFN_SHARDS // (2**18 // (DFN_ROWS // DFN_SHARDS)) + 1
    return {
        "cells": buckets.cells,
        "buckets": buckets.count,
        "chunks": chunks,
        "core hours to find cells": assign / 3600,
        "core hours to compare": compare / 3600,
        "GB of records": places * DFN_ROWS * buckets.dtype.itemsize / 1e9,
        "GB of a worker: centroids": trained * DFN_DIM * 6 / 1e9,
        "GB of a worker: chunk": 2 * 2**18 * buckets.dtype.itemsize / 1e9,
        "GB of a worker: bucket": (2**30 * places / 2 + places * cell * DFN_DIM * 6) / 1e9,
        "GB of the driver: places of records": 2 * chunks * buckets.count * 4 / 1e9,
    }


def measure_recall(rows: int) -> dict[str, Any]:
    """What the rules find, compared with all pairs."""
    vectors = make_vectors(rows)
    url = write_dataset(BUILD / "compared", vectors)
    in_own_process(run, url, NEAR)
    found = {"deduplicate": recall(left_out(url), compared(vectors, vectors, earlier=True))}
    others = np.concatenate([make_vectors(rows, seed=1), vectors[::50]])
    in_own_process(run, url, foreign(write_dataset(BUILD / "against", others)))
    found["decontaminate"] = recall(left_out(url), compared(vectors, others, earlier=False))
    centroids = neighbours.train(vectors, duplicates.Buckets(rows, DIM).cells, 0)
    places, _, _ = neighbours.assign(vectors, centroids, THRESHOLD)
    return {**found, "places of a vector": len(places) / len(vectors)}


def measure_costs(rows: int) -> dict[str, Any]:
    """What each rule costs."""
    url = write_dataset(BUILD / "costs", make_vectors(rows))
    against = write_dataset(BUILD / "few", make_vectors(10_000, seed=1))
    exact = {"deduplicate": {"exact": True}}
    rules = {"near": NEAR, "exact": exact, "balance": CLUSTERED, "decontaminate": foreign(against)}
    return {name: in_own_process(run, url, rule) for name, rule in rules.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.duplicates", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[40_960, 409_600], help="samples of costs")
    parser.add_argument(
        "--compared", type=int, default=100_000, help="samples of which all pairs are compared; 0: none"
    )
    arguments = parser.parse_args()
    results: dict[str, Any] = {"recall": {}, "costs by samples": {}}
    if RESULTS.exists():
        results |= {key: value for key, value in json.loads(RESULTS.read_text()).items() if key in results}
    if arguments.compared:
        results["recall"] = {"samples": arguments.compared, **measure_recall(arguments.compared)}
    for rows in arguments.rows:
        results["costs by samples"][str(rows)] = measure_costs(rows)
    results["at the size of DFN-5B"] = at_dfn(results["recall"]["places of a vector"])
    Console().print(results)
    write_results(RESULTS, ["pyarrow", "faiss-cpu", "numpy"], results)


if __name__ == "__main__":
    main()
