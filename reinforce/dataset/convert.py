"""Fitting of codebooks, and ``reinforce convert``: the vectors of a teacher in another codec, without its model.

A codebook is fitted to vectors of the first shards, which are stored in float16 or float32. Converted vectors become
the layers of a teacher of another name, with the fingerprints and the files that a run would give them. So nothing is
replaced, and the same command continues after an interruption. A run whose config has that teacher, with the same
model and codec, computes further shards.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from reinforce.dataset import vectors
from reinforce.dataset.aligned import layer_errors
from reinforce.dataset.codecs import codebooks
from reinforce.dataset.codecs.base import Codec, FittedCodec, Floats
from reinforce.dataset.codecs.codebooks import find_codec
from reinforce.dataset.index import FileEntry, IndexWriter
from reinforce.dataset.kinds.registry import stored_layer
from reinforce.dataset.layers import Layer, embeddings_layer, inputs_of, mapping_at
from reinforce.dataset.manifest import read_manifest, same_content, write_manifest
from reinforce.dataset.store import LayerWriter, Store, origin_entries, parse_footer
from reinforce.errors import UserError
from reinforce.processes.parallel import open_workers
from reinforce.settings import LAYER_NAME
from reinforce.storage import as_seen_by_workers
from reinforce.terminal import format_bytes, plural
from schemas import Reason
from schemas.seeds import philox_bits, seed_for

_PURPOSE = "codebook"
SHARES = 4  # shards that a sample is of at least, if there are so many


def sample_vectors(layer: Layer, finer: Store, fingerprint: str | None, shards: Sequence[str], seed: int) -> Floats:
    """Vectors [n, D] of a layer, which is stored with ``fingerprint`` in ``finer``: as many as its codebook is fitted
    to, if the ``shards`` have them, of which the first are read. With four shards, none has more than a quarter."""
    wanted, read = layer.sample, 0
    most = -(-wanted // max(1, min(SHARES, len(shards))))
    parts = [np.zeros((0, 0), np.float16)]
    for number, shard in enumerate(shards):
        if read >= wanted:
            break
        with layer_errors(finer, layer.name, shard), finer.open_layer(layer.name, shard, fingerprint) as file:
            halves = [layer.kind.vectors_to_fit(layer, file.read_row_group(n)) for n in range(file.num_row_groups)]
        every = np.concatenate([np.zeros((0, halves[0].shape[1] if halves else 1), np.float16), *halves])
        if len(every) > most:  # random ones, in their order
            bits = philox_bits(seed_for(seed, str(number), _PURPOSE), len(every))
            every = every[np.sort(np.argsort(bits, kind="stable")[:most])]
        parts.append(every[: wanted - read])
        read += len(parts[-1])
    return np.concatenate([part for part in parts if len(part)] or parts[-1:]).astype(np.float32)


def fit_codebook(layer: Layer, values: Floats, target: Store, seed: int) -> str:
    """Fit the codebook of a layer to a sample, and store it in ``target`` -> its digest.

    Raises UserError if there are too few vectors, or the codec cannot store them.
    """
    codec = layer.kind.codec(layer)
    assert isinstance(codec, FittedCodec)
    key = f"teachers.{layer.model}.{layer.kind.codec_key}"
    if len(values) < codec.least:
        more = "Name a larger source" if len(values) < layer.sample else f"Increase {layer.kind.sample_key}"
        raise UserError(
            f"{key}: {layer.dtype} is fitted to {codec.least:,} vectors at least, and the sample of {layer.name} has "
            f"{len(values):,}. {more}, or choose a codec that needs fewer, such as "
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
        {"vectors": len(values), "seed": seed, **codec.facts},
    )


@dataclass
class Converted:
    """Result: for each new layer the bytes of its files and of those that it is made from, and the mean cosine of the
    vectors that were encoded now."""

    bytes: dict[str, tuple[int, int]] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=dict)
    shards: int = 0

    def lines(self) -> list[str]:
        lines = [f"{plural(self.shards, 'shard')} converted"]
        for name, (after, before) in self.bytes.items():
            near = f", mean cosine {self.cosines[name]:.4f}" if name in self.cosines else ""
            lines.append(f"{name}: {format_bytes(after)} of {format_bytes(before)}{near}")
        return lines


@dataclass(frozen=True)
class _Pair:
    """A stored layer, and the layer that is made from it."""

    finer: Layer
    layer: Layer


def convert(
    url: str, teacher: str, name: str, codec: str, sample: int, *, use_ray: bool = True, address: str | None = None
) -> Converted:
    """Store all vectors of a teacher again in a codec, as those of the teacher ``name``. Raises UserError.

    ``sample`` are the vectors to which codebooks are fitted.
    """
    store, result = Store(as_seen_by_workers(url)), Converted()
    store.check_writable()
    try:
        chosen = find_codec(codec)
    except ValueError as error:
        raise UserError(f"--codec: {error}") from None
    with store.lock():
        manifest = read_manifest(store)
        pairs, after = _pairs(store, manifest, teacher, name, chosen, sample)
        if not same_content(after, manifest):
            write_manifest(store, after)
        index = IndexWriter(store, {pair.layer.name: pair.layer for pair in pairs})
        with open_workers(address, use_ray) as workers:
            workers.callback(index.flush)
            for pair in pairs:
                # The reasons of the other layer come first, so that a committed file is complete.
                there = store.shards(f"quarantine/{pair.layer.name}").names
                for shard in store.shards(f"quarantine/{pair.finer.name}").without(there):
                    _quarantine(store, pair, shard)
                cosines = 0.0
                shards = store.shards(pair.finer.name).without(store.shards(pair.layer.name).names)
                work = functools.partial(_convert_shard, as_seen_by_workers(url), pair)
                for shard, (entry, cosine) in workers.map(work, [*shards], unit="shard"):
                    index.add(shard, {pair.layer.name: entry})
                    index.flush_when_due()
                    result.shards, cosines = result.shards + 1, cosines + cosine / len(shards)
                if len(shards):
                    result.cosines[pair.layer.name] = cosines
                files = (store.shards(one.name).total_bytes for one in (pair.layer, pair.finer))
                result.bytes[pair.layer.name] = (next(files), next(files))
    return result


def _pairs(
    store: Store, manifest: Mapping[str, Any], teacher: str, name: str, codec: Codec, sample: int
) -> tuple[list[_Pair], dict[str, Any]]:
    """Each layer of a teacher with the new one, whose codebook is fitted, and dataset.json with these."""
    if teacher not in manifest["teachers"]:
        raise UserError(f"{store.url} has no teacher {teacher}; it has: {', '.join(manifest['teachers']) or 'none'}.")
    if not LAYER_NAME.fullmatch(name) or name == teacher:
        raise UserError(f"{name}: give the converted vectors another name than that of their teacher, of letters and "
                        "digits.")  # fmt: skip
    own = mapping_at(manifest, "teachers", teacher)
    known = mapping_at(manifest, "teachers", name)
    if known and known.get("model") != own.get("model"):
        raise UserError(f"{store.url} has a teacher {name} already, which is another model. Choose another name.")
    after = {**manifest, "teachers": {**manifest["teachers"], name: known or own}, "layers": dict(manifest["layers"])}
    stored = [stored_layer(layer, entry) for layer, entry in manifest["layers"].items()]
    pairs = [
        _Pair(one, _converted(store, after, one, name, codec, sample))
        for one in stored
        if one.kind.vectors and one.model == teacher
    ]
    if not pairs:
        raise UserError(f"{store.url} has no vectors of {teacher}.")
    for pair in pairs:
        layer, before = pair.layer, mapping_at(manifest, "layers", pair.layer.name)
        if before and before["fingerprint"] != layer.fingerprint:
            raise UserError(f"{store.url} has a layer {layer.name} already, of another recipe. Choose another name.")
        entry = layer.kind.entry(layer, {"dim": layer.dim})
        after["layers"][layer.name] = {"kind": layer.kind.name, "fingerprint": layer.fingerprint, **entry}
    return pairs, after


def _converted(store: Store, after: Mapping[str, Any], finer: Layer, name: str, codec: Codec, sample: int) -> Layer:
    """The layer that is made from a finer one, with its codebook."""
    if (finer.dtype != "float32" and not (finer.dtype == "float16" and codec.rounds)) or codec.name == finer.dtype:
        raise UserError(
            f"{finer.name} is stored in {finer.dtype}, from which {codec.name} cannot be made as a run makes it. From "
            "float16: float16-int8, first256, pca128, pq96, rq32 and others; from float32: all."
        )
    if finer.dim is None:
        raise UserError(f"{store.url}: dataset.json has no dimension of {finer.name}. Finish the run.")
    try:
        dim = codec.dim(finer.dim)
    except ValueError as error:
        raise UserError(f"--codec: {error}") from None
    layer = replace(
        finer, name=embeddings_layer(name, inputs_of(finer.name)), model=name, dtype=codec.name, dim=dim,
        codebook={"digest": None, "sample": sample} if codec.fitted else None,
    )  # fmt: skip
    layer = _with_fingerprint(layer, after)
    if layer.codebook is None:
        return layer
    known = mapping_at(after, "layers", layer.name, "codebook")
    digest = known.get("digest") or codebooks.stored(store, layer.name, layer.fingerprint)
    if digest is None:
        shards, seed = sorted(store.shards(finer.name)), int(after.get("seed", 0))
        found = sample_vectors(replace(layer, name=finer.name), store, finer.fingerprint, shards, seed)
        digest = fit_codebook(layer, found, store, seed)
    return _with_fingerprint(replace(layer, codebook={**layer.codebook, "digest": digest}), after)


def _with_fingerprint(layer: Layer, manifest: Mapping[str, Any]) -> Layer:
    fingerprint = layer.kind.recorded(layer, manifest).fingerprint
    if fingerprint is None:
        raise UserError(f"dataset.json does not state the model of {layer.model}, so its vectors have no fingerprint.")
    return replace(layer, fingerprint=fingerprint)


def _quarantine(
    store: Store, pair: _Pair, shard: str, groups: Sequence[Sequence[str]] = (), zeros: Sequence[str] = ()
) -> None:
    """Write the quarantine of the new layer: the rows of the other one, and the keys that are ``zeros`` in its codec.

    A run records a row group after the other; ``groups`` are their keys.
    """
    rows = []
    with contextlib.suppress(FileNotFoundError):  # no row of the other layer is null
        before = store.quarantined(pair.finer.name, shard)
        rows = [(row["key"], Reason(row["reason"]), str(row["detail"])) for row in before]
    place = {key: number for number, keys in enumerate(groups) for key in keys}
    detail = vectors.zero_vector(find_codec(pair.layer.dtype))
    rows += [(key, Reason.ZERO_VECTOR, detail) for key in zeros]
    store.quarantine(pair.layer.name, shard, sorted(rows, key=lambda row: place.get(row[0] or "", -1)))


def _convert_shard(url: str, pair: _Pair, shard: str) -> tuple[FileEntry, float]:
    """Write the file of a shard -> its entry in the index, and the mean cosine of its vectors."""
    store, finer, layer = Store(url), pair.finer, pair.layer
    codec, place, schema = find_codec(layer.dtype), layer.codebook_at(url), layer.schema("")
    cosines = [np.zeros(0, np.float32)]
    with layer_errors(store, finer.name, shard), store.open_layer(finer.name, shard, finer.fingerprint) as file:
        footer = parse_footer(file.metadata)
        groups: list[list[str]] = []
        zeros: list[str] = []
        with LayerWriter(store, layer, schema, shard, footer.get("source", "")) as writer:
            for number in range(file.num_row_groups):
                table = file.read_row_group(number)
                values = vectors.decode(table)
                valid = np.asarray(~np.isnan(values).any(axis=(1, 2)))
                prepared = codec.prepare(values)
                lengths = (prepared != 0).any(axis=2).all(axis=1)  # a zero vector has no direction
                groups.append(table["key"].to_pylist())
                zeros += table["key"].filter(pa.array(valid & ~lengths)).to_pylist()
                valid &= lengths
                columns = vectors.encode_as(prepared, codec, place, valid)
                made = pa.table([table["key"], *columns], schema=schema)
                writer.write(made)
                decoded = vectors.decode(made.replace_schema_metadata(place and place.metadata()))
                cosines.append(vectors.cosines(values[valid][..., : decoded.shape[2]], decoded[valid]).ravel())
            if zeros:
                _quarantine(store, pair, shard, groups, zeros)
            writer.commit(origin_entries(footer))
            every = np.concatenate(cosines)
            return FileEntry(writer.bytes, tuple(writer.groups)), float(every.mean()) if len(every) else 1.0
