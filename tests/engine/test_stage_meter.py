"""The time of the models of a shard."""

from __future__ import annotations

import time

import pytest

from reinforce.engine.rates import Cost
from reinforce.engine.stage_meter import StageMeter, device_report
from teachers.device import Accelerator


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
