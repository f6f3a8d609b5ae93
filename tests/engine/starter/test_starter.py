"""``reinforce init``: configs for sources of every kind, which ``reinforce plan`` accepts unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from reinforce.cli import main
from reinforce.config import load_config
from tests.helpers.data import members_of, picture, write_tar
from tests.helpers.tables import IMG2DATASET, write_huggingface

Made = tuple[dict[str, Any], str, str]


def write_tars(folder: Path) -> str:
    for shard in range(3):
        write_tar(folder / f"{shard:05d}.tar", members_of(shard, 2))
    (folder / "00000_stats.json").write_text("{}")
    return str(folder)


def write_tars_with_json_captions(folder: Path) -> str:
    members = [("a.png", picture(1)), ("a.json", json.dumps({"id": 7, "description": "a red thing"}).encode())]
    write_tar(folder / "deep" / "one.tar.gz", [])  # replaced below: a compressed name needs compressed bytes
    (folder / "deep" / "one.tar.gz").unlink()
    write_tar(folder / "deep" / "one.tar", members)
    write_tar(folder / "deeper" / "still" / "two.tar", members)
    return str(folder)


def write_hub_folder(folder: Path) -> str:
    """As a dataset of the hub lies there: a split for training, and another one."""
    (folder / "data").mkdir(parents=True)
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_huggingface(folder / "data" / f"{name}.parquet", [picture(3)], {"caption": ["a thing"], "label": [1]})
    (folder / "README.md").write_text("a card")
    return str(folder)


def write_img2dataset(folder: Path) -> str:
    folder.mkdir(parents=True)
    for path in IMG2DATASET:
        (folder / path.name).write_bytes(path.read_bytes())
    return str(folder)


def write_odd_parquet(folder: Path) -> str:
    folder.mkdir(parents=True)
    table = {"sample_id": ["x"], "photo": [picture(4)], "alt_text": ["a photo"], "licence": ["cc0"]}
    pq.write_table(pa.table(table), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def write_jsonl(folder: Path) -> str:
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(picture(5))
    rows = [{"file_name": "a.png", "title": "a title", "n": 1}]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "list.jsonl")


def write_csv(folder: Path) -> str:
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(picture(5))
    (folder / "list.csv").write_text("where,words\na.png,some words here\n")
    return str(folder / "list.csv")


def write_folder(folder: Path) -> str:
    for key in "abc":
        (folder / key).mkdir(parents=True)
        (folder / key / f"{key}.png").write_bytes(picture(6))
        (folder / key / f"{key}.txt").write_text(f"caption {key}")
    (folder / "metadata.csv").write_text("file_name,text\na/a.png,other\n")
    return str(folder)


def write_images_alone(folder: Path) -> str:
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(picture(7))
    return str(folder)


#: A source of each kind, and of its config: `source` below the folder, `input`, and the number of shards.
SOURCES: dict[str, tuple[Callable[[Path], str], str, dict[str, Any], int]] = {
    "tars": (write_tars, "/*.tar", {"format": "tar"}, 3),
    "tars at any depth": (
        write_tars_with_json_captions, "/**/*.tar", {"format": "tar", "captions": ["json:description"]}, 2
    ),
    "a folder as on the hub": (write_hub_folder, "/data/train*.parquet", {"format": "parquet"}, 2),
    "img2dataset's Parquet": (write_img2dataset, "/*.parquet", {"format": "parquet"}, len(IMG2DATASET)),
    "odd columns": (
        write_odd_parquet, "/rows.parquet", {"format": "parquet", "image": "photo", "captions": ["alt_text"]}, 1
    ),
    "jsonl": (write_jsonl, "/list.jsonl", {"format": "jsonl", "captions": ["title"]}, 1),
    "csv": (write_csv, "/list.csv", {"format": "csv", "image": "where", "captions": ["words"]}, 1),
    "a folder of images": (write_folder, "", {"format": "folder"}, 1),
    "images without captions": (write_images_alone, "", {"format": "folder", "captions": []}, 1),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([*words])
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out, err


def init(capfd: pytest.CaptureFixture[str], data: str) -> Made:
    """The config that `reinforce init` writes, and what it and `reinforce plan` print."""
    status, out, err = run(capfd, "init", data, "my.yaml")
    assert status == 0, err
    status, planned, err = run(capfd, "plan", "my.yaml")
    assert status == 0, err
    return yaml.safe_load(Path("my.yaml").read_text()), out, planned + err


@pytest.mark.parametrize("kind", SOURCES)
def test_the_config_for_each_kind_of_source_passes_plan_unchanged(
    kind: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write, source, fields, shards = SOURCES[kind]
    data = write(folder / "source")
    config, out, planned = init(capfd, data)
    assert config["source"] == f"{folder}/source{source}"
    assert config["input"] == fields
    assert f"source: {shards} shard" in out
    assert f"{shards} shards, {shards} with something missing" in planned
    assert config["teachers"].keys() == {"mobileclip2-s0"}, "there is no GPU here"
    assert "captioners" not in config
    assert ("caption of the first sample" in out) == (fields.get("captions") != [])
    assert ", caption '" in planned or fields.get("captions") == []
    text = Path("my.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=")
    assert Path(text.partition("\n")[0].partition("=")[2]).exists()
    for key in ("source", "output", "seed", "images", "input", "augmentations", "teachers", "workers"):
        before = text.partition(f"\n{key}:")[0].splitlines()[-1]
        assert before.startswith("#"), f"{key} has a comment above it"


def test_the_samples_of_a_dataset_are_a_source(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from tests.helpers.reinforced import reinforce_here

    write_tars(folder / "source")
    reinforce_here(load_text({"source": f"{folder}/source/*.tar", "output": f"{folder}/first"}, folder))
    config, out, planned = init(capfd, f"{folder}/first")
    assert (config["source"], config["input"]) == (f"{folder}/first", {"format": "dataset"})
    assert "3 shards (reinforced dataset" in out
    assert "3 shards, 3 with something missing" in planned


def load_text(config: dict[str, Any], folder: Path) -> Any:
    (folder / "first.yaml").write_text(yaml.safe_dump(config))
    return load_config(folder / "first.yaml")


def test_a_machine_with_a_gpu_gets_the_ensemble_and_a_captioner(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reinforce.engine.starter.starter.nodes_of_run", lambda: [{"GPU": 1}])
    config, _, planned = init(capfd, write_tars(folder / "source"))
    assert config["teachers"].keys() == {"dfn2b", "dfn2b-s39b"}
    assert config["captioners"].keys() == {"coca"}
    assert "captions/coca" in planned


def test_names_of_columns_cannot_write_into_the_config(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = "a: b\nseed: 666 #\x1b[31m"
    pq.write_table(pa.table({"image": [picture(1)], name: ["some words"]}), folder / "rows.parquet")
    config, out, _ = init(capfd, "rows.parquet")
    assert config["seed"] == 0
    assert config["input"]["captions"] == [name]
    assert "\x1b" not in out + Path("my.yaml").read_text()


def test_an_existing_config_is_replaced_only_by_force(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = write_tars(folder / "photos")
    assert run(capfd, "init", data)[0] == 0
    before = (folder / "photos.yaml").read_text()
    (folder / "photos.yaml").write_text("mine")
    status, _, err = run(capfd, "init", data)
    assert (status, "photos.yaml exists" in err) == (2, True)
    assert (folder / "photos.yaml").read_text() == "mine"
    assert run(capfd, "init", data, "--force")[0] == 0
    assert (folder / "photos.yaml").read_text() == before
    assert "photos-reinforced" in before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nowhere/*.tar", "no file matches"),
        ("empty", "is an empty folder"),
        ("rows.parquet", "input.image"),
        ("nosuch://x/y.tar", "://"),
    ],
)
def test_data_that_cannot_be_read_is_an_error_and_writes_nothing(
    data: str, message: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty").mkdir()
    pq.write_table(pa.table({"a": [1], "b": [2.0]}), folder / "rows.parquet")
    status, _, err = run(capfd, "init", data, "my.yaml")
    assert status == 2
    assert message in err
    assert not (folder / "my.yaml").exists()
