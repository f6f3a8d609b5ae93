"""Errors of a device that is out of memory, batches that are halved then, and full batches before a run."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reinforce.config import Config, parse_config
from reinforce.dataset.layers import Layer
from reinforce.engine.messages import ShardResult, raising_layer_failure
from reinforce.engine.plan.plan import build_layers, describe_models
from reinforce.engine.worker.actor import find_batch, fit_batch
from reinforce.engine.worker.decode import PixelCells, Row
from reinforce.engine.worker.models import (
    BatchSizes,
    Counters,
    Demand,
    LoadedModels,
    OutOfMemory,
    attempt,
    memory_hint,
    texts_per_batch,
)
from reinforce.errors import UserError
from teachers.runtime.accelerator import Accelerator, is_out_of_memory
from tests.helpers.batches import Changed, make_inference, models_of
from tests.helpers.data import config_of, members_of, tree, write_tar
from tests.helpers.reinforced import shard_process

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."


class SmallDevice(Accelerator):
    """A device with memory for ``capacity`` rows, copied ones and those in a forward pass."""

    def __init__(self, capacity: int) -> None:
        super().__init__("cpu")
        self.capacity, self.used, self.copied = capacity, 0, threading.Semaphore(0)
        self._changing = threading.RLock()

    def put_parts(self, parts: Sequence[np.ndarray]) -> torch.Tensor:
        class Block(np.ndarray):
            """Memory of the device, used until no tensor shares it."""

        block = np.concatenate(parts).view(Block)
        with self._changing:
            self.check(len(block))
            self.used += len(block)
        weakref.finalize(block, self.free, len(block))
        self.copied.release()
        return torch.from_numpy(block)

    def check(self, rows: int) -> None:
        if self.used + rows > self.capacity:
            raise torch.cuda.OutOfMemoryError(MESSAGE)

    def free(self, rows: int) -> None:
        with self._changing:
            self.used -= rows


def limited(function: Callable[..., Any], limit: int) -> Callable[..., Any]:
    """``function``, for which at most ``limit`` inputs fit in memory."""

    def run(inputs: Any, *arguments: Any) -> Any:
        arrays = isinstance(inputs, list) and isinstance(inputs[0], np.ndarray)  # of a copy
        if (sum(map(len, inputs)) if arrays else len(inputs)) > limit:
            raise torch.cuda.OutOfMemoryError(MESSAGE)
        return function(inputs, *arguments)

    return run


def limit_memory(models: LoadedModels, where: str, limit: int) -> None:
    """Let one of a worker's steps run out of memory above ``limit`` inputs."""
    owner: Any = {"copy": models.accelerator, "captions": models.loaded.get("captioners", {}).get("namer")}.get(where)
    owner = owner or models.loaded["teachers"]["red"]
    name = {"copy": "put_parts", "captions": "caption", "images": "encode_images", "texts": "encode_texts"}[where]
    setattr(owner, name, limited(getattr(owner, name), limit))


def process(folder: Path, batch: int, where: str = "copy", limit: int = 1000) -> tuple[ShardResult, dict[str, bytes]]:
    """A shard of 13 rows with two augmentations in row groups of 8 -> the result and the files of its layers."""
    output = folder / f"out-{batch}-{limit}"
    shard = shard_process(config_of(f"{folder}/0.tar", output, workers={"batch": batch}))
    limit_memory(shard.models, where, limit)
    return shard.run(), tree(output)


