"""The producer of each kind of layers, and what they test and measure of models before a run.

Floating-point operations are counted on a few inputs, only on cards whose peak is known, and only for models whose
precision is known: not for classes of the user. Captioners are left out, since memory limits decoding, not operations.
Resizing counts for nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping

import torch

from reinforce.config import Config
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import Layer
from reinforce.engine.rates import Cost
from reinforce.engine.worker.inference import Session
from reinforce.engine.worker.models import Counters, LoadedModels
from reinforce.engine.worker.producers.base import Producer, Refusals
from teachers.runtime.flops import count_flops, peak_flops
from teachers.spec import ModelInfo, Precision

#: Producers by the name of their kind.
PRODUCERS: dict[str, type[Producer]] = {}
for _name, _kind in KINDS.items():
    _module, _, _class = _kind.producer.partition(":")
    PRODUCERS[_name] = getattr(importlib.import_module(f"{__package__}.{_module}"), _class)


def make_producers(
    layers: Iterable[Layer], session: Session, refusals: Refusals | None = None, source: str = ""
) -> list[Producer]:
    """A producer for each kind that some of the layers have, each after those whose layers it may need."""
    layers = [*layers]
    of_kind = {name: [layer for layer in layers if layer.kind == kind] for name, kind in KINDS.items()}
    return [PRODUCERS[name](found, session, refusals, source) for name, found in of_kind.items() if found]


def check_models(
    models: LoadedModels,
    layers: Iterable[Layer],
    precisions: Mapping[tuple[str, str], Precision],
    config: Config | None = None,
) -> None:
    """Test the models that make ``layers``, on a few inputs or, with ``config``, on a full batch of it.

    ``precisions`` are those of the forward passes, by section and name of the model.

    Raises UserError that names the model, the check that failed and what was measured.
    """
    tested = set()
    for layer in layers:
        section, name = layer.owner
        if section is None or name is None or layer.published or (name, layer.kind) in tested:
            continue
        tested.add((name, layer.kind))
        producer = PRODUCERS[layer.kind.name]
        side = producer.side(models, name, _info(layer), precisions.get((section, name), "fp32"))
        if side is not None:
            side.check(None if config is None else producer.full_batch(models, layer, config))
    models.counters = Counters()


def _info(layer: Layer) -> ModelInfo:
    """Description of a layer's model, as if it had every side."""
    return ModelInfo(layer.dim, images=True, texts=True, identity=dict(layer.identity))


def measure_costs(
    models: LoadedModels, config: Config, layers: Iterable[Layer], card: str | None = None
) -> dict[str, Cost]:
    """The FLOPs of one input of layers by name, where they are known, and the peak rate of the card.

    ``card`` is torch's name of the device, by default that of the models.
    """
    device, costs = models.accelerator.device, {}
    card = card or (torch.cuda.get_device_name(device) if device.type == "cuda" else "")
    for layer in layers:
        section, name = layer.owner
        spec = config.models.get(str(section), {}).get(str(name))
        if spec is None or not spec.uses_precision:
            continue
        producer, peak = PRODUCERS[layer.kind.name], peak_flops(card, spec.resolved_precision)
        if peak is not None and producer.counted:
            side = producer.side(models, str(name), _info(layer), spec.resolved_precision)
            assert side is not None
            run = side.prepare(producer.counted)
            with models.use_accelerator():
                costs[layer.name] = Cost(count_flops(run) / producer.counted, peak)
    return costs
