"""Google Cloud Storage and Azure Blob Storage: a dataset equals one on disk, is resumed, read and listed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import reinforce
from reinforce.dataset.files.store import Store
from reinforce.source.urls import filesystem
from tests.helpers.azure_blobs import azure_blobs
from tests.helpers.commands import run_command
from tests.helpers.data import config_of, members_of, tree, write_tar
from tests.helpers.reinforced import fresh_dataset

pytestmark = pytest.mark.slow


@pytest.fixture(params=["gs", "abfs"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "gs":
        driver = pytest.importorskip("gcsfs", reason="the extra gcs is not installed").GCSFileSystem
        emulator = pytest.importorskip("gcp_storage_emulator.server", reason="no emulator is installed")
        server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
        server.start()
        host, port = server._api._httpd.server_address
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{host}:{port}")
        yield "gs://bucket"
        driver.clear_instance_cache()
        server.stop()
        return
    driver = pytest.importorskip("adlfs", reason="the extra azure is not installed").AzureBlobFileSystem
    with azure_blobs() as connection:
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
        yield "abfs://bucket"
        driver.clear_instance_cache()


def test_a_dataset_equals_one_on_disk_and_is_resumed(
    bucket: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        tar = write_tar(tmp_path / "source" / f"{number}.tar", members_of(number, 4))
        fs, path = filesystem(f"{bucket}/source/{number}.tar")
        fs.put_file(str(tar), path)
    source = f"{bucket}/source/*.tar"
    config = config_of(source, tmp_path / "local", captioners={})
    fresh_dataset(config)
    remote = {**config, "output": f"{bucket}/out"}
    fresh_dataset({**remote, "teachers": {"red": config["teachers"]["red"]}})
    fresh_dataset(remote)
    assert reinforce.run(remote).message.startswith("nothing to do: 2 shards")
    names = [name.partition("bucket/out/")[2] for name in fs.find("bucket/out")]
    kept = [name for name in names if not name.startswith(("runs/", "index/"))]
    assert {name: fs.cat_file(f"bucket/out/{name}") for name in kept} == tree(tmp_path / "local")
    assert len(list(reinforce.open(f"{bucket}/out"))) == 8
    status, out, err = run_command(capfd, "status", f"{bucket}/out")
    assert (status, out.count("2/2")) == (0, 5), err
    status, out, err = run_command(capfd, "init", f"{bucket}/source", str(tmp_path / "my.yaml"))
    assert (status, "source: 2 shards (tar" in out) == (0, True), err


def test_a_file_is_created_once_and_can_be_replaced_and_removed(bucket: str) -> None:
    store = Store(f"{bucket}/out")
    store.check_writable()
    assert store.create(b"mine", "claim")
    if bucket.startswith("abfs"):  # the emulator of GCS ignores the condition
        assert not store.create(b"theirs", "claim")
    store.write_bytes(b"replaced", "claim")
    assert store.read_bytes("claim", limit=9) == b"replaced"
    store.remove("claim")
    with pytest.raises(FileNotFoundError):
        store.read_bytes("claim", limit=9)
    assert store.read_json("claim") is None
