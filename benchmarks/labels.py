"""``make bench-labels``: what it costs to find and read labels for a copy that is sharded differently.

The labels are made: identities, records, captions and vectors of one teacher, and the index of identities. The copy has
lost a fifth of the images; its shards have other sizes. It is in the order of the labels, or in a random order. Files
are read through a file system that counts requests and bytes, as those of an object store.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile
from rich.console import Console

import schemas
from benchmarks.processes import in_own_process, own_peak
from benchmarks.stored import write_results
from reinforce.config import parse_config
from reinforce.dataset import vectors
from reinforce.dataset.store import LayerWriter, Store
from reinforce.engine.plan.plan import build_layers, describe_models
from reinforce.labels.building import build_index
from reinforce.labels.members import Wanted
from reinforce.labels.rows import open_labels
from reinforce.labels.taken import with_labels

RESULTS = Path(__file__).parent / "results" / "labels.json"
BUILD = Path("build/labels")
COUNT, DIM, CAPTIONS = 2, 768, 5
SHARD_ROWS, COPY_ROWS, LOST = 5000, 7919, 0.2
LAYERS = ("captions/coca", "embeddings/dfn2b/images")
_RANDOM_SAMPLES = 512  # each of which reads a row group
#: DFN-2B as it is labelled: samples.
DFN_ROWS = 2_000_000_000


class CountingFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        CountingFileSystem.requests += 1
        CountingFileSystem.bytes += end - start
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(end - start)


class CountingFileSystem(AbstractFileSystem):
    """Local files, read as an object store's, with the number of requests and bytes."""

    protocol = "counted"
    requests = bytes = 0

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        CountingFileSystem.requests += 1
        found: dict[str, Any] = LocalFileSystem().info(self._strip_protocol(path))
        return found

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        CountingFileSystem.requests += 1
        return LocalFileSystem().ls(self._strip_protocol(path), detail=detail)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> CountingFile:
        return CountingFile(self, path, mode, **options)


fsspec.register_implementation("counted", CountingFileSystem, clobber=True)


def config_of(url: str, labels: str = "") -> Any:
    """The config of the labels, or of a copy that takes them."""
    if labels:
        taken = {"made": {"url": labels, "layers": [*LAYERS]}}
        return parse_config({"source": "copy/*.tar", "output": f"{url}/out", "labels": taken})
    teacher = {"family": "published", "model": "made", "columns": [0, DIM], "logit_scale": 70}
    captioner = {"family": "published", "model": "syn_text", "captions": CAPTIONS}
    made = {"reinforcements": "x.tar", "teachers": {"dfn2b": teacher}, "captioners": {"coca": captioner}}
    return parse_config({"source": "x.tar", "output": url, **made, "augmentations": {"count": COUNT, "size": 224}})


