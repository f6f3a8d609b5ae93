"""Metrics of evaluations, compared with plain open_clip loops and with known answers, and the cache of their images."""

from __future__ import annotations

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

from reinforce.errors import UserError
from reinforce.evaluation.evaluator import Evaluator
from reinforce.evaluation.report import Report, Result
from reinforce.source.config import Limits
from teachers.protocols import ImageSpec
from teachers.runtime.accelerator import Accelerator
from tests.helpers.data import config_of
from tests.helpers.evaluation import (
    COLOURS,
    CPU,
    ColourOracle,
    ConstantEncoder,
    RedNanEncoder,
    count_decoded,
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
def test_accuracy_and_recall_equal_those_of_a_plain_open_clip_loop(
    names: dict[str, str], photos: list[bytes], photo_shard: str, kind: str
) -> None:
    model, _, transform = open_clip.create_model_and_transforms(names[kind])
    tokenizer, labels = open_clip.get_tokenizer(names[kind]), torch.arange(len(photos)) % 5
    weights = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, WORDS, SIMPLE_IMAGENET_TEMPLATES)
    with torch.no_grad():
        pixels = torch.stack([transform(Image.open(io.BytesIO(data))) for data in photos])
        vectors = model.encode_image(pixels, normalize=True)
        texts = model.encode_text(tokenizer([f"photo number {i}" for i in range(len(photos))]), normalize=True)
    hits = ((vectors @ weights).argmax(1) == labels).float()
    classified = {"images": photo_shard, "classes": WORDS}
    sets: dict[str, Any] = {"zero_shot": {"set": classified}, "retrieval": {"set": {"pairs": photo_shard}}}
    result = make_evaluator(**sets).evaluate(load_teacher(names[kind]), CPU).metrics
    assert result["zero_shot/set/top1"] == pytest.approx(float(hits.mean()))
    of_classes = [float(hits[labels == i].mean()) for i in range(5)]
    assert result["zero_shot/set/mean_per_class"] == pytest.approx(np.mean(of_classes))
    assert result["zero_shot/set/top5"] == 1
    scores = (texts @ vectors.T).numpy()
    for way, of_queries in (("text_to_image", scores), ("image_to_text", scores.T)):
        order = np.argsort(-of_queries, axis=1)
        for k in (1, 5, 10):
            found = (order[:, :k] == np.arange(len(photos))[:, None]).any(1)
            assert result[f"retrieval/set/{way}/r{k}"] == pytest.approx(found.mean())
    half = Accelerator("cpu", "bf16")
    fast = make_evaluator(**sets).evaluate(load_teacher(names[kind], half), half).metrics
    recalls = [name for name in result if name.startswith("retrieval/")]
    assert all(abs(result[name] - fast[name]) <= 3 / 18 for name in recalls), "bf16 is close to fp32"


def test_equal_captions_are_one_text_of_retrieval_and_the_report_counts_them(
    names: dict[str, str], photos: list[bytes], tmp_path: Path
) -> None:
    captions = ["a cat", "a cat", "a dog", "a bird", "a cat"]
    shard = write_shard(
        tmp_path / "a.tar",
        [(f"{i}", image, {"txt": text}) for i, (image, text) in enumerate(zip(photos, captions, strict=False))],
    )
    found = make_evaluator(retrieval={"set": {"pairs": shard}}).evaluate(load_teacher(names["squash"]), CPU)
    assert str(found.sets["retrieval/set"]) == "5 images; 3 distinct texts of 5 captions, each counted once"
    assert 3 * found.metrics["retrieval/set/text_to_image/r1"] == pytest.approx(
        round(3 * found.metrics["retrieval/set/text_to_image/r1"])
    )
    other = write_shard(tmp_path / "b.tar", [(f"{i}", photos[i], {"txt": f"photo {i}"}) for i in range(3)])
    found = make_evaluator(retrieval={"set": {"pairs": other}}).evaluate(load_teacher(names["squash"]), CPU)
    assert str(found.sets["retrieval/set"]) == "3 images"


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
    result = sets.evaluate(RedNanEncoder(texts=True), CPU)
    assert (result.metrics, [why.partition(".")[0] for why in result.failed.values()]) == (
        {},
        [
            "1 of 6 class embeddings and 2 of 12 image embeddings are not finite",
            "2 of 12 image embeddings and 2 of 12 text embeddings are not finite",
        ],
    )
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


