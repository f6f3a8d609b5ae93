"""`reinforce diff` names what differs between two datasets in rows of one image, whatever their shards are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from reinforce.labels.difference import DatasetDiff, diff
from reinforce.publishing.labels import export_labels
from tests.helpers.commands import run_command
from tests.helpers.data import config_of, members_of, picture, tree, write_tar
from tests.helpers.reinforced import manifest_to_change, reinforce_here, rewrite

SIZES = (9, 4)


def config(source: Path, output: Path) -> dict[str, Any]:
    return config_of(f"{source}/*.tar", output, scores={"size": {"facts": ["width"]}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, and one of its samples in another order in other shards, without the last one and with a new one."""
    folder = tmp_path_factory.mktemp("diff")
    members = [members_of(number, size) for number, size in enumerate(SIZES)]
    for number, of_shard in enumerate(members):
        write_tar(folder / "source" / f"{number}.tar", of_shard)
    mixed = [member for of_shard in reversed(members) for member in of_shard][:-3]
    new = [("new.png", picture(77)), ("new.json", json.dumps({"uid": "new"}).encode())]
    write_tar(folder / "mixed" / "all.tar", mixed + new)
    for name in ("source", "mixed"):
        reinforce_here(config(folder / name, folder / f"{name}-dataset"))
    return folder


def compare(first: Path, second: Path, **options: Any) -> DatasetDiff:
    return diff(str(first), str(second), use_ray=False, **options)


def change(dataset: Path, layer: str, column: str, value: Any) -> None:
    """Replace a column of the first row of a layer's first shard."""

    def changed(table: pa.Table) -> pa.Table:
        values = table[column].combine_chunks()
        others = value(values) if callable(value) else pa.concat_arrays([pa.array([value], values.type), values[1:]])
        at = table.schema.get_field_index(column)
        return table.set_column(at, table.schema.field(at), others)

    rewrite(min((dataset / layer).glob("*.parquet")), changed)


