"""Codebooks of a run: fitted before anything else, to vectors of the first shards that a separate run computes.

That run stores these vectors in float16, in ``fitting/`` of the dataset, and continues after an interruption as every
run does. Its files are deleted once the codebooks are stored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from reinforce.config import Config
from reinforce.dataset import fitting
from reinforce.dataset.codecs import codebooks
from reinforce.dataset.codecs.base import Floats
from reinforce.dataset.files.store import Store
from reinforce.dataset.layers import Layer, compute_fingerprint
from reinforce.engine.plan.plan import Plan
from reinforce.terminal import plural

FOLDER = "fitting"
_LOG = logging.getLogger(__name__)


def fit_codebooks(plan: Plan, compute: Callable[[Config, int], None]) -> None:
    """Fit the codebooks that a plan lacks. ``compute`` computes the first shards of a config. Raises UserError."""
    layers, seed, output = plan.unfitted, plan.config.seed, plan.config.output.rstrip("/")
    name = compute_fingerprint({"codebooks": [layer.fingerprint for layer in layers]})
    config = _finer(plan.config, layers, f"{output}/{FOLDER}/{name}")
    _LOG.info("fitting the codebooks of %s to vectors of the first shards", plural(len(layers), "layer"))
    store, finer, shards = Store(output), Store(config.output), fitting.SHARES

    def sample(layer: Layer) -> Floats:
        return fitting.sample(layer, finer, None, sorted(finer.shards(layer.name)), seed)

    def lacks(layer: Layer) -> bool:
        return len(finer.shards(layer.name)) < fitting.SHARES or len(sample(layer)) < layer.sample

    compute(config, shards)
    while shards < plan.shards and any(map(lacks, layers)):
        shards *= 2
        compute(config, shards)
    try:
        for layer in layers:
            fitting.fit(layer, sample(layer), store, seed)
    finally:
        with store.storage_errors("removed", FOLDER):
            store.fs.rm(store.path(FOLDER), recursive=True)


def check_codebooks(plan: Plan) -> None:
    """Raise UserError if the codebook of a layer that a plan computes was lost or has changed; copy those of labels."""
    needed = {name for shard in plan.pending for name in shard.layers}
    for name, layer in plan.layers.items():
        place = layer.codebook_at(plan.config.output)
        if place is None or name not in needed:
            continue
        labels = plan.config.labels.get(layer.labels or "")
        if labels is not None and codebooks.stored_digest(Store(place.url), name) is None:
            codebooks.copy(Store(labels.url), Store(place.url), name, place.digest)
        codebooks.load(place).codec.require_encoder()


def _finer(config: Config, layers: Sequence[Layer], output: str) -> Config:
    """The config of the run that computes vectors to fit codebooks to: only with the models that need them."""
    owners = {layer.owner for layer in layers}
    models = {
        section: {name: spec.finer() for name, spec in of.items() if (section, name) in owners}
        for section, of in config.models.items()
    }
    return config.with_models({**models, "captioners": config.captioners}).model_copy(update={"output": output})
