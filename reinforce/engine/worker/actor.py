"""The worker actor: one per accelerator (or per few cores), holding every model that the run's layers need.

Two shards are in flight in it at a time. Its decode processes work for both, and their batches take turns at the
accelerator, so that it does not wait for the next shard to begin when one ends.

Before a run, a full batch of every model is tried, so that its memory is known to suffice, and for ``workers.batch:
auto``. As many are copied to the device at the same time as in a run, where one computes and the others wait for their
turn.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch

from reinforce.config import Config
from reinforce.dataset.layers import Layer
from reinforce.dataset.store import Store
from reinforce.engine.messages import (
    LayerFailure,
    LoadFailure,
    PendingShard,
    ShardFailure,
    ShardResult,
    StorageFailure,
    WorkerId,
    WorkerInfo,
)
from reinforce.engine.plan.plan import check_class_files
from reinforce.engine.pulse import Pulse, WorkerWatch, output_path, process_memory
from reinforce.engine.record import Recorder
from reinforce.engine.worker.decode import DecodePool, Row
from reinforce.engine.worker.inference import IN_WORK, Inference, Session, device_report
from reinforce.engine.worker.models import (
    MAX_AUTO_BATCH,
    Counters,
    LoadedModels,
    describe_loaded,
    load_models,
    rows_per_batch,
)
from reinforce.engine.worker.producers.registry import check_models, make_producers, measure_costs
from reinforce.engine.worker.self_test import precisions
from reinforce.engine.worker.shard import ShardProcess, allocate_pixels
from reinforce.errors import StorageError, UserError
from reinforce.processes.imports import reads_heic
from reinforce.source.samples import AbsentShard
from reinforce.source.urls import is_local, is_storage_error
from reinforce.storage import forget_credentials
from schemas import Reason
from teachers.fast_paths.usage import Usage, growth, snapshot
from teachers.redact import Redactor
from teachers.runtime import determinism
from teachers.runtime.accelerator import forget_peak

SHARDS_IN_FLIGHT = 2
#: Python's default is 5 ms: a thread that has read a flag of the device waits so long for one that runs Python code.
SWITCH_SECONDS = 0.5e-3
_COPIED = 2 * IN_WORK  # batches on the device, of two shards
_POLL_SECONDS = 0.001


class Worker:
    """Runs leases, two at a time; ``as_actor`` makes it a Ray actor."""

    def __init__(
        self, config: Config, layers: Mapping[str, Layer], needed: frozenset[str], folder: str, index: int = 0
    ) -> None:
        """``folder`` is the driver's working directory: relative paths and custom classes are looked up there.
        ``index`` names the worker in metrics."""
        self.config, self.layers, self.needed = config, layers, needed
        self.folders = [path for path in (os.getcwd(), folder) if os.path.isdir(path)]
        self.missing_folder = None if os.path.isdir(folder) else folder
        if self.missing_folder is None:
            os.chdir(folder)
        self.store = Store(config.output)
        self.redact = Redactor(config.model_dump(mode="json"))
        self.models: LoadedModels | None = None
        self.pool: DecodePool | None = None
        self.watch = WorkerWatch()
        self.metrics = Recorder(str(index))
        self.counting = threading.Lock()
        self.counted: tuple[Usage, ...] = ()  # of fast paths, that the driver has

    def load(self) -> WorkerInfo:
        """Load and test the models of the layers in ``needed``. Raises LoadFailure if one does not work."""
        try:
            return self._load()
        except (Exception, KeyboardInterrupt, SystemExit) as error:  # a model may raise anything
            text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            raise LoadFailure(tuple(self.identify()), self.redact.cut(text), isinstance(error, UserError)) from None

    def identify(self) -> WorkerId:
        """The process of this worker, which runs once this answers."""
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""  # asking would start Ray
        return WorkerId(node, os.getpid(), socket.gethostname())

    def _load(self) -> WorkerInfo:
        if self.store.relative and self.missing_folder is not None:
            raise UserError(
                f"output {self.store.url} is relative to {self.missing_folder}, which does not exist on "
                f"{socket.gethostname()}. Set `output` to an absolute path that every node reaches, or to a URL "
                "such as s3://BUCKET/FOLDER."
            )
        torch.set_num_threads(self.config.workers.cores)
        if self.config.workers.gpus:
            sys.setswitchinterval(SWITCH_SECONDS)
        if self.config.classes:
            sys.path += [path for path in self.folders if path not in sys.path]  # behind installed packages
        determinism.set_flags("cuda" if self.config.workers.gpus else "cpu", self.config.workers.deterministic)
        layers = [self.layers[name] for name in sorted(self.needed)]
        failures = self.config.failures
        self.pool = DecodePool(self.config.workers.cores, failures.sample_seconds, failures.solo_attempts)
        self.models = load_models(self.config, layers)
        check_class_files(self.config, layers, socket.gethostname())
        check_models(self.models, layers, precisions(self.config))
        self.config = fit_batch(self.models, self.config, layers)
        check_models(self.models, layers, precisions(self.config), self.config)
        self.models.uncompared = {name for (_, name), used in precisions(self.config).items() if used == "fp8"}
        self.models.costs = measure_costs(self.models, self.config, layers)
        allocate_pixels(self.pool, self.config, layers, self.models, SHARDS_IN_FLIGHT)
        self.pool.wait_until_ready()
        self._record_metrics()
        paths = tuple(replace(one, used=0, plain=0) for one in self._take_usage())
        return WorkerInfo(
            id=self.identify(),
            accelerator=str(self.models.accelerator.device),
            models=describe_loaded(self.models, self.config),
            memory=process_memory(),
            batch=self.config.workers.images,
            notes=self.models.batches.take_notes(),
            device=device_report(self.models.accelerator),
            log=output_path(),
            fast_paths=paths,
            reads_heic=reads_heic(),
        )

    def _take_usage(self) -> tuple[Usage, ...]:
        """What fast paths have counted since the last call; at the first call all paths."""
        with self.counting:
            now = tuple(
                one if one.reason is None else replace(one, reason=self.redact.cut(one.reason)) for one in snapshot()
            )
            grown = growth(self.counted, now) if self.counted else now
            self.counted = now
        return grown

    def process(self, shard: PendingShard) -> ShardResult:
        """Compute and commit the missing layers of one shard. Raises UserError, LayerFailure or ShardFailure."""
        assert self.models is not None
        assert self.pool is not None
        try:
            with self.watch.lease(shard.name) as watch:
                lease = (shard, self.config, self.layers, self.store, self.models, self.pool)
                result = ShardProcess(*lease, watch=watch).run()
            self._record_metrics()
            return replace(result, memory=process_memory(), fast_paths=self._take_usage())
        except (StorageError, AbsentShard) as error:
            raise self._storage_failure(shard, error, str(error)) from None
        except UserError:
            raise
        except LayerFailure as error:
            raise LayerFailure(error.layer, self.redact.cut(str(error.args[1]))) from None
        except Exception as error:
            if is_storage_error(error) and not (self.store.local and is_local(shard.url)):
                raise self._storage_failure(shard, error, f"{type(error).__name__}: {error}") from None
            worker_at_fault = isinstance(error, (RuntimeError, MemoryError))  # storage drivers raise neither
            raise ShardFailure(self.redact.cut(f"{type(error).__name__}: {error}"), worker_at_fault) from None

    def _storage_failure(self, shard: PendingShard, error: Exception, text: str) -> StorageFailure:
        """The failure that the driver receives. The next lease takes the credentials that are in force then."""
        self.store.refresh()
        forget_credentials(shard.url)
        reason = None
        if isinstance(error, AbsentShard):
            reason = error.refusal.reason.value
        elif isinstance(error, (FileNotFoundError, PermissionError)):
            reason = Reason.SHARD_FAILED.value
        missing = isinstance(error, FileNotFoundError) or reason == Reason.SHARD_MISSING.value
        return StorageFailure(self.redact.cut(text), False, reason, missing)

    def pulse(self) -> Pulse:
        """The counts so far and the longest-running decode; also answers while shards run."""
        counters = self.models.counters if self.models else Counters()
        prepared, key = (self.pool.finished, self.pool.longest()) if self.pool else (0, None)
        leases = self.watch.pulses(prepared, time.monotonic())
        self._record_metrics()
        return Pulse(
            samples=counters.samples,
            busy=counters.busy,
            key=key,
            leases=leases,
            slowest=dict(self.watch.slowest),
            memory=process_memory(),
        )

    def _record_metrics(self) -> None:
        if self.models is None or self.pool is None:
            return
        self.metrics.record(
            {
                "reinforce_worker_samples_total": self.models.counters.samples,
                "reinforce_worker_busy_seconds_total": self.models.counters.busy,
                "reinforce_worker_decode_queue": self.pool.chunks.qsize(),
                "reinforce_worker_accelerator_queue": self.models.lock.waiting,
                "reinforce_worker_memory_bytes": process_memory(),
            }
        )


def environment() -> dict[str, str]:
    """Environment variables with which a worker process must start.

    Arrow's allocator, mimalloc, asks for huge pages. The kernel clears 2 MB for each buffer that is new or was idle,
    which doubles the CPU of the worker's own process.
    """
    name = "MIMALLOC_ALLOW_THP"
    return {name: os.environ.get(name, "0"), **determinism.environment()}


def as_actor(config: Config) -> Any:
    """The actor class with the resources of ``config.workers``."""
    threads = str(config.workers.cores)
    return ray.remote(
        num_cpus=config.workers.cores,
        num_gpus=config.workers.gpus,
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=SHARDS_IN_FLIGHT,
        concurrency_groups={"control": 1},
        runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **environment()}},
    )(Worker)


def fit_batch(models: LoadedModels, config: Config, layers: Iterable[Layer]) -> Config:
    """``config`` with a number for ``workers.batch: auto``.

    On CUDA, full batches of the models that make ``layers`` are tried, and halved if they do not fit. Raises UserError
    if a model fails.
    """
    if models.accelerator.device.type == "cuda":
        return find_batch(models, config, [*layers])
    return _with_batch(config, config.workers.images)


def find_batch(models: LoadedModels, config: Config, layers: list[Layer], largest: int = MAX_AUTO_BATCH) -> Config:
    """As ``fit_batch`` on CUDA; ``auto`` is at most ``largest``."""
    automatic = config.workers.batch == "auto"
    if automatic:
        config = _with_batch(config, largest)
    while _try_batch(models, config, layers):
        pass
    models.counters = Counters()
    forget_peak(models.accelerator.device)
    if automatic:
        models.batches.take_notes()
        planned = rows_per_batch(config)
        if (rows := models.batches.fitting("rows", planned)) < planned:
            config = _with_batch(config, rows * config.augmentations.count)
    return config


def _with_batch(config: Config, batch: int) -> Config:
    return config.model_copy(update={"workers": config.workers.model_copy(update={"batch": batch})})


def _try_batch(models: LoadedModels, config: Config, layers: list[Layer]) -> bool:
    """Run full batches side by side -> whether something did not fit and batches are smaller now."""
    sessions = [Session(config, models) for _ in range(_COPIED)]
    inferences = [Inference(session, make_producers(layers, session)) for session in sessions]
    rows = [Row(f"{i}", None, i) for i in range(inferences[0].rows_per_batch)]
    layout = inferences[0].layout
    noise = np.random.default_rng(0).integers(0, 256, len(rows) * layout.cell_bytes, np.uint8)

    def run(inference: Inference) -> None:
        inference.run(rows, layout.cells(noise))
        for encoder in inference.encoders:
            encoder.fill()

    try:
        with ThreadPoolExecutor(_COPIED) as threads:
            with models.lock.take(0):  # until all are copied, or one could not be
                futures = [threads.submit(run, inference) for inference in inferences]
                while models.lock.waiting < _COPIED and not models.batches.short and not any(map(Future.done, futures)):
                    time.sleep(_POLL_SECONDS)
            for future in futures:
                future.result()
    except LayerFailure as error:
        raise UserError(f"{error.layer} fails in a full batch of {config.workers.images}: {error.args[1]}") from None
    return models.batches.end_of_search()
