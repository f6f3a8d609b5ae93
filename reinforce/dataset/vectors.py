"""Vectors, [rows, count, dim] float32, to and from Parquet columns of the storage type, and what they predict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from reinforce.dataset.codecs.base import Codec
from reinforce.dataset.codecs.codebooks import Place, codebook_of, load
from schemas import TRUE_CAPTIONS

Floats = npt.NDArray[np.float32]

#: Largest difference of an embedding's norm from 1, in every precision, before it is stored.
NORM_TOLERANCE = 0.01


def encode(vectors: npt.NDArray[Any], dtype: str, valid: npt.NDArray[np.bool_]) -> list[pa.Array]:
    """Convert vectors to the columns ``embeddings`` and, for int8, ``scales`` of ``schemas.embeddings_schema``.

    ``vectors`` is [rows, count, dim] float32; rows where ``valid`` [rows] is False become null.
    float16 changes a component by at most max(2^-11 of its value, 2^-25). int8 is ``round(v / scale)``, half to even,
    with ``scale = max|v| / 127`` per vector: a component changes by at most half a scale, and for a unit vector
    ``1 - cosine <= dim * (max|v| / 254)^2``.
    uint8 are codes, which are stored as they are. Raises ValueError if a valid row is not finite in the storage type.
    """
    _, count, dim = vectors.shape
    if not valid.all():
        vectors = np.where(valid[:, None, None], vectors, vectors.dtype.type(0))
    if dtype == "int8":
        scales = np.abs(vectors).max(axis=2, initial=0) / np.float32(127)
        _check_finite(scales)
        divisors = np.where(scales > 0, scales, np.float32(1))[..., None]
        # The clip is for scales so small that they are subnormal numbers.
        quantized = np.rint(vectors / divisors).clip(-127, 127).astype(np.int8)
        return [tensor_column(quantized, [count, dim], valid), tensor_column(scales, [count], valid)]
    with np.errstate(over="ignore"):
        stored = vectors.astype(dtype, copy=False)
    if stored.dtype.kind == "f":
        _check_finite(stored)
    return [tensor_column(stored, [count, dim], valid)]


def encode_as(vectors: Floats, codec: Codec, place: Place | None, valid: npt.NDArray[np.bool_]) -> list[pa.Array]:
    """``encode`` prepared vectors by a codec, with the codebook at a place if it is a fitted one."""
    if place is None:
        return encode(vectors, codec.numbers, valid)
    known = np.where(valid[:, None, None], vectors, np.float32(0))
    _check_finite(known)
    return encode(load(place).encode(known), codec.numbers, valid)


def decode(data: pa.Table | pa.RecordBatch) -> Floats:
    """Convert columns of ``schemas.embeddings_schema`` to [rows, count, dim] float32; null rows are NaN.

    A read-only view, not a copy, if the column is float32 in one chunk without nulls.
    """
    embeddings, valid = tensor_rows(data.column("embeddings"))
    vectors = _decoded(data, embeddings)
    if "scales" in data.schema.names:
        vectors *= tensor_rows(data.column("scales"))[0][..., None]
    if not valid.all():
        vectors = vectors if vectors.flags.writeable else vectors.copy()
        vectors[~valid] = np.nan
    return vectors


def cosines(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Cosines [rows, count] of vectors [rows, count, dim]; 0 for those of length 0."""
    norms = np.linalg.norm(first, axis=2) * np.linalg.norm(second, axis=2)
    products: npt.NDArray[np.float32] = np.einsum("rcd,rcd->rc", first, second)
    return products / np.maximum(norms, np.finfo(np.float32).tiny)


def zero_vector(codec: Codec) -> str:
    """The detail of ``Reason.ZERO_VECTOR`` for vectors in a codec."""
    return f"the numbers of a vector that {codec.name} stores are all zero"


def normalized(values: Floats) -> Floats:
    """Vectors [..., D] at unit norm: stored in 16 or 8 bits, they are not exactly so."""
    unit: Floats = values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), np.float32(1e-12))
    return unit


def mean_cosines(texts: Floats, images: Floats) -> Floats:
    """Cosine of texts [rows, N, D] with images [rows, K, D], mean over the images -> [rows, N]."""
    cosines: Floats = np.einsum("rnd,rd->rn", normalized(texts), normalized(images).mean(axis=1))
    return cosines


