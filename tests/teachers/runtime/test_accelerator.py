"""Devices, precisions, copies, frozen layers, and the flags of torch on which equal bytes on CUDA depend."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from ray.train import RunConfig

from reinforce.config import parse_config
from reinforce.engine.check_models import check_class
from reinforce.engine.worker.actor import Worker, as_actor
from reinforce.errors import UserError
from reinforce.training.launch import launch
from reinforce.training.ranks import join_ranks
from reinforce.training.ray_train import environment_of_ranks
from teachers.fast_paths.frozen import FrozenAttention, FrozenLinear, freeze
from teachers.fast_paths.recompilation import decoding_kernels
from teachers.runtime import determinism
from teachers.runtime.accelerator import Accelerator
from tests.helpers.data import config_of
from tests.helpers.models.tiny_coca import batch, build, coca_config
from tests.helpers.stand_in_cuda import stand_in_cuda
from tests.helpers.trainings import PairFeed, TowersTask, job, rows, run
from tests.helpers.trainings import training as training_config


@pytest.mark.parametrize(
    ("name", "precision", "message"),
    [
        ("gpu", "fp32", "'gpu' is unknown: use auto, cpu"),
        ("cuda:64", "fp32", "not available: torch sees"),
        ("cpu", "int4", "use fp32, tf32, bf16, fp16"),
    ],
)
def test_an_unknown_device_or_precision_is_rejected(name: str, precision: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Accelerator(name, precision)  # type: ignore[arg-type]
    assert Accelerator("auto").device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_forward_computes_in_the_precision_and_keeps_float32_weights(precision: str, dtype: torch.dtype) -> None:
    device = Accelerator("cpu", precision)  # type: ignore[arg-type]
    module = device.prepare(torch.nn.Linear(8, 8))
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    with device.forward():
        out = module(torch.ones(1, 8))
    assert out.dtype == dtype
    assert out.is_inference()
    assert module.weight.dtype == torch.float32
    assert module(torch.ones(1, 8)).dtype == torch.float32, "autocast ends with the context"


def test_copies_and_marks_work_on_the_cpu() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    frozen = array.copy()
    frozen.flags.writeable = False
    device = Accelerator("cpu")
    start = device.mark()
    for source in (array, frozen, array[:, ::-1].copy(), torch.from_numpy(array)):
        with device.copy_stream():
            tensor = device.put(source)
        device.wait_for_copies([tensor])
        assert tensor.dtype == torch.uint8
        np.testing.assert_array_equal(tensor.numpy(), np.asarray(source))
    device.synchronize()
    assert device.seconds_between(start, device.mark()) > 0
    assert device.peak_memory() > 0


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("precision", "apart"), [("fp32", 1e-5), ("bf16", 0.02), ("fp16", 0.02)])
def test_a_frozen_linear_layer_matches_torch_under_autocast(precision, apart, bias, packed):
    accelerator, plain = Accelerator("cpu", precision), torch.nn.Linear(48, 33, bias=bias)
    fixed = FrozenLinear(plain.weight, plain.bias, accelerator, packed)
    for shape in ((1, 48), (3, 7, 48), (0, 48)):
        with accelerator.forward():
            found, wanted = fixed(noise(*shape)), plain(noise(*shape))
        assert found.dtype == wanted.dtype == accelerator.dtype
        torch.testing.assert_close(found, wanted, atol=apart, rtol=apart)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 24, "vdim": 24}], ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_a_frozen_attention_matches_torch(options, masked):
    plain = torch.nn.MultiheadAttention(32, 4, batch_first=True, **options).eval()
    query, key = noise(2, 5, 32), noise(2, 6, options.get("kdim", 32), seed=1)
    mask = noise(5, 6, seed=2) if masked else None
    with torch.inference_mode():
        wanted, _ = plain(query, key, key, need_weights=False, attn_mask=mask)
        found, _ = FrozenAttention(plain, Accelerator("cpu"))(query, key, key, need_weights=False, attn_mask=mask)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooled", [True, False])
def test_a_frozen_image_tower_gives_the_same_tokens(pooled):
    config = coca_config()["model_cfg"]
    config["vision_cfg"]["attentional_pool"] = pooled
    del config["custom_text"]
    visual = open_clip.CoCa(**config).eval().requires_grad_(False).visual
    pixels = noise(2, 3, 32, 32)
    with torch.inference_mode():
        wanted = visual(pixels)
        freeze(visual, Accelerator("cpu"))
        found = visual(pixels)
    kinds = [type(module) for module in visual.modules()]
    assert kinds.count(FrozenAttention) == (2 if pooled else 1)
    assert torch.nn.Linear not in kinds
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


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
