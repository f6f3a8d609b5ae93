"""Comparison of the labels' vectors with those that the config's models compute from local images."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import replace

import numpy as np

from reinforce.config import Config
from reinforce.dataset import vectors
from reinforce.dataset.comparison import MIN_COSINE
from reinforce.dataset.files.store import Store
from reinforce.dataset.layers import SAMPLES, Layer
from reinforce.engine.decode.decode_pool import DecodePool
from reinforce.engine.inference.models import load_models, on_this_machine
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.worker.shard import ShardProcess
from reinforce.errors import UserError
from teachers.runtime.determinism import set_flags


def check_labels(config: Config, rows: int = 64, pool: DecodePool | None = None) -> list[str]:
    """Compare the vectors of labels with those of the models in the config, for the first ``rows`` samples of the
    source -> a line for each layer. Models that only the labels name are not loaded. Raises UserError."""
    if not config.labels:
        raise UserError("--labels: the config has no `labels`. Add them.")
    with tempfile.TemporaryDirectory(prefix="reinforce-labels-") as folder:
        limits = config.input.limits.model_copy(update={"shard_samples": rows})
        here = {"output": folder, "input": config.input.model_copy(update={"limits": limits})}
        config = config.with_models({"teachers": config.teachers, "captioners": config.captioners})
        plan = make_plan(on_this_machine(config).model_copy(update=here))
        taken = {name: layer for name, layer in plan.layers.items() if layer.labels is not None}
        vectors_of = {name: layer for name, layer in taken.items() if layer.kind.vectors}
        models = {name: layer for name, layer in vectors_of.items() if not layer.published}
        lines = [
            f"{name}: its model is not in the config, so it is not loaded" for name in vectors_of.keys() - models.keys()
        ]
        if not models:
            return lines
        store = Store(folder)
        shard = replace(plan.pending[0], layers=tuple(name for name in plan.layers if name in (SAMPLES, *taken)))
        set_flags("cuda" if plan.config.workers.gpus else "cpu", True)
        with contextlib.nullcontext(pool) if pool else DecodePool(config.workers.cores) as own:
            # First what the labels have, without models, then all of it by the models.
            stored = {name: replace(layer, published=True) for name, layer in taken.items() if name != SAMPLES}
            loaded = load_models(plan.config, stored.values())
            ShardProcess(shard, plan.config, {**plan.layers, **stored}, store, loaded, own).run()
            before = {name: _values(store, layer, shard.name) for name, layer in models.items()}
            computed = {name: replace(layer, labels=None) for name, layer in models.items()}
            for name in computed:
                store.remove(name, f"{shard.name}.parquet")
            loaded = load_models(plan.config, computed.values())
            again = replace(shard, layers=tuple(computed))
            ShardProcess(again, plan.config, {**plan.layers, **computed}, store, loaded, own).run()
        for name, layer in models.items():
            now = _values(store, layer, shard.name)
            both = np.isfinite(before[name]).all((1, 2)) & np.isfinite(now).all((1, 2))
            cosines = vectors.cosines(before[name][both], now[both]).ravel()
            lines.append(_line(name, len(now), cosines))
        return lines


def _values(store: Store, layer: Layer, shard: str) -> np.ndarray:
    """The vectors of a layer [rows, count, dim], NaN where one is null."""
    with store.open_layer(layer.name, shard) as file:
        return vectors.decode(file.read())


def _line(layer: str, rows: int, cosines: np.ndarray) -> str:
    """The cosines of the stored and the computed vectors of a layer, in so many rows, for people."""
    if not len(cosines):
        return f"{layer}: none of the first {rows:,} samples has labels"
    far = int((cosines < MIN_COSINE).sum())
    text = f"{layer}: {len(cosines):,} vectors, cosine of stored and computed ones: least {np.min(cosines):.4f}, "
    text += f"median {np.median(cosines):.4f}"
    return f"{text}; {far:,} below {MIN_COSINE}" if far else text
