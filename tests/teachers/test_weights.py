"""Checkpoint files: download, identity and conversion."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from teachers import weights
from tests.helpers.web import QuietHandler, serving


class _Server:
    """What an HTTP object store has: its ``content``, and what it has ``sent`` so far."""

    def __init__(self) -> None:
        self.content = self.sent = b"x" * 300_000
        self.downloads, self.url = 0, ""


@pytest.fixture
def server() -> Iterator[_Server]:
    store = _Server()

    class Handler(QuietHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(store.content)))
            self.send_header("ETag", f'"{hashlib.md5(store.content).hexdigest()}"')
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            store.downloads += 1
            self.wfile.write(store.sent)

    with serving(Handler) as url:
        store.url = f"{url}/weights.bin"
        yield store


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REINFORCE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_processes_of_a_node_share_one_download_and_a_replaced_object_is_downloaded_again(server: _Server) -> None:
    code = f"from teachers.weights import fetch; print(fetch({server.url!r}))"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    [first] = {process.communicate(timeout=600)[0].strip() for process in processes}
    assert server.downloads == 1
    server.content = server.sent = b"y" * 300_000
    second = weights.fetch(server.url)
    assert (Path(first).read_bytes(), second.read_bytes()) == (b"x" * 300_000, server.content)
    assert weights.fetch(server.url) == second
    assert server.downloads == 2


def test_an_interrupted_download_leaves_no_file(server: _Server, cache: Path) -> None:
    server.sent = server.content[:1000]
    with pytest.raises(Exception):  # noqa: B017, PT011 - the HTTP client or the size check, whichever sees it first
        weights.fetch(server.url)
    assert [path for path in (cache / "weights").rglob("*") if path.is_file()] == []
    server.sent = server.content
    assert weights.fetch(server.url).stat().st_size == 300_000


def test_what_a_process_that_was_killed_has_left_is_deleted_by_the_next_one(tmp_path: Path, cache: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "[a].pt")
    code = (
        "import os, sys, pathlib, safetensors.torch; from teachers.weights import as_safetensors\n"
        "safetensors.torch.save_file = lambda *_: os.kill(os.getpid(), 9)\n"
        "as_safetensors(pathlib.Path(sys.argv[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "[a].pt")], check=False).returncode == -9

    def there() -> list[tuple[str, int]]:
        return [(path.name, path.stat().st_size) for path in (cache / "safetensors").rglob("*") if path.is_file()]

    assert [size for _, size in there()] == [0]
    made = weights.as_safetensors(tmp_path / "[a].pt")
    assert [name for name, _ in there()] == [made.name]
    assert load_file(made)["a"].tolist() == [1.0] * 3


def test_missing_files_folders_and_unknown_protocols_are_named(tmp_path: Path) -> None:
    for location in ("absent.bin", "file:///absent.bin", "memory://absent.bin"):
        for function in (weights.fetch, weights.identity):
            with pytest.raises(FileNotFoundError, match=r"absent\.bin does not exist"):
                function(location)
    with pytest.raises(FileNotFoundError, match="is a folder, not a file"):
        weights.identity(tmp_path)
    with pytest.raises(ValueError, match="nosuch://a cannot be read"):
        weights.identity("nosuch://a")


def test_identity_depends_on_the_content_not_the_path(tmp_path: Path, server: _Server) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"abc")
    assert weights.identity(tmp_path / "a") == weights.identity(tmp_path / "b")
    assert weights.identity(tmp_path / "a") == f"sha256:{hashlib.sha256(b'abc').hexdigest()}"
    before = weights.identity(server.url)
    assert before == f"size:300000 etag:{hashlib.md5(server.content).hexdigest()}"
    server.content = b"y" * 300_000
    assert weights.identity(server.url) != before
    assert server.downloads == 0


def _state() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3.0, dtype=torch.float16)}


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_checkpoints_are_converted_to_equal_safetensors(tmp_path: Path, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"w{suffix}"
    wrapped = {f"module.{key}": value for key, value in _state().items()}
    for content in ({"epoch": 3, "name": "run", "state_dict": wrapped, "optimizer": {"lr": 0.1}}, _state()):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        found = load_file(converted := weights.as_safetensors(path))  # of this content, not of that before it
        assert found.keys() == _state().keys()
        for key, value in _state().items():
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key], value)
        assert weights.as_safetensors(path) == converted
        assert converted.suffix == ".safetensors"


def test_tied_weights_are_kept(tmp_path: Path) -> None:
    tied = torch.randn(4, 4)
    torch.save({"a": tied, "b": tied, "c": tied.T, "d": tied[1]}, tmp_path / "w.pt")
    with safe_open(weights.as_safetensors(tmp_path / "w.pt"), "pt") as file:
        assert torch.equal(file.get_tensor("a"), tied)
        assert torch.equal(file.get_tensor("b"), tied)
        assert torch.equal(file.get_tensor("c"), tied.T)
        assert torch.equal(file.get_tensor("d"), tied[1])


def test_local_files_are_not_copied_and_safetensors_are_not_converted(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(_state(), path)
    assert weights.fetch(path) == weights.fetch(f"file://{path}") == weights.as_safetensors(path) == path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pt", [torch.zeros(1)], "holds a list, not a state_dict"),
        ("w.pt", {"model": {"a": torch.zeros(1)}, "step": 3}, "model, step are not tensors"),
        ("w.pt", b"<html>not found</html>", "cannot be read as plain tensors"),
        ("w.npz", b"", r"use one of \.safetensors"),
    ],
)
def test_a_file_without_state_dict_is_rejected(tmp_path: Path, name: str, content: Any, message: str) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=message):
        weights.as_safetensors(tmp_path / name)
