"""Worker processes that do what the worker actors do, without Ray."""

from __future__ import annotations

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.pipeline.inputs import make_config
from benchmarks.pipeline.stand_ins import STAND_IN, FixedTimeTeacher, StandInAccelerator, skip_conversion
from benchmarks.processes import Children, children, cpu_seconds, serve
from reinforce.dataset.store import Store
from reinforce.engine.messages import PendingShard
from reinforce.engine.plan.plan import build_layers, describe_models, make_plan
from reinforce.engine.worker.actor import SHARDS_IN_FLIGHT, environment
from reinforce.engine.worker.decode import DecodePool
from reinforce.engine.worker.models import LoadedModels
from reinforce.engine.worker.shard import ShardProcess, allocate_pixels
from teachers.runtime.accelerator import Accelerator


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker process is started with; ``device`` is that of its models or ``stand-in``."""

    augmentations: int
    cores: int
    device: str
    batch: int = 256


@dataclass(frozen=True)
class Job:
    """The shards of ``source`` whose number is ``part`` modulo ``parts``, written to ``output``."""

    source: str
    output: str
    seconds_per_image: float = 0.0
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Measured:
    """What a worker measured of a job. Seconds of CPU are those of its own process and of its decode processes;
    ``busy`` is the share of the time from the first batch to the last in which its models ran."""

    samples: int
    seconds: float
    own: float
    decode: float
    busy: float
    written: int  # bytes


def start_workers(setup: WorkerSetup, count: int = 1) -> Children:
    with patch.dict(os.environ, environment()):
        return Children(serve_worker, [(setup,)] * count)


def serve_worker(pipe: Connection, setup: WorkerSetup) -> None:
    """Answer jobs with what was measured."""
    torch.set_num_threads(setup.cores)
    stand_in = setup.device == STAND_IN
    accelerator = StandInAccelerator() if stand_in else Accelerator(setup.device)
    teacher = FixedTimeTeacher(accelerator.device)
    models = LoadedModels({"teachers": {"fixed": teacher}}, accelerator)
    config = make_config("none.tar", "none", setup.augmentations, setup.cores, setup.batch)
    layers = build_layers(config, describe_models(config))
    with contextlib.ExitStack() as stack:
        if stand_in:
            target = "reinforce.engine.worker.producers.embeddings.to_pixels"
            stack.enter_context(patch(target, skip_conversion))
        pool = stack.enter_context(DecodePool(setup.cores))
        allocate_pixels(pool, config, layers.values(), models, SHARDS_IN_FLIGHT)
        pool.wait_until_ready()
        serve(pipe, lambda job: _run(job, setup, models, teacher, pool))


def _run(job: Job, setup: WorkerSetup, models: LoadedModels, teacher: FixedTimeTeacher, pool: DecodePool) -> Measured:
    """Process the shards of a job, two at a time as a worker actor does."""
    teacher.reset(job.seconds_per_image)
    below = children(os.getpid())
    start, own, decode = time.perf_counter(), time.process_time(), sum(map(cpu_seconds, below))
    config = make_config(job.source, job.output, setup.augmentations, setup.cores, setup.batch)
    plan, store = make_plan(config), Store(config.output)

    def process(shard: PendingShard) -> tuple[int, int]:
        result = ShardProcess(shard, config, plan.layers, store, models, pool).run()
        return result.samples, result.bytes

    with ThreadPoolExecutor(SHARDS_IN_FLIGHT) as leases:
        samples, written = np.sum(list(leases.map(process, plan.pending[job.part :: job.parts])), axis=0).tolist()
    return Measured(
        samples,
        time.perf_counter() - start,
        time.process_time() - own,
        sum(map(cpu_seconds, below)) - decode,
        teacher.busy / max(1e-9, teacher.last - teacher.first),
        written,
    )
