"""Checkpoint files: download, identity and conversion."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from teachers import weights


class _Server:
    """An HTTP object store that counts downloads."""

    def __init__(self) -> None:
        self.content = b"x" * 300_000
        self.sent = self.content
        self.downloads = 0
        store = self

        class Handler(BaseHTTPRequestHandler):
            def _head(self) -> None:
                self.send_response(200 if "there" in self.path else 404)
                self.send_header("Content-Length", str(len(store.content)))
                self.send_header("ETag", f'"{hashlib.md5(store.content).hexdigest()}"')
                self.end_headers()

            def do_HEAD(self) -> None:
                self._head()

            def do_GET(self) -> None:
                self._head()
                if "there" in self.path:
                    store.downloads += 1
                    self.wfile.write(store.sent)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/there/weights.bin"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[_Server]:
    server = _Server()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REINFORCE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_processes_of_a_node_share_one_download(server: _Server, cache: Path) -> None:
    code = f"from teachers.weights import fetch; print(fetch({server.url!r}))"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    paths = {process.communicate(timeout=600)[0].strip() for process in processes}
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == server.content
    assert server.downloads == 1


def test_a_replaced_object_is_downloaded_again(server: _Server) -> None:
    first = weights.fetch(server.url)
    server.content = server.sent = b"y" * 300_000
    second = weights.fetch(server.url)
    assert first.read_bytes()[:1] == b"x"
    assert second.read_bytes()[:1] == b"y"
    assert weights.fetch(server.url) == second
    assert server.downloads == 2


def test_an_interrupted_download_leaves_no_file(server: _Server, cache: Path) -> None:
    server.sent = server.content[:1000]
    with pytest.raises(Exception):  # noqa: B017, PT011 - the HTTP client or the size check, whichever sees it first
        weights.fetch(server.url)
    assert [path for path in (cache / "weights").rglob("*") if path.is_file()] == []
    server.sent = server.content
    assert weights.fetch(server.url).stat().st_size == 300_000


@pytest.mark.parametrize("location", ["absent.bin", "file:///absent.bin", "memory://absent.bin"])
def test_a_missing_file_is_named(location: str) -> None:
    for function in (weights.fetch, weights.identity):
        with pytest.raises(FileNotFoundError, match=r"absent\.bin does not exist"):
            function(location)


def test_folders_and_unknown_protocols_are_rejected(tmp_path: Path) -> None:
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


def test_identity_does_not_import_torch(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    path = str(tmp_path / "a")
    code = f"import sys; from teachers.weights import identity; identity({path!r}); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def _state() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3.0, dtype=torch.float16)}


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_checkpoints_are_converted_to_equal_safetensors(tmp_path: Path, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"w{suffix}"
    torch.save(_state(), path, _use_new_zipfile_serialization=zipped)
    converted = weights.as_safetensors(path)
    assert converted.suffix == ".safetensors"
    found = load_file(converted)
    assert found.keys() == _state().keys()
    for key, value in _state().items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)
    assert weights.as_safetensors(path) == converted


def test_a_training_checkpoint_is_unwrapped(tmp_path: Path) -> None:
    path = tmp_path / "epoch_3.pt"
    wrapped = {f"module.{key}": value for key, value in _state().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": wrapped, "optimizer": {"lr": 0.1}}, path)
    assert load_file(weights.as_safetensors(path)).keys() == _state().keys()


def test_tied_weights_are_kept(tmp_path: Path) -> None:
    tied = torch.randn(4, 4)
    torch.save({"a": tied, "b": tied, "c": tied.T, "d": tied[1]}, tmp_path / "w.pt")
    with safe_open(weights.as_safetensors(tmp_path / "w.pt"), "pt") as file:
        assert torch.equal(file.get_tensor("a"), tied)
        assert torch.equal(file.get_tensor("b"), tied)
        assert torch.equal(file.get_tensor("c"), tied.T)
        assert torch.equal(file.get_tensor("d"), tied[1])


def test_an_overwritten_checkpoint_is_converted_again(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"a": torch.zeros(2)}, path)
    weights.as_safetensors(path)
    torch.save({"a": torch.zeros(3)}, path)
    assert load_file(weights.as_safetensors(path))["a"].shape == (3,)


def test_local_files_are_not_copied_and_safetensors_are_not_converted(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(_state(), path)
    assert weights.fetch(path) == weights.fetch(f"file://{path}") == weights.as_safetensors(path) == path


class _Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, ("__import__('pathlib').Path('ran').touch()",))


def test_code_in_a_checkpoint_is_rejected_and_not_run(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": _Runs()}, "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt cannot be read as plain tensors.*safetensors.torch.save_file"):
        weights.as_safetensors(Path("w.pt"))
    assert not Path("ran").exists()
    assert list((cache / "safetensors").rglob("*.safetensors")) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds a list, not a state_dict"),
        ({"model": {"a": torch.zeros(1)}, "step": 3}, "model, step are not tensors"),
    ],
)
def test_a_file_without_state_dict_is_rejected(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message):
        weights.as_safetensors(tmp_path / "w.pt")


def test_other_files_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        weights.as_safetensors(tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"use one of \.safetensors"):
        weights.as_safetensors(tmp_path / "w.npz")
