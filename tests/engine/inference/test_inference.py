"""Batches through the models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from reinforce.engine.decode.row import Decoded
from reinforce.engine.inference.inference import Inference, to_numpy
from reinforce.engine.inference.models import Counters, Models
from reinforce.engine.messages.results import LayerFailure
from reinforce.seeds import seed_for
from reinforce.source.samples import Refusal
from schemas import Reason
from teachers.device.accelerator import Accelerator
from teachers.preprocessing.pixels import to_pixels
from tests.helpers.batches import CONFIG, CPU, LAYERS, make_inference, pixels, rows, text_encoder
from tests.helpers.models import ColorTeacher, SeedCaptioner, WrongShapeTeacher


class Recording(ColorTeacher):
    """Records the batches of texts."""

    batches: list[list[str]]

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        self.batches = [*getattr(self, "batches", []), list(texts)]
        return super().encode_texts(texts)


def models_with(red: ColorTeacher | None = None) -> Models:
    teachers = {"red": red or ColorTeacher(CPU), "blue": ColorTeacher(CPU, size=24, dim=12, seed=1)}
    return Models(teachers, {"namer": SeedCaptioner(CPU)}, Accelerator("cpu"))


def inference(*names: str, red: ColorTeacher | None = None, counters: Counters | None = None) -> Inference:
    return make_inference(CONFIG, [LAYERS[name] for name in names], models_with(red), counters)


def texts_of(red: ColorTeacher) -> Callable[[Sequence[list[str] | None]], Any]:
    """The encoder of the captions of ``namer``."""
    layer = LAYERS["embeddings/red/namer"]
    return partial(text_encoder(CONFIG, layer, models_with(red)).encode_texts, layer)


def test_a_batch_gives_each_layer_the_outputs_of_its_model() -> None:
    batch = rows(3)
    outputs = inference("embeddings/red/images", "embeddings/blue/images", "captions/namer", "samples").run(
        batch, pixels()
    )
    assert outputs.keys() == {"embeddings/red/images", "embeddings/blue/images", "captions/namer"}
    crops = pixels().crops
    assert crops is not None
    crops = crops.reshape(6, 24, 24, 3)
    for name, size, dim, seed in (("red", 16, 8, 0), ("blue", 24, 12, 1)):
        teacher = ColorTeacher(CPU, size, dim, seed)
        expected = teacher.encode_images(to_pixels(torch.from_numpy(crops), teacher.image)).numpy()
        np.testing.assert_allclose(outputs[f"embeddings/{name}/images"], expected.reshape(3, 2, dim), atol=1e-6)
    seeds = [[seed_for(0, row.key, "captions/namer", n) % 1000 for n in range(2)] for row in batch]
    assert [[int(text.rpartition(" ")[2]) for text in texts] for texts in outputs["captions/namer"]] == seeds


def test_a_lease_of_text_layers_only_runs_no_batch() -> None:
    counters = Counters()
    assert inference("embeddings/red/caption", counters=counters).run(rows(3), pixels()) == {}
    assert counters.busy == 0


def test_each_distinct_text_is_encoded_once_in_batches_of_similar_length() -> None:
    teacher = Recording(CPU)
    texts = [["a", "ccc"], None, ["bb", "a"], [], ["dddd", "ccc"]]
    values, valid = texts_of(teacher)(texts)
    assert teacher.batches == [["a", "bb", "ccc"], ["dddd"]]
    assert valid.tolist() == [True, False, True, False, True]
    assert values.shape == (5, 2, 8)
    assert not values[~valid].any()
    for i in (0, 2, 4):
        np.testing.assert_allclose(values[i], ColorTeacher(CPU).encode_texts(texts[i] or []).numpy(), atol=1e-6)


def test_an_error_of_a_model_names_its_layer() -> None:
    wrong = WrongShapeTeacher(CPU)
    message = r"embeddings/red/images: ValueError: embeddings must have shape \(6, 6\), got \(6, 7\)"
    with pytest.raises(LayerFailure, match=message):
        inference("embeddings/red/images", red=wrong).run(rows(3), pixels())
    with pytest.raises(LayerFailure, match=r"embeddings/red/namer: ValueError: .* \(1, 6\), got \(1, 7\)"):
        texts_of(wrong)([["a"]])
    layer = replace(LAYERS["captions/namer"], count=3)
    models = models_with()
    models.captioners["namer"].caption = lambda pixels, seeds: [["one"]] * len(pixels)  # type: ignore[method-assign]
    with pytest.raises(LayerFailure, match=r"captions/namer: .* must return 3 texts for each of 2 images"):
        make_inference(CONFIG, [layer], models).run(rows(2), pixels())


def test_the_norm_of_every_row_of_embeddings_is_checked() -> None:
    values = torch.nn.functional.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    np.testing.assert_array_equal(to_numpy(values, 50, 8), values.numpy())
    assert to_numpy(values.half(), 50, 8).dtype == np.float32
    to_numpy(values * 1.009, 50, 8)
    for scale in (3.0, 1.011, 0.989, 0.0, 1e30):
        wrong = values.clone()
        wrong[41] *= scale
        with pytest.raises(ValueError, match=rf"norm 1, got {'inf' if scale > 9 else f'{scale:.3f}'} in row 42 of 50"):
            to_numpy(wrong, 50, 8)
        ignored = np.arange(50) == 41
        np.testing.assert_array_equal(to_numpy(wrong, 50, 8, ignored), wrong.numpy())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_left_to_the_quarantine(value: float) -> None:
    values = torch.eye(4)
    values[2, 1] = value
    np.testing.assert_array_equal(to_numpy(values, 4, 4), values.numpy())
    values[3] *= 3
    with pytest.raises(ValueError, match=r"got 3\.000 in row 4 of 4"):
        to_numpy(values, 4, 4)


@pytest.mark.parametrize("layer", ["embeddings/red/images", "embeddings/red/namer"])
def test_a_teacher_whose_norm_changes_after_its_first_batch_fails(layer: str) -> None:
    class Growing(ColorTeacher):
        norm = 1.0

        def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
            return super().encode_images(pixels) * self.norm

        def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
            return super().encode_texts(texts) * self.norm

    teacher = Growing(CPU)
    run, encode_texts = inference("embeddings/red/images", red=teacher), texts_of(teacher)

    def encode() -> None:
        run.run(rows(2), pixels()) if layer.endswith("images") else encode_texts([["a", "b"]])

    encode()
    teacher.norm = 3.0
    with pytest.raises(LayerFailure, match=rf"{layer}: ValueError: embeddings must have norm 1, got 3\.0"):
        encode()


def test_the_norm_of_an_unreadable_images_embedding_is_not_checked() -> None:
    class Brightness(ColorTeacher):
        """Black images get the embedding 0."""

        def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
            return super().encode_images(pixels) * (pixels > -1).any(dim=(1, 2, 3))[:, None]

    batch = rows(3)
    cells = pixels()
    assert cells.crops is not None
    cells.crops[1] = 0
    run = inference("embeddings/red/images", red=Brightness(CPU))
    with pytest.raises(LayerFailure, match=r"got 0\.000 in row 3 of 6"):
        run.run(batch, cells)
    batch[1] = replace(batch[1], decoded=Decoded(unreadable=Refusal("key1", Reason.IMAGE_BROKEN, "gone")))
    assert not run.run(batch, cells)["embeddings/red/images"][1].any()
