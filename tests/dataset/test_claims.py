"""Claims on recipes: one of several runs of different configs starts, on every kind of storage."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec.implementations.memory
import pytest
import s3fs

import reinforce
from reinforce.config import parse_config
from reinforce.dataset.claims import Claims
from reinforce.dataset.manifest import find_manifest, update_manifest
from reinforce.dataset.store import MANIFEST, Store
from reinforce.engine.plan.plan import build_layers, describe_models
from reinforce.errors import StorageError, UserError
from reinforce.storage import ClaimFile
from tests.helpers.commands import Command
from tests.helpers.data import config_of
from tests.helpers.s3_proxy import Fault, Handler, Proxy, Request, empty, refuse


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://claims/out"
    remove()


def remove() -> None:
    with contextlib.suppress(FileNotFoundError):
        fsspec.filesystem("memory").rm("/claims", recursive=True)


def claims_of(output: str, **changes: Any) -> Claims:
    """The claims of a run with ``changes`` of the config, as if on a machine of its own."""
    config = parse_config(config_of("x/{0..1}.tar", output, **changes))
    return Claims(Store(output), config, build_layers(config, describe_models(config)))


def names(output: str) -> list[str]:
    store = Store(output)
    store.fs.invalidate_cache()
    return sorted(store.fs.find(store.path("claims")))


@pytest.fixture(params=["memory", "local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3")
    return {"memory": "memory://claims/out", "local": str(tmp_path / "out"), "s3": "s3://bucket/claimed"}[request.param]


def test_a_second_run_with_another_seed_is_refused_with_what_differs_and_one_of_the_same_config_is_not(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, same, other = claims_of(output), claims_of(output), claims_of(output, seed=7)
    first.take()
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    same.take()
    with pytest.raises(UserError) as raised:
        other.take()
    lines = str(raised.value).splitlines()
    assert lines[0].startswith(f"another run writes to {other.store.url} with another config: pid ")
    assert "    seed: 0 in that run, 7 in this config" in lines
    assert f"delete {other.store.url}/claims" in lines[-1]
    same.release()
    assert len(names(output)) == len(first.layers), "they are those of the first run"
    first.publish({}, ())
    assert names(output) == []
    with pytest.raises(UserError, match="was made by another config"):
        other.take()
    assert names(output) == []
    remove()


@pytest.mark.parametrize("output", ["local", "s3"], indirect=True)
def test_of_many_runs_that_start_at_once_those_of_one_config_start_at_most(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClaimFile, "is_over", lambda self, claim: False)
    runs = [claims_of(output, seed=number % 2, teachers={}, captioners={}) for number in range(6)]
    barrier = threading.Barrier(len(runs))

    def start(claims: Claims) -> bool:
        barrier.wait(600)
        with contextlib.suppress(UserError):
            claims.take()
            return True
        return False

    with ThreadPoolExecutor(len(runs)) as pool:
        started = [claims.config.seed for claims, has in zip(runs, pool.map(start, runs), strict=True) if has]
    assert started in ([0] * 3, [1] * 3)


def test_a_layer_that_two_configs_define_differently_is_claimed_also_in_a_dataset_that_exists(memory: str) -> None:
    samples = claims_of(memory, teachers={}, captioners={})
    samples.store.write_json(update_manifest(None, samples.config, samples.layers, {}), MANIFEST)
    teacher = {"class": "tests.helpers.models:ColorTeacher"}
    first = claims_of(memory, captioners={}, teachers={"new": teacher})
    other = claims_of(memory, captioners={}, teachers={"new": {**teacher, "options": {"seed": 5}}})
    third = claims_of(memory, captioners={}, teachers={"another": {**teacher, "options": {"seed": 5}}})
    first.take()
    assert len(names(memory)) == 2, "samples are listed already"
    with pytest.raises(UserError, match=r"options.seed: not set in that run, 5 in this config"):
        other.take()
    third.take()


def test_claims_of_a_run_that_was_killed_expire_and_are_removed_when_another_of_its_config_has_written_dataset_json(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for output in (memory, str(tmp_path / "out")):
        claims_of(output).take()
        with claims_of(output) as other:
            other.publish({}, ())
        assert names(output) == []
    assert not (tmp_path / "out" / "claims").exists()
    remove()
    claims_of(memory).take()
    other = claims_of(memory, seed=7)
    with pytest.raises(UserError, match="claims end 60 minutes after"):
        other.take()
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 3601)
    other.take()
    assert {json.loads(fsspec.filesystem("memory").cat(name))["token"] for name in names(memory)} == {other.token}


def puts_claim(request: Request) -> bool:
    return request.method == "PUT" and "/claims/" in request.key


def store_and_refuse(handler: Handler, request: Request) -> None:
    """Store an object, and answer with an error that is not tried again."""
    handler.forward(request)
    refuse(403, "AccessDenied")(handler, request)


@pytest.mark.parametrize("fault", [refuse(403, "AccessDenied"), store_and_refuse], ids=["refused", "stored"])
def test_claims_are_given_back_when_taking_them_fails(s3: s3fs.S3FileSystem, s3_proxy: Proxy, fault: Fault) -> None:
    output, last = "s3://bucket/failed", "embeddings@blue@namer.json"
    with (
        s3_proxy.inject(fault, lambda r: puts_claim(r) and r.key.endswith(last)) as refused,
        # The object exists, so that only what reads it back can tell whose it is.
        s3_proxy.inject(refuse(403, "AccessDenied"), lambda r: r.key.endswith(last) and bool(refused), 1),
        pytest.raises(StorageError, match=r"claims/embeddings@blue@namer\.json cannot be"),
        claims_of(output),
    ):
        pytest.fail("the claims were not taken")
    assert names(output) == []
    with claims_of(output, seed=7):
        assert names(output)


@pytest.mark.parametrize("status", [(409, "ConditionalRequestConflict"), (412, "PreconditionFailed")])
def test_a_conflict_without_a_claim_is_tried_again(
    s3: s3fs.S3FileSystem, s3_proxy: Proxy, status: tuple[int, str]
) -> None:
    output = f"s3://bucket/conflict-{status[0]}"
    with s3_proxy.inject(refuse(*status), lambda r: puts_claim(r) and r.key.endswith("/samples.json"), 2) as refused:
        with claims_of(output) as claims:
            assert len(names(output)) == len(claims.layers)
        assert len(refused) == 2
    assert names(output) == []


def test_a_claim_or_dataset_json_that_is_stored_without_bytes_is_named(s3: s3fs.S3FileSystem, s3_proxy: Proxy) -> None:
    with (
        s3_proxy.inject(empty, puts_claim),
        pytest.raises(StorageError, match=r"claims/\S+ cannot be written: it is empty: it has 0 bytes, each time"),
    ):
        claims_of("s3://bucket/empty").take()
    assert names("s3://bucket/empty") == []

    def puts_manifest(request: Request) -> bool:
        return request.method == "PUT" and request.key.endswith(MANIFEST)

    claims = claims_of("s3://bucket/empty")
    with s3_proxy.inject(empty, puts_manifest), pytest.raises(StorageError) as raised:
        claims.publish({}, ())
    assert "bucket/empty/dataset.json is empty: it has 0 bytes." in str(raised.value)
    s3.rm_file("bucket/empty/dataset.json")
    with s3_proxy.inject(empty, puts_manifest, 1) as emptied:  # it is written again
        claims.publish({}, ())
    assert emptied
    assert find_manifest(claims.store) is not None


def test_a_store_that_refuses_conditional_puts_is_written_without_them(s3: s3fs.S3FileSystem, s3_proxy: Proxy) -> None:
    implied = "A header you provided implies functionality that is not implemented"
    with s3_proxy.inject(refuse(501, "NotImplemented", implied), lambda r: "If-None-Match" in r.headers) as refused:
        with claims_of("s3://bucket/refusing"):
            assert len(s3.ls("bucket/refusing/claims")) == len(refused)
        store = Store("s3://bucket/refusing")
        assert store.create(b"first", "file")
        assert not store.create(b"second", "file")
    assert refused
    assert s3.cat_file("bucket/refusing/file") == b"first"


def test_a_store_that_ignores_the_condition_of_puts_has_claims_that_are_read_back(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = fsspec.implementations.memory.MemoryFileSystem.pipe_file

    def pipe_file(self: Any, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        put(self, path, value)

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "pipe_file", pipe_file)
    first, other = claims_of(memory), claims_of(memory, seed=7)
    first.take()
    with pytest.raises(UserError, match="seed: 0 in that run"):
        other.take()
    for name in names(memory):  # a run that had not seen the claims writes its own over them
        fsspec.filesystem("memory").rm(name)
    other.take()
    with pytest.raises(UserError, match="seed: 7 in that run"):
        first.take()


def test_a_run_is_refused_before_it_writes_anything_or_starts_ray(
    shards: Callable[..., str], memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reinforce.processes.cluster.ray.init", lambda **_: pytest.fail("Ray was started"))
    claims_of(memory).take()
    before = names("memory://claims")
    with pytest.raises(UserError, match="another run writes to"):
        reinforce.run(config_of(shards(2), memory, seed=7))
    assert names("memory://claims") == before


def test_sigterm_while_a_run_plans_gives_its_claims_back_and_ends_it_with_143(
    shards: Callable[..., str], memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    def terminate(*_: object) -> None:
        assert names(memory)
        assert callable(signal.getsignal(signal.SIGTERM)), "else the signal kills the tests"
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("reinforce.processes.cluster.ray.init", lambda **_: pytest.fail("Ray was started"))
    monkeypatch.setattr("reinforce.engine.run.check_copies", terminate)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        config = tmp_path / "config.yaml"
        config.write_text(json.dumps(config_of(shards(2), memory)))
        status, _, error = command("run", str(config))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (status, error.splitlines()[-1].partition(";")[0]) == (143, "stopped")
    assert names(memory) == []


def test_claims_of_a_run_that_fails_or_has_left_its_lock_and_what_no_run_has_written_do_not_count(
    memory: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="odd"), claims_of(memory):
        raise ValueError("odd")
    assert names(memory) == []
    Store(memory).write_bytes(b"not json", "claims", "samples.json")
    claims_of(memory).take()
    claims_of(str(tmp_path / "out")).take()  # on this machine, where the lock of a local dataset ends with the run
    claims_of(str(tmp_path / "out"), seed=7).take()
