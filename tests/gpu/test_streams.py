"""Images are copied on a stream of their own, and models wait for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from reinforce.engine.inference import Inference
from reinforce.engine.models import Counters, Models
from teachers.device import Accelerator
from tests.engine.test_inference import CONFIG, LAYERS, pixels, rows
from tests.helpers.models import ColorTeacher, SeedCaptioner
from tests.helpers.stand_in_cuda import stand_in_cuda

NAMES = ("embeddings/red/images", "captions/namer")


def outputs(device: str) -> dict[str, Any]:
    there = torch.device(device)
    models = Models({"red": ColorTeacher(there)}, {"namer": SeedCaptioner(there)}, Accelerator(device))
    cells = pixels()
    for array in (cells.crops, *cells.views.values()):
        assert array is not None
        models.accelerator.pin(array)
    return Inference(CONFIG, [LAYERS[name] for name in NAMES], models, Counters()).run(rows(3), cells)


def test_images_are_copied_while_the_device_computes_and_models_wait_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = outputs("cpu")
    on_default: list[bool] = []
    put_parts = Accelerator.put_parts

    def noting(self: Accelerator, parts: Any) -> torch.Tensor:
        on_default.append(torch.cuda.current_stream() is torch.cuda.default_stream())
        return put_parts(self, parts)

    monkeypatch.setattr(Accelerator, "put_parts", noting)
    with stand_in_cuda() as cuda:  # raises where a stream reads what another one has not finished
        found = outputs("cuda")
        assert cuda.races.at_release == []
        monkeypatch.setattr(Accelerator, "wait_for_copies", lambda self, tensors: None)
        with pytest.raises(RuntimeError, match="race"):
            outputs("cuda")
    assert on_default == [False] * 4
    np.testing.assert_allclose(found[NAMES[0]], expected[NAMES[0]], atol=1e-6)
    assert found[NAMES[1]] == expected[NAMES[1]]