@pytest.mark.parametrize(
    ("where", "limit", "layer", "sizes"),
    [
        ("images", 4, "embeddings/red/images", ["8 images", "4 images", "2 images"]),
        ("captions", 2, "captions/namer", ["8 images", "4 images", "2 images"]),
        ("copy", 2, "copying images", ["8 images", "4 images", "2 images"]),
        ("texts", 4, "embeddings/red/caption", ["8 texts", "4 texts"]),
    ],
)
def test_a_shard_that_runs_out_of_memory_is_finished_as_with_smaller_batches(
    where: str, limit: int, layer: str, sizes: list[str], tmp_path: Path
) -> None:
    write_tar(tmp_path / "0.tar", members_of(0, 13))
    result, files = process(tmp_path, 16, where, limit)
    _, small = process(tmp_path, 4)
    assert result.refused == {}
    assert files.keys() == small.keys()
    same = {name for name in files if where != "texts" or "images" not in name}
    assert {name: files[name] for name in same} == {name: small[name] for name in same}
    notes = [note for note in result.notes if note.startswith(layer)]
    assert [note.partition("now on ")[2].partition(" at once")[0] for note in notes] == sizes[1:]
    assert f"{layer}: {sizes[0]} at once do not fit in the memory of the device" in notes[0]
    assert MESSAGE in notes[0]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("images", r"embeddings/red/images: one augmented image does not fit .* Use teachers\.red: a smaller model"),
        ("captions", r"captions/namer: one image with its 2 captions does not fit .* fewer `captions`"),
        ("copy", r"copying images: the pixels of one image do not fit .* smaller augmentations\.count"),
        ("texts", r"embeddings/red/caption: one text does not fit .* The error was OutOfMemoryError: CUDA out of mem"),
    ],
)
def test_a_single_input_that_does_not_fit_ends_the_run_with_one_error_and_no_quarantine(
    where: str, message: str, tmp_path: Path
) -> None:
    write_tar(tmp_path / "0.tar", members_of(0, 3))
    with pytest.raises(UserError, match=message):
        process(tmp_path, 16, where, 0)
    assert tree(tmp_path / "out-16-0") == {}


