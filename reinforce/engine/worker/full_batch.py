"""A full batch of every model before a run, so that its memory is known to suffice, and ``workers.batch: auto``.

As many are copied to the device at the same time as in a run, where one computes and the others wait for their turn.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from reinforce.config import Config
from reinforce.dataset.layers import Layer
from reinforce.engine.decode.row import Row
from reinforce.engine.inference.batch_sizes import MAX_AUTO_BATCH, rows_per_batch
from reinforce.engine.inference.inference import IN_WORK, Inference
from reinforce.engine.inference.models import Counters, Models
from reinforce.engine.inference.session import Session
from reinforce.engine.messages.results import LayerFailure
from reinforce.engine.worker.producers.registry import make_producers
from reinforce.errors import UserError
from teachers.runtime.memory import forget_peak

_COPIED = 2 * IN_WORK  # batches on the device, of two shards
_POLL_SECONDS = 0.001


def fit_batch(models: Models, config: Config, layers: Iterable[Layer]) -> Config:
    """``config`` with a number for ``workers.batch: auto``.

    On CUDA, full batches of the models that make ``layers`` are tried, and halved if they do not fit. Raises UserError
    if a model fails.
    """
    if models.accelerator.device.type == "cuda":
        return find_batch(models, config, [*layers])
    return _with_batch(config, config.workers.images)


def find_batch(models: Models, config: Config, layers: list[Layer], largest: int = MAX_AUTO_BATCH) -> Config:
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


def _try_batch(models: Models, config: Config, layers: list[Layer]) -> bool:
    """Run full batches side by side -> whether something did not fit and batches are smaller now."""
    sessions = [Session(config, models) for _ in range(_COPIED)]
    inferences = [Inference(session, make_producers(layers, session)) for session in sessions]
    rows = [Row(f"{i}", None, i) for i in range(inferences[0].rows_per_batch)]
    layout = inferences[0].layout
    noise = np.random.default_rng(0).integers(0, 256, len(rows) * layout.cell_bytes, np.uint8)

    def run(inference: Inference) -> None:
        inference.run(rows, layout.cells(noise))
        inference.fill()

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
