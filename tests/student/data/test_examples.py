"""Examples from tables: what is picked, from which source, and which rows are unusable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import schemas
from reinforce.config import Limits
from reinforce.dataset import vectors
from reinforce.student.data.examples import (
    Examples,
    ExampleSpec,
    SampleFile,
    make_examples,
)

ROWS = 400
FILE = SampleFile("samples/x.parquet", Limits())
SPEC = ExampleSpec(
    image_teachers=("t",),
    text_teachers=("t",),
    captioners={"a": 3.0, "b": 1.0},
    captions="both",
    synthetic=0.5,
    pick="random",
    seed=1,
)


def tables(**nulls: set[int]) -> dict[str, pa.Table]:
    """Layers of ROWS rows with K = 2, N = 3, D = 4; ``nulls`` are rows that a layer (or ``caption``) lacks."""
    records = [
        {"crop": {"top": k, "left": 0, "height": 1, "width": 1}, "size": 8, "ops": None if k else []} for k in range(2)
    ]
    keys = [f"k{row}" for row in range(ROWS)]
    samples: dict[str, list[Any]] = {
        "key": keys,
        "caption": [None if row in nulls.get("caption", ()) else f"true {row}" for row in range(ROWS)],
        "metadata": [None] * ROWS,
        "width": [1] * ROWS,
        "height": [1] * ROWS,
        "image": [str(row).encode() for row in range(ROWS)],
        "augmentations": [records] * ROWS,
    }
    layers = {"samples": pa.Table.from_pydict(samples, schemas.samples_schema("embed"))}
    for name in "ab":
        texts = [None if row in nulls.get(name, ()) else [f"{name} {row} {n}" for n in range(3)] for row in range(ROWS)]
        layers[f"captions/{name}"] = pa.table([keys, texts], schema=schemas.captions_schema())
    for what, count in (("images", 2), ("caption", 1), ("a", 3), ("b", 3)):
        values = np.zeros((ROWS, count, 4), np.float32)
        values[:, range(count), range(count)] = 1  # vector n is the n-th unit vector
        valid = np.array([row not in nulls.get(f"t_{what}", ()) for row in range(ROWS)])
        columns = [pa.array(keys), *vectors.encode(values, "float16", valid)]
        layers[f"embeddings/t/{what}"] = pa.table(columns, schema=schemas.embeddings_schema(count, 4, "float16"))
    return layers


def examples(layers: Mapping[str, pa.Table], spec: ExampleSpec = SPEC, first: int = 0, epoch: int = 0) -> Examples:
    return make_examples(layers["samples"], layers.__getitem__, first, ROWS, FILE, spec, epoch)


def test_picks_are_uniform_and_captioners_are_picked_by_weight() -> None:
    made = [example for example in examples(tables()).rows if example]
    views = Counter(example.augmentation.crop.top for example in made)
    sources = Counter(example.texts[1][0] for example in made)
    texts = Counter(example.texts[1][-1] for example in made)
    assert views[0] / ROWS == pytest.approx(1 / 2, abs=0.1)
    assert sources["a"] / ROWS == pytest.approx(3 / 4, abs=0.1)
    assert all(texts[n] / ROWS == pytest.approx(1 / 3, abs=0.1) for n in "012")
    whole, part = examples(tables()).rows, examples(tables(), first=150).rows
    assert [str(example) for example in part] == [str(example) for example in whole[150:]], "in any chunk"


def test_an_epoch_may_have_the_same_augmentation_and_caption_of_all_samples() -> None:
    spec = replace(SPEC, pick="epoch")
    for epoch in range(4):
        made = [example for example in examples(tables(), spec, epoch=epoch).rows if example]
        assert {example.augmentation.crop.top for example in made} == {epoch % 2}
        assert {example.texts[1][-1] for example in made} == {str(epoch % 3)}
        assert {example.texts[1][0] for example in made} == {"a", "b"}, "captioners are picked at random"


def test_without_a_text_of_one_captioner_the_other_is_picked() -> None:
    made = examples(tables(a={0, 1, 2}, t_a={3, 4}))
    assert made.unusable == {}
    assert [example.texts[1][0] for example in made.rows[:5] if example] == ["b"] * 5
    rest = [(old, new) for old, new in zip(examples(tables()).rows[5:], made.rows[5:], strict=True)]
    assert all(str(old) == str(new) for old, new in rest)


def test_nan_infinite_and_zero_vectors_are_nulls_under_their_own_name() -> None:
    layers = tables(a={9}, t_b={6})
    spoil(layers, "images", {1: np.nan, 2: 0})
    spoil(layers, "caption", {2: np.nan, 3: np.inf})
    spoil(layers, "a", {5: 0, 6: np.nan})
    spoil(layers, "b", {7: np.nan, 9: 0})
    made = examples(layers)
    assert [row for row, example in enumerate(made.rows) if example is None] == [1, 2, 3, 6, 9]
    assert made.unusable == {
        "embeddings/t/images is NaN or zero": 2,
        "embeddings/t/caption is NaN or zero": 1,
        "embeddings/t/a is NaN or zero": 1,
        "embeddings/t/b is NaN or zero": 1,
    }
    assert [example.texts[1][0] for row in (5, 7) if (example := made.rows[row])] == ["b", "a"]
    found = np.stack([example.vectors for example in made.rows if example])
    assert np.allclose(np.linalg.norm(found.reshape(len(found), 3, 4), axis=2), 1)


def spoil(layers: dict[str, pa.Table], what: str, rows: Mapping[int, float]) -> None:
    """Set the vectors of some rows to a value, as another program might have stored them."""
    name = f"embeddings/t/{what}"
    table = layers[name]
    values = vectors.decode(table).copy()
    valid = np.asarray(table["embeddings"].is_valid())
    for row, value in rows.items():
        values[row] = value
    stored = np.where(valid[:, None, None], values, 0).astype(np.float16)
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(stored).storage
    nulls = pa.FixedSizeListArray.from_arrays(column.values, column.type.list_size, mask=pa.array(~valid))
    tensor = table.schema.field("embeddings").type
    layers[name] = table.set_column(1, "embeddings", pa.ExtensionArray.from_storage(tensor, nulls))


def test_unusable_rows_are_counted_by_reason() -> None:
    made = examples(tables(caption={1}, a={2, 3}, b={2}, t_b={3}, t_images={1, 4}, t_caption={5}))
    assert [row for row, example in enumerate(made.rows) if example is None] == [1, 2, 3, 4, 5]
    assert made.unusable == {
        "embeddings/t/images is null": 2,
        "no vectors of the caption": 1,
        "no synthetic caption": 1,
        "no vectors of the synthetic caption": 1,
    }
