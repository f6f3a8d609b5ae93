"""The worker actor: one per accelerator (or per few cores), holding every model that the run's layers need.

Two shards are in flight in it at a time. Their images are decoded by one pool of threads, their batches take turns
at the accelerator, so it does not wait at the end of a shard for the beginning of the next.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import ray

from reinforce.config import Config
from reinforce.errors import UserError
from reinforce.layers import Layer
from reinforce.plan import Work
from reinforce.shard import Counters, Models, ShardResult, process_shard
from reinforce.store import Store
from teachers.protocols import ImageSpec

if TYPE_CHECKING:
    import torch

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
        self.pool = ThreadPoolExecutor(config.workers.cpus, thread_name_prefix="decode")
        self.store = Store(config.output)
        self.models: Models | None = None

    def load(self) -> Started:
        """Load the models of the layers in ``needed``. Raises UserError if one cannot be."""
        import torch

        from teachers.device import Accelerator
        from teachers.registry import load_captioner, load_teacher

        torch.set_num_threads(self.config.workers.cpus)
        sys.path[:0] = [path for path in self.folders if path not in sys.path]
        device = "cuda" if self.config.workers.gpus else "cpu"
        kinds = {
            (layer.kind == "captions", str(layer.model)) for name, layer in self.layers.items() if name in self.needed
        }
        try:
            self.models = Models(
                {n: load_teacher(n, s, device) for n, s in self.config.teachers.items() if (False, n) in kinds},
                {n: load_captioner(n, s, device) for n, s in self.config.captioners.items() if (True, n) in kinds},
                Accelerator(device),
            )
        except (ValueError, OSError, ImportError, RuntimeError, TypeError) as error:
            raise UserError(str(error)) from error
        try_out(self.models, [self.layers[name] for name in self.needed])
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
        """Compute and commit the missing layers of one shard."""
        assert self.models is not None
        return process_shard(work, self.config, self.layers, self.store, self.models, self.pool)

    def counters(self) -> Counters:
        """Samples and busy seconds so far, also while shards run."""
        return self.models.counters if self.models else Counters()


def try_out(models: Models, layers: Iterable[Layer]) -> None:
    """One grey image and one short text through every model, so that a wrong shape ends the run before it starts.

    Raises UserError naming the model and what it gave.
    """
    import numpy as np
    import torch

    for layer in layers:
        if layer.model is None:
            continue
        try:
            with models.turn():
                if layer.kind == "captions":
                    captioner = models.captioners[layer.model]
                    pixels = _grey(models, captioner.image)
                    texts = captioner.caption(pixels, np.arange(layer.count, dtype=np.uint64)[None])
                    if [len(row) for row in texts] != [layer.count]:
                        raise ValueError(f"caption() gave {texts!r} for one image, want a list of {layer.count} texts")
                    continue
                teacher = models.teachers[layer.model]
                if layer.kind == "images":
                    out = teacher.encode_images(_grey(models, teacher.image))
                else:
                    out = teacher.encode_texts(["a photo"])
            if tuple(out.shape) != (1, teacher.dim):
                raise ValueError(f"{layer.kind} embeddings of shape {tuple(out.shape)}, want {(1, teacher.dim)}")
            norm = torch.linalg.vector_norm(out.float()).item()
            if not 0.99 < norm < 1.01:
                raise ValueError(f"{layer.kind} embeddings of norm {norm:.3f}, want 1")
        except Exception as error:
            raise UserError(f"{layer.model} fails on a first {layer.kind} input: {error}") from error
    models.counters = Counters()


def _grey(models: Models, spec: ImageSpec | None) -> torch.Tensor:
    import numpy as np

    from teachers.pixels import to_pixels

    if spec is None:
        raise ValueError("it has no `image` (an ImageSpec), so it cannot encode images")
    return to_pixels(models.accelerator.put(np.full((1, spec.height, spec.width, 3), 128, np.uint8)), spec)


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
