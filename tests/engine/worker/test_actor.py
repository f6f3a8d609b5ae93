"""Errors of a worker, as the driver receives them."""

from __future__ import annotations

import contextlib
import pickle
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reinforce.config import parse_config
from reinforce.engine.messages import (
    LayerFailure,
    LoadFailure,
    PendingShard,
    ShardFailure,
    ShardResult,
    StorageFailure,
)
from reinforce.engine.plan.plan import build_layers, describe_models, make_plan
from reinforce.engine.worker import actor
from reinforce.engine.worker.actor import Worker, as_actor
from reinforce.engine.worker.decode import DecodePool
from reinforce.engine.worker.models import LoadedModels, load_models
from reinforce.engine.worker.producers import base as inputs
from reinforce.engine.worker.producers import registry
from reinforce.engine.worker.producers.registry import measure_costs
from reinforce.errors import UserError
from schemas import Reason
from teachers.fast_paths.usage import set_enabled, snapshot
from tests.helpers.compiled_graphs import captured_graphs
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.decoding import decode_pool
from tests.helpers.models import ColorTeacher
from tests.helpers.models.tiny_models import open_clip_model
from tests.helpers.s3_proxy import Proxy, refuse
from tests.helpers.stand_in_cuda import stand_in_cuda


class Reversing(ColorTeacher):
    """Reverses the rows of large batches."""

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().encode_images(pixels.flip(0) if len(pixels) > 50 else pixels)


class Raising(ColorTeacher):
    """Raises ``error`` for images of samples; with ``start`` it does so in ``__init__``."""

    def __init__(self, device: torch.device, error: str, start: bool = False) -> None:
        super().__init__(device, size=8, dim=4)
        self.error = {"exit": SystemExit(1), "interrupt": KeyboardInterrupt(), "long": RuntimeError("x" * 3_000_000)}[
            error
        ]
        if start:
            raise self.error

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        raise self.error


class LocalWorker(Worker):
    """A worker without Ray, with the models of a config and its only shard."""

    def __init__(self, config: dict[str, Any]) -> None:
        parsed = parse_config(config)
        plan = make_plan(parsed)
        super().__init__(parsed, plan.layers, frozenset(plan.layers), "/nonexistent")
        self.models = load_models(parsed, plan.layers.values())
        self.pool = decode_pool()
        self.shard: PendingShard = plan.pending[0]

    def run(self) -> ShardResult:
        return self.process(self.shard)


def test_a_runtime_error_outside_a_model_may_be_the_workers_fault_and_an_error_of_a_storage_is_not(
    shards: Callable[..., str], tmp_path: Path
) -> None:
    worker = LocalWorker(config_of(shards(3), tmp_path / "out"))
    whole, worker.pool = worker.pool, DecodePool(1)
    worker.pool.close()
    with pytest.raises(ShardFailure, match="RuntimeError: the decode processes were stopped") as raised:
        worker.run()
    assert raised.value.worker_at_fault
    worker.pool = whole
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "samples").touch()  # a file where the folder should be
    with pytest.raises(ShardFailure, match="cannot be written") as raised:
        worker.run()
    assert not raised.value.worker_at_fault


def test_a_failing_object_store_charges_no_shard_and_the_next_lease_takes_fresh_credentials(
    s3: Any, s3_proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put_file(str(write_tar(tmp_path / "0.tar", members_of(0, 3))), "bucket/0.tar")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))

    def use_key(key: str) -> None:
        text = f"[default]\naws_access_key_id = {key}\naws_secret_access_key = k\n"
        (tmp_path / "credentials").write_text(text)

    def raised(worker: LocalWorker) -> StorageFailure:
        with pytest.raises(StorageFailure) as caught:
            worker.run()
        found = pickle.loads(pickle.dumps(caught.value))
        assert not found.worker_at_fault
        return found

    use_key("OLD")
    type(s3).clear_instance_cache()
    worker = LocalWorker(config_of("s3://bucket/0.tar", "s3://bucket/out", captioners={}, teachers={}))
    with s3_proxy.inject(refuse(404, "NoSuchKey"), lambda r: r.key == "bucket/0.tar"):
        error = raised(worker)
    assert (error.reason, error.missing) == (Reason.SHARD_MISSING, True)
    with s3_proxy.inject(refuse(403, "AccessDenied"), lambda r: r.method == "PUT"):
        error = raised(worker)
    assert (error.reason, error.missing) == (None, False)
    with s3_proxy.inject(refuse(403, "ExpiredToken"), lambda r: "=OLD/" in r.headers["Authorization"]):
        error = raised(worker)
        assert (str(error), error.reason, error.missing) == ("Forbidden", Reason.SHARD_UNREADABLE, False)
        use_key("NEW")
        assert worker.run().samples == 3
    assert not s3.exists("bucket/out/quarantine")


