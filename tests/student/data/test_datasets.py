"""Opening the datasets of a training: what is missing, damaged or does not fit is named, with the fix."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reinforce.dataset.augment import fixed_point
from reinforce.dataset.augment.backends import load_backend
from reinforce.dataset.files.store import Store
from reinforce.errors import UserError
from reinforce.student.config import Data
from reinforce.student.data.feed import StudentFeed
from schemas import Reason
from tests.helpers.in_loaders import letters
from tests.helpers.reinforced import small_dataset


@pytest.fixture
def dataset(labelled: str, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(labelled, tmp_path / "copy"))


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


def test_unknown_names_and_layers_are_reported_with_the_known_ones(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a reinforced dataset"):
        open_(tmp_path)
    with pytest.raises(UserError, match=r"has no teacher 'rde'; it has: red, blue"):
        open_(dataset, teachers=["rde"])
    with pytest.raises(UserError, match=r"has no captioner 'cocoa'; it has: namer"):
        open_(dataset, captioners={"cocoa": 1.0})
    with pytest.raises(UserError, match=r"has no captioner 'syn_\*'; it has: namer"):
        open_(dataset, captioners=["syn_*"])
    for pattern in ({"n*": 2.0}, {"n*": 3.0, "namer": 2.0}):
        assert open_(dataset, captioners=pattern).data["data.captioners.namer"] == 2.0
    manifest = json.loads((dataset / "dataset.json").read_text())
    del manifest["layers"]["embeddings/red/namer"]
    (dataset / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"no layer embeddings/red/namer\. Run a config with both models"):
        open_(dataset)
    assert open_(dataset, captioners=[]).samples == 44


def test_a_layer_that_lacks_shards_is_named_with_the_command_that_makes_them(dataset: Path) -> None:
    lost = file_of(dataset, "embeddings/blue/images", 1)
    lost.unlink()
    with pytest.raises(UserError, match=rf"embeddings/blue/images lacks 1 of 3 shards \({lost.stem}\).*reinforce run"):
        open_(dataset)
    assert open_(dataset, teachers=["red"]).samples == 44
    file_of(dataset, "embeddings/red/images", 2).unlink()
    with pytest.raises(UserError, match=r"embeddings/red/images lacks 1 of 3 .*; embeddings/blue/images lacks 1 of 3"):
        open_(dataset)


def test_quarantined_shards_are_left_out_with_a_warning(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    lost = file_of(dataset, "captions/namer", 1).stem
    for layer in ("captions/namer", "embeddings/red/namer", "embeddings/blue/namer"):
        file_of(dataset, layer, 1).unlink()
    Store(str(dataset)).quarantine("captions/namer", lost, [(None, Reason.SHARD_FAILED, "the captioner raised")])
    with caplog.at_level(logging.WARNING, "reinforce"):
        assert open_(dataset).samples == 35
    assert [record.message for record in caplog.records] == [
        f"{dataset}: 1 shard is left out because it is quarantined in a layer"
    ]


def test_a_truncated_file_and_one_with_another_fingerprint_or_other_keys_are_named(dataset: Path) -> None:
    path = file_of(dataset, "embeddings/red/caption")
    whole = path.read_bytes()
    rewrite(
        path, lambda table: table.set_column(0, table.schema.field(0), pa.array(reversed(table["key"].to_pylist())))
    )
    with pytest.raises(UserError, match=rf"embeddings/red/caption/{path.name} does not have the keys of samples"):
        open_(dataset)
    path.write_bytes(whole)
    for layer in ("samples", "captions/namer", "embeddings/red/images"):
        path = file_of(dataset, layer, 1)
        whole = path.read_bytes()
        rewrite(path, lambda table: table, fingerprint="0123456789abcdef")
        with pytest.raises(UserError, match=rf"{path} has fingerprint 0123456789abcdef"):
            open_(dataset)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(UserError, match=rf"{layer}/{path.name}: it is not a .* reinforce drop {dataset} {layer} "):
            open_(dataset)
        path.write_bytes(whole)


def test_datasets_that_give_different_examples_are_refused(labelled: str, tmp_path: Path) -> None:
    other = small_dataset(tmp_path, (5,), captioners={})
    with pytest.raises(UserError, match=r"give different examples: .* caption and synthetic .*share under `data`"):
        open_([labelled, other])
    assert open_([labelled, other], captioners=[]).samples == 49


def set_policy(dataset: Path, **policies: str) -> None:
    manifest = json.loads((dataset / "dataset.json").read_text())
    manifest["policies"] |= policies
    (dataset / "dataset.json").write_text(json.dumps(manifest))


def test_policies_that_cannot_be_replayed_are_reported_when_the_dataset_is_opened(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_policy(dataset, augmentation="fixed-point-1")
    monkeypatch.setattr(fixed_point, "RESIZERS", {})
    load_backend.cache_clear()
    with pytest.raises(UserError, match="fixed-point-1: no installed package"):
        open_(dataset)
    set_policy(dataset, image="datacomp-1")
    with pytest.raises(UserError, match=r"image policy datacomp-1, this version supports"):
        open_(dataset)


def test_references_outside_named_folders_are_reported_before_the_first_step_with_the_key(tmp_path: Path) -> None:
    url = small_dataset(tmp_path, (8,), images="reference")
    for data in ({}, {"images_from": f"{tmp_path}/other"}):
        with pytest.raises(UserError, match=rf'add data\.images_from: \["{tmp_path}/source"\]'):
            open_(url, **data)
    assert open_(url, images_from=[f"{tmp_path}/other", f"{tmp_path}/source"]).samples == 8
