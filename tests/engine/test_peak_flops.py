"""Peak rates of cards by their names."""

from __future__ import annotations

import pytest

from reinforce.engine.inference.flops import peak_flops
from teachers.device.accelerator import Precision


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "fp32", 67),
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
