"""Sources at hf:// URLs: the file system of huggingface_hub with a server that answers as the hub does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import yaml
from huggingface_hub import HfFileSystem

from reinforce.source.formats.base import source_format
from reinforce.source.references import read_state
from reinforce.source.urls import canonical, expand, shard_name
from tests.helpers.commands import printed_by
from tests.helpers.data import picture
from tests.helpers.hub import serving_hub
from tests.helpers.tables import outcomes, read_table, write_huggingface


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the repository hf://datasets/lab/photos."""
    (tmp_path / "photos").mkdir()
    with serving_hub(tmp_path) as (_, endpoint):
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": endpoint})
        HfFileSystem.clear_instance_cache()
        yield tmp_path / "photos"
    HfFileSystem.clear_instance_cache()


def test_files_of_the_hub_are_listed_and_read(hub: Path) -> None:
    (hub / "data").mkdir()
    for number in range(2):
        write_huggingface(hub / "data" / f"train-{number}.parquet", [picture(number)], {"text": [f"thing {number}"]})
    (hub / "README.md").write_text("a card")
    url = "hf://datasets/lab/photos/data/train-0.parquet"
    urls = expand("hf://datasets/lab/photos/**/*.parquet")
    assert urls == [url, url.replace("-0", "-1")] == expand("hf://datasets/lab/photos/data/train-{0,1}.parquet")
    assert (source_format(urls, None).name, canonical(url)) == ("parquet", url)
    assert shard_name(url).startswith("train-0.parquet-")
    assert [outcomes(read_table(one)) for one in urls] == [{"shard-00000000": f"thing {n}"} for n in range(2)]
    assert read_state(url).bytes == (hub / "data/train-0.parquet").stat().st_size


def test_init_writes_a_config_for_a_dataset_of_the_hub(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (hub / "data").mkdir()
    for name in ("train-0", "train-1", "validation-0"):
        write_huggingface(hub / "data" / f"{name}.parquet", [picture(3)], {"caption": ["a thing"]})
    (hub / "here").mkdir()
    monkeypatch.chdir(hub / "here")
    out = printed_by(capfd, "init", "hf://datasets/lab/photos") + printed_by(capfd, "plan", "photos.yaml")
    config = yaml.safe_load(Path("photos.yaml").read_text())
    assert config["source"] == "hf://datasets/lab/photos/data/train*.parquet"
    assert "other splits than `train` are left out: 1" in out
    assert "2 shards, 2 with something missing" in out
