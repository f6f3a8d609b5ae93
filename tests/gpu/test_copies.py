"""Copies, page-locked memory and captures on a stand-in for CUDA."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from reinforce.engine.inference.models import Models
from teachers.device.accelerator import Accelerator
from teachers.device.step_graphs import Steps
from tests.helpers.batches import CONFIG, LAYERS, make_inference, pixels, rows
from tests.helpers.models import ColorTeacher, SeedCaptioner
from tests.helpers.stand_in_cuda import stand_in_cuda

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
    models = Models({"red": Noting(there)}, {"namer": SeedCaptioner(there)}, Accelerator(device))
    cells = pixels()
    for array in (cells.crops, *cells.views.values()):
        models.accelerator.pin(array)
    run = make_inference(CONFIG, [LAYERS[name] for name in NAMES], models).run
    return run(rows(3), cells), models.teachers["red"]  # type: ignore[return-value]


def test_images_are_copied_while_the_device_computes_and_models_wait_for_them() -> None:
    expected, _ = outputs("cpu")
    with stand_in_cuda() as cuda:
        with cuda.counted() as counts:
            found, teacher = outputs("cuda")
        copies = [copy for copy in counts.copies_to_device() if copy.place.startswith("teachers/device/accelerator")]
        assert {copy.blocking for copy in copies} == {False}
        (stream,) = {copy.stream for copy in copies}
        assert stream is not torch.cuda.default_stream()
        assert (teacher.awaited, teacher.recorded) == ([stream], 2), "crops and whole images"
    np.testing.assert_allclose(found[NAMES[0]], expected[NAMES[0]], atol=1e-6)
    assert found[NAMES[1]] == expected[NAMES[1]]


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


def test_a_capture_that_fails_leaves_the_thread_on_its_stream() -> None:
    entered = list[Any]()  # and not left when nothing refers to it

    class Failing:
        """As torch.cuda.graph, whose end raises before it sets the stream back."""

        def __init__(self, graph: Any, pool: Any, stream: Any, **_: Any) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            entered.append(torch.cuda.stream(self.stream))
            entered[0].__enter__()

        def __exit__(self, *_: Any) -> None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    with stand_in_cuda(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "graph", Failing)
        before = torch.cuda.current_stream()
        with pytest.raises(RuntimeError, match="during capture"):
            Steps(torch.device("cuda", 0)).run("step", lambda: None)
        assert torch.cuda.current_stream() is before
