"""FLOPs of teachers."""

from __future__ import annotations

from pathlib import Path

import torch

from reinforce.config import parse_config
from reinforce.engine.inference.flops import costs_on, count_flops, measure_costs
from reinforce.engine.inference.models import Counters, load_models
from reinforce.engine.plan.recipe import build_layers, describe_models
from tests.helpers import tiny_models
from tests.helpers.data import config_of


def test_the_flops_of_a_tower_are_those_of_its_products_also_where_torch_has_a_fused_layer() -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 64, batch_first=True).eval()
    rows = 2 * 10  # two inputs of ten tokens
    with torch.inference_mode():
        assert count_flops(lambda: layer(torch.zeros(2, 10, 16))) >= 2 * rows * 16 * (3 * 16 + 16 + 64 + 64)
    assert torch.backends.mha.get_fastpath_enabled()
    assert count_flops(lambda: 1 / 0) == 0, "a run does not need them"


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
    costs = costs_on("NVIDIA H100 80GB HBM3", models, config, layers)
    assert costs.keys() == {"embeddings/tiny/images", "embeddings/tiny/caption", "embeddings/tiny/namer"}
    assert {cost.peak for cost in costs.values()} == {989e12}
    assert all(cost.flops > 0 for cost in costs.values())
    assert costs_on("a card of next year", models, config, layers) == {}
    assert measure_costs(models, config, layers) == {}, "a CPU"
