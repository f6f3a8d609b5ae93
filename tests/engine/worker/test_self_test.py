"""The self-test of loaded models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from reinforce.config import Config, parse_config
from reinforce.engine.plan.plan import build_layers, describe_models
from reinforce.engine.worker import self_test
from reinforce.engine.worker.models import Counters, load_models
from reinforce.engine.worker.producers.registry import check_models
from reinforce.engine.worker.self_test import TEXTS, check_text_encoder
from reinforce.errors import UserError
from teachers.registry import teacher_spec
from teachers.runtime.accelerator import Precision
from tests.helpers.batches import CONFIG, CPU, LAYERS, Changed, Writing, models_of
from tests.helpers.models import ColorTeacher, ImageOnly, TextOnly, WrongShapeTeacher, tiny_models
from tests.helpers.models.tiny_captioners import blip, spec_of
from tests.helpers.models.tiny_coca import coca_model
from tests.helpers.specs import captioner_spec

IMAGES, TRUE, CAPTIONS = "embeddings/red/images", "embeddings/red/caption", "captions/namer"


def check(*layers: str, precision: Precision = "fp32", config: Config | None = None, **loaded: Any) -> None:
    check_models(models_of(**loaded), [LAYERS[layer] for layer in layers], {("teachers", "red"): precision}, config)


class Network(ColorTeacher):
    """A teacher with a network over the embeddings of texts, in training mode as it is built."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__(CPU, dim=64)
        self.head = torch.nn.Sequential(torch.nn.Identity(), layer)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.nn.functional.normalize(self.head(super().encode_texts(texts)), dim=-1)


class Split(ColorTeacher):
    """Encodes texts by their tokens, in a run too, to embeddings of norm 3."""

    def tokenize(self, texts: Sequence[str]) -> list[str]:
        return list(texts)

    def encode_tokens(self, tokens: list[str]) -> torch.Tensor:
        return 3 * super().encode_texts(tokens)


def without_image() -> ColorTeacher:
    teacher = ColorTeacher(CPU)
    teacher.image = None  # type: ignore[assignment]
    return teacher