def test_a_dataset_and_its_labels_are_equal(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dataset = folder / "source-dataset"
    export_labels(str(dataset), str(tmp_path / "labels"), use_ray=False)
    code, out, _ = run_command(capfd, "diff", str(dataset), str(tmp_path / "labels"), "--no-ray")
    assert (code, out.splitlines()[-1]) == (0, "equal")
    assert "of one image: 13 by key in shards of one name" in out
    for part in ("captions/namer", "samples: augmentations", "scores/size", "embeddings/red/namer"):
        assert f"{part} " in out


def test_rows_in_other_shards_are_matched_by_identity(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = tree(folder / "mixed-dataset", layers_only=False)
    found = compare(folder / "source-dataset", folder / "mixed-dataset")
    assert tree(folder / "mixed-dataset", layers_only=False) == before  # no index is left
    assert (found.rows, found.unmatched, dict(found.matched)) == ((13, 13), (1, 1), {"uid": 12, "absent": 1})
    assert all((one.rows, one.equal) == (12, 12) for one in found.layers.values())
    assert not found.equal
    code, out, _ = run_command(capfd, "diff", f"{folder}/mixed-dataset", f"{folder}/source-dataset", "--json")
    document = json.loads(out)
    assert (code, document["equal"], document["matched"]) == (1, False, {"uid": 12, "absent": 1})
    assert document["layers"]["embeddings/red/images"]["mean_cosine"] == 1


def test_what_differs_is_named(folder: Path, tmp_path: Path) -> None:
    dataset = folder / "source-dataset"
    other = Path(shutil.copytree(dataset, tmp_path / "other"))
    change(other, "samples", "caption", "another")
    change(other, "scores/size", "scores", {"width": 140.0})
    turned = np.zeros((1, 16), np.float16)
    turned[0, [0, 8]] = 1
    change(
        other,
        "embeddings/red/images",
        "embeddings",
        lambda column: pa.ExtensionArray.from_storage(
            column.type, pa.concat_arrays([pa.array([turned[0].tolist()], column.storage.type), column.storage[1:]])
        ),
    )
    change(other, "captions/namer", "captions", None)
    shutil.rmtree(other / "embeddings/blue")
    manifest = manifest_to_change(other)
    manifest["layers"] = {name: one for name, one in manifest["layers"].items() if "blue" not in name}
    (other / "dataset.json").write_text(json.dumps(manifest))
    found = compare(dataset, other)
    different = {name: (one.rows - one.equal, one.nulls) for name, one in found.layers.items() if one.equal < one.rows}
    assert different == {
        "samples: captions": (1, 0), "captions/namer": (1, 1), "embeddings/red/images": (1, 0), "scores/size": (1, 0),
    }  # fmt: skip
    assert found.layers["scores/size"].difference == 100
    vectors = found.layers["embeddings/red/images"]
    assert -1 <= vectors.cosine < vectors.mean_cosine < 1
    assert found.only_first == [f"embeddings/blue/{name}" for name in ("caption", "images", "namer")]
    loose = compare(dataset, other, layers=["embeddings/red"], min_cosine=-1.0)
    assert loose.layers["embeddings/red/images"].equal == 13


def test_another_image_under_one_key_is_no_match(folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(folder / "source", tmp_path / "source"))
    members = members_of(0, SIZES[0])
    members[2] = (members[2][0], json.dumps({"uid": "truck", "url": "https://example.org/truck"}).encode())
    write_tar(source / "0.tar", members)
    reinforce_here({**config(source, tmp_path / "out"), "moved": {str(source): str(folder / "source")}})
    found = compare(folder / "source-dataset", tmp_path / "out", layers=["captions"])
    assert (dict(found.matched), found.unmatched) == ({"key": 12, "other_image": 1}, (1, 1))


def unstated(folder: Path, shards: int, images: str = "embed", **stated: Any) -> Path:
    """A dataset of eight images of which nothing is stated, or the uids that ``stated`` has by number."""
    for shard in range(shards):
        members = []
        for number in range(8)[shard::shards]:
            members.append((f"{shards}-{number}.png", picture(number)))
            if number in stated.get("uids", {}):
                members.append((f"{shards}-{number}.json", json.dumps({"uid": stated["uids"][number]}).encode()))
        write_tar(folder / f"{shards}-source" / f"{shards}-{shard}.tar", members)
    source = f"{folder}/{shards}-source/*.tar"
    return Path(reinforce_here(config_of(source, folder / f"{shards}-out", images=images, teachers={})))


@pytest.mark.parametrize("images", ["embed", "reference"])
@pytest.mark.parametrize("labels", [False, True])
def test_equal_images_of_which_nothing_is_stated_are_matched_by_digest(
    tmp_path: Path, images: str, labels: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = unstated(tmp_path, 1, images), unstated(tmp_path, 2)
    if labels:
        second = Path(export_labels(str(second), str(tmp_path / "labels"), use_ray=False).output)
    for one, other in ((first, second), (second, first)):
        found = compare(one, other)
        assert (dict(found.matched), found.unmatched) == ({"digest": 8}, (0, 0))
        assert not any("without uid" in line for line in found.lines())
    write_tar(tmp_path / "1-source" / "1-1.tar", [("new.png", picture(100))])
    unstated(tmp_path, 1, images)
    code, out, _ = run_command(capfd, "diff", str(first), str(second), "--no-ray")
    assert code == 1
    assert "only in A: 1 sample\n" in out
    assert "in A, without uid, SHA-256 and URL: 1 sample; only the digest joins these" in out


def test_sides_without_common_identities_are_not_different(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first, second = unstated(tmp_path, 1), unstated(tmp_path, 2, uids={number: f"uid{number}" for number in range(8)})
    export_labels(str(second), str(tmp_path / "uids"), identities=["uid"], use_ray=False)
    code, out, _ = run_command(capfd, "diff", str(first), str(tmp_path / "uids"), "--no-ray")
    assert (code, out.splitlines()[-1]) == (1, "not compared: no image was found in both")
    assert "no kind of identity is common to both: A states digest, B states uid. Digests join copies of equal" in out
    found = compare(tmp_path / "uids", first)
    assert found.as_json()["identities"] == {"a": ["uid"], "b": ["digest"]}
    assert [*found.lines()][-1].startswith("not compared")
    assert compare(first, second).compared, "both have images, whose digests join them"


def test_rows_of_a_repeated_uid_are_matched_where_the_digest_shows_which(tmp_path: Path) -> None:
    uids = {number: f"uid{number % 3}" for number in range(8)}
    first, second = unstated(tmp_path, 1, uids=uids), unstated(tmp_path, 2, uids=uids)
    export_labels(str(second), str(tmp_path / "labels"), use_ray=False)
    export_labels(str(second), str(tmp_path / "uids"), identities=["uid"], use_ray=False)
    assert compare(first, tmp_path / "labels").matched == {"uid": 8}
    assert compare(first, second).matched == {"uid": 8}
    found = compare(first, tmp_path / "uids")
    assert (dict(found.matched), found.unmatched) == ({"ambiguous": 8}, (8, 8))
    assert "of one of several, which nothing distinguishes: 8" in [*found.lines()]


def test_bad_input_is_one_line(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dataset = str(folder / "source-dataset")
    for words, message in [
        ([dataset, str(tmp_path)], "is not a reinforced dataset"),
        ([dataset, dataset, "--layers", "nope"], "neither dataset has nope; they have: captions/namer"),
    ]:
        code, out, err = run_command(capfd, "diff", *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
