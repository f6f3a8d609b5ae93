"""Layer files that were changed after they were committed: found by size, reported, set aside, computed again."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import reinforce
from reinforce.config import parse_config
from reinforce.dataset.files.damage import find_damaged
from reinforce.dataset.files.store import Store
from reinforce.dataset.manifest.manifest import read_manifest
from reinforce.dataset.status import read_status
from reinforce.dataset.validate.validate import validate
from reinforce.engine.plan.plan import make_plan
from reinforce.errors import UserError
from reinforce.student.config import Data
from reinforce.student.data.datasets import open_datasets
from reinforce.student.data.reader import DatasetReader
from reinforce.training.order import Order
from tests.helpers.data import config_of, tree
from tests.helpers.reinforced import reinforce_here, small_dataset

IMAGES = "embeddings/red/images"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(small_dataset(tmp_path_factory.mktemp("dataset"), (9, 3)))


@pytest.fixture
def dataset(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def config(made: Path, dataset: Path) -> dict[str, object]:
    return config_of(f"{made.parent}/source/*.tar", dataset)


def file_of(dataset: Path, layer: str, number: int = 0) -> Path:
    return sorted((dataset / layer).glob("*.parquet"))[number]


def damaged(dataset: Path) -> list[str]:
    store = Store(str(dataset))
    layers = read_manifest(store)["layers"]
    found = find_damaged(
        store, {name: store.shards(name) for name in layers}, {n: e["fingerprint"] for n, e in layers.items()}
    )
    return [f"{one.layer}/{one.shard}.parquet" for one in found]


@pytest.mark.parametrize("layer", ["samples", IMAGES, "captions/namer"])
@pytest.mark.parametrize("size", [0, 7, 4000, -1])
def test_a_file_that_was_cut_is_missing_in_plan_status_open_and_training(
    made: Path, dataset: Path, layer: str, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = file_of(dataset, layer)
    name, before = f"{layer}/{path.name}", tree(dataset)
    path.write_bytes(path.read_bytes()[: min(size, path.stat().st_size - 1)])
    fix = f"reinforce drop {dataset} {layer} --shard {path.stem} --yes"

    plan = make_plan(parse_config(config(made, dataset)))
    assert [(shard.name, shard.layers) for shard in plan.pending] == [(path.stem, (layer,))]
    status = read_status(str(dataset))
    assert (status["layers"][layer]["shards"], [one.line().split(":")[0] for one in status["damaged"]]) == (1, [name])
    with caplog.at_level(logging.WARNING):
        assert len(reinforce.open(str(dataset))) == 3
    assert fix in caplog.text
    assert f"{name}: it is" in caplog.text
    for read in (
        lambda: reinforce.open(str(dataset), strict=True),
        lambda: open_datasets(Data.model_validate({"datasets": [str(dataset)]}), 0, None),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert name in str(caught.value)
        assert fix in str(caught.value)

    reinforce_here(config(made, dataset))
    assert tree(dataset) == before
    [kept] = (dataset / "set-aside" / layer).iterdir()
    assert kept.name.startswith(f"{path.stem}.")
    assert len(reinforce.open(str(dataset), strict=True)) == 12


def test_a_dataset_without_an_index_is_complete_and_empty_files_are_still_found(made: Path, dataset: Path) -> None:
    shutil.rmtree(dataset / "index")
    assert not damaged(dataset)
    assert not make_plan(parse_config(config(made, dataset))).pending
    path = file_of(dataset, IMAGES, 1)
    path.write_bytes(b"")
    assert damaged(dataset) == [f"{IMAGES}/{path.name}"]


def test_a_complete_file_of_another_size_counts_as_it_is(dataset: Path) -> None:
    path = file_of(dataset, IMAGES)
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\0" * 64 + content[4:-8])  # a footer that points elsewhere
    assert damaged(dataset) == [f"{IMAGES}/{path.name}"]
    path.write_bytes(content)
    file = pq.ParquetFile(path)
    metadata = file.schema_arrow.metadata
    table = pq.read_table(path).replace_schema_metadata({**metadata, b"reinforce.rows": b"9"})
    pq.write_table(table, path, compression="none", row_group_size=8)
    assert path.stat().st_size != len(content)
    assert not damaged(dataset)


def test_a_damaged_file_of_a_shard_outside_the_source_stays_where_it_is(made: Path, dataset: Path) -> None:
    path = file_of(dataset, IMAGES, 1)
    path.write_bytes(b"PAR1PAR1")
    one = {**config(made, dataset), "source": f"{made.parent}/source/00000.tar"}
    plan = make_plan(parse_config(one))
    assert ([file.shard for file in plan.damaged], plan.recomputed) == ([path.stem], [])
    reinforce_here(one)
    assert path.read_bytes() == b"PAR1PAR1"


@pytest.mark.parametrize("how", ["gone", "emptied"])
def test_samples_that_are_lost_are_counted_where_no_other_layer_is_read(
    made: Path, dataset: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = file_of(dataset, "samples")
    path.write_bytes(b"") if how == "emptied" else path.unlink()
    with caplog.at_level(logging.WARNING):
        assert len(reinforce.open(str(dataset), teachers=[], captioners=[])) == 3
    assert f"1 of 2 shards are read, because samples lacks 1 of 2 shards ({path.stem})" in caplog.text
    if how == "gone":
        assert read_status(str(dataset))["lost"] == f"samples lacks 1 of 2 shards ({path.stem})"
    plain = Data.model_validate({"datasets": [str(dataset)], "captioners": {}})
    with pytest.raises(UserError, match="samples lacks 1 of 2 shards" if how == "gone" else "1 file is damaged"):
        open_datasets(plain, 0, [])
    reinforce_here(config(made, dataset))
    assert len(reinforce.open(str(dataset), teachers=[], captioners=[], strict=True)) == 12
    assert read_status(str(dataset))["lost"] == ""


def test_a_shard_that_was_removed_from_all_layers_is_named_and_forgotten_by_the_next_run(
    made: Path, dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = file_of(dataset, "samples", 1).name
    for path in dataset.rglob(name):
        path.unlink()
    with pytest.raises(UserError, match="samples lacks 1 of 2 shards"):
        reinforce.open(str(dataset), strict=True)
    one = {**config(made, dataset), "source": f"{made.parent}/source/00000.tar"}
    with caplog.at_level(logging.WARNING):
        assert reinforce.run(one).run is None, "nothing is computed"
    assert f"the samples of 1 shards, such as {Path(name).stem}, were deleted" in caplog.text
    assert len(reinforce.open(str(dataset), strict=True)) == 9


def flip(path: Path, column: str) -> None:
    """Invert a byte in the middle of the first pages of a column."""
    group = pq.ParquetFile(path).metadata.row_group(0)
    leaves = (group.column(i) for i in range(group.num_columns))
    leaf = next(leaf for leaf in leaves if leaf.path_in_schema.startswith(column))
    content = bytearray(path.read_bytes())
    content[leaf.data_page_offset + leaf.total_compressed_size // 2] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize(("layer", "column"), [("samples", "image"), (IMAGES, "embeddings")])
def test_a_flipped_byte_is_named_by_every_reader_with_the_command_that_mends_it(
    dataset: Path, layer: str, column: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file_of(dataset, layer)
    flip(path, column)
    fix = f"reinforce drop {dataset} {layer} --shard {path.stem} --yes"

    def train() -> None:
        [opened] = open_datasets(Data.model_validate({"datasets": [str(dataset)]}), 0, None)
        with ThreadPoolExecutor(1) as pool:
            next(iter(DatasetReader(opened, Order(opened.groups[:, 2], 0, "d", 1, 16), 0, 0, pool)))

    for read in (lambda: list(reinforce.open(str(dataset))), train):
        with pytest.raises(UserError) as caught:
            read()
        for part in (str(path), "a page does not have its checksum", fix):
            assert part in str(caught.value)
    found = validate(str(dataset))
    assert (found.valid, len(found.errors)) == (False, 1)
    assert str(path) in found.errors[0]
    assert fix in found.errors[0]
    assert validate(str(dataset), quick=True).valid, "only the keys are read"


def test_files_without_checksums_stay_readable(dataset: Path) -> None:
    for path in [*dataset.glob("samples/*.parquet"), *dataset.glob("embeddings/**/*.parquet")]:
        table = pq.ParquetFile(path)
        with pq.ParquetWriter(path.with_suffix(".new"), table.schema_arrow, compression="none") as writer:
            for number in range(table.num_row_groups):
                writer.write_table(table.read_row_group(number))
        path.with_suffix(".new").replace(path)
    assert len(list(reinforce.open(str(dataset)))) == 12
    assert validate(str(dataset)).valid
