"""Another reinforced dataset as the source: the same samples, and none of its teachers' layers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reinforce.config import parse_config
from reinforce.dataset.store import Store
from reinforce.dataset.validate import validate
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.preflight.check_source import check_source
from reinforce.errors import UserError
from tests.helpers.data import config_of, members_of, picture, write_tar
from tests.helpers.reinforced import manifest_to_change, reinforce_here
from tests.helpers.tables import outcomes, read_table
from tests.helpers.tables import samples_config as config
from tests.helpers.tables import stored_rows as rows
from tests.helpers.views import make_view

TEACHERS = {"red": config_of("", "")["teachers"]["red"]}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets of one shard: with embedded images and a teacher, and by reference without one."""
    folder = tmp_path_factory.mktemp("first")
    write_tar(folder / "tars" / "0.tar", [*members_of(0, 5), ("broken.png", b"no image")])
    reinforce_here(config(f"{folder}/tars/0.tar", folder / "embed", teachers=TEACHERS))
    reinforce_here(config(f"{folder}/tars/0.tar", folder / "reference", images="reference"))
    return folder


def read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("images", ["embed", "reference"])
def test_the_samples_of_a_dataset_are_those_of_its_source(first: Path, tmp_path: Path, images: str) -> None:
    spec = {"images_from": str(first / "tars")} if images == "reference" else {}
    values = config(first / images, tmp_path / "out", input=spec)
    [shard] = make_plan(parse_config(values)).pending
    assert (shard.format, shard.layers) == ("dataset", ("samples",))
    sample, notes = check_source(make_plan(parse_config(values)))
    assert (sample and sample.caption, notes) == ("thing 0 of shard 0", [])
    assert rows(reinforce_here(values)) == rows(first / "embed")
    assert not Store(str(tmp_path / "out")).shards("quarantine/samples")
    other = reinforce_here({**values, "augmentations": {"count": 1}, "output": f"{tmp_path}/1"})
    assert rows(other) != rows(first / "embed")


@pytest.fixture
def viewed(first: Path, tmp_path: Path) -> Path:
    """A copy of the datasets of which the view ``some`` keeps two samples."""
    shutil.copytree(first, tmp_path / "first")
    for images in ("embed", "reference"):
        make_view(tmp_path / "first" / images, "key IN ('00000001', '00000003')")
    return tmp_path / "first"


@pytest.mark.parametrize("images", ["embed", "reference"])
def test_of_a_view_its_samples_are_read_and_dataset_json_records_it(first: Path, viewed: Path, images: str) -> None:
    spec = {"view": "some", **({"images_from": str(first / "tars")} if images == "reference" else {})}
    values = config(viewed / images, viewed / "out", input=spec)
    sample, notes = check_source(make_plan(parse_config(values)))
    assert (sample and sample.raw.key, notes) == ("00000001", [])
    kept = [row for row in rows(first / "embed") if row["key"] in ("00000001", "00000003")]
    assert rows(reinforce_here(values)) == kept
    recorded = read_json(viewed / "out/dataset.json")["input"]["view"]
    assert recorded == f"some@{read_json(viewed / images / 'views/some/view.json')['fingerprint']}"
    assert not make_plan(parse_config({**values, "input": {**spec, "view": recorded}})).pending
    found = validate(f"{viewed}/out", [str(viewed)], count=True)
    assert (found.valid, found.counted) == (True, 0), "the samples that are left out are not missed"


