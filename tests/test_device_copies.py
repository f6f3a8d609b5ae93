"""Copies to a device and from it, on a stand-in for CUDA: their bytes and streams, and that none of them waits.

It computes on the CPU in the order of the program, so a pass does not show the time that a copy takes, memory that
changes while another stream reads it, and copies inside of torch's own C++ code; see ``tests.helpers.stand_in_cuda``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from reinforce.engine.worker.models import LoadedModels
from teachers.runtime import accelerator
from teachers.runtime.accelerator import Accelerator
from tests.helpers.batches import CONFIG, LAYERS, make_inference, pixels, rows
from tests.helpers.models import ColorTeacher, SeedCaptioner
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
    models = LoadedModels(
        {"teachers": {"red": Noting(there)}, "captioners": {"namer": SeedCaptioner(there)}}, Accelerator(device)
    )
    cells = pixels()
    for array in (cells.crops, *cells.whole.values()):
        models.accelerator.pin(array)
    run = make_inference(CONFIG, [LAYERS[name] for name in NAMES], models).run
    return run(rows(3), cells), models.loaded["teachers"]["red"]  # type: ignore[return-value]


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


@pytest.fixture(autouse=True)
def fresh_log() -> None:
    accelerator.device_of_float64.cache_clear()
