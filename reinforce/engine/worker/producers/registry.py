"""The producer of each kind of layers, and what they test and measure of models before a run.

Floating-point operations are counted on a few inputs, only on cards whose peak is known, and only for models whose
precision is known: not for classes of the user. Captioners are left out, since memory limits decoding, not operations.
Resizing counts for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from reinforce.config import Config
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import Layer
from reinforce.engine.inference.models import Counters, Models
from reinforce.engine.inference.session import Session
from reinforce.engine.record.rates import Cost
from reinforce.engine.worker.producers.base import Producer
from reinforce.engine.worker.producers.captions import Captions
from reinforce.engine.worker.producers.image_embeddings import ImageEmbeddings
from reinforce.engine.worker.producers.samples import Samples
from reinforce.engine.worker.producers.scores import Scores
from reinforce.engine.worker.producers.text_embeddings import TextEmbeddings
from reinforce.engine.worker.refusals import Refusals
from teachers.device.flops import peak_flops
from teachers.spec import Precision

#: Producers by the name of their kind.
PRODUCERS: dict[str, type[Producer]] = {
    producer.kind: producer for producer in (Samples, Captions, ImageEmbeddings, TextEmbeddings, Scores)
}


def make_producers(
    layers: Iterable[Layer], session: Session, refusals: Refusals | None = None, source: str = ""
) -> list[Producer]:
    """A producer for each kind that some of the layers have, each after those whose layers it may need."""
    layers = [*layers]
    of_kind = {name: [layer for layer in layers if layer.kind == kind] for name, kind in KINDS.items()}
    return [PRODUCERS[name](found, session, refusals, source) for name, found in of_kind.items() if found]


def check_models(
    models: Models, layers: Iterable[Layer], precisions: Mapping[str, Precision], config: Config | None = None
) -> None:
    """Test the models that make ``layers``, on a few inputs or, with ``config``, on a full batch of it.

    ``precisions`` are those of the forward passes, by name of the model.

    Raises UserError that names the model, the check that failed and what was measured.
    """
    tested = set()
    for layer in layers:
        if layer.model is None or layer.published or (layer.model, layer.kind) in tested:
            continue
        tested.add((layer.model, layer.kind))
        PRODUCERS[layer.kind.name].self_test(models, layer, precisions.get(layer.model, "fp32"), config)
    models.counters = Counters()


def measure_costs(models: Models, config: Config, layers: Iterable[Layer], card: str | None = None) -> dict[str, Cost]:
    """The FLOPs of one input of layers by name, where they are known, and the peak rate of the card.

    ``card`` is torch's name of the device, by default that of the models.
    """
    device, costs = models.accelerator.device, {}
    card = card or (torch.cuda.get_device_name(device) if device.type == "cuda" else "")
    for layer in layers:
        spec = config.teachers.get(layer.model or "")
        if layer.published or spec is None or not spec.uses_precision:
            continue
        peak = peak_flops(card, spec.resolved_precision)
        if peak is not None and (flops := PRODUCERS[layer.kind.name].flops(models, layer)):
            costs[layer.name] = Cost(flops, peak)
    return costs
