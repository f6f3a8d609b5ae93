"""Shared fixtures and the order of files: one Ray and one S3 server serve many, since each takes seconds to start."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from hypothesis import HealthCheck, settings

from teachers.fast_paths import usage
from tests.helpers.commands import Command, Printed, printed_by, run_command
from tests.helpers.data import members_of, write_tar
from tests.helpers.s3_proxy import Proxy, s3_behind_proxy, s3_environment

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # defaults use a GPU, and tests compare bits and speeds of one device
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch threads that wait would use CPU
os.environ.setdefault("RAY_worker_niceness", "0")  # with Ray's default of 15, other tests starve the workers
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

_RAY = pytest.StashKey[ExitStack]()  # stops the Ray of this process


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect garbage neither while tests are imported nor, later, among what was imported: a fifth of that time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(5_000)  # instead of 700: a twentieth of what many tests take
        gc.enable()


@pytest.fixture
def own_fast_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """A switch and counts of fast paths for one test."""
    monkeypatch.setattr(usage, "_process", usage._Process())
    monkeypatch.delenv(usage.VARIABLE, raising=False)


@pytest.fixture(scope="session")
def s3_proxy() -> Iterator[Proxy]:
    """The proxy of an S3 server that runs for the session."""
    with s3_behind_proxy() as proxy:
        yield proxy


@pytest.fixture(scope="session")
def s3_server(s3_proxy: Proxy) -> str:
    """The endpoint of the S3 server, for the tests and for the workers of Ray."""
    return s3_proxy.url


def _set_s3_environment(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    for name, value in s3_environment(endpoint).items():
        patch.setenv(name, value)


@pytest.fixture(scope="module")
def ray_session(s3_server: str, request: pytest.FixtureRequest) -> None:
    """Ray as commands start it here, until the first file that does not use it: even idle it takes CPU.

    Files share it, so no test may kill a process of it but the workers of its own runs.
    """
    from reinforce.processes.cluster import ray_cluster

    if _RAY not in request.config.stash:
        ray = request.config.stash[_RAY] = ExitStack()
        with pytest.MonkeyPatch.context() as patch:  # workers get the environment in which Ray starts
            _set_s3_environment(patch, s3_server)
            patch.setenv("RAY_metrics_report_interval_ms", "2000")  # instead of 10,000, for which a test would wait
            # else a test that sends SIGTERM would start the deadline of the whole session
            patch.setattr("reinforce.processes.signals.ends_after_sigterm", nullcontext)
            ray.enter_context(ray_cluster(None, log_to_driver=False))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _RAY in item.config.stash and item.path not in _files_with_ray():
        _stop_ray(item.config)


def pytest_unconfigure(config: pytest.Config) -> None:
    _stop_ray(config)


def _stop_ray(config: pytest.Config) -> None:
    if _RAY in config.stash:
        config.stash[_RAY].close()
        del config.stash[_RAY]


@pytest.fixture(name="worker_in_process")
def _worker_in_process() -> Iterator[None]:
    """Runs have no Ray, and their worker in the process of the test, which asks for it by this name."""
    from tests.helpers.worker_in_process import worker_in_process

    with worker_in_process():
        yield


#: CPU seconds of the longest files, those of Ray's processes included. All others take less than 20.
_SECONDS = {
    "integration/test_faults.py": 107, "pairs/test_runs.py": 76, "integration/test_train_hosts.py": 95,
    "pairs/test_trainings.py": 107, "tuning/test_adapt.py": 60, "integration/test_cluster.py": 60,
    "integration/test_train_ray.py": 54, "test_docs.py": 35, "integration/test_s3.py": 42, "training/test_ranks.py": 26,
    "api/test_commands.py": 36, "student/test_train.py": 33, "hostile/test_run.py": 37, "shipping/test_networks.py": 29,
    "student/data/test_feed.py": 34, "tuning/test_command.py": 26,
    "explore/test_browser.py": 26, "integration/test_train.py": 30, "labels/test_faulty_storage.py": 25,
    "integration/test_images_alone.py": 21, "shipping/test_export.py": 21, "shipping/test_coreml.py": 20,
}  # fmt: skip
_FOLDER = Path(__file__).parent


@cache
def _files_with_ray() -> dict[Path, int]:
    """The files whose tests share Ray, with the number of the half that each belongs to; halves take equally long."""
    files = [path for path in sorted(_FOLDER.rglob("test_*.py")) if "ray_session" in path.read_text()]
    halves, taken = {}, [0, 0]
    for path in sorted(files, key=lambda path: -_SECONDS.get(_name(path), 10)):
        halves[path] = taken.index(min(taken))
        taken[halves[path]] += _SECONDS.get(_name(path), 10)
    return halves


def _name(file: Path) -> str:
    return file.relative_to(_FOLDER).as_posix()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give whole files to each process, but each half of those that share Ray to one process."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            half = _files_with_ray().get(config.rootpath / file)
            return file if half is None else f"files with Ray, half {half}"

    return Scheduling(config, log)


@pytest.fixture(scope="module")
def s3(s3_server: str) -> Iterator[Any]:
    """An S3 file system with an empty bucket; the environment variables name its endpoint and credentials."""
    import s3fs

    with urlopen(Request(f"{s3_server}/moto-api/reset", method="POST")):
        pass
    with pytest.MonkeyPatch.context() as patch:
        _set_s3_environment(patch, s3_server)
        s3fs.S3FileSystem.clear_instance_cache()
        fs = s3fs.S3FileSystem(use_listings_cache=False)  # other processes change the objects
        fs.mkdir("bucket")
        yield fs
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of 44 samples in three shards, which tests copy before they damage it."""
    from tests.helpers.reinforced import small_dataset

    return small_dataset(tmp_path_factory.mktemp("labelled"))


@pytest.fixture
def copy(labelled: str, tmp_path: Path) -> Path:
    """A copy of ``labelled`` that a test may damage."""
    return Path(shutil.copytree(labelled, tmp_path / "labelled"))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 9 and 3 samples in row groups of 8, next to their source."""
    from tests.helpers.reinforced import small_dataset

    return Path(small_dataset(tmp_path_factory.mktemp("made"), (9, 3)))


@pytest.fixture
def dataset(made: Path, tmp_path: Path) -> Path:
    """A copy of ``made`` that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "out"))


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes shards of the given sizes and returns their glob."""

    def write(*sizes: int, folder: str = "source") -> str:
        for shard, size in enumerate(sizes):
            write_tar(tmp_path / folder / f"{shard:05d}.tar", members_of(shard, size))
        return f"{tmp_path}/{folder}/*.tar"

    return write


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that share Ray first, then the longest: the last files are short, so that no process ends late."""
    assert not [name for name in _SECONDS if not (_FOLDER / name).exists()], "_SECONDS names a file that is gone"
    items.sort(key=lambda item: (item.path not in _files_with_ray(), -_SECONDS.get(_name(item.path), 0)))


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs a command."""
    return partial(run_command, capfd)


@pytest.fixture
def printed(capfd: pytest.CaptureFixture[str]) -> Printed:
    """What a command prints that succeeds."""
    return partial(printed_by, capfd)


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Printed:
    """The error of a command that ends with status 2."""
    return partial(printed_by, capfd, status=2)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings leave out the pictures of their curves, which take half a second each."""
    monkeypatch.setattr("reinforce.training.log.draw_curves", lambda *_: None)
