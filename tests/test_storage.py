"""Files are published whole or not at all, on a local disk and in an object store."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

import pytest
from safetensors import SafetensorError

from reinforce.errors import StorageError, UserError
from reinforce.storage import Storage


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(f"{tmp_path}/out" if request.param == "local" else f"memory://storage-test{tmp_path}")


def files(storage: Storage) -> list[str]:
    """Paths of the files, relative to the root; the lock is not listed."""
    found = [str(path) for path in storage.fs.find(storage.root)] if storage.fs.exists(storage.root) else []
    return sorted(path[len(storage.root) + 1 :] for path in found if not path.endswith(".tmp/lock"))


def test_json_files_are_written_and_read(storage: Storage) -> None:
    assert storage.read_json("dataset.json") is None
    storage.write_json({"name": "Käse", "count": 2}, "runs", "1", "summary.json")
    assert storage.read_json("runs", "1", "summary.json") == {"name": "Käse", "count": 2}
    assert files(storage) == ["runs/1/summary.json"]


@pytest.mark.parametrize(("content", "message"), [(b"{", "is not valid JSON"), (b"[]", "is not a JSON object")])
def test_a_broken_json_file_is_a_user_error_with_the_path(storage: Storage, content: bytes, message: str) -> None:
    storage.write_bytes(content, "dataset.json")
    with pytest.raises(UserError, match=rf"dataset\.json {message}.*[Rr]estore it from a backup"):
        storage.read_json("dataset.json")


def test_a_new_file_appears_at_the_end_of_the_block(storage: Storage) -> None:
    with storage.new_file("folder", "data.bin") as path:
        Path(path).write_bytes(b"data")
        Path(path).with_name("scratch").write_bytes(b"temporary")
        assert not storage.fs.exists(storage.path("folder", "data.bin"))
    assert storage.fs.cat_file(storage.path("folder", "data.bin")) == b"data"
    assert files(storage) == ["folder/data.bin"]


def test_a_block_that_raises_publishes_nothing(storage: Storage) -> None:
    def write_half_of_a_new_file() -> None:
        with storage.new_file("data.bin") as path:
            Path(path).write_bytes(b"half")
            raise RuntimeError("half written")

    def stage_half_a_file() -> None:
        with storage.staging() as (file, _):
            file.write(b"half")
            raise RuntimeError("half written")

    for write in (write_half_of_a_new_file, stage_half_a_file):
        with pytest.raises(RuntimeError, match="half written"):
            write()
    assert files(storage) == []


def test_published_files_have_the_mode_of_other_new_files(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with storage.new_file("made.bin") as path:
        Path(path).unlink()
        Path(path).touch(mode=0o600)
    (tmp_path / "usual.bin").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("made.bin", "usual.bin")]
    assert modes[0] == modes[1]


def test_a_folder_is_published_with_its_subfolders(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "made" / "inner").mkdir(parents=True)
    (tmp_path / "made" / "a.txt").write_text("a")
    (tmp_path / "made" / "inner" / "b.txt").write_text("b")
    storage.put_folder(str(tmp_path / "made"), "model")
    assert files(storage) == ["model/a.txt", "model/inner/b.txt"]
    assert storage.fs.cat_file(storage.path("model", "inner", "b.txt")) == b"b"


def test_urls_are_safe_to_print() -> None:
    storage = Storage("memory://eve:secret@bucket/out/")
    assert storage.url == "memory://bucket/out"


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError, "make room in"),
        (PermissionError("denied"), StorageError, "check the storage, the network and the permissions"),
        (TimeoutError("no answer"), StorageError, "check the storage"),
    ],
)
def test_errors_of_a_local_storage_name_the_path_and_the_fix(
    tmp_path: Path, raised: Exception, expected: type[Exception], message: str
) -> None:
    storage = Storage(str(tmp_path))
    with (
        pytest.raises(UserError, match=rf"{tmp_path}/a/b cannot be written: .*{message}") as caught,
        storage.storage_errors("written", "a", "b"),
    ):
        raise raised
    assert type(caught.value) is expected


def test_a_full_disk_is_recognised_in_errors_of_libraries_and_other_errors_pass(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    expected = rf"{tmp_path}/a cannot be written: .*os error 28\); make room in {tmp_path}\."
    with pytest.raises(UserError, match=expected), storage.new_file("a"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    for error in (
        SafetensorError("I/O error: Permission denied (os error 13)"),
        KeyError("k"),
        OSError(errno.EIO, "x"),
    ):
        with pytest.raises(type(error)), storage.new_file("a"):
            raise error
    assert files(storage) == []


def test_a_full_disk_on_the_way_to_an_object_store_costs_an_attempt() -> None:
    with (
        pytest.raises(StorageError, match="of the machine that writes it"),
        Storage("memory://x").storage_errors("written", "a"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("raised", [FileNotFoundError("gone"), UserError("said"), ValueError("bad"), KeyError("k")])
def test_missing_files_and_errors_of_the_caller_pass_unchanged(tmp_path: Path, raised: Exception) -> None:
    with pytest.raises(type(raised)) as caught, Storage(str(tmp_path)).storage_errors("read", "a"):
        raise raised
    assert caught.value is raised


def test_a_lock_refuses_a_second_run_and_deletes_the_files_of_a_killed_one(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    half = tmp_path / ".tmp" / "reinforce-half"
    half.parent.mkdir()
    half.write_bytes(b"PAR1")
    with storage.lock():
        assert not half.exists()
        with pytest.raises(UserError, match="another run"), Storage(str(tmp_path)).lock():
            pass
    with storage.lock():
        pass


def test_an_output_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        Storage(str(tmp_path / "file" / "out")).check_writable()


@pytest.mark.parametrize("url", ["out", "./runs/s0", "file://runs/s0", "{job}/out"])
def test_an_output_in_the_folder_of_a_ray_job_is_refused(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    url = url.format(job=job)
    with pytest.raises(UserError, match=f"^output {url} is in the temporary folder of a Ray job.*absolute path"):
        Storage(url).check_writable()
    assert [*job.iterdir()] == []


def test_a_ray_job_writes_to_absolute_paths_and_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    for url in (f"{tmp_path}/out", f"file://{tmp_path}/out", "~/out", "memory://job/out"):
        Storage(url).check_writable()
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    monkeypatch.chdir(tmp_path)
    Storage("out").check_writable()
