"""Batches through the models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from reinforce.config import parse_config
from reinforce.engine.inference import Inference
from reinforce.engine.models import Counters, Models
from reinforce.engine.outcome import LayerFailure
from reinforce.engine.recipe import build_layers, describe_models
from reinforce.engine.rows import Pixels, Row
from reinforce.seeds import seed_for
from teachers.device import Accelerator
from teachers.pixels import to_pixels
from tests.helpers.data import config_of
from tests.helpers.models import ColorTeacher, SeedCaptioner, WrongShapeTeacher

CPU = torch.device("cpu")
CONFIG = parse_config(config_of("x.tar", "out", workers={"batch": 3}))
LAYERS = build_layers(CONFIG, describe_models(CONFIG))
VIEW = SeedCaptioner(CPU).image


class Recording(ColorTeacher):
    """Records the batches of texts."""

    batches: list[list[str]]

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        self.batches = [*getattr(self, "batches", []), list(texts)]
        return super().encode_texts(texts)


def inference(*names: str, red: ColorTeacher | None = None, counters: Counters | None = None) -> Inference:
    teachers = {"red": red or ColorTeacher(CPU), "blue": ColorTeacher(CPU, size=24, dim=12, seed=1)}
    models = Models(teachers, {"namer": SeedCaptioner(CPU)}, Accelerator("cpu"))
    return Inference(CONFIG, [LAYERS[name] for name in names], models, counters or Counters())


def rows(count: int) -> list[Row]:
    rng = np.random.default_rng(0)
    return [
        Row(
            f"key{i}",
            None,
            Pixels(rng.integers(0, 255, (2, 24, 24, 3), np.uint8), {VIEW: rng.integers(0, 255, (8, 8, 3), np.uint8)}),
            {},
        )
        for i in range(count)
    ]


def test_a_batch_gives_each_layer_the_outputs_of_its_model() -> None:
    batch = rows(3)
    outputs = inference("embeddings/red/images", "embeddings/blue/images", "captions/namer", "samples").run(batch)
    assert outputs.keys() == {"embeddings/red/images", "embeddings/blue/images", "captions/namer"}
    crops = np.concatenate([row.pixels.crops for row in batch if row.pixels.crops is not None])
    for name, size, dim, seed in (("red", 16, 8, 0), ("blue", 24, 12, 1)):
        teacher = ColorTeacher(CPU, size, dim, seed)
        expected = teacher.encode_images(to_pixels(torch.from_numpy(crops), teacher.image)).numpy()
        np.testing.assert_allclose(outputs[f"embeddings/{name}/images"], expected.reshape(3, 2, dim), atol=1e-6)
    seeds = [[seed_for(0, row.key, "captions/namer", n) % 1000 for n in range(2)] for row in batch]
    assert [[int(text.rpartition(" ")[2]) for text in texts] for texts in outputs["captions/namer"]] == seeds


def test_a_lease_of_text_layers_only_runs_no_batch() -> None:
    counters = Counters()
    assert inference("embeddings/red/caption", counters=counters).run(rows(3)) == {}
    assert counters.busy == 0


def test_each_distinct_text_is_encoded_once_in_batches_of_similar_length() -> None:
    teacher = Recording(CPU)
    texts = [["a", "ccc"], None, ["bb", "a"], [], ["dddd", "ccc"]]
    run = inference("embeddings/red/namer", red=teacher)
    values, valid = run.encode_texts(LAYERS["embeddings/red/namer"], texts)
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
        inference("embeddings/red/images", red=wrong).run(rows(3))
    with pytest.raises(LayerFailure, match=r"embeddings/red/namer: ValueError: .* \(1, 6\), got \(1, 7\)"):
        inference(red=wrong).encode_texts(LAYERS["embeddings/red/namer"], [["a"]])
    run = inference("captions/namer")
    run.caption_layers = [replace(LAYERS["captions/namer"], count=3)]
    run._models.captioners["namer"].caption = lambda pixels, seeds: [["one"]] * len(pixels)  # type: ignore[method-assign]
    with pytest.raises(LayerFailure, match=r"captions/namer: .* must return 3 texts for each of 2 images"):
        run.run(rows(2))
