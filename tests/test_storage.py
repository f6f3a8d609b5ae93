"""Files are published whole or not at all, on a local disk and in an object store."""

from __future__ import annotations

import errno
import socket
import stat
import subprocess
import sys
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


def test_json_files_are_written_and_read_and_broken_ones_are_user_errors_with_the_path(storage: Storage) -> None:
    assert storage.read_json("dataset.json") is None
    storage.write_json({"name": "Käse", "count": 2}, "runs", "1", "summary.json")
    assert storage.read_json("runs", "1", "summary.json") == {"name": "Käse", "count": 2}
    assert files(storage) == ["runs/1/summary.json"]
    for content, message in ((b"{", "is not valid JSON"), (b"[]", "is not a JSON object")):
        storage.write_bytes(content, "dataset.json")
        with pytest.raises(UserError, match=rf"dataset\.json {message}.*[Rr]estore it from a backup"):
            storage.read_json("dataset.json")


def test_a_new_file_appears_at_the_end_of_the_block_and_not_if_that_raises(storage: Storage) -> None:
    def write_half(new: bool) -> None:
        with storage.new_file("data.bin") if new else storage.staging() as made:
            Path(made).write_bytes(b"half") if isinstance(made, str) else made[0].write(b"half")
            raise RuntimeError("half written")

    for new in (True, False):
        with pytest.raises(RuntimeError, match="half written"):
            write_half(new)
    assert files(storage) == []
    with storage.new_file("folder", "data.bin") as path:
        Path(path).write_bytes(b"data")
        Path(path).with_name("scratch").write_bytes(b"temporary")
        assert not storage.fs.exists(storage.path("folder", "data.bin"))
    assert storage.fs.cat_file(storage.path("folder", "data.bin")) == b"data"
    assert files(storage) == ["folder/data.bin"]


def test_published_files_have_the_mode_of_other_new_files_and_an_output_below_a_file_is_an_error(
    tmp_path: Path,
) -> None:
    with Storage(str(tmp_path)).new_file("made.bin") as path:
        Path(path).unlink()
        Path(path).touch(mode=0o600)
    (tmp_path / "usual.bin").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("made.bin", "usual.bin")]
    assert modes[0] == modes[1]
    with pytest.raises(UserError, match="cannot be written"):
        Storage(str(tmp_path / "usual.bin" / "out")).check_writable()


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


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("url", "what", "raised", "expected", "message"),
    [
        ("{}", "written", FULL, UserError, "{}/a/b cannot be written: .*make room in {}"),
        ("memory://x", "written", FULL, StorageError, "make room in .* of the machine that writes it"),
        ("{}", "written", PermissionError("no"), StorageError, "check the storage, the network and the permissions"),
        ("{}", "written", TimeoutError("no answer"), StorageError, "check the storage"),
        *(("{}", "read", error, type(error), str(error)) for error in (FileNotFoundError("gone"), UserError("said"))),
        *(("{}", "read", error, type(error), str(error)) for error in (ValueError("bad"), KeyError("k"))),
    ],
)
def test_errors_of_a_storage_name_the_path_and_the_fix_and_those_of_the_caller_pass(
    tmp_path: Path, url: str, what: str, raised: Exception, expected: type[Exception], message: str
) -> None:
    storage = Storage(url.format(tmp_path))
    with (
        pytest.raises(expected, match=message.format(tmp_path, tmp_path)) as caught,
        storage.storage_errors(what, "a", "b"),
    ):
        raise raised
    assert type(caught.value) is expected
    assert (caught.value is raised) == (what == "read")


def test_a_full_disk_is_recognised_in_errors_of_libraries_and_other_errors_pass(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    expected = rf"{tmp_path}/a cannot be written: .*os error 28\); make room in {tmp_path}\."
    with pytest.raises(UserError, match=expected), storage.new_file("a"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    for error in (SafetensorError("I/O error: Permission denied (os error 13)"), OSError(errno.EIO, "x")):
        with pytest.raises(type(error)), storage.new_file("a"):
            raise error
    assert files(storage) == []


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


def test_the_files_of_a_process_that_has_ended_are_deleted_and_those_of_others_kept(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "out[1]"))
    host = socket.gethostname()
    code = (
        "import os, sys; from reinforce.storage import Storage\n"
        "with Storage(sys.argv[1]).staging(), Storage(sys.argv[1]).temporary_folder(): os.kill(os.getpid(), 9)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, storage.root])
    assert process.wait(600) == -9
    with storage.staging() as (_, mine), storage.temporary_folder() as folder:
        assert len(storage.names(".tmp")) == 4
        storage.remove_temporary(host, int(str(process.pid)[:-1]))
        storage.remove_temporary(f"{host}x", process.pid)
        assert len(storage.names(".tmp")) == 4
        storage.remove_temporary(host, process.pid)
        assert storage.names(".tmp") == sorted(Path(path).name for path in (mine, folder))
    assert storage.names(".tmp") == []


def test_an_output_in_the_folder_of_a_ray_job_is_refused_and_absolute_paths_and_urls_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for url in ("out", "./runs/s0", "file://runs/s0", f"{job}/out"):
        with pytest.raises(UserError, match=f"^output {url} is in the temporary folder of a Ray job.*absolute path"):
            Storage(url).check_writable()
    assert [*job.iterdir()] == []
    for url in (f"{tmp_path}/out", f"file://{tmp_path}/out", "~/out", "memory://job/out"):
        Storage(url).check_writable()
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    Storage("out").check_writable()
