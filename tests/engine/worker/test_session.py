"""The time of the models of a shard, FLOPs of teachers, and peak rates of cards by their names."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from reinforce.config import parse_config
from reinforce.engine.plan.plan import build_layers, describe_models
from reinforce.engine.rates import Cost
from reinforce.engine.worker.inference import StageMeter, device_report
from reinforce.engine.worker.models import Counters, load_models
from reinforce.engine.worker.producers.registry import measure_costs
from teachers.runtime.accelerator import Accelerator, Precision
from teachers.runtime.flops import count_flops, peak_flops
from tests.helpers.batches import CONFIG, LAYERS, Changed, make_inference, models_of, pixels, rows, text_encoder
from tests.helpers.data import config_of
from tests.helpers.models import tiny_models
from tests.helpers.stand_in_cuda import stand_in_cuda

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


class Waiting(torch.Tensor):
    """An output that the host waits for when it reads it, not when it queues a copy of it."""

    accelerator: QueuingAccelerator
    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]

    def clone(self, **_: Any) -> Waiting:
        return self

    def float(self, *_: Any, **__: Any) -> torch.Tensor:
        self.accelerator.synchronize()
        time.sleep(0.01)
        return self.as_subclass(torch.Tensor)


def test_a_run_counts_what_the_device_spent_on_models_and_nothing_of_the_host() -> None:
    accelerator, counters = QueuingAccelerator(), Counters()

    def launch(values: torch.Tensor, _: Any) -> Waiting:
        """Queue work in no time; the host then waits for it, and is slow with what it got."""
        accelerator.queued += SECONDS
        out = values.as_subclass(Waiting)
        out.accelerator = accelerator
        return out

    models = models_of(Changed(launch), accelerator=accelerator)
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


H100 = "NVIDIA H100 80GB HBM3"


def test_the_flops_of_a_tower_are_those_of_its_products_also_where_torch_has_a_fused_layer() -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 64, batch_first=True).eval()
    rows = 2 * 10  # two inputs of ten tokens
    with torch.inference_mode():
        assert count_flops(lambda: layer(torch.zeros(2, 10, 16))) >= 2 * rows * 16 * (3 * 16 + 16 + 64 + 64)
    assert torch.backends.mha.get_fastpath_enabled()
    assert count_flops(lambda: 1 / 0) == 0, "a run does not need them"


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_the_flops_of_a_training_are_three_times_those_of_a_forward_pass_also_in_groups(groups: int) -> None:
    convolution, inputs = torch.nn.Conv2d(8, 8, 3, padding=1, groups=groups), torch.zeros(2, 8, 4, 4)
    forward = 2 * 2 * 4 * 4 * 8 * (8 // groups) * 9
    assert count_flops(lambda: convolution(inputs)) == forward
    assert count_flops(lambda: convolution(inputs).sum().backward()) == 2 * forward, "inputs have no gradient"
    assert count_flops(lambda: convolution(inputs.clone().requires_grad_()).sum().backward()) == 3 * forward


def test_costs_are_those_of_teachers_on_cards_whose_peak_is_known(tmp_path: Path) -> None:
    config = parse_config(
        config_of(
            "x.tar",
            tmp_path / "out",
            teachers={
                "tiny": {"model": tiny_models.open_clip_model(tmp_path / "tiny"), "precision": "bf16"},
                "red": {"class": "tests.helpers.models:ColorTeacher"},
            },
        )
    )
    layers = [*build_layers(config, describe_models(config)).values()]
    models = load_models(config, layers)
    models.counters = Counters()
    costs = measure_costs(models, config, layers, H100)
    assert costs.keys() == {"embeddings/tiny/images", "embeddings/tiny/caption", "embeddings/tiny/namer"}
    assert {cost.peak for cost in costs.values()} == {989e12}
    assert all(cost.flops > 0 for cost in costs.values())
    assert measure_costs(models, config, layers, "a card of next year") == {}
    assert measure_costs(models, config, layers) == {}, "a CPU"
    on_gpu = config.model_copy(update={"workers": config.workers.model_copy(update={"gpus": 1.0})})
    with stand_in_cuda():
        padded = measure_costs(load_models(on_gpu, layers), on_gpu, layers, H100)
    name = "embeddings/tiny/images"
    assert padded[name].flops == pytest.approx(costs[name].flops), "of an image, not of the batch that it is padded to"


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        (H100, "bf16", 989),
        (H100, "fp32", 67),
        (H100, "fp8", 1978),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("NVIDIA H100 PCIe", "fp16", 756),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA GH200 480GB", "bf16", 989),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA L4", "tf32", 60),
        ("Tesla T4", "fp16", 65),
        ("Tesla T4", "bf16", None),
        ("Tesla V100-SXM2-16GB", "tf32", None),
        ("Quadro RTX 4000", "fp16", None),
        ("NVIDIA A1000", "bf16", None),
    ],
)
def test_a_card_is_found_by_the_words_of_its_name(name: str, precision: Precision, tera: float | None) -> None:
    assert peak_flops(name, precision) == (None if tera is None else tera * 1e12)
