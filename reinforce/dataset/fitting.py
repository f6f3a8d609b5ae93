"""Fitting the codebook of a layer to vectors of the first shards, which are stored in float16 or float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from reinforce.dataset.codecs import codebooks
from reinforce.dataset.codecs.base import FittedCodec, Floats
from reinforce.dataset.files.store import Store
from reinforce.dataset.layers import Layer
from reinforce.dataset.reading.aligned import layer_errors
from reinforce.errors import UserError
from reinforce.seeds import philox_bits, seed_for

_PURPOSE = "codebook"
SHARES = 4  # shards that a sample is of at least, if there are so many


def sample(layer: Layer, finer: Store, fingerprint: str | None, shards: Sequence[str], seed: int) -> Floats:
    """Vectors [n, D] of a layer, which is stored with ``fingerprint`` in ``finer``: as many as its codebook is fitted
    to, if the ``shards`` have them, of which the first are read. With four shards, none has more than a quarter."""
    wanted, read = layer.sample, 0
    most = -(-wanted // max(1, min(SHARES, len(shards))))
    parts = [np.zeros((0, 0), np.float16)]
    for number, shard in enumerate(shards):
        if read < wanted:
            parts.append(_sample(finer, layer, fingerprint, shard, number, most, seed)[: wanted - read])
            read += len(parts[-1])
    return np.concatenate([part for part in parts if len(part)] or parts).astype(np.float32)


def fit(layer: Layer, values: Floats, target: Store, seed: int) -> str:
    """Fit the codebook of a layer to a sample, and store it in ``target`` -> its digest.

    Raises UserError if there are too few vectors, or the codec cannot store them.
    """
    codec = layer.kind.codec(layer)
    assert isinstance(codec, FittedCodec)
    key = f"teachers.{layer.model}.{layer.kind.codec_key}"
    least = codec.least(values.shape[1])
    if len(values) < least:
        raise UserError(
            f"{key}: {layer.dtype} is fitted to {least:,} vectors at least, and the sample of {layer.name} has "
            f"{len(values):,}. Increase the sample or the source, or choose a codec that needs fewer, such as "
            f"{'int8' if layer.kind.vectors else 'float16'}."
        )
    try:
        codec.dim(values.shape[1])
    except ValueError as error:
        raise UserError(f"{key}: {error}") from None
    arrays = codec.fit(codec.prepare(values), seed_for(seed, layer.name, _PURPOSE))
    return codebooks.save(
        target,
        layer.name,
        codec.name,
        layer.fingerprint,
        arrays,
        {"vectors": len(values), "seed": seed, **layer.kind.codebook_facts(layer)},
    )


def _sample(
    store: Store, layer: Layer, fingerprint: str | None, shard: str, number: int, most: int, seed: int
) -> npt.NDArray[np.float16]:
    """At most so many random vectors of a shard [n, D], in their order."""
    with layer_errors(store, layer.name, shard), store.open_layer(layer.name, shard, fingerprint) as file:
        halves = [layer.kind.vectors_to_fit(layer, file.read_row_group(n)) for n in range(file.num_row_groups)]
    every = np.concatenate([np.zeros((0, halves[0].shape[1] if halves else 1), np.float16), *halves])
    if len(every) > most:
        bits = philox_bits(seed_for(seed, str(number), _PURPOSE), len(every))
        every = every[np.sort(np.argsort(bits, kind="stable")[:most])]
    return every
