"""The worker actor: one per accelerator (or per few cores), holding every model that the run's layers need.

Two shards are in flight in it at a time. Their images are decoded by one pool of threads, their batches take turns
at the accelerator, so it does not wait at the end of a shard for the beginning of the next.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import ray
import torch

from reinforce.config import Config
from reinforce.dataset.layers import Layer
from reinforce.dataset.store import Store
from reinforce.engine.models import Counters, Models, load_models
from reinforce.engine.outcome import LayerFailure, ShardFailure, ShardResult
from reinforce.engine.plan import Work
from reinforce.engine.shard import process_shard
from reinforce.engine.watch import Pulse, WatchedThreads
from reinforce.errors import StorageError, UserError
from teachers.redact import Redactor

SHARDS_IN_FLIGHT = 2


@dataclass(frozen=True)
class Started:
    """What a worker tells of itself once its models are loaded. ``models`` is what only a loaded model knows."""

    node: str
    pid: int
    accelerator: str
    models: Mapping[str, Mapping[str, Any]]


class Worker:
    """Runs leases, two at a time; ``as_actor`` makes it a Ray actor."""

    def __init__(self, config: Config, layers: Mapping[str, Layer], needed: frozenset[str], folder: str) -> None:
        """``folder`` is where the driver was started: a class of the user's own may lie there."""
        self.config, self.layers, self.needed = config, layers, needed
        self.folders = [path for path in (os.getcwd(), folder) if os.path.isdir(path)]
        self.pool = WatchedThreads(config.workers.cpus)
        self.store = Store(config.output)
        self.tell = Redactor(config.model_dump(mode="json"))
        self.models: Models | None = None

    def load(self) -> Started:
        """Load the models of the layers in ``needed``. Raises UserError if one cannot be."""
        torch.set_num_threads(self.config.workers.cpus)
        warnings.filterwarnings("ignore", module="PIL")  # of odd metadata, one line an image; what is refused is told
        sys.path[:0] = [path for path in self.folders if path not in sys.path]
        self.models = load_models(self.config, [self.layers[name] for name in self.needed])
        known = {
            name: {
                "dim": teacher.dim,
                "logit_scale": getattr(teacher, "logit_scale", None),
                "image": asdict(image) if (image := getattr(teacher, "image", None)) else None,
            }
            for name, teacher in self.models.teachers.items()
        }
        node = ray.get_runtime_context().get_node_id()
        return Started(node, os.getpid(), str(self.models.accelerator.device), known)

    def process(self, work: Work) -> ShardResult:
        """Compute and commit the missing layers of one shard. Raises UserError, LayerFailure or ShardFailure."""
        assert self.models is not None
        try:
            return process_shard(work, self.config, self.layers, self.store, self.models, self.pool)
        except StorageError as error:
            raise ShardFailure(self.tell(str(error)), False) from None
        except UserError:
            raise
        except LayerFailure as error:
            raise LayerFailure(error.layer, self.tell(str(error.args[1]))) from None
        except Exception as error:
            of_worker = isinstance(error, (RuntimeError, MemoryError))  # and not a storage's
            raise ShardFailure(self.tell(f"{type(error).__name__}: {error}"), of_worker) from None

    def pulse(self) -> Pulse:
        """What is done so far and what is being done, also while shards run."""
        counters = self.models.counters if self.models else Counters()
        return Pulse(counters.samples, counters.busy, self.pool.finished, *self.pool.longest())


def as_actor(config: Config) -> Any:
    """The actor class with the resources of ``config.workers``."""
    threads = str(config.workers.cpus)
    return ray.remote(
        num_cpus=config.workers.cpus,
        num_gpus=config.workers.gpus,
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=SHARDS_IN_FLIGHT,
        concurrency_groups={"control": 1},
        runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
    )(Worker)