def test_the_augmentations_of_one_row_are_encoded_in_parts_where_they_do_not_fit_together(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", members_of(0, 3))
    result, files = process(tmp_path, 2, "images", 1)
    assert [note for note in result.notes if "1 augmented image at once" in note]
    assert files.keys() == process(tmp_path, 2)[1].keys()


def test_the_batch_that_the_other_shard_has_copied_is_not_the_cause_of_a_second_shortage() -> None:
    config = parse_config(config_of("x.tar", "out", workers={"batch": 16}))
    layer = build_layers(config, describe_models(config))["embeddings/red/images"]
    device = SmallDevice(17)
    first = threading.Event()

    def encode(out: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        if not first.is_set():
            first.set()
            for _ in range(2):  # until both shards have copied their batch
                assert device.copied.acquire(timeout=600)
        device.check(3 * len(pixels) // 2)  # 8 rows do not fit, 4 do, and 2 beside a copied batch of 8
        return out

    models = models_of(Changed(encode), accelerator=device)
    crops = np.random.default_rng(0).integers(0, 255, (8, 2, 24, 24, 3), np.uint8)
    outputs: list[Any] = []

    def shard() -> None:
        rows = [Row(f"key{i}", None, i) for i in range(8)]
        outputs.append(make_inference(config, [layer], models).run(rows, PixelCells(crops)))

    threads = [threading.Thread(target=shard) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert len(outputs) == 2
    np.testing.assert_array_equal(outputs[0][layer.name], outputs[1][layer.name])
    assert outputs[0][layer.name].shape == (8, 2, 8)
    assert models.batches.fitting("rows", 8) == 4
    assert device.used == 0


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.77 GB, max allowed: 18.13 GB)."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_errors_of_memory_are_recognised_also_as_the_cause_of_another(error: Exception) -> None:
    assert is_out_of_memory(error)
    other = ValueError("our_lab: encoding failed")
    other.__cause__ = error
    assert is_out_of_memory(other)
    assert memory_hint(other).startswith(". The models of the config do not fit")


@pytest.mark.parametrize("of", ["GET was unable", "FIND was unable", "Unable"])
def test_a_convolution_without_an_algorithm_has_a_hint_with_what_to_set(of: str) -> None:
    error = RuntimeError(f"teacher vit: RuntimeError: {of} to find an engine to execute this computation")
    assert "Set workers.deterministic to false" in memory_hint(error)


def test_other_errors_are_not_of_memory() -> None:
    for error in (RuntimeError("device-side assert triggered"), ValueError("CUDA out of memory"), MemoryError()):
        assert not is_out_of_memory(error)
        assert memory_hint(error) == ""
        with pytest.raises(type(error)):
            attempt(lambda error=error: _raise(error))  # type: ignore[misc]


def _raise(error: Exception) -> None:
    raise error


def test_an_attempt_that_runs_out_of_memory_releases_what_its_functions_held() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def encode() -> torch.Tensor:
        large = torch.zeros(1000)
        held.append(weakref.ref(large))
        return large @ torch.empty(2**60)  # the CPU's allocator raises

    def run() -> torch.Tensor:
        with raising_layer_failure("embeddings/red/images"):
            return encode()

    result = attempt(run)
    assert result.layer == "embeddings/red/images"
    assert "DefaultCPUAllocator" in result.text
    assert held[0]() is None
    assert attempt(lambda: 3) == 3


def loaded(batch: Any, capacity: int = 17) -> tuple[LoadedModels, Config, list[Layer]]:
    """Models of which ``red`` needs memory for three rows for each that it encodes, and encodes at most 10 texts."""
    device = SmallDevice(capacity)

    def encode(out: torch.Tensor, inputs: Any) -> torch.Tensor:
        if isinstance(inputs, list) and len(inputs) > 10:
            raise torch.cuda.OutOfMemoryError(MESSAGE)
        device.check(0 if isinstance(inputs, list) else 3 * len(inputs) // 2)
        return out

    config = parse_config(config_of("x.tar", "out", workers={"batch": batch}))
    layers = [*build_layers(config, describe_models(config)).values()]
    return models_of(Changed(encode), accelerator=device), config, layers


def test_auto_is_the_largest_batch_that_fits_while_others_are_copied_and_on_the_cpu_a_fixed_number() -> None:
    # four batches of 4 crops and 4 whole images are copied, and 12 more are needed
    models, config, layers = loaded("auto", 50)
    found = find_batch(models, config, layers, largest=64)
    assert found.workers.images == 8, "4 rows with 2 augmentations"
    assert models.batches.fitting("texts", 64) == 8
    assert models.batches.take_notes() == ()
    assert models.counters == Counters()
    with models.batches.on_device() as first, models.batches.on_device() as second:
        assert first
        assert second, "the search is no reason to copy one batch at a time"
    assert fit_batch(models, config, layers).workers.batch == 256
    assert models.counters == Counters(), "nothing is tried"


def test_a_batch_that_does_not_fit_is_reported_before_the_run() -> None:
    models, config, layers = loaded(16)
    assert find_batch(models, config, layers).workers.batch == 16
    line = "8 images at once do not fit in the memory of the device; from now on 4 images"
    assert any(line in note for note in models.batches.take_notes())


def test_a_model_that_fails_in_a_full_batch_only_ends_the_run_before_it_begins() -> None:
    models, config, layers = loaded(64, 10_000)

    def caption(pixels: torch.Tensor, seeds: np.ndarray) -> Any:
        raise IndexError(f"no room for {len(pixels)}")

    captioner: Any = models.loaded["captioners"]["namer"]
    captioner.caption = caption
    with pytest.raises(UserError, match=r"captions/namer fails in a full batch of 64: IndexError: no room for 32"):
        find_batch(models, config, layers)


def test_secrets_are_removed_from_the_cause_before_it_is_cut() -> None:
    config = parse_config(config_of("https://user:0123456789abcdef@host/x.tar", "y"))
    sizes, demand = BatchSizes(), Demand("rows", "one does", "a smaller one")
    shortage = OutOfMemory("layer", f"{'x' * 240} 0123456789abcdef {'y' * 500}")
    sizes.halve(shortage, demand, 8, config, shared=False)
    with pytest.raises(UserError) as raised:
        sizes.halve(shortage, demand, 1, config, shared=False)
    for text in (*sizes.take_notes(), str(raised.value)):
        assert "xxx (sec" in text
        assert "0123" not in text
        assert len(text) < 700


@pytest.mark.parametrize(("workers", "texts"), [((16, 1), 1024), ((2048, 1), 2048), ((16, 0), 16)])
def test_texts_are_encoded_in_large_batches_where_launching_kernels_decides(
    workers: tuple[int, int], texts: int
) -> None:
    batch, gpus = workers
    assert texts_per_batch(parse_config(config_of("x.tar", "y", workers={"batch": batch, "gpus": gpus}))) == texts


def test_a_batch_must_be_a_number_or_auto() -> None:
    for wrong in (0, "large", True, 1.5):
        with pytest.raises(UserError, match=r"workers\.batch: must be a number of images, at least 1, or auto, got"):
            parse_config(config_of("x.tar", "out", workers={"batch": wrong}))