def softmax(logits: Floats) -> Floats:
    """Softmax of each row of [rows, columns]."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: Floats = weights / weights.sum(axis=1, keepdims=True)
    return probabilities


def entropies(probabilities: Floats) -> Floats:
    """Entropy in nats of each row of [rows, columns] -> [rows]."""
    terms: Floats = probabilities * np.log(probabilities, out=np.zeros_like(probabilities), where=probabilities > 0)
    return -terms.sum(axis=1)


def agreements(predictions: Sequence[Floats]) -> Floats:
    """How far T predictions, [rows, columns] each, agree in each row -> [rows], from 0 to 1.

    It is 1 - their Jensen-Shannon divergence / log T.
    """
    divergence = entropies(np.mean(predictions, axis=0)) - np.mean([entropies(one) for one in predictions], axis=0)
    agreement: Floats = (1 - divergence / np.log(len(predictions))).clip(0, 1)
    return agreement


def own_slots(samples: pa.Table, count: int) -> npt.NDArray[np.bool_]:
    """Which of ``count`` vectors of true captions means are over -> [rows, count].

    A row with fewer captions has its vectors again in turn, which would count twice.
    """
    if TRUE_CAPTIONS not in samples.column_names:
        return np.ones((len(samples), count), bool)
    captions = pc.fill_null(pc.list_value_length(samples[TRUE_CAPTIONS]), 0).to_numpy()
    own: npt.NDArray[np.bool_] = np.arange(count) < np.maximum(captions, 1)[:, None]
    return own


def from_lists(column: pa.ChunkedArray, shape: Sequence[int]) -> pa.Array:
    """Convert a column of lists to a fixed_shape_tensor column of ``shape``; null rows stay null.

    The values are not copied, unless there are several chunks or nulls. Raises ValueError if a list has another length.
    """
    lists = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    offsets = lists.offsets.to_numpy()
    valid = np.asarray(lists.is_valid()) if lists.null_count else np.ones(len(lists), bool)
    width, dtype = math.prod(shape), np.dtype(lists.type.value_type.to_pandas_dtype())
    values, first = lists.values, int(offsets[0]) if len(lists) else 0
    count = width * int(valid.sum())
    wanted = width if count == width * len(lists) else np.where(valid, width, 0)
    contiguous = bool((offsets[1:] - offsets[:-1] == wanted).all())  # null lists have no values in Parquet
    if width < 1 or values.null_count or not contiguous:
        raise ValueError(f"not every vector of the column has the shape {[*shape]}")
    buffer = values.buffers()[1] if count else b""
    stored = np.frombuffer(buffer, dtype, count=count, offset=(values.offset + first) * dtype.itemsize if count else 0)
    if not lists.null_count:
        return tensor_column(stored, [*shape], valid)
    rows = np.zeros((len(lists), width), dtype)
    rows[valid] = stored.reshape(-1, width)
    return tensor_column(rows, [*shape], valid)


def pick(
    data: pa.Table | pa.RecordBatch, index: npt.NDArray[np.intp]
) -> tuple[Floats, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Select vector ``index[row]`` of every row -> float32 [rows, dim], and two masks [rows].

    The first mask has the rows that are not null; vectors of null rows are arbitrary. The second has those of unit
    norm: the others are null, NaN, infinite or zero. Only the selected vectors are decoded. They are normalised, so
    int8's scales are not needed.
    """
    stored, valid = tensor_rows(data.column("embeddings"))
    vectors = _decoded(data, stored[np.arange(len(index)), index])
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.isfinite(norms) & (norms > 0)
    return np.divide(vectors, norms, out=vectors, where=unit), valid, valid & unit[:, 0]


def _decoded(data: pa.Table | pa.RecordBatch, stored: npt.NDArray[Any]) -> Floats:
    """Stored vectors [..., width] of columns as float32, those of codes at unit norm. Raises UserError if the codebook
    was lost or has changed."""
    if stored.dtype != np.uint8:
        vectors: Floats = stored.astype(np.float32, copy=False)
        return vectors
    codebook = codebook_of(data.schema.metadata)
    if codebook is None:
        raise ValueError("a column of codes without the place of its codebook")
    return normalized(codebook.decode(stored))


def _check_finite(values: npt.NDArray[np.floating]) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        row = int(np.argwhere(~finite)[0, 0])
        raise ValueError(f"row {row} is not finite as {values.dtype}: mark it as not valid to store it as null")


def tensor_column(values: npt.NDArray[Any], shape: list[int], valid: npt.NDArray[np.bool_]) -> pa.Array:
    """Wrap [rows, *shape] as a fixed_shape_tensor column over the same memory."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    mask = None if valid.all() else pa.array(~valid)
    lists = pa.FixedSizeListArray.from_arrays(flat, math.prod(shape), mask=mask)
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(flat.type, shape), lists)


def tensor_rows(column: pa.ChunkedArray | pa.Array) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Read a fixed_shape_tensor column -> [rows, *shape], arbitrary in null rows, and a mask [rows] of valid ones."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    shape, dtype = column.type.shape, np.dtype(column.type.value_type.to_pandas_dtype())
    width = math.prod(shape)
    parts = [np.empty((0, *shape), dtype)]
    for chunk in chunks:
        # Read the buffer: `flatten` would drop null rows, and nulls among the values would make them float64.
        values = chunk.storage.values
        buffer = values.buffers()[1]
        if len(chunk) and width:
            start = (values.offset + chunk.storage.offset * width) * dtype.itemsize
            part = np.frombuffer(buffer, dtype, count=len(chunk) * width, offset=start)
            part.flags.writeable = False  # a buffer that wraps an ndarray is mutable
            parts.append(part.reshape(len(chunk), *shape))
    rows = parts[-1] if len(parts) <= 2 else np.concatenate(parts)
    return rows, np.asarray(column.is_valid())