@pytest.mark.parametrize("error", ["exit", "interrupt", "long"])
def test_whatever_a_model_raises_costs_its_layer_and_is_cut(
    shards: Callable[..., str], tmp_path: Path, error: str
) -> None:
    teachers = {"ill": {"class": f"{__name__}:Raising", "options": {"error": error}}}
    config = config_of(shards(3), tmp_path / "out", captioners={}, teachers=teachers)
    with pytest.raises(LayerFailure, match=r"^embeddings/ill/images: ") as raised:
        LocalWorker(config).run()
    assert len(str(raised.value)) < 25_000
    assert "test_actor.py:" in str(raised.value), "the place in the class"
    teachers["ill"]["options"] |= {"start": True}
    parsed = parse_config({**config, "teachers": teachers})
    worker = Worker(parsed, build_layers(parsed, describe_models(parsed)), frozenset({"embeddings/ill/images"}), ".")
    with pytest.raises(LoadFailure, match=r"ill: (SystemExit|RuntimeError)|KeyboardInterrupt") as failed:
        worker.load()
    assert len(str(failed.value)) < 25_000


def test_an_error_in_the_data_is_not_the_workers_fault(
    shards: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(shards(3), tmp_path / "out")
    LocalWorker({**config, "teachers": {}}).run()
    worker = LocalWorker(config)
    [path] = (tmp_path / "out" / "captions" / "namer").glob("*.parquet")
    path.write_bytes(path.read_bytes()[:-9])
    monkeypatch.setattr(inputs, "file_damage", lambda *_: None)  # damaged on its way, and good the next time
    with pytest.raises(ShardFailure, match="RefusedFile: it is not a Parquet file, or it is cut off") as raised:
        worker.run()
    assert not raised.value.worker_at_fault


def test_an_error_that_the_user_must_fix_is_raised_as_it_is(shards: Callable[..., str], tmp_path: Path) -> None:
    source = shards(3)
    for output, seed in (("out", 0), ("other", 1)):
        LocalWorker(config_of(source, tmp_path / output, captioners={}, teachers={}, seed=seed)).run()
    worker = LocalWorker(config_of(source, tmp_path / "out", captioners={}))
    shutil.rmtree(tmp_path / "out" / "samples")
    shutil.copytree(tmp_path / "other" / "samples", tmp_path / "out" / "samples")
    with pytest.raises(UserError, match="fingerprint"):
        worker.run()


def test_a_relative_output_is_in_the_folder_of_the_driver_which_must_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    driver, relative = tmp_path / "driver", parse_config(config_of("source.tar", "out"))
    with pytest.raises(LoadFailure, match=rf"^output out is relative to {driver}, which does not exist on"):
        Worker(relative, {}, frozenset(), str(driver)).load()
    absolute = parse_config(config_of("source.tar", tmp_path / "out", captioners={}, teachers={}))
    worker = Worker(absolute, {}, frozenset(), str(driver))
    assert worker.load().accelerator == "cpu"
    worker.pool.close()
    driver.mkdir()
    assert Worker(relative, {}, frozenset(), str(driver)).store.root == f"{driver}/out"


def test_a_worker_does_not_start_with_a_teacher_that_is_wrong_in_full_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    teachers = {"red": {"class": "tests.engine.worker.test_actor:Reversing"}}
    config = parse_config(config_of("x.tar", "out", captioners={}, teachers=teachers, workers={"batch": 64}))
    layers = build_layers(config, describe_models(config))
    worker = Worker(config, layers, frozenset(layers), str(tmp_path))
    with pytest.raises(LoadFailure, match=r"red fails its self-test \(images, a batch of 64\): .*order of the rows"):
        worker.load()
    worker.pool.close()


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_worker_counts_operations_of_towers_that_stay_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    monkeypatch.chdir(tmp_path)
    teachers = {"vit": {"model": open_clip_model(tmp_path / "vit"), "precision": "fp32", "compile": True}}
    settings = {"batch": 8, "gpus": gpus}
    config = parse_config(config_of("x.tar", "out", captioners={}, teachers=teachers, workers=settings))
    layers = build_layers(config, describe_models(config))
    worker = Worker(config, layers, frozenset(layers), str(tmp_path))
    calls, default = [], sys.getswitchinterval()

    def encode(models: LoadedModels, *sizes: int) -> None:
        for rows in sizes:
            before = graphs.calls
            models.loaded["teachers"]["vit"].encode_images(models.accelerator.put(torch.zeros(rows, 3, 32, 32)))
            calls.append(graphs.calls - before)

    def measure(models: LoadedModels, *others: Any) -> Any:
        encode(models, 1)
        costs = measure_costs(models, *others)
        encode(models, 1, 40, 70)  # in batches of sizes that were compiled before, and of others
        return costs

    monkeypatch.setattr(registry, "peak_flops", lambda *_: 1e12)
    monkeypatch.setattr(actor, "measure_costs", measure)
    set_enabled(True)
    try:
        with stand_in_cuda() if gpus else contextlib.nullcontext(), captured_graphs() as graphs:
            worker.load()
    finally:
        worker.pool.close()
        sys.setswitchinterval(default)
        torch.use_deterministic_algorithms(False)  # as the process was
    assert worker.models.costs["embeddings/vit/images"].flops > 1e6
    assert calls == [2, 2, 2, 2], "of two blocks"
    [used] = [one for one in snapshot() if one.path == "compile"]
    assert (used.plain, used.reason) == (0, None)


def test_a_worker_reports_the_layer_and_the_batch_in_which_a_shard_hangs_while_it_hangs(
    shards: Callable[..., str], tmp_path: Path
) -> None:
    worker = LocalWorker(config_of(shards(3), tmp_path / "out", captioners={}))
    running, resume = threading.Event(), threading.Event()
    teacher: Any = worker.models.loaded["teachers"]["red"]
    encode = teacher.encode_images

    def hang(pixels: Any) -> Any:
        running.set()
        resume.wait(600)
        return encode(pixels)

    teacher.encode_images = hang
    thread = threading.Thread(target=worker.run)
    thread.start()
    assert running.wait(600)
    time.sleep(0.1)
    [lease] = worker.pulse().leases
    resume.set()
    thread.join(600)
    assert (lease.shard, lease.stage) == (worker.shard.name, "embeddings/red/images")
    assert lease.what == "3 rows, keys '00000000' to '00000002'"
    assert 0.1 <= lease.seconds < 240
    after = worker.pulse()
    assert after.leases == ()
    assert after.slowest["embeddings/red/images"] > 0.1
    assert after.slowest.keys() >= {"reading", "decoding", "writing"}
    assert 2**20 < after.memory < 2**40


def test_workers_start_with_small_pages_unless_the_environment_sets_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def variables() -> dict[str, str]:
        actor = as_actor(parse_config(config_of("x.tar", "y")))
        found: dict[str, str] = actor._default_options["runtime_env"]["env_vars"]
        return found

    monkeypatch.delenv("MIMALLOC_ALLOW_THP", raising=False)
    assert variables()["MIMALLOC_ALLOW_THP"] == "0"
    monkeypatch.setenv("MIMALLOC_ALLOW_THP", "1")
    assert variables()["MIMALLOC_ALLOW_THP"] == "1"


def test_threads_of_a_worker_with_an_accelerator_take_turns_often(shards: Callable[..., str], tmp_path: Path) -> None:
    default = sys.getswitchinterval()
    config = parse_config(config_of(shards(1), tmp_path / "out", captioners={}, teachers={}, workers={"gpus": 1}))
    try:
        with contextlib.suppress(LoadFailure):  # of a machine without an accelerator
            Worker(config, make_plan(config).layers, frozenset(), "/nonexistent").load()
        assert sys.getswitchinterval() == pytest.approx(0.5e-3)
    finally:
        sys.setswitchinterval(default)
        torch.use_deterministic_algorithms(False)  # as the process was
