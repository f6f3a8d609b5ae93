"""Datasets of a training and what they lack, examples from their tables, and pixels, tokens and vectors in buffers."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import schemas
from reinforce.dataset import vectors
from reinforce.dataset.store import Store
from reinforce.errors import UserError
from reinforce.images import backends as fixed_point
from reinforce.images.backends import load_backend
from reinforce.images.device import augment
from reinforce.images.records import Augmentation, Crop, Op
from reinforce.source.config import Limits
from reinforce.student.config import Data
from reinforce.student.data.examples import Example, ExampleSpec, ReplayedExamples, SampleFile, make_examples
from reinforce.student.data.feed import BufferPool, StudentFeed
from reinforce.student.data.stream import PartMaker, TargetShape
from schemas import Reason
from tests.helpers.data import picture
from tests.helpers.evaluation import encode_png
from tests.helpers.in_loaders import letters
from tests.helpers.reinforced import manifest_to_change, small_dataset

ROWS = 400
FILE = SampleFile("samples/x.parquet", Limits())
SPEC = ExampleSpec(
    crops=("embeddings/t/images",),
    texts=("t",),
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
        layers[f"captions/{name}"] = pa.table([keys, texts], schema=schemas.CAPTIONS_SCHEMA)
    for what, count in (("images", 2), ("caption", 1), ("a", 3), ("b", 3)):
        values = np.zeros((ROWS, count, 4), np.float32)
        values[:, range(count), range(count)] = 1  # vector n is the n-th unit vector
        valid = np.array([row not in nulls.get(f"t_{what}", ()) for row in range(ROWS)])
        columns = [pa.array(keys), *vectors.encode(values, "float16", valid)]
        layers[f"embeddings/t/{what}"] = pa.table(columns, schema=schemas.embeddings_schema(count, 4, "float16"))
    return layers


def examples(
    layers: Mapping[str, pa.Table], spec: ExampleSpec = SPEC, first: int = 0, epoch: int = 0
) -> ReplayedExamples:
    return make_examples(layers["samples"], layers.__getitem__, slice(first, ROWS), FILE, spec, epoch)


def test_picks_are_uniform_and_captioners_are_picked_by_weight() -> None:
    made = [example for example in examples(tables()).rows if example]
    crops = Counter(example.augmentation.crop.top for example in made)
    sources = Counter(example.texts[1][0] for example in made)
    texts = Counter(example.texts[1][-1] for example in made)
    assert crops[0] / ROWS == pytest.approx(1 / 2, abs=0.1)
    assert sources["a"] / ROWS == pytest.approx(3 / 4, abs=0.1)
    assert all(texts[n] / ROWS == pytest.approx(1 / 3, abs=0.1) for n in "012")
    mixed = examples(tables(), replace(SPEC, captions="mixed", synthetic=0.25)).rows
    picked = Counter(example.texts[0][0] for example in mixed if example)
    assert picked["t"] / ROWS == pytest.approx(3 / 4, abs=0.1), "the true caption"
    assert picked["a"] / (picked["a"] + picked["b"]) == pytest.approx(3 / 4, abs=0.1)
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
    found = np.stack([example.targets for example in made.rows if example])
    assert found.shape[1:] == (3, 4)
    assert np.allclose(np.linalg.norm(found, axis=2), 1)


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


TARGETS = (TargetShape("t", "image", "float32", (5,)),)
CROP = Augmentation(Crop(top=2, left=3, height=20, width=24), 16, None)


def example(number: int) -> Example:
    targets = (np.full(5, number, np.float32),)
    return Example(FILE, f"k{number}", picture(number), CROP, (f"true {number}", f"synthetic {number}"), targets)


def test_an_image_that_is_not_the_augmented_one_or_has_a_damaged_record_is_named() -> None:
    ops = (Op("Posterize", 9.0), Op("Melt", 1.0), Op("Rotate", float("nan")))
    for device, damaged in (
        (False, example(0)._replace(image=b"not an image")),
        (False, example(0)._replace(image=picture(0, width=8, height=6))),
        *((True, example(0)._replace(augmentation=Augmentation(CROP.crop, 16, (op,)))) for op in ops),
    ):
        maker = PartMaker(12, TARGETS, letters, device=device)
        with pytest.raises(UserError, match=r"samples/x\.parquet, key k0: this is not the image that was augmented"):
            maker.make([damaged], maker.allocate(1), Counter())


def test_an_image_above_the_limits_of_its_dataset_is_named_with_the_limit_and_is_not_called_changed() -> None:
    strict = example(0)._replace(file=FILE._replace(limits=Limits(pixels=100)))
    maker = PartMaker(12, TARGETS, letters)
    with pytest.raises(
        UserError, match=r"x\.parquet, key k0: \d+x\d+ pixels, above limits\.pixels of 100\. .*data\.limits"
    ):
        maker.make([strict], maker.allocate(1), Counter())


def test_translations_are_scaled_or_shift_by_the_stored_pixels() -> None:
    """The crop is white; a translation to the right leaves black columns of its own width."""
    image = np.full((20, 24, 3), 255, np.uint8)
    record = Augmentation(Crop(0, 0, 20, 24), 16, (Op("TranslateX", 4.9), Op("TranslateY", -3.0)))
    white = example(0)._replace(image=encode_png(image), augmentation=record)

    def shifts(size: int, **options: Any) -> list[int]:
        maker = PartMaker(size, TARGETS, letters, **options)
        part = maker.make([white], maker.allocate(1), Counter())
        assert part.buffers is not None
        buffers = [part.buffers.image, part.buffers.crop] if maker.sides[1] else [part.buffers.image]
        black = [(pixels[0] == 0).all(dim=-1) for pixels in buffers]
        return [int(side.sum()) for mask in black for side in (mask.all(dim=0), mask.all(dim=1))]

    assert shifts(16) == shifts(16, scaled=False) == [4, 3]
    assert shifts(32) == [9, 6]
    assert shifts(32, scaled=False) == [4, 3]
    assert shifts(32, scaled=False, crop=48) == [4, 3, 14, 9], "teachers in the loop see what a stored one would"


def test_an_image_that_is_augmented_on_the_device_has_the_pixels_of_the_default_backend() -> None:
    """Also at another size, where translations are scaled or not; a crop without room in a cell is resized here."""
    records = [
        Augmentation(Crop(2, 3, 20, 24), 16, (Op("TranslateX", 4.9), Op("Equalize", 0.0))),
        Augmentation(Crop(0, 1, 40, 39), 16, (Op("Rotate", -9.0),)),
        Augmentation(Crop(2, 3, 7, 40), 16, None),
    ]
    examples = [example(n)._replace(augmentation=r, image=picture(n, 48, 40)) for n, r in enumerate(records)]

    def images(size: int, scaled: bool, device: bool) -> torch.Tensor:
        maker = PartMaker(size, TARGETS, letters, scaled=scaled, device=device)
        part = maker.make(examples, maker.allocate(3), Counter())
        assert part.buffers is not None
        return augment(part.buffers.image, part.records, size) if device else part.buffers.image

    for size, scaled in ((16, True), (12, True), (12, False)):
        found, expected = (images(size, scaled, device).int() for device in (True, False))
        assert (found - expected).abs().max() <= 1
        assert (found != expected).float().mean() < 0.01


def test_memory_is_reused_only_when_nothing_references_it() -> None:
    pool = BufferPool()
    batch = torch.from_numpy(pool.array((4, 2)))
    place, part = batch.data_ptr(), batch[1:3]
    assert torch.from_numpy(pool.array((4, 2))).data_ptr() != place
    del batch
    assert torch.from_numpy(pool.array((4, 2))).data_ptr() != place, "a part of it is still referenced"
    del part
    assert torch.from_numpy(pool.array((2, 4))).data_ptr() != place
    places = {torch.from_numpy(pool.array((4, 2))).data_ptr() for _ in range(9)}
    assert len(places) <= 2, "one after the other, they alternate between the free arrays"
    held = [torch.from_numpy(pool.array((4, 2))) for _ in range(3)]
    assert place in {tensor.data_ptr() for tensor in held}
    assert len({tensor.data_ptr() for tensor in held}) == 3


def open_(dataset: Path | str | list[Any], **data: Any) -> StudentFeed:
    urls = dataset if isinstance(dataset, list) else str(dataset)
    return StudentFeed(Data.model_validate({"datasets": urls, "workers": 0, **data}), 0, 16, letters)


def file_of(dataset: Path, layer: str, number: int = 0) -> Path:
    return sorted((dataset / layer).glob("*.parquet"))[number]


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table], fingerprint: str | None = None) -> None:
    """Rewrite a file with the same row groups and footer and other content."""
    old = pq.ParquetFile(path)
    tables = [change(old.read_row_group(i)) for i in range(old.num_row_groups)]
    metadata = dict(tables[0].schema.metadata)
    if fingerprint:
        metadata[b"reinforce.fingerprint"] = fingerprint.encode()
    with pq.ParquetWriter(path, tables[0].schema.with_metadata(metadata)) as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(metadata))


def test_unknown_names_and_layers_are_reported_with_the_known_ones(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a reinforced dataset"):
        open_(tmp_path)
    with pytest.raises(UserError, match=r"has no teacher 'rde'; it has: red, blue"):
        open_(copy, teachers=["rde"])
    with pytest.raises(UserError, match=r"has no captioner 'cocoa'; it has: namer"):
        open_(copy, captioners={"cocoa": 1.0})
    with pytest.raises(UserError, match=r"has no captioner 'syn_\*'; it has: namer"):
        open_(copy, captioners=["syn_*"])
    for pattern in ({"n*": 2.0}, {"n*": 3.0, "namer": 2.0}):
        assert open_(copy, captioners=pattern).data["data.captioners.namer"] == 2.0
    manifest = manifest_to_change(copy)
    del manifest["layers"]["embeddings/red/namer"]
    (copy / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"no layer embeddings/red/namer\. Run a config with both models"):
        open_(copy)
    assert open_(copy, captioners=[]).samples == 44


def test_a_layer_that_lacks_shards_is_named_with_the_command_that_makes_them(copy: Path) -> None:
    lost = file_of(copy, "embeddings/blue/images", 1)
    lost.unlink()
    with pytest.raises(UserError, match=rf"embeddings/blue/images lacks 1 of 3 shards \({lost.stem}\).*reinforce run"):
        open_(copy)
    assert open_(copy, teachers=["red"]).samples == 44
    file_of(copy, "embeddings/red/images", 2).unlink()
    with pytest.raises(UserError, match=r"embeddings/red/images lacks 1 of 3 .*; embeddings/blue/images lacks 1 of 3"):
        open_(copy)


def test_quarantined_shards_are_left_out_with_a_warning(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    lost = file_of(copy, "captions/namer", 1).stem
    for layer in ("captions/namer", "embeddings/red/namer", "embeddings/blue/namer"):
        file_of(copy, layer, 1).unlink()
    Store(str(copy)).quarantine("captions/namer", lost, [(None, Reason.SHARD_FAILED, "the captioner raised")])
    with caplog.at_level(logging.WARNING, "reinforce"):
        assert open_(copy).samples == 35
    assert [record.message for record in caplog.records] == [
        f"{copy}: 1 shard is left out because it is quarantined in a layer"
    ]


def test_a_truncated_file_and_one_with_another_fingerprint_or_other_keys_are_named(copy: Path) -> None:
    path = file_of(copy, "embeddings/red/caption")
    whole = path.read_bytes()
    rewrite(
        path, lambda table: table.set_column(0, table.schema.field(0), pa.array(reversed(table["key"].to_pylist())))
    )
    with pytest.raises(UserError, match=rf"embeddings/red/caption/{path.name} does not have the keys of samples"):
        open_(copy)
    path.write_bytes(whole)
    for layer in ("samples", "captions/namer", "embeddings/red/images"):
        path = file_of(copy, layer, 1)
        whole = path.read_bytes()
        rewrite(path, lambda table: table, fingerprint="0123456789abcdef")
        with pytest.raises(UserError, match=rf"{path} has fingerprint 0123456789abcdef"):
            open_(copy)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(UserError, match=rf"{layer}/{path.name}: it is not a .* reinforce drop {copy} {layer} "):
            open_(copy)
        path.write_bytes(whole)


def test_datasets_that_give_different_examples_are_refused(labelled: str, tmp_path: Path) -> None:
    other = small_dataset(tmp_path, (5,), captioners={})
    with pytest.raises(UserError, match=r"give different examples: .* caption and synthetic .*share under `data`"):
        open_([labelled, other])
    assert open_([labelled, other], captioners=[]).samples == 49


def set_policy(dataset: Path, **policies: str) -> None:
    manifest = manifest_to_change(dataset)
    manifest["policies"] |= policies
    (dataset / "dataset.json").write_text(json.dumps(manifest))


def test_policies_that_cannot_be_replayed_are_reported_when_the_dataset_is_opened(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_policy(copy, augmentation="fixed-point-1")
    monkeypatch.setattr(fixed_point, "RESIZERS", {})
    load_backend.cache_clear()
    with pytest.raises(UserError, match="fixed-point-1: no installed package"):
        open_(copy)
    set_policy(copy, image="datacomp-1")
    with pytest.raises(UserError, match=r"image policy datacomp-1, this version supports"):
        open_(copy)


def test_references_outside_named_folders_are_reported_before_the_first_step_with_the_key(tmp_path: Path) -> None:
    url = small_dataset(tmp_path, (8,), images="reference")
    for data in ({}, {"images_from": f"{tmp_path}/other"}):
        with pytest.raises(UserError, match=rf'add data\.images_from: \["{tmp_path}/source"\]'):
            open_(url, **data)
    assert open_(url, images_from=[f"{tmp_path}/other", f"{tmp_path}/source"]).samples == 8
