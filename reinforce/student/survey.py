"""Before the first step: which layers a training reads, whether they are whole, and how many rows lie where."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from reinforce.config import Limits
from reinforce.dataset import Zip, chosen, naming, read_manifest
from reinforce.errors import UserError
from reinforce.layers import SAMPLES, embeddings_layer
from reinforce.store import Store
from reinforce.student.config import Data
from reinforce.student.examples import TRUE, Choice
from reinforce.student.stream import Corpus

_LOG = logging.getLogger(__name__)
_THREADS = 32  # footers read at a time


def survey(data: Data, seed: int, teachers: Sequence[str] | None) -> list[Corpus]:
    """The datasets of a training, checked. ``teachers`` are those whose vectors are read; default: all.

    Raises UserError where something is missing, damaged or does not fit together.
    """
    corpora = [_corpus(source.url, source.weight, data, seed, teachers) for source in data.datasets]
    return corpora


def _corpus(url: str, weight: float, data: Data, seed: int, teachers: Sequence[str] | None) -> Corpus:
    store = Store(url)
    manifest = read_manifest(store)
    layers = manifest["layers"]
    teachers = chosen(url, "teachers", teachers, manifest)
    names = chosen(url, "captioners", None if data.captioners is None else list(data.captioners), manifest)
    choice = Choice(
        seeing=tuple(t for t in teachers if embeddings_layer(t, "images") in layers),
        reading=tuple(t for t in teachers if embeddings_layer(t, TRUE) in layers),
        captioners={name: (data.captioners or {}).get(name, 1.0) for name in names},
        captions=data.captions,
        synthetic=data.synthetic,
        pick=data.pick,
        seed=seed,
    )
    columns = choice.columns(manifest["images"])
    for layer in columns:
        if layer not in layers:
            raise UserError(
                f"{url} has no layer {layer}. Run the config that has both models, or leave one out under `data`."
            )
    shards = _whole(store, list(columns))
    zipped = Zip(store, {layer: layers[layer]["fingerprint"] for layer in columns}, columns)
    groups = _row_groups(zipped, shards)
    limits = Limits.model_validate(manifest["input"]["limits"])
    targets = [
        ((teacher, what), layers[embeddings_layer(teacher, "images" if what == "image" else TRUE)]["dim"])
        for teacher, what in choice.targets
    ]
    size = manifest["augmentations"]["size"]
    return Corpus(url, zipped, choice, limits, tuple(shards), groups, weight, size, tuple(targets))


def _whole(store: Store, layers: Sequence[str]) -> list[str]:
    """Shards that are in every layer."""
    listings = {layer: store.shards(layer) for layer in layers}
    return sorted(set.intersection(*(set(listing) for listing in listings.values())))


def _row_groups(zipped: Zip, shards: Sequence[str]) -> npt.NDArray[np.int64]:
    """[row groups, 3]: number of the shard, place in its file, rows; by the footers of the samples layer."""

    def rows(shard: str) -> list[int]:
        path = zipped.store.layer_path(SAMPLES, shard)
        with naming(path), zipped.store.open_layer(SAMPLES, shard, zipped.fingerprints[SAMPLES]) as file:
            return [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]

    with ThreadPoolExecutor(_THREADS) as pool:
        counts = list(pool.map(rows, shards))
    table = [(shard, i, n) for shard, counted in enumerate(counts) for i, n in enumerate(counted)]
    return np.array(table, np.int64).reshape(-1, 3)
