"""The flags of torch on which equal bytes on CUDA depend."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.train import RunConfig

from reinforce.config import parse_config
from reinforce.engine.check_models import check_class
from reinforce.engine.worker.actor import Worker, as_actor
from reinforce.errors import UserError
from reinforce.training.distributed.ranks import join_ranks
from reinforce.training.launch import launch
from reinforce.training.ray_train import environment_of_ranks
from teachers.fast_paths.step_graphs import decoding_kernels
from teachers.runtime import determinism
from teachers.runtime.accelerator import Accelerator
from tests.helpers.data import config_of
from tests.helpers.models.tiny_coca import batch, build
from tests.helpers.stand_in_cuda import stand_in_cuda
from tests.helpers.trainings import PairFeed, TowersTask, job, rows, run
from tests.helpers.trainings import training as training_config

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def flags() -> dict[str, bool]:
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return {
        "tf32 in products": cuda.matmul.allow_tf32,
        "tf32 in convolutions": cudnn.allow_tf32,
        "sums in bf16": bool(cuda.matmul.allow_bf16_reduced_precision_reduction),
        "sums in fp16": bool(cuda.matmul.allow_fp16_reduced_precision_reduction),
        "cudnn attention": cuda.cudnn_sdp_enabled(),
        "flash attention": cuda.flash_sdp_enabled(),
        "deterministic": cudnn.deterministic,
        "benchmark": cudnn.benchmark,
    }


SETTLED = {**dict.fromkeys(flags(), False), "flash attention": True, "deterministic": True}


@pytest.fixture(autouse=True)
def flags_of_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch's defaults before each test and after it."""
    monkeypatch.delenv(WORKSPACE, raising=False)

    def reset() -> None:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = False

    reset()
    yield
    os.environ.pop(WORKSPACE, None)
    reset()


def worker(folder: Path, **options: bool) -> None:
    config = config_of("x.tar", folder / "out", captioners={}, teachers={}, workers={"gpus": 0, **options})
    started = Worker(parse_config(config), {}, frozenset(), str(folder))
    started.load()
    started.pool.close()


def training(folder: Path, **options: bool) -> None:
    launch(lambda _: (TowersTask(), PairFeed()), job(folder, steps=3, compute=options))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("start", [worker, training, lambda _: check_class("tests.helpers.models:ColorTeacher", {})])
def test_workers_trainings_and_checks_settle_the_flags_before_they_load_models(tmp_path: Path, start: Any) -> None:
    assert flags() != SETTLED
    start(tmp_path / "deterministic")
    assert flags() == SETTLED
    assert os.environ[WORKSPACE] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled(), "it would change operations on CPUs"
    if start in (worker, training):
        start(tmp_path / "fastest", deterministic=False)
        assert flags() == {**SETTLED, "deterministic": False, "benchmark": True}


def test_ray_starts_processes_with_the_workspace_of_cublas_unless_one_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment_of_ranks(gpus=0) == {}, "ranks on CPUs can use processes that wait"
    for value in (":4096:8", ":16:8"):
        assert RunConfig(**environment_of_ranks(gpus=1)).worker_runtime_env == {"env_vars": {WORKSPACE: value}}
        actor = as_actor(parse_config(config_of("x.tar", "y")))
        assert actor._default_options["runtime_env"]["env_vars"][WORKSPACE] == value
        monkeypatch.setenv(WORKSPACE, ":16:8")


def test_on_cuda_operations_are_deterministic_and_only_trainings_require_it() -> None:
    determinism.set_flags("cuda")
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled(), "teachers may use any operation"
    determinism.set_flags("cuda:1", strict=True)
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "else backward passes of attention are not"
    assert not torch.utils.deterministic.fill_uninitialized_memory
    with determinism.inference():
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    determinism.set_flags("cuda", deterministic=False)
    with stand_in_cuda(), join_ranks(training_config().compute, "cuda:0"):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.are_deterministic_algorithms_enabled(), "a notebook goes on"


def test_captions_are_decoded_without_sorting_indices_of_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = build("cpu")
    seen: list[bool] = []
    begin = captioner._decoder.begin

    def noting(*arguments: Any) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        begin(*arguments)

    monkeypatch.setattr(captioner._decoder, "begin", noting)
    determinism.set_flags("cuda")
    captioner.generate(*batch(captioner, 1))
    assert seen == [False]
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    with decoding_kernels(torch.device("cuda")):
        assert not torch.are_deterministic_algorithms_enabled()
    assert torch.are_deterministic_algorithms_enabled(), "as it was"


class Failing(TowersTask):
    """Its loss calls an operation that raises."""

    def __init__(self, operation: Callable[[], object]) -> None:
        super().__init__()
        self.operation = operation

    def losses(self, encoded: Any, batch: Any) -> dict[str, torch.Tensor]:
        self.operation()
        return super().losses(encoded, batch)


def test_a_training_with_an_operation_without_a_deterministic_kernel_names_it_and_the_switch(tmp_path: Path) -> None:
    def put() -> None:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))  # has no deterministic kernel on CPUs, too

    torch.use_deterministic_algorithms(True)
    with pytest.raises(UserError, match=r"kernel for put_, which .* Set train\.compute\.deterministic to false"):
        launch(lambda _: (Failing(put), PairFeed()), job(tmp_path, steps=3))


@pytest.mark.parametrize(("deterministic", "key"), [(True, "deterministic to false: a"), (False, "precision;")])
def test_a_convolution_without_an_algorithm_names_what_to_set(tmp_path: Path, deterministic: bool, key: str) -> None:
    """cuDNN says the same where memory for its workspace is lacking: the first parts that fit are found."""
    no_engine = "GET was unable to find an engine to execute this computation"
    calls: list[int] = []

    def run_out(until: float) -> None:
        calls.append(1)
        if len(calls) < until:
            raise RuntimeError(no_engine)

    made = job(tmp_path / "lacking", steps=3, compute={"deterministic": deterministic})
    with stand_in_cuda(), pytest.raises(UserError, match=rf"^cuDNN has no .*algorithm .*fp32.* train\.compute\.{key}"):
        run(made, task=Failing(lambda: run_out(math.inf)), accelerator=Accelerator("cuda"))
    assert len(calls) == 5, "16 samples in 1, 2, 4, 8 and 16 parts"
    calls.clear()
    with stand_in_cuda():
        run(job(tmp_path / "parts", steps=3), task=Failing(lambda: run_out(3)), accelerator=Accelerator("cuda"))
    assert rows(tmp_path / "parts")[-1]["step"] == 3


def test_tf32_is_used_by_models_of_that_precision_only(monkeypatch: pytest.MonkeyPatch) -> None:
    determinism.set_flags("cpu")
    accelerator = Accelerator("cpu", "tf32")
    with accelerator.forward():
        assert not torch.backends.cudnn.allow_tf32, "CPUs have no TF32"
        assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == torch.float32
    accelerator.device = torch.device("cuda")
    with accelerator.forward():
        assert flags() == {**SETTLED, "tf32 in products": True, "tf32 in convolutions": True}
    assert flags() == SETTLED
    accelerator.precision = "fp32"
    with accelerator.forward():
        assert flags() == SETTLED