def write_labels(folder: Path, rows: int) -> None:
    """Labels of made images, without images, and their index."""
    shutil.rmtree(folder, ignore_errors=True)
    config = config_of(str(folder))
    layers = build_layers(config, describe_models(config))
    store, rng = Store(str(folder)), np.random.default_rng(0)
    types = {
        "samples": schemas.samples_schema("none"),
        LAYERS[0]: schemas.CAPTIONS_SCHEMA,
        LAYERS[1]: schemas.embeddings_schema(COUNT, DIM, "float16"),
    }
    for first in range(0, rows, SHARD_ROWS):
        writers = {
            name: LayerWriter(store, layers[name], type_, f"{first // SHARD_ROWS:05d}", "")
            for name, type_ in types.items()
        }
        for start in range(first, min(first + SHARD_ROWS, rows), 1024):
            numbers = range(start, min(start + 1024, first + SHARD_ROWS, rows))
            found = rng.standard_normal((len(numbers), COUNT, DIM), dtype=np.float32)
            crop = {"top": 5, "left": 7, "height": 200, "width": 210}
            record = {"crop": crop, "size": 224, "ops": [{"name": "Rotate", "magnitude": 9.0}] * 2}
            columns: dict[str, list[Any]] = {
                "key": [f"{number:09d}" for number in numbers],
                "caption": [f"image {number} and its true caption" for number in numbers],
                "uid": [uid(number) for number in numbers],
                "url": [f"https://example.org/images/{number}.jpg" for number in numbers],
                "augmentations": [[record] * COUNT for _ in numbers],
                **dict.fromkeys(("width", "height"), [256] * len(numbers)),
            }
            keys = columns["key"]
            values = {
                "samples": [pa.array(columns.get(one.name, [None] * len(keys)), one.type) for one in types["samples"]],
                LAYERS[0]: [
                    pa.array(keys),
                    pa.array([[f"a picture of {key}, {n}" for n in range(CAPTIONS)] for key in keys]),
                ],
                LAYERS[1]: [
                    pa.array(keys),
                    *vectors.encode(vectors.normalized(found), "float16", np.ones(len(keys), bool)),
                ],
            }
            for name, writer in writers.items():
                writer.write(pa.table(values[name], schema=types[name]))
        for writer in writers.values():
            with writer:
                writer.commit()
    models: dict[str, dict[str, Any]] = {"teachers": {}, "captioners": {}}
    for section, name in (("teachers", "dfn2b"), ("captioners", "coca")):
        layer = next(one for one in layers.values() if one.owner == (section, name))
        models[section][name] = {"model": dict(layer.identity), "logit_scale": 70.0, "logit_scale_from": "config"}
    manifest = {
        "format": "reinforced-dataset",
        "schema_version": schemas.SCHEMA_VERSION,
        **layers["samples"].recipe,
        **models,
        "images": "embed",
        "layers": {
            name: {"kind": layers[name].kind.name, "fingerprint": layers[name].fingerprint}
            | layers[name].kind.entry(layers[name], {"dim": layers[name].dim})
            for name in types
        },
    }
    store.write_json(manifest, "dataset.json")
    build_index(str(folder), use_ray=False)


def uid(number: int) -> str:
    return f"{number * 0x9E3779B97F4A7C15 % 2**128:032x}"


def join(labels: str, rows: int, order: str, most: int) -> dict[str, float]:
    """Find and read the labels of the first ``most`` samples of a copy -> what it costs a sample."""
    rng = np.random.default_rng(1)
    kept = np.flatnonzero(rng.random(rows) >= LOST)
    if order == "random":
        rng.shuffle(kept)
    config = with_labels(config_of(labels, f"counted://{Path(labels).absolute()}"))
    layers = build_layers(config, describe_models(config))
    seconds, cpu, found, labelled = time.perf_counter(), time.process_time(), 0, 0
    CountingFileSystem.requests = CountingFileSystem.bytes = 0
    for start in range(0, min(most, len(kept)), COPY_ROWS):  # its shards
        reader = open_labels(config, layers.values())
        part = kept[start : min(start + COPY_ROWS, most)].tolist()
        for first in range(0, len(part), 512):
            wanted = [Wanted(f"own{one}", {"uid": uid(one)}) for one in part[first : first + 512]]
            labelled += sum(len(one.values) == len(LAYERS) for [one] in reader.find(wanted))
            found += len(wanted)
        reader.close()
    seconds, cpu = time.perf_counter() - seconds, time.process_time() - cpu
    return {
        "samples": found,
        "labelled": labelled,
        "seconds": seconds,
        "CPU us a sample": 1e6 * cpu / found,
        "bytes a sample": CountingFileSystem.bytes / found,
        "requests a sample": CountingFileSystem.requests / found,
        "MB": own_peak() / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    console = Console()
    folder = BUILD / "labels"
    start, cpu = time.perf_counter(), time.process_time()
    write_labels(folder, args.rows)
    console.print(
        f"{args.rows:,} labels made in {time.perf_counter() - start:.0f} s, CPU {time.process_time() - cpu:.0f} s"
    )
    size = sum(path.stat().st_size for path in folder.rglob("*.parquet")) / args.rows
    results: dict[str, Any] = {"rows": args.rows, "stored bytes a row": size}
    for order, most in (("same", args.rows), ("random", _RANDOM_SAMPLES)):
        results[order] = found = in_own_process(join, str(folder), args.rows, order, most)
        hours = found["CPU us a sample"] * DFN_ROWS * (1 - LOST) / 1e6 / 3600
        results[order] |= {"CPU hours of 1.6 billion": hours, "TB of 1.6 billion": found["bytes a sample"] * 1.6e-3}
        console.print(order, json.dumps(results[order], indent=1))
    write_results(args.results, ["numpy", "pyarrow"], results)


if __name__ == "__main__":
    main()
