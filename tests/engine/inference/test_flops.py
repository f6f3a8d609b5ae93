"""FLOPs of teachers, and peak rates of cards by their names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reinforce.config import parse_config
from reinforce.engine.inference.models import Counters, load_models
from reinforce.engine.plan.recipe import build_layers, describe_models
from reinforce.engine.worker.producers.registry import measure_costs
from teachers.device.accelerator import Precision
from teachers.device.flops import count_flops, peak_flops
from tests.helpers import tiny_models
from tests.helpers.data import config_of
from tests.helpers.stand_in_cuda import stand_in_cuda

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
        ("NVIDIA H200", "tf32", 494.5),
        ("NVIDIA B200", "tf32", 1100),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA GH200 480GB", "bf16", 989),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "tf32", 60),
        ("Tesla T4", "fp16", 65),
        ("Tesla T4", "bf16", None),
        ("Tesla V100-SXM2-16GB", "tf32", None),
        ("NVIDIA GeForce GTX 1080", "fp32", None),
        ("Quadro RTX 4000", "fp16", None),
        ("NVIDIA A1000", "bf16", None),
    ],
)
def test_a_card_is_found_by_the_words_of_its_name(name: str, precision: Precision, tera: float | None) -> None:
    assert peak_flops(name, precision) == (None if tera is None else tera * 1e12)
