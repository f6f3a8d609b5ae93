"""Floating-point operations of the teachers.

Operations are counted on a few inputs when a worker starts, only on cards whose peak is known, and only for models
whose precision is known: not for classes of the user. Captioners are left out, since memory limits decoding, not
operations. Resizing counts for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch

from reinforce.config import Config
from reinforce.dataset.layers import Layer
from reinforce.engine.inference.models import Models
from reinforce.engine.record.rates import Cost
from teachers.device.flops import peak_flops

FlopsOf: TypeAlias = "Callable[[Models, Layer], float]"


def measure_costs(
    models: Models, config: Config, layers: Iterable[Layer], flops_of: FlopsOf, card: str | None = None
) -> dict[str, Cost]:
    """The costs of layers by name, where they are known; ``flops_of`` counts the FLOPs of one input.

    ``card`` is torch's name of the device, by default that of the models.
    """
    device, costs = models.accelerator.device, {}
    card = card or (torch.cuda.get_device_name(device) if device.type == "cuda" else "")
    for layer in layers:
        spec = config.teachers.get(layer.model or "")
        if layer.published or spec is None or not spec.uses_precision:
            continue
        peak = peak_flops(card, spec.resolved_precision)
        if peak is not None and (flops := flops_of(models, layer)):
            costs[layer.name] = Cost(flops, peak)
    return costs
