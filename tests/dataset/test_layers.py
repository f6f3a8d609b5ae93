"""Names, sizes, schemas and fingerprints of layers."""

from __future__ import annotations

import pytest

from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import (
    Layer,
    SampleBytes,
    captions_layer,
    compute_fingerprint,
    embeddings_layer,
    reads_reinforcements,
)


def test_a_fingerprint_depends_on_content_and_not_on_order() -> None:
    assert compute_fingerprint({"seed": 0, "images": "embed"}) == compute_fingerprint({"images": "embed", "seed": 0})
    assert compute_fingerprint({"seed": 0}) != compute_fingerprint({"seed": 1})
    # If this one changes, no existing dataset can be extended any more.
    assert compute_fingerprint({"seed": 0, "images": "embed"}) == "389e7ca116e06093"


def test_names_are_paths_in_the_dataset() -> None:
    assert captions_layer("coca") == "captions/coca"
    assert embeddings_layer("dfn2b", "images") == "embeddings/dfn2b/images"


@pytest.mark.parametrize(("dtype", "size"), [("float16", 2 * 12), ("float32", 4 * 12), ("int8", 12 + 3 * 4)])
def test_a_row_of_vectors_takes_the_bytes_of_its_type(dtype: str, size: int) -> None:
    layer = Layer("embeddings/t/images", KINDS["images"], "f00d", count=3, dim=4, dtype=dtype)  # type: ignore[arg-type]
    assert layer.kind.row_bytes(layer, SampleBytes(0, 0, 0)) == size
    names = layer.schema("embed").names
    assert names == (["key", "embeddings", "scales"] if dtype == "int8" else ["key", "embeddings"])


def test_bytes_of_a_row_of_vectors_are_unknown_without_a_dimension() -> None:
    layer = Layer("embeddings/t/images", KINDS["images"], "f00d", count=3)
    assert layer.kind.row_bytes(layer, SampleBytes(0, 0, 0)) is None


def test_the_dimension_of_a_loaded_model_completes_the_schema() -> None:
    layer = Layer("embeddings/t/images", KINDS["images"], "f00d", count=3)
    assert layer.schema("embed", 5).field("embeddings").type.shape == [3, 5]


def test_samples_and_published_layers_read_the_reinforcements() -> None:
    samples, computed = Layer("samples", KINDS["samples"], "a"), Layer("captions/c", KINDS["captions"], "b")
    published = Layer("captions/p", KINDS["captions"], "c", published=True)
    assert [reads_reinforcements(layers) for layers in ([samples], [computed], [computed, published], [])] == [
        True, False, True, False,
    ]  # fmt: skip
