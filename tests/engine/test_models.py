"""Loading and checking models, and sharing the accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from reinforce.config import parse_config
from reinforce.engine.models import Counters, Models, check_models, load_models
from reinforce.engine.recipe import build_layers, describe_models
from reinforce.errors import UserError
from teachers.device import Accelerator
from tests.helpers.data import config_of
from tests.helpers.models import ColorTeacher, ImageOnly, SeedCaptioner, WrongShapeTeacher

CPU = torch.device("cpu")
CONFIG = parse_config(config_of("x.tar", "out"))
LAYERS = build_layers(CONFIG, describe_models(CONFIG))


class LongTeacher(ColorTeacher):
    """Embeddings of norm 2."""

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return 2 * super().encode_texts(texts)


class Tokenizing(ColorTeacher):
    """Splits ``encode_texts`` into its two parts."""

    def tokenize(self, texts: Sequence[str]) -> list[str]:
        return [text.upper() for text in texts]

    def encode_tokens(self, tokens: list[str]) -> torch.Tensor:
        return self.encode_texts(tokens)


def models(red: Any = None, namer: Any = None) -> Models:
    return Models({"red": red or ColorTeacher(CPU)}, {"namer": namer or SeedCaptioner(CPU)}, Accelerator("cpu"))


def check(layer: str, **loaded: Any) -> None:
    check_models(models(**loaded), [LAYERS[layer]])


def test_only_the_models_of_missing_layers_are_loaded() -> None:
    loaded = load_models(CONFIG, [LAYERS["samples"], LAYERS["embeddings/red/caption"]])
    assert (loaded.teachers.keys(), loaded.captioners.keys()) == ({"red"}, set())
    loaded = load_models(CONFIG, [LAYERS["captions/namer"]])
    assert (loaded.teachers.keys(), loaded.captioners.keys()) == (set(), {"namer"})


def test_a_model_that_cannot_be_built_is_a_user_error() -> None:
    config = config_of("x.tar", "out")
    config["teachers"]["red"]["options"] = {"delay": 0.0, "dim": "eight"}
    with pytest.raises(UserError):
        load_models(parse_config(config), [LAYERS["embeddings/red/caption"]])


@pytest.mark.parametrize(
    ("layer", "loaded", "message"),
    [
        ("embeddings/red/caption", {"red": WrongShapeTeacher(CPU)}, r"red fails .* shape \(1, 6\), got \(1, 7\)"),
        ("embeddings/red/images", {"red": WrongShapeTeacher(CPU)}, r"red fails .* images embeddings .* \(1, 6\)"),
        ("embeddings/red/caption", {"red": LongTeacher(CPU)}, r"red fails .* norm 1, got 2\.000"),
        ("embeddings/red/caption", {"red": ImageOnly(CPU)}, r"red fails .*encode_texts"),
        ("captions/namer", {"namer": ColorTeacher(CPU)}, r"namer fails on its first captions input: .*'caption'"),
    ],
)
def test_a_model_that_does_not_fit_its_layer_is_a_user_error(layer: str, loaded: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(layer, **loaded)


def test_a_captioner_with_another_number_of_captions_is_a_user_error() -> None:
    class OneCaption(SeedCaptioner):
        def caption(self, pixels: torch.Tensor, seeds: np.ndarray) -> list[list[str]]:
            return [row[:1] for row in super().caption(pixels, seeds)]

    with pytest.raises(UserError, match=r"namer fails .* list of 2 texts for one image, got \[\['a picture of"):
        check("captions/namer", namer=OneCaption(CPU))


def test_a_teacher_without_an_image_spec_cannot_encode_images() -> None:
    teacher = ColorTeacher(CPU)
    teacher.image = None  # type: ignore[assignment]
    with pytest.raises(UserError, match="no `image`"):
        check("embeddings/red/images", red=teacher)


def test_the_check_does_not_count_as_work() -> None:
    checked = models()
    check_models(checked, [LAYERS["embeddings/red/images"]])
    assert checked.counters == Counters()


def test_use_of_the_accelerator_is_busy_time_of_the_worker_and_of_the_shard_even_if_it_raises() -> None:
    shared, shard = models(), Counters()
    with pytest.raises(ZeroDivisionError), shared.use_accelerator(shard):
        torch.zeros(int(torch.is_inference_mode_enabled()) // 0)
    with shared.use_accelerator():
        assert torch.is_inference_mode_enabled()
    assert 0 < shard.busy < shared.counters.busy


def test_texts_are_tokenized_before_the_accelerator_is_used_where_the_teacher_supports_it() -> None:
    encode = models().text_encoder(Tokenizing(CPU), ["one", "two"])
    torch.testing.assert_close(encode(), ColorTeacher(CPU).encode_texts(["ONE", "TWO"]))
    encode = models().text_encoder(ColorTeacher(CPU), ["one"])
    torch.testing.assert_close(encode(), ColorTeacher(CPU).encode_texts(["one"]))