def test_a_dataset_scores_as_its_shards_do(names: dict[str, str], shards: Callable[..., str], tmp_path: Path) -> None:
    model = load_teacher(names["shortest"])
    source = shards(7, 6)
    results = []
    options: dict[str, Any] = {"teachers": {}, "captioners": {}}
    configs = [config_of(source, tmp_path / how, images=how, **options) for how in ("embed", "reference")]
    for url in (source, *map(reinforce_here, configs)):
        result = make_evaluator(
            retrieval={"set": {"pairs": url}},
            zero_shot={"set": {"images": url, "label": "json:uid"}},
            images_from=[str(Path(source).parent)],
        ).evaluate(model, CPU)
        assert result.sets["retrieval/set"].images == result.sets["zero_shot/set"].images == 13
        results.append(result)
    assert results[0] == results[1] == results[2]
    assert 0 < results[0].metrics["retrieval/set/image_to_text/r5"] < 1


# --- images that cannot be decoded


def test_refused_images_are_listed(names: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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


def test_no_usable_image_and_a_model_of_texts_are_errors(names: dict[str, str], folder: str, tmp_path: Path) -> None:
    url = write_shard(tmp_path / "a.tar", [("k", b"no image", {"cls": "red"})])
    model, tokenizer = open_clip.create_model(names["shortest"]).train(), open_clip.get_tokenizer(names["shortest"])
    with pytest.raises(UserError, match=r"zero_shot/set: every image is refused, the first \(k\) for image_format"):
        make_evaluator(zero_shot={"set": {"images": url}}).evaluate_module(model, load_spec(model), tokenizer, CPU)
    assert all(module.training for module in model.modules()), "modes are restored"
    large = make_evaluator(zero_shot={"set": {"images": folder}}, limits=Limits(image_bytes=10))
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
        model = open_clip.create_model(names["shortest"], force_patch_dropout=0.5).train()
        model.visual.register_forward_pre_hook(lambda *_: modes_seen.append([m.training for m in model.modules()]))
        model.visual.ln_post.eval()  # a module in another mode than its parent
        model.token_embedding.requires_grad_(False)
        model.set_grad_checkpointing(True)
        modes = [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]
        tokenizer = open_clip.get_tokenizer(names["shortest"])
        spec, clean = load_spec(model), tokenizer.clean_fn
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for step in range(3):
            if evaluator is not None and step:
                modes_seen.clear()
                metrics = evaluator.evaluate_module(model, spec, tokenizer, CPU).metrics
                assert {*metrics} == {*evaluator.config.metrics}
                assert modes_seen
                assert not any(map(any, modes_seen)), "evaluated in eval mode"
            images, texts, _ = model(torch.randn(4, 3, 32, 32), tokenizer(["a", "b", "c", "d"]))
            (images @ texts.T).diagonal().sum().backward()
            optimizer.step()
            assert [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()] == modes
        assert tokenizer.clean_fn is clean
        state = [value.detach() for p in model.parameters() for value in (p, p.grad) if value is not None]
        return state, [torch.rand(1).item(), float(np.random.rand()), random.random()]

    modes_seen: list[list[bool]] = []
    evaluator = make_evaluator(zero_shot={"a": {"images": folder}}, retrieval={"b": {"pairs": photo_shard}})
    (alone, drawn), (evaluated, drawn_evaluated) = train(None), train(evaluator)
    assert drawn == drawn_evaluated
    assert all(torch.equal(one, other) for one, other in zip(alone, evaluated, strict=True))


def test_sets_that_fit_are_decoded_once(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = count_decoded(monkeypatch)
    url = write_colour_shard(tmp_path / "a.tar", each=3)
    sets = {"zero_shot": {"a": {"images": folder}, "b": {"images": url, "label": "json:class"}}}
    small = 12 * 8 * 8 * 3
    metrics = []
    for memory, again in ((small + 18 * 8 * 8 * 3, 0), (small, 18), (small - 1, 30), (0, 30)):
        evaluator = make_evaluator(**sets, memory=memory)
        for count in (30, again):
            decoded.clear()
            metrics.append(evaluator.evaluate(ColourOracle(), CPU).metrics)
            assert len(decoded) == count
    assert all(of_one == metrics[0] for of_one in metrics)


def test_a_cache_has_one_geometry_and_no_interrupted_pass(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Larger(ColourOracle):
        image = ImageSpec(12, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    class Normalised(ColourOracle):
        image = ImageSpec(8, (0.1, 0.1, 0.1), (1.0, 1.0, 1.0))

    class Interrupted(ColourOracle):
        def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    decoded = count_decoded(monkeypatch)
    evaluator = make_evaluator(zero_shot={"a": {"images": folder}}, memory=12 * 12 * 12 * 3)
    with pytest.raises(KeyboardInterrupt):
        evaluator.evaluate(Interrupted(), CPU)
    for model, count in ((ColourOracle(), 12), (Normalised(), 0), (Larger(), 12), (Larger(), 0), (ColourOracle(), 12)):
        decoded.clear()
        metrics = evaluator.evaluate(model, CPU).metrics
        assert len(decoded) == count
    assert metrics["zero_shot/a/top1"] == 1
