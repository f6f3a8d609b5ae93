"""Floating-point operations of the teachers, counted on a few inputs when a worker starts.

Only on cards whose peak is known, and only for models whose precision is known: not for classes of the user. Captioners
are left out, since what limits decoding is memory and not operations. Resizing counts for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from reinforce.config import Config
from reinforce.dataset.layers import Layer
from reinforce.engine.inference.models import Models
from reinforce.engine.inference.peak_flops import peak_flops
from reinforce.engine.inference.self_test import TEXTS, probe_images
from reinforce.engine.record.rates import Cost


def measure_costs(models: Models, config: Config, layers: Iterable[Layer]) -> dict[str, Cost]:
    """The costs of layers by name, where they are known."""
    device = models.accelerator.device
    if device.type != "cuda":
        return {}
    return costs_on(torch.cuda.get_device_name(device), models, config, layers)


def costs_on(card: str, models: Models, config: Config, layers: Iterable[Layer]) -> dict[str, Cost]:
    """As ``measure_costs``, on a card by torch's name of it."""
    costs = {}
    for layer in layers:
        spec = config.teachers.get(layer.model or "")
        if layer.published or layer.kind not in ("images", "texts") or spec is None or spec.class_ is not None:
            continue
        peak = peak_flops(card, spec.resolved_precision)
        if peak is not None and (flops := _flops_of_input(models, layer)):
            costs[layer.name] = Cost(flops, peak)
    return costs


def _flops_of_input(models: Models, layer: Layer) -> float:
    """FLOPs of an image, or the mean of a few texts."""
    teacher = models.teachers[str(layer.model)]
    with models.use_accelerator():
        if layer.kind == "images":
            pixels = probe_images(models, teacher.image, [0])
            return count_flops(lambda: teacher.encode_images(pixels))
        return count_flops(models.text_encoder(teacher, TEXTS)) / len(TEXTS)


def count_flops(work: Callable[[], Any]) -> int:
    """FLOPs of a function; 0 if they cannot be counted."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its operation is unknown to the counter
    try:
        with FlopCounterMode(display=False) as counter:
            work()
        return int(counter.get_total_flops())
    except Exception:  # the counter does not support every operation, and a run does not need its result
        return 0
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
