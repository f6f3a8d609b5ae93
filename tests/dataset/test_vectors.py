import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from reinforce.dataset.vectors import decode, encode, pick
from schemas import embeddings_schema

DTYPES = ["float16", "float32", "int8"]


def unit_vectors(rows: int, count: int, dim: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, count, dim))
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def table(vectors: np.ndarray, dtype: str, valid: np.ndarray) -> pa.Table:
    keys = pa.array([str(i) for i in range(len(vectors))])
    schema = embeddings_schema(vectors.shape[1], vectors.shape[2], dtype)
    return pa.Table.from_arrays([keys, *encode(vectors, dtype, valid)], schema=schema)


def through_parquet(written: pa.Table, group: int) -> pq.ParquetFile:
    buffer = io.BytesIO()
    pq.write_table(written, buffer, row_group_size=group)
    return pq.ParquetFile(io.BytesIO(buffer.getvalue()))


@st.composite
def unit_rows(draw) -> np.ndarray:
    """Unit vectors of any shape, some with one dominant component, some zero."""
    shape = draw(st.tuples(st.integers(0, 6), st.integers(1, 3), st.integers(1, 24)))
    values = draw(arrays.arrays(np.float64, shape, elements=st.floats(-1, 1) | st.just(1e4)))
    norms = np.linalg.norm(values, axis=-1, keepdims=True)
    return (values / np.where(norms > 0, norms, 1)).astype(np.float32)


@pytest.mark.skipif(int(pa.__version__.partition(".")[0]) < 26, reason="plain pyarrow 25 does not read null rows")
@settings(max_examples=60)
@given(unit_rows(), st.sampled_from(DTYPES), st.data())
def test_vectors_and_nulls_survive_parquet(vectors, dtype, data):
    valid = data.draw(arrays.arrays(np.bool_, len(vectors)))
    written = table(np.where(valid[:, None, None], vectors, np.nan).astype(np.float32), dtype, valid)
    file = through_parquet(written, group=data.draw(st.integers(1, 7)))
    whole = decode(file.read())

    assert whole.shape == vectors.shape
    assert whole.dtype == np.float32
    assert np.isnan(whole[~valid]).all()
    assert np.array_equal(whole, decode(written), equal_nan=True)
    batches = [decode(batch) for batch in file.iter_batches(batch_size=data.draw(st.integers(1, 7)))]
    assert np.array_equal(np.concatenate([whole[:0], *batches]), whole, equal_nan=True)
    start, length = data.draw(st.tuples(st.integers(0, 6), st.integers(0, 6)))
    assert np.array_equal(decode(file.read().slice(start, length)), whole[start : start + length], equal_nan=True)

    expected, read = vectors[valid], whole[valid]
    if dtype == "float32":
        assert np.array_equal(read, expected)
    elif dtype == "float16":
        assert (np.abs(read - expected) <= np.maximum(np.abs(expected) * 2.0**-11, 2.0**-25)).all()
    else:
        peaks = np.abs(expected).max(axis=-1, keepdims=True)
        assert (np.abs(read - expected) <= peaks / 254 * (1 + 1e-4)).all()


def test_int8_rounds_half_to_even_at_a_scale_of_the_largest_component_and_keeps_cosines_above_0_9999():
    vectors = np.array([[[127, 0.5, 1.5, -2.5, -127], [0, 0, 0, 0, 0]]], np.float32)
    embeddings, scales = encode(vectors, "int8", np.array([True]))
    assert embeddings.to_numpy_ndarray().tolist() == [[[127, 0, 2, -2, -127], [0, 0, 0, 0, 0]]]
    assert scales.to_numpy_ndarray().tolist() == [[1.0, 0.0]]
    vectors = unit_vectors(200, 2, 768)
    read = decode(table(vectors, "int8", np.ones(200, bool)))
    assert ((read * vectors).sum(-1) / np.linalg.norm(read, axis=-1)).min() > 1 - 1e-4


def test_float32_is_not_copied_and_nulls_are_not_written_into_the_stored_table():
    vectors, valid = unit_vectors(5, 2, 8), np.array([True, False, True, True, True])
    (column,) = encode(vectors, "float32", np.ones(5, bool))
    assert np.shares_memory(vectors, decode(pa.table({"embeddings": column})))
    read = through_parquet(table(vectors, "float32", np.ones(5, bool)), group=5).read()
    assert np.shares_memory(decode(read), decode(read))
    written = table(vectors, "float32", valid)
    before = written["embeddings"].combine_chunks().storage.values.to_pylist()
    decode(written)
    assert written["embeddings"].combine_chunks().storage.values.to_pylist() == before


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("float16", np.nan), ("float16", 1e5), ("float32", np.inf), ("int8", np.nan), ("int8", -np.inf)],
)
def test_a_valid_row_that_is_not_finite_is_an_error_with_its_number(dtype, value):
    vectors = unit_vectors(3, 2, 4)
    vectors[1, 1, 2] = value
    with pytest.raises(ValueError, match="row 1 is not finite"):
        encode(vectors, dtype, np.ones(3, bool))
    assert np.isnan(decode(table(vectors, dtype, np.array([True, False, True])))[1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_picked_vectors_are_the_decoded_ones_at_unit_norm(dtype):
    valid = np.array([True, True, False, True, True, True])
    written = table(unit_vectors(6, 3, 16), dtype, valid)
    index = np.array([0, 2, 1, 1, 0, 2])
    for start, part in ((0, written), (2, written.slice(2, 3))):
        selected = index[start : start + len(part)]
        picked, present, unit = pick(part, selected)
        expected = decode(part)[np.arange(len(part)), selected]
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        assert present.tolist() == unit.tolist() == valid[start : start + len(part)].tolist()
        assert np.allclose(np.linalg.norm(picked[present], axis=1), 1, atol=1e-6)
        assert np.allclose(picked[present], expected[present], atol=1e-6)
