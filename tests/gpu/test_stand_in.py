"""Copies and little memory on a stand-in for CUDA."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reinforce.config import Config, parse_config
from reinforce.dataset.files.store import Store
from reinforce.engine.inference.models import Models, load_models
from reinforce.engine.plan.plan import Plan, make_plan
from reinforce.engine.worker import full_batch
from reinforce.engine.worker.full_batch import find_batch
from reinforce.engine.worker.producers.registry import measure_costs
from reinforce.engine.worker.shard import ShardProcess
from reinforce.errors import UserError
from teachers.runtime.accelerator import Accelerator
from tests.helpers.batches import CONFIG, LAYERS, make_inference, pixels, rows
from tests.helpers.data import config_of, members_of, tree, write_tar
from tests.helpers.decoding import decode_pool
from tests.helpers.models import ColorTeacher, GroupCaptioner, SeedCaptioner
from tests.helpers.models.tiny_models import open_clip_model
from tests.helpers.stand_in_cuda import StandIn, stand_in_cuda


@pytest.fixture
def cuda() -> Iterator[StandIn]:
    with stand_in_cuda() as cuda:
        yield cuda


def test_copies_of_pinned_memory_do_not_wait(cuda: StandIn) -> None:
    arena = np.zeros((4, 2), np.float32)
    accelerator = Accelerator("cuda")
    accelerator.pin(arena)
    with cuda.counted() as counts:
        tensor = accelerator.put(np.ones(8, np.float32))
        parts = accelerator.put_parts([arena[:1], arena[2:]])
        assert parts.to("cpu", non_blocking=True).shape == (3, 2)
        torch.empty(8, pin_memory=True).copy_(tensor, non_blocking=True)
    copies = [(copy.to_device, copy.bytes) for copy in counts.copies]
    assert copies == [(True, 32), (True, 8), (True, 16), (False, 24), (False, 32)]
    assert counts.synchronizations == 0, counts


NAMES = ("embeddings/red/images", "captions/namer")


class Noting(ColorTeacher):
    """Notes what the stream of the first batch has waited for, and what memory is kept for it."""

    awaited: list[Any]
    recorded: int

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.is_cuda:
            stream: Any = torch.cuda.current_stream()
            self.awaited, self.recorded = [*stream.awaited], len(stream.recorded)
        return super().encode_images(pixels)


def outputs(device: str) -> tuple[dict[str, Any], Noting]:
    there = torch.device(device)
    models = Models(
        {"teachers": {"red": Noting(there)}, "captioners": {"namer": SeedCaptioner(there)}}, Accelerator(device)
    )
    cells = pixels()
    for array in (cells.crops, *cells.whole.values()):
        models.accelerator.pin(array)
    run = make_inference(CONFIG, [LAYERS[name] for name in NAMES], models).run
    return run(rows(3), cells), models.teachers["red"]  # type: ignore[return-value]


def test_images_are_copied_while_the_device_computes_and_models_wait_for_them() -> None:
    expected, _ = outputs("cpu")
    with stand_in_cuda() as cuda:
        with cuda.counted() as counts:
            found, teacher = outputs("cuda")
        copies = [copy for copy in counts.copies_to_device() if copy.place.startswith("teachers/runtime/accelerator")]
        assert {copy.blocking for copy in copies} == {False}
        (stream,) = {copy.stream for copy in copies}
        assert stream is not torch.cuda.default_stream()
        assert (teacher.awaited, teacher.recorded) == ([stream], 2), "crops and whole images"
    np.testing.assert_allclose(found[NAMES[0]], expected[NAMES[0]], atol=1e-6)
    assert found[NAMES[1]] == expected[NAMES[1]]


def test_cells_can_be_written_again_where_only_captions_of_row_groups_see_images(cuda: StandIn) -> None:
    def captions(device: str) -> Any:
        models = Models({"captioners": {"namer": GroupCaptioner(torch.device(device))}}, Accelerator(device))
        cells = pixels()
        for array in cells.whole.values():
            models.accelerator.pin(array)
        outputs = make_inference(CONFIG, [LAYERS["captions/namer"]], models).run(rows(3), cells)
        for array in cells.whole.values():
            array[:] = 0  # as decode processes do for the next images
        encoded, drawn = zip(*outputs["captions/namer"], strict=True)
        return np.array(models.captioners["namer"].decode([*encoded], np.stack(drawn), 3))  # type: ignore[attr-defined]

    expected = captions("cpu")
    with cuda.delayed(), cuda.counted() as counts:
        np.testing.assert_allclose(captions("cuda"), expected, rtol=1e-5)
    streams = {copy.stream for copy in counts.copies_to_device()}
    assert torch.cuda.default_stream() not in streams
    [wait] = [place for place in counts.waits if "Event.synchronize" in place]
    assert counts.waits[wait] == 1, "for the copies alone, while models compute"


def test_memory_that_cannot_be_pinned_leaves_no_error_for_the_next_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = np.zeros(8, np.uint8)
    with stand_in_cuda() as cuda:
        accelerator, pending, operate = Accelerator("cuda"), list[RuntimeError](), cuda.operate

        def register(address: int, size: int, flags: int) -> int:
            pending.append(RuntimeError("CUDA error: out of memory"))
            return 2

        def kernel(*arguments: Any) -> Any:  # as C10_CUDA_KERNEL_LAUNCH_CHECK
            out = operate(*arguments)
            if pending:
                raise pending.pop()
            return out

        monkeypatch.setattr(torch.cuda.cudart(), "cudaHostRegister", register)
        monkeypatch.setattr(cuda, "operate", kernel)
        assert not accelerator.pin(memory)
        assert accelerator.put_parts([memory]).tolist() == [0] * 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("memory")
    write_tar(folder / "source" / "0.tar", members_of(0, 8))
    return config_of(
        f"{folder}/source/*.tar",
        folder / "out",
        captioners={},
        teachers={"vit": {"model": open_clip_model(folder / "vit"), "precision": "bf16"}},
        workers={"batch": 16, "max": 1, "gpus": 1},
    )


def load(config: dict[str, Any], **changes: Any) -> tuple[Config, Plan, Models]:
    parsed = parse_config({**config, **changes})
    plan = make_plan(parsed)
    return parsed, plan, load_models(parsed, plan.layers.values())


def test_a_shard_is_finished_with_less_memory_and_reports_it(
    config: dict[str, Any], tmp_path: Path, cuda: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    results = []
    parsed, plan, models = load(config, output=str(tmp_path / "whole"))
    models.costs = measure_costs(models, parsed, plan.layers.values())
    for output in ("whole", "halved"):
        store = Store(str(tmp_path / output))
        results.append(ShardProcess(plan.pending[0], parsed, plan.layers, store, models, decode_pool(), 8).run())
        cuda.memory = cuda.allocated + (cuda.peak - cuda.allocated) // 2
    whole, halved = results
    assert not [note for note in whole.notes if "at once" in note]
    assert any("from now on 4 images at once" in note for note in halved.notes), halved.notes
    assert (halved.samples, halved.refused) == (8, {})
    assert tree(tmp_path / "halved").keys() == tree(tmp_path / "whole").keys()
    assert halved.device["name"] == "NVIDIA H100 80GB HBM3"
    assert halved.device["memory_peak"] > 0
    images = halved.stages["embeddings/vit/images"]
    assert images["flops"] > 16 * 1e5
    assert images["peak_flops"] == pytest.approx(images["seconds"] * 989e12)


def test_auto_is_what_fits_and_without_memory_for_one_image_the_run_ends(
    config: dict[str, Any], cuda: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed, plan, models = load(config, workers={"batch": "auto", "gpus": 1})
    layers, models_only = [plan.layers["embeddings/vit/images"]], cuda.allocated
    with monkeypatch.context() as patch:
        patch.setattr(full_batch, "forget_peak", lambda _: None)
        assert find_batch(models, parsed, layers, largest=8).workers.images == 8
    cuda.memory = models_only + int(0.6 * (cuda.peak - models_only))
    assert find_batch(models, parsed, layers, largest=8).workers.images == 4
    assert cuda.peak == cuda.allocated, "the peak of the run does not include the search"
    cuda.memory = models_only + 1000
    with pytest.raises(UserError, match=r"does not fit in the memory of the device|do not fit"):
        find_batch(models, parsed, layers, largest=8)


def test_a_thread_that_drops_a_tensor_waits_for_none_that_computes(cuda: StandIn) -> None:
    """Threads of gloo drop tensors of a collective while they hold what the computing thread waits for."""
    tensors, before = [torch.ones(1000, device="cuda")], cuda.allocated
    with cuda._one_thread:
        thread = threading.Thread(target=tensors.clear)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
    assert cuda.allocated == before - 4000
