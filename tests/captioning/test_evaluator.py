"""Metrics of captioners, compared with open_clip's, a run's and published values."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from reinforce.captioning.data import HeldOutImages, load_streams
from reinforce.captioning.evaluator import CaptionerEvaluator, cider
from reinforce.captioning.model import CaptionerModel
from reinforce.errors import UserError
from reinforce.explore.captions import bleu
from reinforce.images.policy import decode
from reinforce.source.config import Limits
from teachers.coca.captioner import CocaCaptioner
from teachers.fit import fit
from teachers.open_clip.text import Tokenizer
from teachers.pixels import to_pixels
from teachers.runtime.accelerator import Accelerator
from tests.helpers.captioning import captioned, captioner_config, make_captioner, write_shards
from tests.helpers.data import picture, write_tar
from tests.helpers.models.tiny_coca import END


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captioner")
    write_shards(folder, 30, captions=2)
    return folder


def make_evaluator(folder: Path, **changes: object) -> tuple[CaptionerEvaluator, HeldOutImages, CaptionerModel]:
    config = captioner_config(folder, **changes)
    pairs = load_streams(config, 32)[1]
    return CaptionerEvaluator(pairs, config, Tokenizer("coca_ViT-B-32"), END), pairs, make_captioner(folder).eval()


def load_pixels(pairs: HeldOutImages, model: CaptionerModel) -> torch.Tensor:
    images = [fit(decode(image, Limits()), model.image) for image in pairs.images()]
    return to_pixels(torch.from_numpy(np.stack(images)), model.image)


def test_losses_and_recalls_equal_those_of_open_clips_forward_pass_and_the_model_does_not_change(folder: Path) -> None:
    evaluator, pairs, model = make_evaluator(folder, evaluate={"batch": 4, "captioned": 0})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    metrics = evaluator.evaluate(model)
    assert evaluator.evaluate(model) == metrics
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    pixels, count = load_pixels(pairs, model), len(pairs)
    assert count > 4
    nll: list[float] = []
    hits: list[bool] = []
    contrastive: list[float] = []
    with torch.inference_mode():
        for number in range(2):
            texts = Tokenizer("coca_ViT-B-32")([pairs.captions[row][number] for row in range(count)])
            outputs = model.coca(pixels, texts)
            for row in range(count):
                end = texts[row].tolist().index(END)
                losses = cross_entropy(outputs["logits"][row, :end], texts[row, 1 : end + 1], reduction="none")
                nll += losses.tolist()
                hits += (outputs["logits"][row, :end].argmax(-1) == texts[row, 1 : end + 1]).tolist()
            if number == 0:
                loss = open_clip.loss.ClipLoss()
                for start in range(0, count - 3, 4):
                    part = slice(start, start + 4)
                    features = outputs["image_features"][part], outputs["text_features"][part]
                    contrastive.append(float(loss(*features, outputs["logit_scale"])))
    assert metrics["caption_loss"] == pytest.approx(np.mean(nll), rel=1e-4)
    assert metrics["token_accuracy"] == pytest.approx(np.mean(hits))
    assert metrics["contrastive_loss"] == pytest.approx(np.mean(contrastive), rel=1e-4)
    assert "cider" not in metrics
    owners = np.repeat(np.arange(count), 2)
    tokens = Tokenizer("coca_ViT-B-32")([text for row in range(count) for text in pairs.captions[row]])
    with torch.inference_mode():
        scores = (model.coca.encode_image(pixels) @ model.coca.encode_text(tokens).T).numpy()
    for k in (1, 5, 10):
        found = owners[np.argsort(-scores, axis=1)[:, :k]] == np.arange(count)[:, None]
        assert metrics[f"retrieval/image_to_text/r{k}"] == pytest.approx(found.any(1).mean())
        found = np.argsort(-scores.T, axis=1)[:, :k] == owners[:, None]
        assert metrics[f"retrieval/text_to_image/r{k}"] == pytest.approx(found.any(1).mean())
    assert 0 < metrics["retrieval/text_to_image/r5"] < 1


def test_captions_equal_those_of_a_run(folder: Path) -> None:
    evaluator, pairs, model = make_evaluator(folder)
    metrics = evaluator.evaluate(model)
    spec = captioner_config(folder).evaluate.generate.captioner(f"local-dir:{folder}/model")
    captions = CocaCaptioner(spec, Accelerator("cpu")).caption(
        load_pixels(pairs, model)[:3], np.zeros((3, 1), np.uint64)
    )
    texts = [text[0] for text in captions if text is not None]
    assert evaluator.generate_captions(model, Accelerator("cpu")) == dict(enumerate(texts))
    references = pairs.captions[:3]
    assert metrics["cider"] == pytest.approx(cider(texts, references))
    assert metrics["bleu"] == pytest.approx(bleu(texts, references))


def test_broken_held_out_images_are_left_out(tmp_path: Path) -> None:
    write_shards(tmp_path, 30)
    broken = {f"9{i}": picture(i)[:90] for i in range(3)}
    write_tar(tmp_path / "held_out" / "0.tar", captioned(broken))
    evaluator, _, model = make_evaluator(tmp_path, held_out={"source": f"{tmp_path}/held_out/0.tar"})
    with pytest.raises(UserError, match=r"held_out: no image can be decoded, the first: 9\d: "):
        evaluator.evaluate(model)
    good = {f"8{i}": picture(i) for i in range(5)}
    write_tar(tmp_path / "held_out" / "1.tar", captioned(good))
    evaluator, _, model = make_evaluator(tmp_path, held_out={"source": f"{tmp_path}/held_out/*.tar"})
    mixed = evaluator.evaluate(model)
    evaluator, _, model = make_evaluator(tmp_path, held_out={"source": f"{tmp_path}/held_out/1.tar"})
    alone = evaluator.evaluate(model)
    assert mixed["caption_loss"] == pytest.approx(alone["caption_loss"])
    assert mixed["retrieval/image_to_text/r1"] == alone["retrieval/image_to_text/r1"]


@pytest.mark.parametrize("tower", ["visual", "text", "text_decoder"])
def test_metrics_of_what_is_not_finite_are_nan_and_named(
    folder: Path, tower: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that gives NaN must not count as one that misses."""
    evaluator, pairs, model = make_evaluator(folder)
    weights = {"visual": model.coca.visual.proj, "text": model.coca.text.text_projection}
    with torch.no_grad():
        weights.get(tower, model.coca.text_decoder.text_projection).fill_(torch.nan)
    metrics = evaluator.evaluate(model)
    failed = {name for name, value in metrics.items() if math.isnan(value)}
    of_captions = {"caption_loss", "token_accuracy", "cider", "bleu"}
    if tower == "text_decoder":
        assert failed == of_captions
        assert "held out: the losses of captions are not finite. Check the weights of the model" in caplog.text
        return
    assert failed == {*metrics} - of_captions
    what, count = ("image", len(pairs)) if tower == "visual" else ("text", 2 * len(pairs))
    assert f"held out: retrieval has no metrics: {count} of {count} {what} embeddings are not finite" in caplog.text