def test_good_models_pass_and_the_check_does_not_count_as_work() -> None:
    checked = models_of()
    check_models(checked, [LAYERS[name] for name in ("samples", IMAGES, TRUE, CAPTIONS)], {})
    assert checked.counters == Counters()
    check(IMAGES, red=ImageOnly(CPU))
    check(TRUE, "embeddings/red/namer", red=TextOnly(CPU))
    np.testing.assert_allclose(check_text_encoder(models_of(), "red", "fp32"), [1] * len(TEXTS), atol=1e-6)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models of both libraries."""
    folder = tmp_path_factory.mktemp("models")
    make = {"vit": tiny_models.open_clip_model, "clip": tiny_models.transformers_clip, "coca": coca_model, "blip": blip}
    make |= {"bert": tiny_models.transformers_bert, "dino": tiny_models.transformers_dinov2}
    return {name: one(folder / name) for name, one in make.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_models_of_both_libraries_pass_in_every_precision(saved: dict[str, str], precision: Precision) -> None:
    hugging_face: Any = {"family": "transformers", "precision": precision}
    specs = {"vit": teacher_spec(model=saved["vit"], precision=precision)}
    specs |= {name: teacher_spec(model=saved[name], **hugging_face) for name in ("clip", "bert", "dino")}
    captioners = {
        "coca": captioner_spec(model=saved["coca"], captions=2, max_length=10, precision=precision),
        "blip": spec_of(saved["blip"], "blip", captions=2, max_length=10, precision=precision),
    }
    config = parse_config({"source": "x.tar", "output": "out", "teachers": specs, "captioners": captioners})
    layers = [*build_layers(config, describe_models(config)).values()]
    check_models(load_models(config, layers), layers, self_test.precisions(config))


@pytest.mark.parametrize(
    ("layer", "red", "message"),
    [
        (IMAGES, WrongShapeTeacher(CPU), r"\(images\): embeddings must have shape \(3, 6\)"),
        (TRUE, ImageOnly(CPU), r"\(texts\): it encodes no texts, as is known"),
        (IMAGES, Changed(lambda out, _: 1.02 * out), r"norm 1, got 1\.020"),
        (IMAGES, Changed(lambda out, _: out * float("nan")), "finite, got NaN"),
        (TRUE, Changed(lambda out, _: out[:1].expand(len(out), -1)), "'a cat in the sun' and 'a dog on the bed' get"),
        (IMAGES, Changed(lambda out, _: out[:1].expand(len(out), -1)), "two different images get the same embedding"),
        (
            TRUE,
            Changed(lambda out, texts: out[np.argsort([-len(text) for text in texts])]),  # sorted by length
            "in a batch than alone .*order of the rows",
        ),
        (
            TRUE,
            Changed(lambda out, _: torch.nn.functional.normalize(out + 0.1 * torch.randn_like(out), dim=-1)),
            r"second time \(cosine 0\.\d+, at least 0\.9999 is required\)",
        ),
        (TRUE, Split(CPU), r"norm 1, got 3\.000.*normalize"),
        (IMAGES, without_image(), "no `image`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_teacher_is_a_user_error(layer: str, red: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"red fails its self-test .*{message}"):
        check(layer, red=red)


@pytest.mark.parametrize(
    ("part", "failed"),
    [(torch.nn.Dropout(0.1), "the second time"), (torch.nn.BatchNorm1d(64), "Expected more than 1")],
)
def test_a_network_in_training_mode_is_named(part: torch.nn.Module, failed: str) -> None:
    teacher = Network(part)
    fix = r"[^.]*.*[^.]\. Call `\.eval\(\)` on `head`, which is in training mode"
    with pytest.raises(UserError, match=failed + fix):
        check(TRUE, red=teacher)
    teacher.head.eval()
    check(TRUE, red=teacher)


def test_tolerances_depend_on_the_precision_of_the_output_and_of_the_config() -> None:
    def turned(degrees: float) -> Any:
        """Embeddings of a batch, turned by so many degrees."""
        angle = torch.tensor(np.deg2rad(degrees))

        def turn(out: torch.Tensor, _: Any) -> torch.Tensor:
            side = torch.nn.functional.normalize(out.roll(1, 1) - (out * out.roll(1, 1)).sum(1, True) * out, dim=-1)
            return angle.cos() * out + angle.sin() * side if len(out) > 1 else out

        return turn

    check(TRUE, red=Changed(turned(1)))
    with pytest.raises(UserError, match=r"cosine 0\.99619, at least 0\.999"):
        check(TRUE, red=Changed(turned(5)))
    check(TRUE, red=Changed(turned(5)), precision="bf16")
    check(TRUE, red=Changed(lambda out, texts: turned(5)(out, texts).half()))
    with pytest.raises(UserError, match=r"at least 0\.99 "):
        check(TRUE, red=Changed(turned(10)), precision="bf16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda texts, *_: [row[:1] for row in texts], r"list of 2 texts for each of 2 images, got \[\['a pict"),
        (lambda texts, *_: texts[9], r"\(captions\): IndexError"),
        (
            lambda texts, _, call: [[f"call {call}"] * 2 for _ in texts],
            r"other captions the second time, \['call 1', .*`seeds`",
        ),
        (
            lambda texts, seeds, _: [[f"{int(seeds.sum())}, caption of a batch"] * 2 for _ in texts],
            r"captions in a batch, .* than alone, .* image b and seeds\[b, n\] alone",
        ),
    ],
    ids=["number", "error", "unseeded", "batch"],
)
def test_a_captioner_without_its_number_of_seeded_captions_is_a_user_error(change: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"namer fails its self-test .*{message}"):
        check(CAPTIONS, namer=Writing(change))


def full_batch(size: int) -> Config:
    return CONFIG.model_copy(update={"workers": CONFIG.workers.model_copy(update={"batch": size})})


def from_eight(change: Any) -> Any:
    """``change`` of outputs and inputs, in batches of eight or more."""
    return lambda out, *inputs: change(out) if len(out) >= 8 else out


WRONG_BATCHES = {
    "reversed": (lambda out: out[::-1] if isinstance(out, list) else out.flip(0), "order of the rows"),
    "rotated": (lambda out: [*out[1:], out[0]] if isinstance(out, list) else out.roll(1, 0), "order of the rows"),
    "half": (lambda out: out[: len(out) // 2], "must"),
    "other": (
        lambda out: [["x"] * 2] * len(out) if isinstance(out, list) else out.roll(1, 1),
        "in a batch.* than alone",
    ),
}


@pytest.mark.parametrize("size", [16, 18, 64, 200])
@pytest.mark.parametrize("wrong", WRONG_BATCHES)
def test_a_model_that_is_wrong_in_full_batches_alone_fails_its_self_test(wrong: str, size: int) -> None:
    change, message = WRONG_BATCHES[wrong]
    teacher, namer = Changed(from_eight(change)), Writing(from_eight(change))
    check(IMAGES, TRUE, CAPTIONS, red=teacher, namer=namer)
    check(IMAGES, TRUE, CAPTIONS, config=full_batch(size))
    for layer, kind, full in ((IMAGES, "images", size), (TRUE, "texts", size), (CAPTIONS, "captions", size // 2)):
        rows = min(full, 64)
        named = "Changed.encode_" if (wrong, kind) == ("half", kind) and kind != "captions" else ""
        with pytest.raises(UserError, match=rf"self-test \({kind}, a batch of {rows}\): .*{message}.*{named}"):
            check(layer, red=teacher, namer=namer, config=full_batch(size))


def test_a_full_batch_is_that_of_the_config_or_what_fits_in_memory_or_is_quick_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    red, namer = (kind(lambda out, *_: sizes.append(len(out)) or out) for kind in (Changed, Writing))
    loaded = models_of(red=red)
    check_models(loaded, [LAYERS[IMAGES], LAYERS[TRUE]], {}, full_batch(20))
    loaded.batches._bounds |= {"rows": 4, "texts": 7}
    check_models(loaded, [LAYERS[IMAGES], LAYERS[TRUE]], {}, full_batch(20))
    assert [size for size in sizes if size > 1] == [20, 20, 8, 7]
    sizes.clear()
    monkeypatch.setattr(self_test, "_SECONDS", 0.0)  # of a slow model
    check(IMAGES, TRUE, CAPTIONS, red=red, namer=namer, config=full_batch(200))
    assert [size for size in sizes if size > 1] == [8, 8, 8]


def test_a_captioner_that_is_not_repeatable_is_not_asked_for_a_full_batch() -> None:
    namer = Writing(lambda texts, *_: texts)
    namer.repeatable = False
    check(CAPTIONS, namer=namer, config=full_batch(64))
    assert namer.calls == 0
