"""A source file that is replaced while its shard is computed: nothing of the lease is written."""

from __future__ import annotations

import base64
import csv
import gzip
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from reinforce.dataset.validate import validate
from reinforce.source.references import ChangedSource
from tests.helpers.data import config_of, members_of, picture, tree, write_tar
from tests.helpers.models import ColorTeacher
from tests.helpers.reinforced import fresh_dataset, shard_process
from tests.helpers.s3_proxy import Fault, Proxy
from tests.helpers.tables import write_columns
from tests.helpers.web import QuietHandler, serving

#: What is done when the first crops of a shard are encoded; then the shard is read already, or in part.
ACTIONS: list[Callable[[], Any]] = []
TEACHER = {"red": {"class": f"{__name__}:Acting", "options": {"size": 8, "dim": 4}}}


class Acting(ColorTeacher):
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        while ACTIONS:
            ACTIONS.pop()()
        return super().encode_images(pixels)


@pytest.fixture(autouse=True)
def no_actions() -> Iterator[None]:
    yield
    ACTIONS.clear()


def simple_config(source: str, output: Path | str) -> dict[str, Any]:
    return config_of(source, output, captioners={}, teachers=TEACHER)


def write_source(path: Path, first: int) -> Path:
    """Four samples from number ``first`` on, in the format of the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + 4)
    rows: dict[str, list[Any]] = {"key": [*map(str, numbers)], "caption": [f"thing {number}" for number in numbers]}
    images = [picture(number) for number in numbers]
    texts = {**rows, "image": [base64.b64encode(image).decode() for image in images]}
    if path.name.startswith("coco"):
        for number, image in zip(numbers, images, strict=True):
            (path.parent / f"{number}.png").write_bytes(image)
        document = {
            "images": [{"id": number, "file_name": f"{number}.png"} for number in numbers],
            "annotations": [{"image_id": number, "caption": f"thing {number}"} for number in numbers],
        }
        path.write_text(json.dumps(document))
    elif path.suffix == ".parquet":
        write_columns(path, {**rows, "image": images})
    elif path.suffix == ".jsonl":
        path.write_text(
            "".join(json.dumps(dict(zip(texts, row, strict=True))) + "\n" for row in zip(*texts.values(), strict=True))
        )
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([texts.keys(), *zip(*texts.values(), strict=True)])
    else:
        data = write_tar(path, members_of(first, 4)).read_bytes()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["0.tar", "0.tar.gz", "0.parquet", "0.jsonl", "0.csv", "coco.json"])
@pytest.mark.parametrize("how", ["replaced", "rewritten", "same time"])
def test_a_file_that_changes_while_it_is_read_is_computed_again(name: str, how: str, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source" / name, 100)
    other = write_source(tmp_path / "other" / name, 200)
    for image in (tmp_path / "other").glob("*.png"):
        shutil.copy(image, tmp_path / "source")
    state = os.stat(source)

    def change() -> None:
        if how == "rewritten":
            source.write_bytes(other.read_bytes())
        else:
            os.replace(shutil.copy(other, tmp_path / "new"), source)
        if how == "same time":
            os.utime(source, ns=(state.st_atime_ns, state.st_mtime_ns))

    config = simple_config(str(source), tmp_path / "out")
    ACTIONS.append(change)
    with pytest.raises(
        ChangedSource, match=f"{name} has changed while it was read: (.* then, .* now|its first 64 KiB differ)"
    ):
        shard_process(config).run()
    assert not tree(tmp_path / "out"), "neither a layer nor a quarantine file is written"
    assert shard_process(config).run().samples == 4
    fresh = fresh_dataset({**config, "output": str(tmp_path / "fresh")})
    assert {name: data for name, data in tree(fresh).items() if name != "dataset.json"} == tree(tmp_path / "out")
    assert validate(str(fresh), [str(tmp_path / "source")]).sources == {"same": 1}


def test_an_object_that_is_replaced_is_noticed_by_its_etag_without_further_requests(
    s3: Any, s3_proxy: Proxy, tmp_path: Path
) -> None:
    first, second = (write_source(tmp_path / f"{number}.tar", number) for number in (1, 2))
    config = simple_config("s3://bucket/0.tar", tmp_path / "out")
    s3.put_file(str(first), "bucket/0.tar")
    process = shard_process(config)
    s3_proxy.requests.clear()
    process.run()
    asked = [request.method for request in s3_proxy.requests if request.key == "bucket/0.tar"]
    assert asked == ["HEAD", "GET", "HEAD", "GET"], "opening and reading it, and its state afterwards"
    shutil.rmtree(tmp_path / "out")
    for number in (0, 1):
        (tmp_path / f"broken{number}").write_bytes(b"no tar %d" % number * 100)

    def replaced_by(path: Path, early: bool) -> Fault:
        """Replace the object before or after its bytes are read."""

        def fault(handler: Any, request: Any) -> None:
            answer = None if early else handler.forward(request)
            s3.put_file(str(path), "bucket/0.tar")
            handler.send(answer or handler.forward(request))

        return fault

    broken = (tmp_path / "broken0", tmp_path / "broken1")
    for (before, after), early in itertools.product([(first, second), broken], (True, False)):
        s3.put_file(str(before), "bucket/0.tar")
        fault = replaced_by(after, early)
        with (
            s3_proxy.inject(fault, lambda request: request.key == "bucket/0.tar" and request.is_read, times=1),
            pytest.raises(ChangedSource, match=r"s3://bucket/0\.tar has changed while it was read"),
        ):
            shard_process(config).run()
        assert not tree(tmp_path / "out"), "nor is a shard quarantined that was not whole when it was read"


@contextmanager
def web_server(content: list[bytes], sized: bool) -> Iterator[tuple[str, list[str]]]:
    """A server of the first ``content`` without ETags and times, and perhaps without sizes; and its requests."""
    asked: list[str] = []

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            asked.append(self.command)
            self.send_response(200)
            if sized:
                self.send_header("Content-Length", str(len(content[0])))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[0])

        do_HEAD = do_GET

    with serving(Handler) as url:
        yield f"{url}/0.tar", asked


@pytest.mark.parametrize("sized", [True, False])
def test_a_file_of_a_web_server_without_etags_is_known_by_its_first_bytes(sized: bool, tmp_path: Path) -> None:
    first, second = (write_source(tmp_path / f"{number}.tar", number).read_bytes() for number in (1, 2))
    content = [first]
    with web_server(content, sized) as (url, asked):
        config = simple_config(url, tmp_path / "out")
        process = shard_process(config)
        asked.clear()
        process.run()
        if sized:
            assert asked == ["HEAD", "GET", "HEAD", "GET"], "the first bytes come with those that are read anyway"
        shutil.rmtree(tmp_path / "out")
        process = shard_process(config)
        ACTIONS.append(lambda: content.insert(0, second))
        with pytest.raises(ChangedSource, match=r"0\.tar has changed while it was read: its first 64 KiB differ"):
            process.run()
    assert len(first) == len(second)
    assert not tree(tmp_path / "out")
