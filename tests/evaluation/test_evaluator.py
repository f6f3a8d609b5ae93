"""What models are found to be worth, against plain open_clip and against answers that are known."""

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
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
from PIL import Image

from reinforce import settings
from reinforce.config import Limits
from reinforce.errors import UserError
from reinforce.evaluation import pictures
from reinforce.evaluation.classes import templates_of
from reinforce.evaluation.config import Evaluation
from reinforce.evaluation.encoding import Encoder, classifier
from reinforce.evaluation.evaluator import Evaluator
from reinforce.evaluation.pictures import Memory, Pictures
from reinforce.evaluation.reading import Example
from reinforce.evaluation.report import Result
from teachers.device import Accelerator
from teachers.open_clip import OpenClipEncoder, OpenClipTeacher, image_spec
from teachers.pixels import to_pixels
from teachers.protocols import ImageSpec
from teachers.spec import TeacherSpec
from tests.helpers import tiny_models
from tests.helpers.data import config_of, picture
from tests.helpers.evaluation import COLOURS, Blind, Diverged, Seer, colour_folder, colour_shard, plain, shard
from tests.helpers.reinforced import reinforce_here

CPU = Accelerator("cpu")
NAMES = list(COLOURS)
WORDS = ["dog", "red car", "<end_of_text>", "great white shark", "Ünïcode"]


def evaluator(**config: Any) -> Evaluator:
    return Evaluator(settings.parse(Evaluation, {"threads": 2, "batch": 5, **config}))


