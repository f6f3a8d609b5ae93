"""Loading models, and sharing the accelerator."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from reinforce.config import parse_config
from reinforce.dataset import fixed_point
from reinforce.dataset.backends import load_backend
from reinforce.engine.models import Counters, Models, load_models
from reinforce.engine.recipe import build_layers, describe_models
from reinforce.errors import UserError
from teachers.device import Accelerator
from tests.helpers.data import config_of
from tests.helpers.models import ColorTeacher, SeedCaptioner

CPU = torch.device("cpu")
CONFIG = parse_config(config_of("x.tar", "out"))
LAYERS = build_layers(CONFIG, describe_models(CONFIG))


class Tokenizing(ColorTeacher):
    """Splits ``encode_texts`` into its two parts."""

    def tokenize(self, texts: Sequence[str]) -> list[str]:
        return [text.upper() for text in texts]

    def encode_tokens(self, tokens: list[str]) -> torch.Tensor:
        return self.encode_texts(tokens)


def models() -> Models:
    return Models({"red": ColorTeacher(CPU)}, {"namer": SeedCaptioner(CPU)}, Accelerator("cpu"))


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


def test_an_augmentation_backend_without_a_package_is_a_user_error_before_any_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fixed_point, "RESIZERS", {})
    load_backend.cache_clear()
    config = parse_config(config_of("x.tar", "out", augmentations={"backend": "fixed-point-1"}))
    with pytest.raises(UserError, match="fixed-point-1: no installed package"):
        load_models(config, [LAYERS["samples"]])


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


def test_a_gpu_that_torch_does_not_see_is_reported_with_the_fix() -> None:
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU")
    config = parse_config(config_of("x.tar", "out", workers={"gpus": 1}))
    with pytest.raises(UserError, match=r"torch does not see it.*set workers.gpus to 0"):
        load_models(config, LAYERS.values())
