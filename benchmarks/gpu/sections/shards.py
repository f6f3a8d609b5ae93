"""Whole shards, from decoding to Parquet: their speed, equal bytes, a device out of memory, and a run with Ray."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import reinforce
from benchmarks.gpu import recipe
from benchmarks.gpu.bench import Bench
from benchmarks.pipeline.figures import Figure, Rule
from reinforce.dataset.manifest import update_manifest
from reinforce.dataset.store import MANIFEST, Store
from reinforce.engine.messages import ShardResult
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.rates import Stages, add_stages
from reinforce.engine.worker.actor import SHARDS_IN_FLIGHT, Worker
from reinforce.engine.worker.models import describe_loaded
from reinforce.errors import UserError
from reinforce.settings import use_accelerator

SECTION, MANY, CHECKS, RUN = "shards", "shards, many augmentations", "checks of shards", "reinforce run"
PER_SECOND = 400  # source images, with 2 augmentations
_CHANGED = "images"  # of the embeddings that a resumed run computes again


class Shards:
    """The worker of a run, in this process: its models, decode processes and two shards in flight."""

    def __init__(self, bench: Bench, augmentations: int = 2, accelerator: str = "fast") -> None:
        self._bench, self._keys = bench, (augmentations, accelerator)
        self._first = self._make(bench.folder / "none")
        self._first.load()
        assert self._first.models is not None
        self.models = self._first.models

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._first.pool is not None
        self._first.pool.close()

    def _make(self, output: Path) -> Worker:
        self._plan = make_plan(recipe.run_config(self._bench, output, *self._keys))
        return Worker(self._plan.config, self._plan.layers, frozenset(self._plan.layers), os.getcwd())

    def for_output(self, output: Path) -> Iterator[partial[ShardResult]]:
        """The work that is missing in an output, a call for each shard; dataset.json is written first."""
        worker = self._make(output)
        worker.models, worker.pool = self._first.models, self._first.pool
        worker.config = self._first.config.model_copy(update={"output": str(output)})  # with the batch that fits
        plan, store = self._plan, Store(str(output))
        loaded = describe_loaded(self.models, self._plan.config)
        store.write_json(update_manifest(store.read_json(MANIFEST), plan.config, plan.layers, loaded), MANIFEST)
        return (partial(worker.process, shard) for shard in plan.pending)

    def run(self, output: Path, count: int | None = None) -> list[ShardResult]:
        """Compute what is missing of the first ``count`` shards; None for all."""
        with ThreadPoolExecutor(SHARDS_IN_FLIGHT) as leases:
            return list(leases.map(lambda work: work(), itertools.islice(self.for_output(output), count)))


def dataset(bench: Bench) -> Path:
    """A finished dataset, which the first section that reads it computes without fast paths; it is no result."""
    output, unfinished = bench.folder / "dataset", bench.folder / "dataset-unfinished"
    if not output.exists():
        shutil.rmtree(unfinished, ignore_errors=True)
        with Shards(bench, accelerator="plain") as shards:
            shards.run(unfinished)
        use_accelerator("fast")
        unfinished.rename(output)
    return output


def measure_shards(bench: Bench) -> list[Figure]:
    return _measure(bench, SECTION, 2)


def measure_many_augmentations(bench: Bench) -> list[Figure]:
    return _measure(bench, MANY, bench.size.many)


def _measure(bench: Bench, section: str, augmentations: int) -> list[Figure]:
    """Source images a second after the first shard, the busy share, and what each image took of the device."""
    size, passes = bench.size, _new(bench.folder / f"passes-{augmentations}")
    what = f"{augmentations} augmentations, {bench.cores} decode processes"
    name = f"decoding to Parquet, {what}"

    with Shards(bench, augmentations) as shards, ThreadPoolExecutor(SHARDS_IN_FLIGHT) as leases, bench.counting(name):
        endless = itertools.chain.from_iterable(shards.for_output(passes / str(number)) for number in itertools.count())
        running = {leases.submit(next(endless)) for _ in range(SHARDS_IN_FLIGHT)}
        counts: list[tuple[int, float, float]] = []  # images, time and busy seconds, whenever shards end
        finished: list[ShardResult] = []
        while not counts or counts[-1][0] == counts[0][0] or counts[-1][1] - counts[0][1] < size.seconds:
            done = wait(running, return_when=FIRST_COMPLETED).done
            counters = shards.models.counters
            counts.append((counters.samples, time.perf_counter(), counters.busy))
            running = running - done | {leases.submit(next(endless)) for _ in done}
            finished += [lease.result() for lease in done]
        with bench.tracing(name):
            time.sleep(size.traced)
        finished += [lease.result() for lease in running]
    shutil.rmtree(passes, ignore_errors=True)
    (before, start, busy), (after, end, busy_then) = counts[0], counts[-1]
    rate: tuple[float | None, Rule] = (PER_SECOND, "at least") if bench.on_cuda and augmentations == 2 else (None, "")
    share = (busy_then - busy) / (end - start)
    figures = [
        Figure(section, name, (after - before) / (end - start), "images/s", *rate),
        Figure(section, f"busy share of the device, {what}", share, "", 1.0, "limit"),
    ]
    return figures + _stages(section, finished, (end - start) / (after - before))


def _stages(section: str, finished: list[ShardResult], seconds: float) -> list[Figure]:
    """Milliseconds of a source image that its layers took of the device, and others, as the estimates name them."""
    sums: Stages = {}
    for result in finished:
        add_stages(sums, result.stages)
    images, took = sum(result.samples for result in finished), Counter[str]()
    for layer, stage in sums.items():
        kind = "captions" if layer.startswith("captions/") else "teachers" if layer.endswith("/images") else "texts"
        took[kind] += 1000 * stage["seconds"] / images  # type: ignore[assignment]
    gaps = {"gaps": 1000 * seconds - sum(took.values()), "all": 1000 * seconds}
    return [Figure(section, f"a source image: {name}", ms, "ms") for name, ms in {**took, **gaps}.items()]


def check_shards(bench: Bench) -> list[Figure]:
    """Files that differ between two runs and after some were lost, and shards that finish where memory is short."""
    first, again = (_new(bench.folder / name) for name in ("first", "again"))
    with Shards(bench) as shards:
        shards.run(first, bench.size.checked)
    with Shards(bench) as shards:
        shards.run(again, bench.size.checked)
        different = _differing(first, again)
        lost = sorted(again.glob(f"embeddings/*/{_CHANGED}/*.parquet"))[::2]
        for path in lost:
            path.unlink()
        shards.run(again, bench.size.checked)
        resumed = _differing(first, again)
        finished = _run_short_of_memory(bench, shards)
    return [
        Figure(CHECKS, "files that differ between two runs", different, "", 0.0, "at most"),
        Figure(
            CHECKS, f"files that differ after {len(lost)} were lost and computed again", resumed, "", 0.0, "at most"
        ),
        Figure(CHECKS, "shards that finish in halved batches when memory is short", finished, "", 1.0, "at least"),
    ]


def _new(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _differing(one: Path, other: Path) -> int:
    """Files of one dataset that are not equal in the other."""
    paths = [path for path in one.rglob("*.parquet") if path.relative_to(one).parts[0] != "index"]
    if not paths:
        raise RuntimeError(f"no files were written to {one}")
    others = (other / path.relative_to(one) for path in paths)
    return sum(
        not there.exists() or path.read_bytes() != there.read_bytes() for path, there in zip(paths, others, strict=True)
    )


def _run_short_of_memory(bench: Bench, shards: Shards) -> float:
    """The share of the shards that finish where full batches do not fit; 0 if all of them fit."""
    output, notes = _new(bench.folder / "short"), ""
    try:
        with _too_little_memory(bench, shards):
            notes = " ".join(note for result in shards.run(output, bench.size.checked) for note in result.notes)
    except UserError as error:  # of a batch of one
        bench.log(str(error))
    bench.log("out of memory: " + (notes or "nothing was halved"))
    return len([*output.glob("samples/*.parquet")]) / bench.size.checked if notes else 0.0


@contextlib.contextmanager
def _too_little_memory(bench: Bench, shards: Shards) -> Iterator[None]:
    """On CUDA, a limit below what a full batch takes. On a CPU, a teacher that raises for such a batch."""
    models = shards.models
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
    teacher: Any = next(iter(models.loaded["teachers"].values()))
    encode, limit = teacher.encode_images, bench.size.batch // 2

    def refuse(pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory, injected")
        result: torch.Tensor = encode(pixels)
        return result

    with patch.object(teacher, "encode_images", refuse):
        yield


def measure_run(bench: Bench) -> list[Figure]:
    """``reinforce run`` with its driver and its actor: images a second after the first shards, and its busy share."""
    what = "images/s of `reinforce run`, after its first shards"
    alone, output = (_new(bench.folder / name) for name in ("without-ray", "ray"))
    with Shards(bench) as shards:
        shards.run(alone, bench.size.checked)
    summary = reinforce.run(recipe.run_config(bench, output))
    ended = sorted(path.stat().st_mtime for path in output.glob("samples/*.parquet"))
    bench.keep_usage(what, summary.fast_paths)
    first = min(SHARDS_IN_FLIGHT, len(ended) - 1)  # those that were in flight together at the start
    rate = (len(ended) - first) * bench.size.images / max(1e-9, ended[-1] - ended[first - 1])
    return [
        Figure(RUN, what, rate, "images/s"),
        Figure(RUN, "images/s with the start of Ray and of the worker", summary.samples / summary.seconds, "images/s"),
        Figure(RUN, "busy share of the device", summary.busy_share, "", 1.0, "limit"),
        Figure(RUN, "files that differ from those without Ray", _differing(alone, output), "", 0.0, "at most"),
    ]
