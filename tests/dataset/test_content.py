"""Digests and states of layer files: equal for copies, others for other values; digests and hashes of keys."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import schemas
from reinforce.dataset.index import content_of, digest_keys, find_content, hash_keys, states_of
from reinforce.dataset.store import Store

LAYER, ROWS = "embeddings/red/images", 12


def write(folder: Path, order: list[int], checksums: bool, caption: str = "a") -> Store:
    """A shard of samples and vectors; of the latter, the rows in this order."""
    schema = schemas.embeddings_schema(2, 4, "float16")
    keys = pa.array([f"{n:03d}" for n in range(ROWS)])
    numbers = np.arange(ROWS * 8, dtype=np.float16).reshape(ROWS, 8)[order]
    values = pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), 8)
    vectors = pa.ExtensionArray.from_storage(schema.field("embeddings").type, values)
    options = {"compression": "none", "write_page_checksum": checksums, "row_group_size": 5}
    for layer in (LAYER, "captions/namer"):
        (folder / layer).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table([keys, vectors], schema=schema), folder / LAYER / "0.parquet", **options)
    captions = pa.table([keys, pa.array([[caption]] * ROWS)], schema=schemas.CAPTIONS_SCHEMA)
    pq.write_table(captions, folder / "captions/namer/0.parquet", **options)
    return Store(str(folder))


@pytest.mark.parametrize("checksums", [True, False])
def test_the_content_is_that_of_the_columns_alone(tmp_path: Path, checksums: bool) -> None:
    order = [*range(ROWS)]
    first = write(tmp_path / "first", order, checksums)
    again = write(tmp_path / "again", order, checksums, caption="b")
    turned = write(tmp_path / "turned", order[::-1], checksums)
    sizes = {os.path.getsize(store.layer_path(LAYER, "0")) for store in (first, turned)}
    assert len(sizes) == 1, "neither the size nor the statistics of the file show it"
    vectors = {LAYER: None}
    assert content_of(first, vectors, "0") == content_of(again, vectors, "0") != content_of(turned, vectors, "0")
    keys = {LAYER: ["key"]}
    assert content_of(first, keys, "0") == content_of(turned, keys, "0")
    both = {**vectors, "captions/namer": None}
    assert content_of(first, both, "0") != content_of(again, both, "0")
    assert find_content(first, vectors, "1") is None
    Path(turned.layer_path(LAYER, "0")).write_bytes(b"PAR1")
    assert find_content(turned, vectors, "0") is None


def test_states_differ_with_times_and_are_unknown_where_a_file_is_missing(tmp_path: Path) -> None:
    store = write(tmp_path / "some", [*range(ROWS)], True)
    layers, path = [LAYER, "captions/namer"], Path(store.layer_path(LAYER, "0"))
    [before] = states_of(store, layers, ["0"])
    assert before
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    [touched, missing] = states_of(store, layers, ["0", "1"])
    assert touched not in (before, 0)
    assert missing == 0
    shutil.rmtree(store.path("captions"))
    assert [*states_of(store, layers, ["0"])] == [0]
    assert states_of(store, [LAYER], ["0"])[0]


texts = st.lists(st.text(max_size=20) | st.sampled_from(["x" * 255, "x" * 256, "x" * 257]), max_size=8)
few = settings(max_examples=40)


@few
@given(texts)
def test_keys_have_equal_hashes_exactly_if_they_are_equal(keys: list[str]) -> None:
    every = [*keys, *(f"{key}\0" for key in keys), *keys[::-1]]
    hashes = hash_keys(pa.array(every, pa.string())).tolist()
    assert len({*hashes}) == len({*every})
    assert dict(zip(every, hashes, strict=True)) == {
        key: hash_keys(pa.array([key], pa.string())).tolist()[0] for key in every
    }


@few
@given(texts, texts, st.integers(0, 5))
def test_hashes_and_digests_are_of_the_keys_and_not_of_how_arrow_holds_them(
    first: list[str], second: list[str], start: int
) -> None:
    whole = pa.array(["before", *first], pa.string())[1:]
    parts = pa.chunked_array([whole[:start], whole[start:]])
    assert hash_keys(parts).tolist() == hash_keys(pa.array(first, pa.string())).tolist()
    digests = [digest_keys(pa.array(keys, pa.string())) for keys in (first, second, [*first, None], [*first, ""])]
    assert digest_keys(parts) == digests[0]
    assert (digests[0] == digests[1]) == (first == second)
    assert len({digests[0], *digests[2:]}) == 3