def zero_shot(model: Encoder, images: str, **config: Any) -> dict[str, float]:
    """Scores of one classification set."""
    result = evaluator(zero_shot={"set": {"images": images, **config}}).evaluate(model, CPU)
    return {name.rpartition("/")[2]: score for name, score in result.metrics.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return colour_folder(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models of both ways to resize."""
    root = tmp_path_factory.mktemp("models")
    squash = {"resize_mode": "squash", "mean": 0.5, "std": 0.5, "interpolation": "bilinear"}
    return {
        "shortest": tiny_models.open_clip_model(root / "shortest"),
        "squash": tiny_models.open_clip_model(root / "squash", image_size=24, seed=1, preprocess=squash),
    }


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Pictures of several shapes and formats."""
    shapes = [(40, 30, "PNG"), (30, 40, "JPEG"), (24, 24, "PNG"), (90, 31, "JPEG"), (17, 50, "WEBP"), (33, 33, "JPEG")]
    return [picture(seed, width, height, kind) for seed, (width, height, kind) in enumerate(shapes * 3)]


@pytest.fixture(scope="module")
def photo_shard(tmp_path_factory: pytest.TempPathFactory, photos: list[bytes]) -> str:
    samples = [(f"{i:02d}", image, {"cls": str(i % 5), "txt": f"photo number {i}"}) for i, image in enumerate(photos)]
    return shard(tmp_path_factory.mktemp("photos") / "a.tar", samples)


# --- against open_clip


@pytest.mark.parametrize("kind", ["shortest", "squash"])
def test_pixels_are_those_of_open_clips_validation(names: dict[str, str], photos: list[bytes], kind: str) -> None:
    _, _, transform = open_clip.create_model_and_transforms(names[kind])
    spec = OpenClipTeacher(TeacherSpec(model=names[kind]), CPU).image
    assert spec is not None
    examples = [Example(str(i), lambda data=data: data, i) for i, data in enumerate(photos)]
    found = Pictures(lambda: iter(examples), len(photos), Limits(), Memory(0)).batches(spec, 4, 2)
    pixels = torch.cat([to_pixels(CPU.put(batch.pixels), spec) for batch in found])
    assert torch.equal(pixels, torch.stack([transform(Image.open(io.BytesIO(data))) for data in photos]))


@pytest.mark.parametrize("templates", ["openai", "simple", ["a photo of {}.", "{}"]])
def test_the_classifier_is_the_one_that_open_clip_builds(names: dict[str, str], templates: Any) -> None:
    model, tokenizer = open_clip.create_model(names["shortest"]).eval(), open_clip.get_tokenizer(names["shortest"])
    theirs = {"openai": OPENAI_IMAGENET_TEMPLATES, "simple": SIMPLE_IMAGENET_TEMPLATES}
    words = [word for word in WORDS if "<" not in word]  # which open_clip takes for the end of the text
    plain = templates if isinstance(templates, list) else theirs[templates]
    expected = open_clip.build_zero_shot_classifier(model, tokenizer, words, plain)
    ours = classifier(OpenClipTeacher(TeacherSpec(model=names["shortest"]), CPU), words, templates_of(templates, ""), 7)
    torch.testing.assert_close(ours.T, expected, rtol=0, atol=1e-6)
    assert (expected.T @ expected).fill_diagonal_(0).max() < 1 - 1e-4, "the classes are told apart"


@pytest.mark.parametrize("kind", ["shortest", "squash"])
def test_accuracy_is_that_of_a_plain_loop_over_open_clip(
    names: dict[str, str], photos: list[bytes], photo_shard: str, kind: str
) -> None:
    model, _, transform = open_clip.create_model_and_transforms(names[kind])
    words = [word for word in WORDS if "<" not in word] + ["cat"]
    weights = open_clip.build_zero_shot_classifier(
        model.eval(), open_clip.get_tokenizer(names[kind]), words, SIMPLE_IMAGENET_TEMPLATES
    )
    with torch.no_grad():
        pixels = torch.stack([transform(Image.open(io.BytesIO(data))) for data in photos])
        chosen = (model.encode_image(pixels, normalize=True) @ weights).argmax(1)
    labels = torch.arange(len(photos)) % 5
    hits = (chosen == labels).float()
    found = zero_shot(OpenClipTeacher(TeacherSpec(model=names[kind]), CPU), photo_shard, classes=words)
    assert found["top1"] == pytest.approx(float(hits.mean()))
    assert found["mean_per_class"] == pytest.approx(float(np.mean([hits[labels == i].mean() for i in range(5)])))
    assert found["top5"] == 1


def test_recall_is_that_of_a_plain_loop_over_open_clip(
    names: dict[str, str], photos: list[bytes], photo_shard: str
) -> None:
    model, _, transform = open_clip.create_model_and_transforms(names["shortest"])
    with torch.no_grad():
        pixels = torch.stack([transform(Image.open(io.BytesIO(data))) for data in photos])
        images = model.eval().encode_image(pixels, normalize=True).numpy()
        tokens = open_clip.get_tokenizer(names["shortest"])([f"photo number {i}" for i in range(len(photos))])
        texts = model.encode_text(tokens, normalize=True).numpy()
    found = evaluator(retrieval={"set": {"pairs": photo_shard}}).evaluate(
        OpenClipTeacher(TeacherSpec(model=names["shortest"]), CPU), CPU
    )
    for way, scores in (("text_to_image", texts @ images.T), ("image_to_text", images @ texts.T)):
        places = np.argsort(-scores, axis=1)
        for k in (1, 5, 10):
            hits = (places[:, :k] == np.arange(len(photos))[:, None]).any(1)
            assert found.metrics[f"retrieval/set/{way}/r{k}"] == pytest.approx(hits.mean())


def test_bf16_is_near_fp32(names: dict[str, str], photo_shard: str) -> None:
    half = Accelerator("cpu", "bf16")
    sets = evaluator(retrieval={"set": {"pairs": photo_shard}})
    exact, fast = (
        sets.evaluate(OpenClipTeacher(TeacherSpec(model=names["shortest"]), device), device).metrics
        for device in (CPU, half)
    )
    assert exact.keys() == fast.keys()
    assert all(abs(exact[name] - fast[name]) <= 3 / 18 for name in exact)


# --- against known answers


def test_who_sees_is_always_right_and_who_does_not_is_at_chance(folder: str) -> None:
    groups = {name: "dull" if name in ("grey", "blue") else "bright" for name in NAMES}
    perfect = {"top1": 1, "top5": 1, "mean_per_class": 1, "group": 1}
    assert zero_shot(Seer(), folder, groups=groups) == perfect
    # all classes tie, so the first, blue, is chosen for all
    chance = {"top1": 1 / 6, "top5": 5 / 6, "mean_per_class": 1 / 6, "group": 2 / 6}
    assert zero_shot(Blind(), folder, groups=groups) == pytest.approx(chance)
    assert zero_shot(Diverged(), folder, groups=groups) == dict.fromkeys(perfect, 0)


def test_folders_and_shards_of_the_same_images_agree(names: dict[str, str], folder: str, tmp_path: Path) -> None:
    url = colour_shard(tmp_path / "a.tar")
    for model in (Seer(), OpenClipTeacher(TeacherSpec(model=names["shortest"]), CPU)):
        of_folder = zero_shot(model, folder)
        assert zero_shot(model, url, classes=NAMES) == of_folder
        assert zero_shot(model, url, label="json:class") == of_folder


def test_any_true_match_is_a_hit(tmp_path: Path) -> None:
    """Two red images share a caption; the blue one has two, of which one is misleading."""
    samples = [
        ("0", plain("red"), {"json": {"texts": ["some red"]}}),
        ("1", plain("blue"), {"json": {"texts": ["a blue sky", "not green"]}}),
        ("2", plain("red", 1), {"json": {"texts": ["some red"]}}),
        ("3", plain("green"), {"json": {"texts": ["grass, green"]}}),
    ]
    sets = {"pairs": shard(tmp_path / "a.tar", samples), "captions": ["json:texts"]}
    found = evaluator(retrieval={"set": sets}).evaluate(Seer(), CPU)
    # four texts: "some red" finds image 0, "not green" finds image 3 and not 1
    assert found.metrics["retrieval/set/text_to_image/r1"] == pytest.approx(3 / 4)
    # green finds "not green" first, as it ties with its own and stands before it
    assert found.metrics["retrieval/set/image_to_text/r1"] == pytest.approx(3 / 4)
    assert found.metrics["retrieval/set/image_to_text/r5"] == 1
    assert found.metrics["retrieval/set/text_to_image/r5"] == 1
    assert found.sets["retrieval/set"].images == 4


def test_a_reinforced_dataset_is_judged_by_as_its_shards_are(
    names: dict[str, str], shards: Callable[..., str], tmp_path: Path
) -> None:
    model = OpenClipTeacher(TeacherSpec(model=names["shortest"]), CPU)
    source = shards(7, 6)
    results = []
    for url in (source, *(reinforce_here(_bare(source, tmp_path / how, how)) for how in ("embed", "reference"))):
        result = evaluator(
            retrieval={"set": {"pairs": url}},
            zero_shot={"set": {"images": url, "label": "json:uid"}},
        ).evaluate(model, CPU)
        assert result.sets["retrieval/set"].images == result.sets["zero_shot/set"].images == 13
        results.append(result)
    assert results[0] == results[1] == results[2]
    assert 0 < results[0].metrics["retrieval/set/image_to_text/r5"] < 1


def _bare(source: str, output: Path, images: str) -> dict[str, Any]:
    return config_of(source, output, images=images, teachers={}, captioners={})


# --- images that cannot be had


def test_refused_images_are_counted_and_named_and_change_nothing_else(
    names: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = [(f"{i}", plain(name), {"cls": str(i), "txt": name}) for i, name in enumerate(NAMES)]
    bad = [("x", b"no image", {"cls": "3", "txt": "red"}), ("y", plain("red")[:-30], {"cls": "3", "txt": "red"})]
    silent = [("z", plain("red"), {"cls": "3"})]
    whole = shard(tmp_path / "whole.tar", good)
    holes = shard(tmp_path / "holes.tar", [*bad, *good[:3], *silent, *good[3:]])

    def judged(url: str, **config: Any) -> Result:
        sets = {"zero_shot": {"set": {"images": url, "classes": NAMES}}, "retrieval": {"set": {"pairs": url}}}
        model, tokenizer = open_clip.create_model(names["shortest"]), open_clip.get_tokenizer(names["shortest"])
        spec = image_spec(open_clip.get_model_preprocess_cfg(model))
        return evaluator(**sets, **config).evaluate_module(model, spec, tokenizer, CPU)

    with caplog.at_level(logging.WARNING, "reinforce.evaluation"):
        clean = judged(whole)
        assert not caplog.messages
        found = judged(holes)
    assert [(r.key, r.reason.value) for r in found.sets["retrieval/set"].refused] == [
        ("x", "image_format"), ("y", "image_broken"), ("z", "no_text"),
    ]  # fmt: skip
    assert [r.key for r in found.sets["zero_shot/set"].refused] == ["x", "y"]
    assert caplog.messages == [
        "zero_shot/set: 7 images; without 2 that were refused: x (image_format), y (image_broken)",
        "retrieval/set: 6 images; without 3 that were refused: x (image_format), y (image_broken), z (no_text)",
    ]
    retrieval = {name: score for name, score in clean.metrics.items() if name.startswith("retrieval")}
    assert {name: found.metrics[name] for name in retrieval} == retrieval


def test_a_set_without_a_good_image_is_told(tmp_path: Path) -> None:
    url = shard(tmp_path / "a.tar", [("k", b"no image", {"cls": "red"})])
    with pytest.raises(UserError, match=r"zero_shot/set: every image is refused, the first \(k\) for image_format"):
        zero_shot(Seer(), url)


def test_a_file_above_the_limit_is_not_read(folder: str) -> None:
    sets = evaluator(zero_shot={"set": {"images": folder}}, limits={"image_bytes": 10})
    with pytest.raises(UserError, match=r"every image is refused, the first \(blue/0\.png\) for image_bytes: \d+"):
        sets.evaluate(Seer(), CPU)


def test_a_model_without_an_image_side_is_told(folder: str) -> None:
    class Reader(Seer):
        image = None

    with pytest.raises(UserError, match="no image side"):
        zero_shot(Reader(), folder)


# --- memory


class Decodes:
    """Counts what is decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        decode = pictures.decode

        def counted(data: bytes, limits: Limits) -> Image.Image:
            self.count += 1
            return decode(data, limits)

        monkeypatch.setattr(pictures, "decode", counted)

    def during(self, act: Callable[[], Any]) -> int:
        before = self.count
        act()
        return self.count - before


def test_what_fits_is_decoded_once(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = Decodes(monkeypatch)
    url = colour_shard(tmp_path / "a.tar", each=3)
    sets = {"zero_shot": {"a": {"images": folder}, "b": {"images": url, "label": "json:class"}}}
    small = 12 * 8 * 8 * 3
    expected: list[dict[str, float]] = []
    for memory, again in ((small + 18 * 8 * 8 * 3, 0), (small, 18), (small - 1, 30), (0, 30)):
        judge = evaluator(**sets, memory=memory)
        expected.append(judge.evaluate(Seer(), CPU).metrics)
        assert decodes.during(lambda judge=judge: expected.append(judge.evaluate(Seer(), CPU).metrics)) == again
    assert all(metrics == expected[0] for metrics in expected)


def test_what_was_left_before_its_end_is_not_kept(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Seer):
        def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    decodes = Decodes(monkeypatch)
    judge = evaluator(zero_shot={"a": {"images": folder}})
    with pytest.raises(KeyboardInterrupt):
        judge.evaluate(Interrupted(), CPU)
    assert decodes.during(lambda: judge.evaluate(Seer(), CPU)) == 12
    assert judge.evaluate(Seer(), CPU).metrics["zero_shot/a/top1"] == 1


def test_another_size_takes_the_place_of_what_is_kept(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Larger(Seer):
        image = ImageSpec(12, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    class Normalised(Seer):
        image = ImageSpec(8, (0.1, 0.1, 0.1), (1.0, 1.0, 1.0))

    decodes = Decodes(monkeypatch)
    judge = evaluator(zero_shot={"a": {"images": folder}}, memory=12 * 12 * 12 * 3)
    for model, count in ((Seer(), 12), (Normalised(), 0), (Larger(), 12), (Larger(), 0), (Seer(), 12)):
        assert decodes.during(lambda model=model: judge.evaluate(model, CPU)) == count


# --- during a training


def test_a_training_goes_on_as_if_nothing_had_been(names: dict[str, str], folder: str, photo_shard: str) -> None:
    def train(judge: Evaluator | None) -> tuple[list[torch.Tensor], list[Any]]:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        model = open_clip.create_model(names["shortest"], force_patch_dropout=0.5)
        model.train()
        model.visual.register_forward_pre_hook(lambda *_: modes_seen.append([m.training for m in model.modules()]))
        model.visual.ln_post.eval()  # a module that is frozen in another mode than its parent
        model.token_embedding.requires_grad_(False)
        model.set_grad_checkpointing(True)
        modes = {name: (m.training, [p.requires_grad for p in m.parameters()]) for name, m in model.named_modules()}
        tokenizer = open_clip.get_tokenizer(names["shortest"])
        spec = image_spec(open_clip.get_model_preprocess_cfg(model))
        clean = tokenizer.clean_fn
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for step in range(3):
            if judge is not None and step:
                modes_seen.clear()
                metrics.append(judge.evaluate_module(model, spec, tokenizer, CPU).metrics)
                assert modes_seen
                assert not any(map(any, modes_seen)), "judged in eval mode"
            pixels = torch.randn(4, 3, 32, 32)
            images, texts, _ = model(pixels, tokenizer(["a", "b", "c", "d"]))
            loss = (images @ texts.T).diagonal().sum()
            loss.backward()
            optimizer.step()
            assert {
                name: (m.training, [p.requires_grad for p in m.parameters()]) for name, m in model.named_modules()
            } == modes
        assert tokenizer.clean_fn is clean
        learnt = [value.detach() for p in model.parameters() for value in (p, p.grad) if value is not None]
        return learnt, [torch.rand(1).item(), float(np.random.rand()), random.random()]

    modes_seen: list[list[bool]] = []
    metrics: list[dict[str, float]] = []
    judge = evaluator(zero_shot={"a": {"images": folder}}, retrieval={"b": {"pairs": photo_shard}})
    (alone, drawn), (judged, drawn_judged) = train(None), train(judge)
    assert drawn == drawn_judged
    assert all(torch.equal(one, other) for one, other in zip(alone, judged, strict=True))
    assert len(metrics) == 2
    assert set(metrics[0]) == set(judge.config.metrics)


def test_modes_are_restored_when_judging_fails(names: dict[str, str], tmp_path: Path) -> None:
    judge = evaluator(zero_shot={"a": {"images": shard(tmp_path / "a.tar", [("k", b"bad", {"cls": "red"})])}})
    model, tokenizer = open_clip.create_model(names["shortest"]).train(), open_clip.get_tokenizer(names["shortest"])
    with pytest.raises(UserError):
        judge.evaluate_module(model, image_spec(open_clip.get_model_preprocess_cfg(model)), tokenizer, CPU)
    assert all(module.training for module in model.modules())


def test_names_of_classes_are_only_text(names: dict[str, str]) -> None:
    model, tokenizer = open_clip.create_model(names["shortest"]).eval(), open_clip.get_tokenizer(names["shortest"])
    encoder = OpenClipEncoder(model, image_spec(open_clip.get_model_preprocess_cfg(model)), tokenizer, CPU)
    texts = ["a <end_of_text> b", "a", "a < end_of_text> b"]
    whole, cut, spelled = encoder.encode_texts(texts)
    assert torch.equal(whole, spelled)
    assert not torch.equal(whole, cut)
    with torch.no_grad():
        theirs = model.encode_text(tokenizer(texts[:2]), normalize=True)
    torch.testing.assert_close(theirs[0], theirs[1], rtol=0, atol=1e-6)  # what the caller's tokenizer still does