def test_captions_have_no_metrics_if_the_model_captions_one_image_not(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator, pairs, model = make_evaluator(folder)
    texts: dict[int, str | None] = {0: "a cat", 1: None, 2: "a dog"}
    monkeypatch.setattr(evaluator, "generate_captions", lambda *_: texts)
    metrics = evaluator.evaluate(model)
    assert {name for name, value in metrics.items() if math.isnan(value)} == {"cider", "bleu"}
    assert f"held out: the logits of {pairs.keys[1]} are not finite" in caplog.text


REFERENCES = [
    ["a red apple on a table", "an apple"],
    ["a dog with a hat"],
    ["the face of a small cat", "a cat", "a small cat looks"],
]
CAPTIONS = ["a red apple", "a cat with a hat", "a small cat"]


def test_cider_d_equals_that_of_pycocoevalcap_and_scores_of_perfect_and_unrelated_captions_are_known() -> None:
    # value of pycocoevalcap 1.2 for the same words (its Cider is CIDEr-D)
    assert cider(CAPTIONS, REFERENCES) == pytest.approx(3.3992980299586297, rel=1e-12)
    first = [texts[0] for texts in REFERENCES]
    assert bleu(first, REFERENCES) == pytest.approx(1)
    assert cider(first, [[text] for text in first]) == pytest.approx(10), "the highest score"
    unrelated = ["x y z w v"] * 3
    assert cider(unrelated, REFERENCES) == 0
    assert bleu(unrelated, REFERENCES) < 0.05  # smoothed
    same = ["A red, apple!", "a CAT with a hat.", "a small cat"]
    assert cider(same, REFERENCES) == cider(CAPTIONS, REFERENCES), "case and punctuation are ignored"
    assert cider([f"{text} {text} {text} {text}" for text in CAPTIONS], REFERENCES) < cider(CAPTIONS, REFERENCES)


@given(st.lists(st.tuples(st.text("abc ", max_size=20), st.lists(st.text("abc ", max_size=20), min_size=1, max_size=3))
                , min_size=1, max_size=5))  # fmt: skip
def test_scores_are_in_range_for_any_text(rows: list[tuple[str, list[str]]]) -> None:
    captions, references = [text for text, _ in rows], [texts for _, texts in rows]
    assert 0 <= cider(captions, references) <= 10 + 1e-9
    assert 0 <= bleu(captions, references) <= 1 + 1e-9
