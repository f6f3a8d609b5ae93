"""Metrics of captioners, compared with open_clip's, a run's and published values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from reinforce.captioning.evaluator import CaptionerEvaluator
from reinforce.captioning.metrics import bleu, cider
from reinforce.captioning.model import CaptionerModel
from reinforce.captioning.pairs import Pairs, load_pairs
from reinforce.config import Limits
from reinforce.errors import UserError
from reinforce.images.policy import decode
from teachers.coca.captioner import CocaCaptioner
from teachers.device.accelerator import Accelerator
from teachers.open_clip.tokenizer import Tokenizer
from teachers.preprocessing.fit import fit
from teachers.preprocessing.pixels import to_pixels
from tests.helpers.captioning import captioned, captioner_config, make_captioner, write_shards
from tests.helpers.data import picture, write_tar
from tests.helpers.tiny_coca import END


def make_evaluator(folder: Path, **changes: object) -> tuple[CaptionerEvaluator, Pairs, CaptionerModel]:
    config = captioner_config(folder, **changes)
    pairs = load_pairs(config).held_out()
    return CaptionerEvaluator(pairs, config, Tokenizer("coca_ViT-B-32"), END), pairs, make_captioner(folder).eval()


def load_pixels(pairs: Pairs, model: CaptionerModel) -> torch.Tensor:
    keys = pairs.table["key"].to_pylist()
    images = [fit(decode(picture(int(key[:3]) * 1000 + int(key[3:])), Limits()), model.image) for key in keys]
    return to_pixels(torch.from_numpy(np.stack(images)), model.image)


def test_losses_equal_those_of_open_clips_forward_pass(tmp_path: Path) -> None:
    write_shards(tmp_path, 30, captions=2)
    evaluator, pairs, model = make_evaluator(tmp_path, evaluate={"batch": 4, "captioned": 0})
    metrics = evaluator.evaluate(model)
    pixels, count = load_pixels(pairs, model), len(pairs)
    assert count > 4
    nll: list[float] = []
    hits: list[bool] = []
    contrastive: list[float] = []
    with torch.inference_mode():
        for number in range(2):
            texts = Tokenizer("coca_ViT-B-32")([pairs.captions(row)[number] for row in range(count)])
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


def test_retrieval_uses_the_image_and_text_towers(tmp_path: Path) -> None:
    write_shards(tmp_path, 40)
    evaluator, pairs, model = make_evaluator(tmp_path, evaluate={"batch": 4, "captioned": 0})
    metrics = evaluator.evaluate(model)
    texts = Tokenizer("coca_ViT-B-32")([pairs.captions(row)[0] for row in range(len(pairs))])
    with torch.inference_mode():
        scores = model.coca.encode_image(load_pixels(pairs, model)) @ model.coca.encode_text(texts).T
    for way, matrix in {"image_to_text": scores, "text_to_image": scores.T}.items():
        order = matrix.argsort(dim=1, descending=True)
        for k in (1, 5, 10):
            recall = np.mean([row in order[row, :k] for row in range(len(pairs))])
            assert metrics[f"retrieval/{way}/r{k}"] == pytest.approx(recall)
    assert 0 < metrics["retrieval/image_to_text/r10"] < 1


def test_captions_equal_those_of_a_run(tmp_path: Path) -> None:
    write_shards(tmp_path, 30, captions=2)
    evaluator, pairs, model = make_evaluator(tmp_path)
    metrics = evaluator.evaluate(model)
    spec = captioner_config(tmp_path).evaluate.generate.captioner(f"local-dir:{tmp_path}/model")
    captions = CocaCaptioner(spec, Accelerator("cpu")).caption(
        load_pixels(pairs, model)[:3], np.zeros((3, 1), np.uint64)
    )
    texts = [text[0] for text in captions if text is not None]
    assert evaluator.generate_captions(model, Accelerator("cpu")) == dict(enumerate(texts))
    references = [pairs.captions(row) for row in range(3)]
    assert metrics["cider"] == pytest.approx(cider(texts, references))
    assert metrics["bleu"] == pytest.approx(bleu(texts, references))


def test_evaluation_does_not_change_the_model(tmp_path: Path) -> None:
    write_shards(tmp_path, 30)
    evaluator, _, model = make_evaluator(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = evaluator.evaluate(model)
    assert evaluator.evaluate(model) == first
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_broken_held_out_images_are_left_out(tmp_path: Path) -> None:
    write_shards(tmp_path, 30)
    broken = {f"9{i}": picture(i)[:90] for i in range(3)}
    write_tar(tmp_path / "held_out" / "0.tar", captioned(broken))
    evaluator, _, model = make_evaluator(tmp_path, held_out={"source": f"{tmp_path}/held_out/0.tar"})
    with pytest.raises(UserError, match="held_out: no image can be decoded, the first: 90: "):
        evaluator.evaluate(model)
    good = {f"8{i}": picture(i) for i in range(5)}
    write_tar(tmp_path / "held_out" / "1.tar", captioned(good))
    evaluator, _, model = make_evaluator(tmp_path, held_out={"source": f"{tmp_path}/held_out/*.tar"})
    mixed = evaluator.evaluate(model)
    evaluator, _, model = make_evaluator(tmp_path, held_out={"source": f"{tmp_path}/held_out/1.tar"})
    alone = evaluator.evaluate(model)
    assert mixed["caption_loss"] == pytest.approx(alone["caption_loss"])
    assert mixed["retrieval/image_to_text/r1"] == alone["retrieval/image_to_text/r1"]


REFERENCES = [
    ["a red apple on a table", "an apple"],
    ["a dog with a hat"],
    ["the face of a small cat", "a cat", "a small cat looks"],
]
CAPTIONS = ["a red apple", "a cat with a hat", "a small cat"]


def test_cider_d_equals_that_of_pycocoevalcap() -> None:
    # value of pycocoevalcap 1.2 for the same words (its Cider is CIDEr-D)
    assert cider(CAPTIONS, REFERENCES) == pytest.approx(3.3992980299586297, rel=1e-12)


def test_scores_of_perfect_unrelated_repeated_and_punctuated_captions() -> None:
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
