"""``make bench-sources``: CPU per sample of a run by the format of its source, compared with tars.

The same photograph-like JPEGs, keys and captions lie in tars, in Parquet as Hugging Face's ``datasets`` and as
img2dataset write it, and in jsonl with base64. Shards are computed alternately, in this process and one decode process,
with two teachers of little cost, so that reading, decoding, augmenting and writing are what is measured. CPU seconds
are those of both processes. Ratios of medians are comparable between machines.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.loader import photo, sentence
from benchmarks.processes import children, cpu_seconds
from benchmarks.stored import write_results, write_tar
from reinforce.config import parse_config
from reinforce.dataset.store import Store
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.worker.decode import DecodePool
from reinforce.engine.worker.models import load_models
from reinforce.engine.worker.shard import ShardProcess
from reinforce.source.formats.base import Shard, read_samples, source_format

RESULTS = Path(__file__).parent / "results" / "sources.json"
BOUND = 1.1  # of the CPU of tars
SIZE = 224
PHOTOS = 128  # distinct photographs
ROW_GROUP = 100  # rows, as Hugging Face writes images

Sample = tuple[str, bytes, str]
Figures = dict[str, dict[str, list[float]]]


def write_webdataset(path: Path, samples: Sequence[Sample]) -> None:
    write_tar(
        path,
        (
            (key, {"jpg": image, "json": json.dumps({"url": key}).encode(), "txt": caption.encode()})
            for key, image, caption in samples
        ),
    )


def write_huggingface(path: Path, samples: Sequence[Sample]) -> None:
    """A struct of bytes and path, as the image feature of ``datasets``."""
    keys, images, captions = zip(*samples, strict=True)
    struct = pa.array(
        [{"bytes": image, "path": None} for image in images], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    table = pa.table({"image": struct, "key": keys, "text": captions, "url": keys})
    pq.write_table(table, path, row_group_size=ROW_GROUP)


def write_img2dataset(path: Path, samples: Sequence[Sample]) -> None:
    """The columns of img2dataset, in one row group."""
    keys, images, captions = zip(*samples, strict=True)
    columns = {"url": keys, "key": keys, "status": ["success"] * len(keys), "error_message": [None] * len(keys)}
    columns |= {"width": [0] * len(keys), "height": [0] * len(keys), "caption": captions, "jpg": images}
    pq.write_table(pa.table(columns), path)


def write_jsonl(path: Path, samples: Sequence[Sample]) -> None:
    with path.open("w") as file:
        for key, image, caption in samples:
            row = {"uid": key, "text": caption, "image": base64.b64encode(image).decode(), "url": key}
            file.write(json.dumps(row) + "\n")


WRITERS: dict[str, tuple[str, Callable[[Path, Sequence[Sample]], None]]] = {
    "tar": ("source.tar", write_webdataset),
    "parquet, Hugging Face": ("huggingface.parquet", write_huggingface),
    "parquet, img2dataset": ("img2dataset.parquet", write_img2dataset),
    "jsonl": ("source.jsonl", write_jsonl),
}


def make_samples(count: int, side: int | None = None) -> list[Sample]:
    photos = [photo(number, side) for number in range(min(count, PHOTOS))]
    return [(f"{number:08d}", photos[number % PHOTOS], sentence(number)) for number in range(count)]


@contextmanager
def measured() -> Iterator[list[float]]:
    """CPU seconds of this process and its children that live, as one number in the list at the end."""
    found: list[float] = []
    pids = children(os.getpid())
    before = time.process_time() + sum(map(cpu_seconds, pids))
    yield found
    found.append(time.process_time() + sum(map(cpu_seconds, pids)) - before)


def measure_reading(source: Path) -> float:
    """CPU milliseconds per sample of reading alone."""
    with measured() as found:
        items = sum(1 for _ in read_samples(_shard(source), parse_config({"source": "x", "output": "y"}).input))
    return 1000 * found[0] / items


def _shard(source: Path) -> Shard:
    return Shard(str(source), "x", source_format([str(source)], None).name)


class Runs:
    """Shards of any of the sources through the same models and decode process."""

    def __init__(self, folder: Path, pool: DecodePool, samples: int, size: int = SIZE) -> None:
        self._folder, self._pool, self._samples, self._size, self._count = folder, pool, samples, size, 0
        config = self._config(WRITERS["tar"][0])
        self._models = load_models(config, make_plan(config).layers.values())

    def _config(self, name: str) -> Any:
        teachers = {name: {"class": "benchmarks.loader:RandomTeacher", "options": {"seed": 0}} for name in ("a", "b")}
        return parse_config(
            {
                "source": str(self._folder / name),
                "output": str(self._folder / f"out-{self._count}"),
                "input": {"captions": ["txt", "caption"]},
                "augmentations": {"count": 2, "size": self._size},
                "teachers": teachers,
            }
        )

    def measure(self, name: str) -> float:
        """CPU milliseconds per sample of a shard, from its source to its layers."""
        self._count += 1
        config = self._config(name)
        plan, store = make_plan(config), Store(config.output)
        with measured() as found:
            ShardProcess(plan.pending[0], config, plan.layers, store, self._models, self._pool).run()
        return 1000 * found[0] / self._samples


def compare(
    folder: Path, samples: Sequence[Sample], rounds: int, size: int = SIZE
) -> dict[str, dict[str, list[float]]]:
    """CPU milliseconds per sample by source, of reading and of a run, one for each round."""
    figures: Figures = {name: {"read": [], "run": []} for name in WRITERS}
    for file, write in WRITERS.values():
        write(folder / file, samples)
    with DecodePool(1) as pool:
        runs = Runs(folder, pool, len(samples), size)
        for number in range(-1, rounds):  # the first round is for warming up
            for name, (file, _) in WRITERS.items():
                read, run = measure_reading(folder / file), runs.measure(file)
                if number >= 0:
                    figures[name]["read"].append(read)
                    figures[name]["run"].append(run)
    return figures


def summarize(figures: Figures) -> dict[str, dict[str, float]]:
    """Medians by source, and the ratio of each run to that of tars."""
    medians = {
        name: {part: statistics.median(values) for part, values in parts.items()} for name, parts in figures.items()
    }
    return {name: {**parts, "run / tar": parts["run"] / medians["tar"]["run"]} for name, parts in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512, help="samples of the shard")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS, help=f"where results are written ({RESULTS})")
    options = parser.parse_args()
    samples = make_samples(options.samples)
    with tempfile.TemporaryDirectory() as folder:
        figures = compare(Path(folder), samples, options.rounds)
    medians = summarize(figures)
    table = Table("source", "reading, ms", "run, ms", "run / tar")
    for name, parts in medians.items():
        table.add_row(name, f"{parts['read']:.3f}", f"{parts['run']:.2f}", f"{parts['run / tar']:.3f}")
    Console().print(table)
    image = sum(len(image) for _, image, _ in samples) / len(samples)
    setup = {"samples": options.samples, "rounds": options.rounds, "image bytes": round(image)}
    write_results(options.json, ["pyarrow", "pillow"], {"setup": setup, "medians": medians, "figures": figures})
    slow = [name for name, parts in medians.items() if parts["run / tar"] > BOUND]
    if slow:
        raise SystemExit(f"above {BOUND} times the CPU of tars: {', '.join(slow)}")


if __name__ == "__main__":
    main()
