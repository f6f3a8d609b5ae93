"""What the models of a config compute now, compared with what labels or a dataset have.

``check_labels`` compares the labels' vectors with those that the config's models compute from local images.

``recompute`` serves ``reinforce validate --recompute``. Random rows of some shards are copied with their captions to a
temporary dataset, and the code of workers computes the other layers of it. Captions are computed from the images or
true captions, embeddings of captions from the stored captions. Each model is loaded by itself. Equal software on an
equal device gives equal bytes; otherwise vectors differ by rounding, and captions, which are sampled, may be others.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from reinforce.config import Config
from reinforce.dataset import vectors
from reinforce.dataset.aligned import AlignedLayers
from reinforce.dataset.codecs import codebooks
from reinforce.dataset.layer_file import RefusedFile
from reinforce.dataset.layers import MIN_COSINE, SAMPLES, Comparison, Layer
from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.shard_checks import Finding
from reinforce.dataset.store import LayerWriter, Store, origin_entries
from reinforce.engine.messages import LayerFailure, PendingShard
from reinforce.engine.plan.plan import (
    build_layers,
    describe_models,
    make_plan,
    resolve_layers,
    resolve_precisions,
)
from reinforce.engine.plan.source_shards import with_view
from reinforce.engine.worker.decode import DecodePool
from reinforce.engine.worker.models import load_models, on_this_machine
from reinforce.engine.worker.producers.base import MisalignedLayer
from reinforce.engine.worker.shard import ShardProcess
from reinforce.errors import UserError
from reinforce.labels.taken import with_labels
from reinforce.processes.parallel import nodes_of_run
from teachers.runtime.determinism import set_flags
from teachers.spec import ModelInfo

_SHARDS = 16  # from which rows are taken, at most


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
            if not len(cosines):
                lines.append(f"{name}: none of the first {len(now):,} samples has labels")
                continue
            far = int((cosines < MIN_COSINE).sum())
            text = f"{name}: {len(cosines):,} vectors, cosine of stored and computed ones: least {np.min(cosines):.4f}"
            text += f", median {np.median(cosines):.4f}"
            lines.append(f"{text}; {far:,} below {MIN_COSINE}" if far else text)
        return lines


def _values(store: Store, layer: Layer, shard: str) -> np.ndarray:
    """The vectors of a layer [rows, count, dim], NaN where one is null."""
    with store.open_layer(layer.name, shard) as file:
        return vectors.decode(file.read())


@dataclass
class Recomputed:
    """The comparison of each layer, and why others were not computed."""

    layers: dict[str, Comparison] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def findings(self) -> list[Finding]:
        """The layers whose values are not what the models compute."""
        return [Finding("rows", one.line(name), name) for name, one in self.layers.items() if not one.fits]

    def lines(self) -> list[str]:
        """For people: the layers without a finding, and those that were left out."""
        return [*(one.line(name) for name, one in self.layers.items() if one.fits), *self.left_out]

    def as_json(self) -> dict[str, Any]:
        keys = ("rows", "equal", "nulls", "difference", "cosine", "fits")
        layers = [{"layer": name, **{key: getattr(one, key) for key in keys}} for name, one in self.layers.items()]
        return {"layers": layers, "left_out": self.left_out}


@dataclass(frozen=True)
class _PickedRows:
    """Rows of one row group of a shard, with the tables of its layers and the footer of its samples."""

    shard: str
    source: str
    footer: Mapping[str, str]
    tables: Mapping[str, pa.Table]


def recompute(config: Config, url: str, rows: int, seed: int = 0, pool: DecodePool | None = None) -> Recomputed:
    """Compute about ``rows`` random rows of the dataset at ``url`` again, with the models of its ``config``.

    A model that cannot be loaded, and layers of another recipe, are left out. Raises UserError.
    """
    store, found = Store(url), Recomputed()
    manifest = read_manifest(store)
    config = on_this_machine(config).model_copy(update={"output": store.url})
    config = _describable(resolve_precisions(with_labels(with_view(config)), lambda: manifest, nodes_of_run)[0], found)
    config, layers, _ = resolve_layers(config, store, manifest, nodes_of_run)
    chosen: dict[str, Layer] = {}  # those that the dataset has by the same recipe
    for name, layer in layers.items():
        stored = manifest["layers"].get(name, {}).get("fingerprint")
        if stored == layer.fingerprint:
            chosen[name] = replace(layer, dim=layer.dim or manifest["layers"][name].get("dim"))
        elif stored is not None:
            found.left_out.append(f"{name}: not computed again: the config has another recipe than the dataset")
    if SAMPLES not in chosen:
        return found
    set_flags("cuda" if config.workers.gpus else "cpu", config.workers.deterministic)
    picked = [*_pick(store, chosen, config, rows, random.Random(seed))]  # noqa: S311
    computed = {name: layer for name, layer in chosen.items() if name != SAMPLES and not layer.published}
    owners = dict.fromkeys(layer.owner for layer in computed.values())
    with contextlib.nullcontext(pool) if pool else DecodePool(config.workers.cores) as own:
        for owner in owners:
            of_model = {name: layer for name, layer in computed.items() if layer.owner == owner}
            try:
                found.layers |= _compare_model(config, {**layers, **chosen}, of_model, picked, own)
            except (UserError, LayerFailure, RefusedFile, MisalignedLayer) as error:
                found.left_out.append(f"{', '.join(of_model)}: not computed again: {error}")
    return found


def _describable(config: Config, found: Recomputed) -> Config:
    """The config without models whose identity cannot be determined, such as those whose weights are not here, and
    without scores that are computed from theirs."""
    usable: dict[str, dict[str, Any]] = {section: {} for section in config.models}
    infos: dict[tuple[str, str], ModelInfo] = {}
    for section, specs in usable.items():
        for name, spec in getattr(config, section).items():
            try:
                infos |= describe_models(config.with_models({section: {name: spec}}))
                build_layers(config.with_models({**usable, section: {name: spec}}), infos)
                specs[name] = spec
            except UserError as error:
                found.left_out.append(f"{section[:-1]} {name}: not computed again: {error}")
    return config.with_models(usable)


def _pick(
    store: Store, layers: Mapping[str, Layer], config: Config, rows: int, rng: random.Random
) -> Iterator[_PickedRows]:
    """Random rows, from shards that have all layers."""
    listings = store.listings(layers)
    complete = listings[SAMPLES]
    for listing in listings.values():
        complete = complete.only(complete.within(listing.names))
    shards = sorted(rng.sample([*complete], min(rows, _SHARDS, len(complete))))
    aligned = AlignedLayers(store, {name: layer.fingerprint for name, layer in layers.items()}, {}, config.moved)
    for shard in shards:
        with aligned.open(shard, whole=False) as opened:
            if not opened.row_groups:
                continue
            tables = opened.read(rng.randrange(opened.row_groups))
            count = tables[SAMPLES].num_rows
            places = sorted(rng.sample(range(count), min(count, -(-rows // len(shards)))))
            taken = {name: table.take(places) for name, table in tables.items()}
            yield _PickedRows(shard, opened.source, opened.footer(SAMPLES), taken)


def _compare_model(
    config: Config,
    layers: Mapping[str, Layer],
    of_model: Mapping[str, Layer],
    picked: Sequence[_PickedRows],
    pool: DecodePool,
) -> dict[str, Comparison]:
    """Compute the layers of one model for all rows, and compare."""
    models = load_models(config, of_model.values())
    found = {name: Comparison() for name in of_model}
    with tempfile.TemporaryDirectory(prefix="reinforce-recompute-") as folder:
        store = Store(folder)
        here = config.model_copy(update={"output": folder})
        for layer in of_model.values():
            if (place := layer.codebook_at(config.output)) is not None:
                codebooks.copy(Store(place.url), store, layer.name, place.digest)
        inputs = {name for layer in of_model.values() for name in layer.needs} - of_model.keys()
        for rows in picked:
            for name in inputs & rows.tables.keys():
                table, layer = rows.tables[name], layers[name]
                columns = [column for column in layer.schema(config.images) if column.name in table.column_names]
                schema = pa.schema(columns)
                with LayerWriter(store, layer, schema, rows.shard, rows.footer.get("source", "")) as writer:
                    writer.write(table.select(schema.names).cast(schema))
                    writer.commit(origin_entries(rows.footer))
            ShardProcess(
                PendingShard(rows.shard, rows.source, tuple(of_model)), here, layers, store, models, pool
            ).run()
            for name, layer in of_model.items():
                with store.open_layer(name, rows.shard) as file:
                    found[name].add(layer.kind.compare(rows.tables[name], file.read()))
    return found