def test_a_view_of_a_source_that_was_made_again_is_refused_with_what_differs(viewed: Path) -> None:
    values = config(viewed / "embed", viewed / "out", input={"view": "some"})
    reinforce_here(values)
    before = read_json(viewed / "embed/views/some/view.json")["fingerprint"]
    now = make_view(viewed / "embed", "key = '00000002'").fingerprint
    for view, message in [
        ("some", f'input.view: "some@{before}" in the dataset, "some@{now}" in this config'),
        (f"some@{before}", f"view some of {viewed}/embed was made again: it has fingerprint {now} now"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            make_plan(parse_config({**values, "input": {"view": view}}))
    manifest = viewed / "embed" / "dataset.json"
    fingerprint = read_json(manifest)["layers"]["samples"]["fingerprint"]
    manifest.write_text(json.dumps(manifest_to_change(manifest.parent)).replace(fingerprint, "0" * 16))
    message = f"samples has changed since view some was made ({fingerprint} then, {'0' * 16} now). Make it again"
    with pytest.raises(UserError, match=re.escape(message)):
        make_plan(parse_config({**values, "output": f"{viewed}/other"}))


def test_a_view_of_another_source_or_of_other_rows_is_one_error(viewed: Path) -> None:
    for source, found in [
        (f"{viewed}/tars/0.tar", f"source has {viewed}/tars/0.tar."),
        ([f"{viewed}/embed", f"{viewed}/reference"], f"source has {viewed}/embed and 1 more."),
    ]:
        with pytest.raises(UserError, match=re.escape(f"input.view: a view is of one reinforced dataset, and {found}")):
            make_plan(parse_config({**config("", viewed / "out"), "source": source, "input": {"view": "some"}}))
    with pytest.raises(UserError, match="has no view 'best'; it has: some"):
        make_plan(parse_config(config(viewed / "embed", viewed / "out", input={"view": "best"})))
    with pytest.raises(UserError, match=r"input\.view"):
        parse_config(config(viewed / "embed", viewed / "out", input={"view": "../some"}))
    values = config(viewed / "embed", viewed / "out", input={"view": "some"})
    [path] = (viewed / "embed" / "views" / "some").glob("rows-*/*")
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)

    def refused(output: str) -> str:
        store = Store(reinforce_here({**values, "output": f"{viewed}/{output}"}))
        [row] = store.quarantined("samples", next(iter(store.shards("quarantine/samples"))))
        assert row["reason"] == "shard_unreadable"
        return str(row["detail"])

    assert "does not have the digest that the view states" in refused("out")


def test_references_are_read_only_from_folders_that_are_named(first: Path, tmp_path: Path) -> None:
    values = config(first / "reference", tmp_path / "out")
    with pytest.raises(UserError, match=r"stores its images by reference\. Name the folders .* in input\.images_from"):
        make_plan(parse_config(values))
    [path] = (first / "reference" / "samples").iterdir()
    found = read_table(path, "dataset", images_from=["/elsewhere"])
    assert {item.reason.value for item in found} == {"image_place"}  # type: ignore[union-attr]
    assert f'add input.images_from: ["{first}/tars"]' in found[0].detail  # type: ignore[union-attr]


def test_a_replaced_or_missing_tar_costs_the_rows_whose_images_are_not_there(first: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", members_of(0, 5))
    reinforce_here(config(f"{tmp_path}/0.tar", tmp_path / "out", images="reference"))
    [path] = (tmp_path / "out" / "samples").iterdir()
    data = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(
        data.replace(picture(1), picture(1)[:-9] + bytes(9))[: data.index(picture(3)) + 100]
    )
    found = outcomes(read_table(path, "dataset", images_from=str(tmp_path)))
    assert [value.partition(":")[0] for value in found.values()] == [
        "thing 0 of shard 0", "image_broken", "thing 2 of shard 0", "image_missing", "image_missing",
    ]  # fmt: skip
    (tmp_path / "0.tar").unlink()
    found = outcomes(read_table(path, "dataset", images_from=str(tmp_path)))
    assert {value.partition(":")[0] for value in found.values()} == {"image_missing"}


def test_a_dataset_that_cannot_be_read_is_one_error(first: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is the output of this run, too"):
        make_plan(parse_config(config(first / "embed", first / "embed")))
    with pytest.raises(UserError, match=r"is not a reinforced dataset: it has no dataset\.json"):
        make_plan(parse_config(config(first / "tars", tmp_path / "out", input={"format": "dataset"})))
    with pytest.raises(UserError, match=r"images: reference needs files .* is a reinforced dataset; set images: embed"):
        make_plan(parse_config(config(first / "embed", tmp_path / "out", images="reference")))
    pq.write_table(
        pa.table({"key": [1], "caption": ["a"], "metadata": ["{}"], "image": [b"x"]}), tmp_path / "x.parquet"
    )
    [refusal] = read_table(tmp_path / "x.parquet", "dataset")
    assert refusal.detail.endswith("cannot be used: it does not have the columns of a samples layer")  # type: ignore[union-attr]
