"""Sources at hf:// URLs: the file system of huggingface_hub with a server that answers as the hub does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec
import pytest
import yaml
from huggingface_hub import HfFileSystem

from reinforce.source.formats.recognise import source_format
from reinforce.source.identity import read_state
from reinforce.source.urls import canonical, expand, shard_name
from tests.helpers.commands import printed_by
from tests.helpers.data import picture
from tests.helpers.tables import outcomes, read_table, write_huggingface
from tests.helpers.web import QuietHandler, serving

API = "/api/datasets/lab/photos"


class _Hub(QuietHandler):
    """One dataset repository, whose files are those of ``folder``."""

    folder: Path

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith(f"{API}/tree/main"):
            return self._answer([self._entry(file) for file in sorted(self.folder.rglob("*"))])
        if path.startswith("/datasets/lab/photos/resolve/main/"):
            return self._file((self.folder / path.partition("/main/")[2]).read_bytes())
        return self._answer({"id": "lab/photos", "sha": "0" * 40, "private": False, "siblings": []})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        self._answer([self._entry(self.folder / path) for path in asked if (self.folder / path).exists()])

    def _entry(self, file: Path) -> dict[str, Any]:
        kind = "directory" if file.is_dir() else "file"
        return {"type": kind, "path": str(file.relative_to(self.folder)), "size": file.stat().st_size, "oid": "1" * 40}

    def _file(self, data: bytes) -> None:
        first, _, last = self.headers["Range"].partition("=")[2].partition("-")
        self._send(data[int(first) : int(last) + 1], 206)

    def _answer(self, values: Any) -> None:
        self._send(json.dumps(values).encode(), 200)

    def _send(self, data: bytes, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the repository hf://datasets/lab/photos."""
    handler = type("Handler", (_Hub,), {"folder": tmp_path})
    with serving(handler) as endpoint:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": endpoint})
        HfFileSystem.clear_instance_cache()
        yield tmp_path
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
