"""Metrics of evaluations, compared with plain open_clip loops and with known answers, and the cache of their images."""

from __future__ import annotations

import functools
import io
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.zero_shot_metadata import SIMPLE_IMAGENET_TEMPLATES
from PIL import Image

from reinforce.config import Limits
from reinforce.errors import UserError
from reinforce.evaluation import images
from reinforce.evaluation.evaluator import Evaluator
from reinforce.evaluation.images import CacheBudget, ImageBatches
from reinforce.evaluation.reading import Example
from reinforce.evaluation.report import Report, Result
from teachers.device.accelerator import Accelerator
from teachers.preprocessing.pixels import to_pixels
from teachers.protocols import ImageSpec
from tests.helpers.data import config_of
from tests.helpers.evaluation import (
    COLOURS,
    CPU,
    ColourOracle,
    ConstantEncoder,
    NanEncoder,
    RedNanEncoder,
    evaluate_zero_shot,
    load_spec,
    load_teacher,
    make_evaluator,
    make_photos,
    solid_image,
    write_colour_folder,
    write_colour_shard,
    write_models,
    write_shard,
)
from tests.helpers.reinforced import reinforce_here

NAMES = list(COLOURS)
WORDS = ["dog", "red car", "great white shark", "Ünïcode", "cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_colour_folder(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    return make_photos()


@pytest.fixture(scope="module")
def photo_shard(tmp_path_factory: pytest.TempPathFactory, photos: list[bytes]) -> str:
    samples = [(f"{i:02d}", image, {"cls": str(i % 5), "txt": f"photo number {i}"}) for i, image in enumerate(photos)]
    return write_shard(tmp_path_factory.mktemp("photos") / "a.tar", samples)


# --- compared with open_clip


@pytest.mark.parametrize("kind", ["shortest", "squash"])
def test_pixels_and_accuracy_equal_those_of_a_plain_open_clip_loop(
    names: dict[str, str], photos: list[bytes], photo_shard: str, kind: str
) -> None:
    model, _, transform = open_clip.create_model_and_transforms(names[kind])
    weights = open_clip.build_zero_shot_classifier(
        model.eval(), open_clip.get_tokenizer(names[kind]), WORDS, SIMPLE_IMAGENET_TEMPLATES
    )
    with torch.no_grad():
        pixels = torch.stack([transform(Image.open(io.BytesIO(data))) for data in photos])
        predicted = (model.encode_image(pixels, normalize=True) @ weights).argmax(1)
    spec = load_teacher(names[kind]).image
    assert spec is not None
    examples = [Example(str(i), lambda data=data: data, i) for i, data in enumerate(photos)]
    batches = ImageBatches(lambda: iter(examples), len(photos), Limits(), CacheBudget(0)).batches(spec, 4, 2)
    assert torch.equal(torch.cat([to_pixels(CPU.put(batch.pixels), spec) for batch in batches]), pixels)
    labels = torch.arange(len(photos)) % 5
    hits = (predicted == labels).float()
    result = evaluate_zero_shot(load_teacher(names[kind]), photo_shard, classes=WORDS)
    assert result["top1"] == pytest.approx(float(hits.mean()))
    assert result["mean_per_class"] == pytest.approx(float(np.mean([hits[labels == i].mean() for i in range(5)])))
    assert result["top5"] == 1


def test_recall_equals_that_of_a_plain_open_clip_loop(
    names: dict[str, str], photos: list[bytes], photo_shard: str
) -> None:
    model, _, transform = open_clip.create_model_and_transforms(names["shortest"])
    with torch.no_grad():
        pixels = torch.stack([transform(Image.open(io.BytesIO(data))) for data in photos])
        images = model.eval().encode_image(pixels, normalize=True).numpy()
        tokens = open_clip.get_tokenizer(names["shortest"])([f"photo number {i}" for i in range(len(photos))])
        texts = model.encode_text(tokens, normalize=True).numpy()
    result = make_evaluator(retrieval={"set": {"pairs": photo_shard}}).evaluate(load_teacher(names["shortest"]), CPU)
    for way, scores in (("text_to_image", texts @ images.T), ("image_to_text", images @ texts.T)):
        order = np.argsort(-scores, axis=1)
        for k in (1, 5, 10):
            hits = (order[:, :k] == np.arange(len(photos))[:, None]).any(1)
            assert result.metrics[f"retrieval/set/{way}/r{k}"] == pytest.approx(hits.mean())
    half = Accelerator("cpu", "bf16")
    sets = make_evaluator(retrieval={"set": {"pairs": photo_shard}})
    fast = sets.evaluate(load_teacher(names["shortest"], half), half).metrics
    assert fast.keys() == result.metrics.keys()
    assert all(abs(result.metrics[name] - fast[name]) <= 3 / 18 for name in fast), "bf16 is close to fp32"


# --- compared with known answers


def test_a_perfect_model_scores_one_and_a_constant_one_is_at_chance(folder: str) -> None:
    groups = {name: "dull" if name in ("grey", "blue") else "bright" for name in NAMES}
    perfect = {"top1": 1, "top5": 1, "mean_per_class": 1, "group": 1}
    assert evaluate_zero_shot(ColourOracle(), folder, groups=groups) == perfect
    # all classes tie, so the first, blue, is predicted for all images
    chance = {"top1": 1 / 6, "top5": 5 / 6, "mean_per_class": 1 / 6, "group": 2 / 6}
    assert evaluate_zero_shot(ConstantEncoder(), folder, groups=groups) == pytest.approx(chance)


def test_a_set_on_which_embeddings_are_not_finite_has_failed_with_their_number(folder: str, tmp_path: Path) -> None:
    shard = write_colour_shard(tmp_path / "a.tar")
    sets = make_evaluator(zero_shot={"set": {"images": folder}}, retrieval={"own": {"pairs": shard}})
    failures = {}
    for name, encoder in {"all": NanEncoder(), "red": RedNanEncoder(), "texts": RedNanEncoder(texts=True)}.items():
        result = sets.evaluate(encoder, CPU)
        assert result.metrics == {}, name
        failures[name] = [why.partition(".")[0] for why in result.failed.values()]
    assert failures == {
        "all": ["12 of 12 image embeddings are not finite"] * 2,
        "red": ["2 of 12 image embeddings are not finite"] * 2,
        "texts": [
            "1 of 6 class embeddings and 2 of 12 image embeddings are not finite",
            "2 of 12 image embeddings and 2 of 12 text embeddings are not finite",
        ],
    }
    report = Report({"bad": result, "good": sets.evaluate(ColourOracle(), CPU)})
    assert report.failed == ["zero_shot/set", "retrieval/own"]
    assert "zero_shot/set failed: bad: 1 of 6 class embeddings" in "\n".join(report.lines())
    assert report.as_json()["models"]["good"]["metrics"]["zero_shot/set/top1"] == 1


def test_any_true_match_is_a_hit(tmp_path: Path) -> None:
    """Two red images share a caption; the blue one has two, of which one is misleading."""
    samples = [
        ("0", solid_image("red"), {"json": {"texts": ["some red"]}}),
        ("1", solid_image("blue"), {"json": {"texts": ["a blue sky", "not green"]}}),
        ("2", solid_image("red", 1), {"json": {"texts": ["some red"]}}),
        ("3", solid_image("green"), {"json": {"texts": ["grass, green"]}}),
    ]
    sets = {"pairs": write_shard(tmp_path / "a.tar", samples), "captions": ["json:texts"]}
    result = make_evaluator(retrieval={"set": sets}).evaluate(ColourOracle(), CPU)
    # four texts: "some red" finds image 0, "not green" finds image 3 and not 1
    assert result.metrics["retrieval/set/text_to_image/r1"] == pytest.approx(3 / 4)
    # green finds "not green" first, as it ties with its own caption and has a lower index
    assert result.metrics["retrieval/set/image_to_text/r1"] == pytest.approx(3 / 4)
    assert result.metrics["retrieval/set/image_to_text/r5"] == 1
    assert result.metrics["retrieval/set/text_to_image/r5"] == 1
    assert result.sets["retrieval/set"].images == 4


def test_a_reinforced_dataset_gives_the_metrics_of_its_shards(
    names: dict[str, str], shards: Callable[..., str], tmp_path: Path
) -> None:
    model = load_teacher(names["shortest"])
    source = shards(7, 6)
    results = []
    for url in (
        source,
        *(reinforce_here(_config_without_models(source, tmp_path / how, how)) for how in ("embed", "reference")),
    ):
        result = make_evaluator(
            retrieval={"set": {"pairs": url}},
            zero_shot={"set": {"images": url, "label": "json:uid"}},
            images_from=[str(Path(source).parent)],
        ).evaluate(model, CPU)
        assert result.sets["retrieval/set"].images == result.sets["zero_shot/set"].images == 13
        results.append(result)
    assert results[0] == results[1] == results[2]
    assert 0 < results[0].metrics["retrieval/set/image_to_text/r5"] < 1


def _config_without_models(source: str, output: Path, images: str) -> dict[str, Any]:
    return config_of(source, output, images=images, teachers={}, captioners={})


# --- images that cannot be decoded


def test_refused_images_are_listed_and_do_not_change_retrieval(
    names: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = [(f"{i}", solid_image(name), {"cls": str(i), "txt": name}) for i, name in enumerate(NAMES)]
    bad = [("x", b"no image", {"cls": "3", "txt": "red"}), ("y", solid_image("red")[:-30], {"cls": "3", "txt": "red"})]
    without_caption = [("z", solid_image("red"), {"cls": "3"})]
    clean_url = write_shard(tmp_path / "whole.tar", good)
    holes = write_shard(tmp_path / "holes.tar", [*bad, *good[:3], *without_caption, *good[3:]])

    def evaluate(url: str, **config: Any) -> Result:
        sets = {"zero_shot": {"set": {"images": url, "classes": NAMES}}, "retrieval": {"set": {"pairs": url}}}
        model, tokenizer = open_clip.create_model(names["shortest"]), open_clip.get_tokenizer(names["shortest"])
        spec = load_spec(model)
        return make_evaluator(**sets, **config).evaluate_module(model, spec, tokenizer, CPU)

    with caplog.at_level(logging.WARNING, "reinforce.evaluation"):
        clean = evaluate(clean_url)
        assert not caplog.messages
        result = evaluate(holes)
    assert [(r.key, r.reason.value) for r in result.sets["retrieval/set"].refused] == [
        ("x", "image_format"), ("y", "image_broken"), ("z", "no_text"),
    ]  # fmt: skip
    assert [r.key for r in result.sets["zero_shot/set"].refused] == ["x", "y"]
    assert caplog.messages == [
        "zero_shot/set: 7 images; 2 refused: x (image_format), y (image_broken)",
        "retrieval/set: 6 images; 3 refused: x (image_format), y (image_broken), z (no_text)",
    ]
    retrieval = {name: score for name, score in clean.metrics.items() if name.startswith("retrieval")}
    assert {name: result.metrics[name] for name in retrieval} == retrieval


def test_a_set_whose_images_are_all_refused_and_a_model_without_an_image_side_are_errors(
    names: dict[str, str], folder: str, tmp_path: Path
) -> None:
    url = write_shard(tmp_path / "a.tar", [("k", b"no image", {"cls": "red"})])
    model, tokenizer = open_clip.create_model(names["shortest"]).train(), open_clip.get_tokenizer(names["shortest"])
    with pytest.raises(UserError, match=r"zero_shot/set: every image is refused, the first \(k\) for image_format"):
        make_evaluator(zero_shot={"set": {"images": url}}).evaluate_module(model, load_spec(model), tokenizer, CPU)
    assert all(module.training for module in model.modules()), "modes are restored"
    large = make_evaluator(zero_shot={"set": {"images": folder}}, limits={"image_bytes": 10})
    with pytest.raises(UserError, match=r"every image is refused, the first \(blue/0\.png\) for image_bytes: \d+"):
        large.evaluate(ColourOracle(), CPU)

    class TextEncoder(ColourOracle):
        image = None

    with pytest.raises(UserError, match="no image side"):
        evaluate_zero_shot(TextEncoder(), folder)


def test_evaluation_has_no_side_effects_on_training(names: dict[str, str], folder: str, photo_shard: str) -> None:
    def train(evaluator: Evaluator | None) -> tuple[list[torch.Tensor], list[Any]]:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        model = open_clip.create_model(names["shortest"], force_patch_dropout=0.5)
        model.train()
        model.visual.register_forward_pre_hook(lambda *_: modes_seen.append([m.training for m in model.modules()]))
        model.visual.ln_post.eval()  # a module in another mode than its parent
        model.token_embedding.requires_grad_(False)
        model.set_grad_checkpointing(True)
        modes = {name: (m.training, [p.requires_grad for p in m.parameters()]) for name, m in model.named_modules()}
        tokenizer = open_clip.get_tokenizer(names["shortest"])
        spec = load_spec(model)
        clean = tokenizer.clean_fn
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for step in range(3):
            if evaluator is not None and step:
                modes_seen.clear()
                metrics.append(evaluator.evaluate_module(model, spec, tokenizer, CPU).metrics)
                assert modes_seen
                assert not any(map(any, modes_seen)), "evaluated in eval mode"
            pixels = torch.randn(4, 3, 32, 32)
            images, texts, _ = model(pixels, tokenizer(["a", "b", "c", "d"]))
            loss = (images @ texts.T).diagonal().sum()
            loss.backward()
            optimizer.step()
            assert {
                name: (m.training, [p.requires_grad for p in m.parameters()]) for name, m in model.named_modules()
            } == modes
        assert tokenizer.clean_fn is clean
        state = [value.detach() for p in model.parameters() for value in (p, p.grad) if value is not None]
        return state, [torch.rand(1).item(), float(np.random.rand()), random.random()]

    modes_seen: list[list[bool]] = []
    metrics: list[dict[str, float]] = []
    evaluator = make_evaluator(zero_shot={"a": {"images": folder}}, retrieval={"b": {"pairs": photo_shard}})
    (alone, drawn), (evaluated, drawn_evaluated) = train(None), train(evaluator)
    assert drawn == drawn_evaluated
    assert all(torch.equal(one, other) for one, other in zip(alone, evaluated, strict=True))
    assert len(metrics) == 2
    assert set(metrics[0]) == set(evaluator.config.metrics)


SPEC = ImageSpec(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class DecodeCounter:
    """Counts decoded images."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        decode = images.decode

        def counted(data: bytes, limits: Limits, **options: Any) -> Image.Image:
            self.count += 1
            return decode(data, limits, **options)

        monkeypatch.setattr(images, "decode", counted)

    def during(self, act: Callable[[], Any]) -> int:
        before = self.count
        act()
        return self.count - before


def test_sets_that_fit_are_decoded_once(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = DecodeCounter(monkeypatch)
    url = write_colour_shard(tmp_path / "a.tar", each=3)
    sets = {"zero_shot": {"a": {"images": folder}, "b": {"images": url, "label": "json:class"}}}
    small = 12 * 8 * 8 * 3
    expected: list[dict[str, float]] = []
    for memory, decoded in ((small + 18 * 8 * 8 * 3, 0), (small, 18), (small - 1, 30), (0, 30)):
        evaluator = make_evaluator(**sets, memory=memory)
        expected.append(evaluator.evaluate(ColourOracle(), CPU).metrics)
        again = functools.partial(evaluator.evaluate, ColourOracle(), CPU)
        assert decodes.during(lambda again=again: expected.append(again().metrics)) == decoded
    assert all(metrics == expected[0] for metrics in expected)


def test_another_geometry_replaces_the_cache_and_an_interrupted_pass_is_not_cached(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Larger(ColourOracle):
        image = ImageSpec(12, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    class Normalised(ColourOracle):
        image = ImageSpec(8, (0.1, 0.1, 0.1), (1.0, 1.0, 1.0))

    class Interrupted(ColourOracle):
        def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    decodes = DecodeCounter(monkeypatch)
    evaluator = make_evaluator(zero_shot={"a": {"images": folder}}, memory=12 * 12 * 12 * 3)
    with pytest.raises(KeyboardInterrupt):
        evaluator.evaluate(Interrupted(), CPU)
    for model, count in ((ColourOracle(), 12), (Normalised(), 0), (Larger(), 12), (Larger(), 0), (ColourOracle(), 12)):
        assert decodes.during(lambda model=model: evaluator.evaluate(model, CPU)) == count
    assert evaluator.evaluate(ColourOracle(), CPU).metrics["zero_shot/a/top1"] == 1
