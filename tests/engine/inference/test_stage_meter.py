"""The time of the models of a shard."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from reinforce.engine.inference.models import Counters, Models
from reinforce.engine.inference.stage_meter import StageMeter, device_report
from reinforce.engine.record.rates import Cost
from teachers.device.accelerator import Accelerator
from tests.helpers.batches import CONFIG, LAYERS, make_inference, pixels, rows, text_encoder
from tests.helpers.models import ColorTeacher, SeedCaptioner

SECONDS = 1000.0  # of a batch on the device


class QueuingAccelerator(Accelerator):
    """A device with a clock of its own, which works through its queue when it is asked for a result."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.clock, self.queued = 0.0, 0.0

    def mark(self) -> Any:
        return self.clock + self.queued

    def has_passed(self, mark: Any) -> bool:
        return bool(mark <= self.clock)

    def wait_until(self, mark: Any) -> None:
        self.synchronize()

    def synchronize(self) -> None:
        self.clock, self.queued = self.clock + self.queued, 0.0


class Launching(ColorTeacher):
    """Queues work in no time; the host then waits for it, and is slow with what it got."""

    def __init__(self, accelerator: QueuingAccelerator) -> None:
        super().__init__(torch.device("cpu"))
        self.accelerator = accelerator

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        self.accelerator.queued += SECONDS
        return waiting(super().encode_images(pixels), self.accelerator)

    def encode_texts(self, texts: Any) -> torch.Tensor:
        self.accelerator.queued += SECONDS
        return waiting(super().encode_texts(texts), self.accelerator)


class Waiting(torch.Tensor):
    """An output that the host waits for when it reads it, not when it queues a copy of it."""

    accelerator: QueuingAccelerator

    def clone(self, **_: Any) -> Waiting:
        return self

    def float(self, *_: Any, **__: Any) -> torch.Tensor:
        self.accelerator.synchronize()
        time.sleep(0.01)
        return self.as_subclass(torch.Tensor)


def waiting(values: torch.Tensor, accelerator: QueuingAccelerator) -> Waiting:
    out = values.as_subclass(Waiting)
    out.accelerator = accelerator
    return out


def test_a_run_counts_what_the_device_spent_on_models_and_nothing_of_the_host() -> None:
    accelerator, counters = QueuingAccelerator(), Counters()
    models = Models({"red": Launching(accelerator)}, {"namer": SeedCaptioner(torch.device("cpu"))}, accelerator)
    run = make_inference(CONFIG, [LAYERS["embeddings/red/images"], LAYERS["captions/namer"]], models, counters)
    run.run(rows(3), pixels())
    assert counters.busy == models.counters.busy == SECONDS
    layer = LAYERS["embeddings/red/caption"]
    texts = text_encoder(CONFIG, layer, models, counters)
    texts.encode_texts(layer, [["a cat"], ["a dog"], ["a bird"], ["a fish"]])
    assert counters.busy == models.counters.busy == 3 * SECONDS, "two batches of texts"


def test_inputs_seconds_and_flops_are_summed_by_layer_and_failed_work_does_not_count() -> None:
    accelerator = Accelerator("cpu")
    meter = StageMeter(accelerator, {"embeddings/t/images": Cost(flops=3.0, peak=100.0)})
    for inputs in (4, 2):
        with meter.stage("embeddings/t/images", inputs):
            time.sleep(0.01)
    with pytest.raises(ZeroDivisionError), meter.stage("captions/c", 5):
        raise ZeroDivisionError
    for _ in range(300):  # more than wait at a time
        with meter.stage("captions/c", 1):
            pass
    stages = meter.collect()
    assert meter.collect() is stages
    images = stages["embeddings/t/images"]
    assert (images["inputs"], images["flops"], stages["captions/c"]["inputs"]) == (6, 18, 300)
    assert 0.02 <= images["seconds"] == pytest.approx(images["peak_flops"] / 100)
    assert "flops" not in stages["captions/c"]
    assert device_report(accelerator) == {}


def test_stages_are_counted_once_the_device_has_passed_their_end_and_without_waiting_for_it() -> None:
    accelerator, counters = QueuingAccelerator(), Counters()
    meter = StageMeter(accelerator, {}, counters)
    for _ in range(2):
        with meter.stage("embeddings/t/images", 3):
            accelerator.queued += 2.0
        accelerator.queued += 5.0  # of others, in between
    meter.update()
    assert (counters.busy, accelerator.queued) == (0.0, 14.0)
    accelerator.clock, accelerator.queued = 7.0, 7.0
    meter.update()
    assert counters.busy == 2.0
    assert meter.collect() == {"embeddings/t/images": {"inputs": 6, "seconds": 4.0}}
    assert counters.busy == 4.0
