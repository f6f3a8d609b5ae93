"""Whole shards, from decoding to Parquet, by the recipe of configs/dfn5b.yaml; equal bytes; a device out of memory."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.pipeline.figures import Figure, Rule
from benchmarks.pipeline.inputs import photo, write_shards
from reinforce.config import Config, parse_config
from reinforce.dataset.files.store import MANIFEST, Store
from reinforce.dataset.layers import Layer
from reinforce.dataset.manifest.manifest import update_manifest
from reinforce.engine.decode.pool import DecodePool
from reinforce.engine.inference.models import Counters, Models, load_models
from reinforce.engine.messages.results import ShardResult
from reinforce.engine.messages.task import PendingShard
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.plan.recipe import build_layers, describe_models
from reinforce.engine.worker.actor import SHARDS_IN_FLIGHT
from reinforce.engine.worker.shard import allocate_pixels, process_shard
from reinforce.errors import UserError

SHARDS = "shards"
PER_SECOND = 400  # source images, with 2 augmentations
_TEACHERS = 2  # of the recipe
_CHANGED = "embeddings/second/images"  # the layer that a resumed run computes again


@dataclass(frozen=True)
class Measured:
    """A run of shards: source images per second, and the share of the time in which the device computed."""

    output: Path
    rate: float
    busy: float
    notes: tuple[str, ...]  # about batches that were halved


class Worker:
    """Loaded models and decode processes, which process shards two at a time as a worker of a run does."""

    def __init__(self, bench: Bench, pool: DecodePool) -> None:
        self._bench, self._pool = bench, pool
        config = self.config("none", "none", 2)
        self.models: Models = load_models(config, _layers_of(config))

    def config(self, source: str, output: str, augmentations: int) -> Config:
        size = self._bench.size
        names = [size.teachers[min(n, len(size.teachers) - 1)] for n in range(_TEACHERS)]
        options = {"name": size.captioner, "captions": size.captions, "words": size.words}
        captioner = {"class": "benchmarks.gpu.models:RandomCaptioner", "captions": size.captions, "options": options}
        return parse_config(
            {
                "source": source,
                "output": output,
                "augmentations": {"count": augmentations, "size": 224},
                "captioners": {"captioner": captioner},
                "teachers": {
                    number: {
                        "class": "benchmarks.gpu.models:RandomTeacher",
                        "options": {"name": name},
                        "logit_scale": 50.0,
                    }
                    for number, name in zip(("first", "second"), names, strict=True)
                },
                "workers": {"cpus": self._bench.cores, "gpus": int(self._bench.on_cuda), "batch": size.batch},
            }
        )

    def allocate(self, config: Config) -> None:
        """Pinned pixel memory for the shards that are in work, as large as the config needs."""
        allocate_pixels(self._pool, config, _layers_of(config), self.models, SHARDS_IN_FLIGHT)

    def run(self, source: str, output: Path, augmentations: int = 2) -> Measured:
        """Compute what is missing, and write dataset.json."""
        config = self.config(source, str(output), augmentations)
        plan, store = make_plan(config), Store(config.output)
        self.models.counters = Counters()
        if self._bench.on_cuda:
            torch.cuda.reset_peak_memory_stats(self.models.accelerator.device)
        start = time.perf_counter()

        def process(shard: PendingShard) -> ShardResult:
            return process_shard(shard, config, plan.layers, store, self.models, self._pool)

        with ThreadPoolExecutor(SHARDS_IN_FLIGHT) as leases:
            results = list(leases.map(process, plan.pending))
        seconds = time.perf_counter() - start
        loaded = {name: {"dim": teacher.dim} for name, teacher in self.models.teachers.items()}
        manifest = update_manifest(store.read_json(MANIFEST), config, plan.layers, loaded, plan.layers)
        store.write_json(manifest, MANIFEST)
        samples = sum(result.samples for result in results)
        notes = tuple(note for result in results for note in result.notes)
        return Measured(output, samples / seconds, self.models.counters.busy / seconds, notes)


def _layers_of(config: Config) -> list[Layer]:
    return [*build_layers(config, describe_models(config)).values()]


def measure_shards(bench: Bench, pool: DecodePool | None = None) -> list[Figure]:
    """Speed with few and many augmentations, equal bytes, and a run whose device has too little memory."""
    with contextlib.ExitStack() as stack:
        pool = pool or stack.enter_context(DecodePool(bench.cores))
        worker = Worker(bench, pool)
        photos = [photo(seed) for seed in range(8)]
        figures = []
        for augmentations, (shards, images) in bench.size.shards.items():
            source = write_shards(bench.folder / f"source-{augmentations}", shards, images, photos)
            work = partial(_measure, bench, worker, source, augmentations)
            figures += bench.attempt(f"shards: {augmentations} augmentations", work)
        figures += bench.attempt("shards: equal bytes", lambda: _compare_bytes(bench, worker))
        return figures + bench.attempt("shards: too little memory", lambda: [_run_short_of_memory(bench, worker)])


def _measure(bench: Bench, worker: Worker, source: str, augmentations: int) -> list[Figure]:
    worker.allocate(worker.config(source, "none", augmentations))
    measured = worker.run(source, bench.folder / f"run-{augmentations}", augmentations)
    target: tuple[float | None, Rule] = (None, "")
    if bench.on_cuda and augmentations == 2:
        target = (PER_SECOND, "at least")
    what = f"{augmentations} augmentations, {bench.cores} decode processes"
    return [
        Figure(SHARDS, f"decoding to Parquet, {what}", measured.rate, "images/s", *target),
        Figure(SHARDS, f"busy share of the device, {what}", measured.busy, "", 1.0, "limit"),
    ]


def _compare_bytes(bench: Bench, worker: Worker) -> list[Figure]:
    """Files that differ between the run with 2 augmentations, a second one, and one that continues after a loss."""
    source, first = f"{bench.folder}/source-2/*.tar", bench.folder / "run-2"
    again = worker.run(source, bench.folder / "again").output
    different = _differing(first, again)
    for path in sorted((again / _CHANGED).glob("*.parquet"))[::2]:
        path.unlink()
    resumed = _differing(first, worker.run(source, again).output)
    return [
        Figure(SHARDS, "files that differ between two runs", different, "", 0.0, "at most"),
        Figure(SHARDS, "files that differ after a run that continues", resumed, "", 0.0, "at most"),
    ]


def _differing(one: Path, other: Path) -> int:
    digests = [
        {
            str(path.relative_to(root)): hashlib.blake2b(path.read_bytes()).digest()
            for path in sorted(root.rglob("*.parquet"))
            if path.relative_to(root).parts[0] != "index"
        }
        for root in (one, other)
    ]
    return sum(digests[0].get(name) != digests[1].get(name) for name in {*digests[0], *digests[1]})


def _run_short_of_memory(bench: Bench, worker: Worker) -> Figure:
    """The share of the images that a run computes where full batches do not fit."""
    source, (shards, _) = f"{bench.folder}/source-2/*.tar", bench.size.shards[2]
    finished, notes = 0.0, ""
    try:
        with _too_little_memory(bench, worker.models):
            measured = worker.run(source, bench.folder / "short")
        notes = " ".join(measured.notes)
        if notes:
            finished = len([*(measured.output / "samples").glob("*.parquet")]) / shards
    except UserError as error:  # of a batch of one
        notes = str(error)
    bench.log("out of memory: " + (notes or "nothing was halved"))
    return Figure(SHARDS, "shards that finish in halved batches when memory is short", finished, "", 1.0, "at least")


@contextlib.contextmanager
def _too_little_memory(bench: Bench, models: Models) -> Iterator[None]:
    """On CUDA, a limit below what a full batch takes. On a CPU, a teacher that raises for such a batch."""
    if bench.on_cuda:
        device = models.accelerator.device
        torch.cuda.empty_cache()
        batch = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        total = torch.cuda.get_device_properties(device).total_memory
        kept = torch.cuda.memory_reserved(device)  # counts for the limit, with the gaps between tensors
        torch.cuda.set_per_process_memory_fraction((kept + 0.6 * batch) / total, device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    teacher: Any = models.teachers["first"]
    encode, limit = teacher.encode_images, bench.size.batch // 2

    def refuse(pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory, injected")
        result: torch.Tensor = encode(pixels)
        return result

    with patch.object(teacher, "encode_images", refuse):
        yield
