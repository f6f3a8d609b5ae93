"""Runs whose source is not tars: the layers, the probe, the plan and the fingerprints."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from reinforce.config import parse_config
from reinforce.dataset.files.store import Store
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.plan.recipe import build_layers
from reinforce.engine.preflight.check_source import FirstSample, check_source
from reinforce.engine.preflight.estimate_bytes import expected_bytes
from reinforce.errors import UserError
from tests.helpers.data import config_of, picture, tree, write_tar
from tests.helpers.reinforced import reinforce_here
from tests.helpers.tables import write_huggingface

COUNT = 5
IMAGES = [picture(number) for number in range(COUNT)]
KEYS = [f"{number:03d}" for number in range(COUNT)]
CAPTIONS = [f"thing {number}" for number in range(COUNT)]


def config(folder: Path, source: str, output: str = "out", **changes: Any) -> dict[str, Any]:
    return config_of(source, folder / output, **{"captioners": {}, **changes})


def probe(values: dict[str, Any]) -> tuple[FirstSample | None, list[str]]:
    return check_source(make_plan(parse_config(values)))


def rows(dataset: str) -> list[Any]:
    """The rows of all layers of a dataset of one shard."""
    return [
        pq.read_table(path).to_pylist() for path in sorted(Path(dataset).rglob("*.parquet")) if "index" not in str(path)
    ]


@pytest.fixture
def from_tar(tmp_path: Path) -> list[Any]:
    members = [
        (f"{key}.{end}", data)
        for key, image, caption in zip(KEYS, IMAGES, CAPTIONS, strict=True)
        for end, data in (("png", image), ("json", f'{{"caption": "{caption}", "n": 1}}'.encode()))
    ]
    return rows(reinforce_here(config(tmp_path, str(write_tar(tmp_path / "x.tar", members)), "of-tar")))


def test_a_table_gives_the_rows_of_a_tar_with_the_same_samples(tmp_path: Path, from_tar: list[Any]) -> None:
    columns = {"key": KEYS, "caption": CAPTIONS, "n": [1] * COUNT}
    path = write_huggingface(tmp_path / "x.parquet", [*IMAGES, None], {name: [*v, v[0]] for name, v in columns.items()})
    values = config(tmp_path, path, input={"metadata": ["caption", "n"]})
    made = rows(reinforce_here(values))
    assert [row["reason"] for row in made.pop(-2)] == ["no_image"]
    assert made == from_tar
    before = tree(tmp_path / "out")
    assert not make_plan(parse_config(values)).pending, "a second run finds it complete"
    reinforce_here({**values, "output": f"{tmp_path}/again", "input": {**values["input"], "format": "parquet"}})
    assert tree(tmp_path / "again") == before


def test_the_first_sample_of_a_table_is_shown_and_what_is_not_there_is_one_error(tmp_path: Path) -> None:
    path = write_huggingface(tmp_path / "x.parquet", IMAGES, {"title": CAPTIONS})
    sample, [note, of_key] = probe(config(tmp_path, path))
    name = make_plan(parse_config(config(tmp_path, path))).pending[0].name
    assert sample is not None
    assert sample.line() == f"first sample: {name}-00000000 (.png, 40 x 30), no caption"
    assert note.endswith("the row has image, title; set input.captions to where captions are, or to []")
    assert f"{name}-00000000: rows without a key get one made of the file's URL" in of_key
    sample, notes = probe(config(tmp_path, path, input={"captions": ["title"], "key": "title"}))
    assert (sample and sample.caption, notes) == ("thing 0", [])
    with pytest.raises(
        UserError, match=r"^source: no sample can be read\. .*x\.parquet: a Parquet file .* column 'jpg'"
    ):
        probe(config(tmp_path, path, input={"image": "jpg"}))
    (tmp_path / "y.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(
        UserError, match=r"y\.parquet: a Parquet file that cannot be used: it is not a Parquet file, or"
    ):
        probe(config(tmp_path, f"{tmp_path}/y.parquet"))
    sizes = expected_bytes(make_plan(parse_config(config(tmp_path, path))))
    assert sum(map(len, IMAGES)) < sizes["samples"] < 3 * sum(map(len, IMAGES))  # type: ignore[operator]


def test_the_format_is_recognised_by_names_then_by_content(tmp_path: Path) -> None:
    path = write_huggingface(tmp_path / "00000.parquet", IMAGES, {"text": CAPTIONS})
    (tmp_path / "00000_stats.json").write_text("{}")
    sample, [note, _] = probe(config(tmp_path, f"{tmp_path}/0*"))
    assert sample is not None
    assert note == (
        f"source: 1 of 2 files are not parquet files by their names and will be quarantined, such as {tmp_path}/"
        "00000_stats.json, a JSON file; write a pattern that ends in .parquet"
    )
    (tmp_path / "part").write_bytes(Path(path).read_bytes())
    assert make_plan(parse_config(config(tmp_path, f"{tmp_path}/part"))).pending[0].format == "parquet"
    write_tar(tmp_path / "00000.tar", [("a.png", IMAGES[0])])
    assert {shard.format for shard in make_plan(parse_config(config(tmp_path, f"{tmp_path}/0*"))).pending} == {"tar"}
    with pytest.raises(UserError, match="tar: a tar by its name, not a jsonl file"):
        probe(config(tmp_path, f"{tmp_path}/00000.tar", input={"format": "jsonl"}))


def test_images_by_reference_need_files_that_hold_them(tmp_path: Path) -> None:
    path = write_huggingface(tmp_path / "x.parquet", IMAGES, {})
    with pytest.raises(
        UserError, match=r"^source: images: reference needs .*x\.parquet is a parquet file; set images: e"
    ):
        make_plan(parse_config(config(tmp_path, path, images="reference")))


def test_a_table_of_paths_stores_references_that_are_read_again(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    listed = ["a.png", f"{tmp_path}/a.png", "none.png"]
    (tmp_path / "x.csv").write_text("file_name\n" + "\n".join(listed))
    values = config(tmp_path, f"{tmp_path}/x.csv", images="reference", teachers={})
    [samples, quarantine] = rows(reinforce_here(values))[::-1]
    assert [row["image_ref"]["url"] for row in samples] == [f"{tmp_path}/a.png"]
    assert [row["reason"] for row in quarantine] == ["image_place", "image_missing"]
    reinforce_here(config(tmp_path, f"{tmp_path}/x.csv", images="reference"))
    encoded = base64.b64encode(IMAGES[0]).decode()
    (tmp_path / "y.csv").write_text(f"image\n{encoded}\n")
    found = rows(reinforce_here({**values, "source": f"{tmp_path}/y.csv", "output": f"{tmp_path}/y"}))
    assert found[0][0]["detail"] == "images: reference needs a file for each image"


def test_later_keys_of_the_config_change_a_fingerprint_only_if_they_are_set(tmp_path: Path) -> None:
    def fingerprint(**spec: Any) -> str:
        return build_layers(parse_config(config(tmp_path, "x.tar", teachers={}, input=spec)), {})["samples"].fingerprint

    assert fingerprint() == fingerprint(format="parquet") == "ac6546f82d470a30"
    assert len({fingerprint(), fingerprint(image="jpg"), fingerprint(key="id")}) == 3


def test_a_quarantined_table_is_named_in_the_quarantine(tmp_path: Path) -> None:
    write_huggingface(tmp_path / "0.parquet", IMAGES, {"text": CAPTIONS})
    (tmp_path / "1.parquet").write_bytes(b"PAR1" + bytes(50))
    output = reinforce_here(config(tmp_path, f"{tmp_path}/?.parquet"))
    store = Store(output)
    [shard] = store.shards("quarantine/samples")
    assert store.quarantined("samples", shard)[0]["reason"] == "shard_unreadable"
    assert len(store.shards("samples")) == 1
