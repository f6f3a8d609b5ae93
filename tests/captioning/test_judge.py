from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from torch.nn.functional import cross_entropy

from reinforce.captioning.finetune import build, cut_captions
from reinforce.captioning.judge import Judge
from reinforce.captioning.metrics import bleu, cider
from reinforce.captioning.model import CaptionerModel
from reinforce.captioning.pairs import Pairs, find_pairs
from reinforce.config import Limits
from reinforce.errors import UserError
from reinforce.source.image import decode
from teachers.coca import CocaCaptioner
from teachers.device import Accelerator
from teachers.open_clip_tokens import Tokenizer
from teachers.pixels import fit, to_pixels
from tests.helpers.captioning import captioner, captioner_config, write_shards
from tests.helpers.data import picture, write_tar
from tests.helpers.tiny_coca import END


def judge_of(folder: Path, **changes: object) -> tuple[Judge, Pairs, CaptionerModel]:
    config = captioner_config(folder, **changes)
    pairs = find_pairs(config).held_out()
    return Judge(pairs, config, Tokenizer("coca_ViT-B-32"), END), pairs, captioner(folder).eval()


def pixels_of(pairs: Pairs, model: CaptionerModel) -> torch.Tensor:
    keys = pairs.table["key"].to_pylist()
    images = [fit(decode(picture(int(key[:3]) * 1000 + int(key[3:])), Limits()), model.image) for key in keys]
    return to_pixels(torch.from_numpy(np.stack(images)), model.image)


def test_losses_are_those_of_open_clips_forward_pass(tmp_path: Path) -> None:
    write_shards(tmp_path, 30, captions=2)
    judge, pairs, model = judge_of(tmp_path, evaluate={"batch": 4, "captioned": 0})
    metrics = judge(model)
    pixels, count = pixels_of(pairs, model), len(pairs)
    assert count > 4
    nll: list[float] = []
    hits: list[bool] = []
    contrastive: list[float] = []
    with torch.inference_mode():
        for number in range(2):
            texts = Tokenizer("coca_ViT-B-32")([pairs.captions(row)[number] for row in range(count)])
            made = model.coca(pixels, texts)
            for row in range(count):
                end = texts[row].tolist().index(END)
                losses = cross_entropy(made["logits"][row, :end], texts[row, 1 : end + 1], reduction="none")
                nll += losses.tolist()
                hits += (made["logits"][row, :end].argmax(-1) == texts[row, 1 : end + 1]).tolist()
            if number == 0:
                loss = open_clip.loss.ClipLoss()
                for start in range(0, count - 3, 4):
                    part = slice(start, start + 4)
                    features = made["image_features"][part], made["text_features"][part]
                    contrastive.append(float(loss(*features, made["logit_scale"])))
    assert metrics["caption_loss"] == pytest.approx(np.mean(nll), rel=1e-4)
    assert metrics["token_accuracy"] == pytest.approx(np.mean(hits))
    assert metrics["contrastive_loss"] == pytest.approx(np.mean(contrastive), rel=1e-4)
    assert "cider" not in metrics


def test_retrieval_is_that_of_the_two_towers(tmp_path: Path) -> None:
    write_shards(tmp_path, 40)
    judge, pairs, model = judge_of(tmp_path, evaluate={"batch": 4, "captioned": 0})
    metrics = judge(model)
    texts = Tokenizer("coca_ViT-B-32")([pairs.captions(row)[0] for row in range(len(pairs))])
    with torch.inference_mode():
        scores = model.coca.encode_image(pixels_of(pairs, model)) @ model.coca.encode_text(texts).T
    for way, matrix in {"image_to_text": scores, "text_to_image": scores.T}.items():
        order = matrix.argsort(dim=1, descending=True)
        for k in (1, 5, 10):
            found = np.mean([row in order[row, :k] for row in range(len(pairs))])
            assert metrics[f"retrieval/{way}/r{k}"] == pytest.approx(found)
    assert 0 < metrics["retrieval/image_to_text/r10"] < 1


def test_captions_are_those_of_a_run(tmp_path: Path) -> None:
    write_shards(tmp_path, 30, captions=2)
    judge, pairs, model = judge_of(tmp_path)
    metrics = judge(model)
    spec = captioner_config(tmp_path).evaluate.generate.captioner(f"local-dir:{tmp_path}/model")
    made = CocaCaptioner(spec, Accelerator("cpu")).caption(pixels_of(pairs, model)[:3], np.zeros((3, 1), np.uint64))
    texts = [text[0] for text in made if text is not None]
    assert judge.captions(model, Accelerator("cpu")) == dict(enumerate(texts))
    references = [pairs.captions(row) for row in range(3)]
    assert metrics["cider"] == pytest.approx(cider(texts, references))
    assert metrics["bleu"] == pytest.approx(bleu(texts, references))


def test_judging_leaves_the_model_and_its_gradients_alone(tmp_path: Path) -> None:
    write_shards(tmp_path, 30)
    judge, _, model = judge_of(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = judge(model)
    assert judge(model) == first
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_held_out_images_that_are_broken_are_left_out(tmp_path: Path) -> None:
    write_shards(tmp_path, 30)
    broken = {f"9{i}": picture(i)[:90] for i in range(3)}
    write_tar(tmp_path / "own" / "0.tar", [m for key in broken for m in _members(key, broken[key])])
    judge, _, model = judge_of(tmp_path, held_out={"source": f"{tmp_path}/own/0.tar"})
    with pytest.raises(UserError, match="held_out: no image can be decoded, the first: 90: "):
        judge(model)
    whole = {f"8{i}": picture(i) for i in range(5)}
    write_tar(tmp_path / "own" / "1.tar", [m for key in whole for m in _members(key, whole[key])])
    judge, _, model = judge_of(tmp_path, held_out={"source": f"{tmp_path}/own/*.tar"})
    mixed = judge(model)
    judge, _, model = judge_of(tmp_path, held_out={"source": f"{tmp_path}/own/1.tar"})
    alone = judge(model)
    assert mixed["caption_loss"] == pytest.approx(alone["caption_loss"])
    assert mixed["retrieval/image_to_text/r1"] == alone["retrieval/image_to_text/r1"]


def test_what_is_learnt_from_what_is_told_at_the_start(tmp_path: Path) -> None:
    members = [m for i in range(30) for m in _members(str(i), picture(i))]
    members += [m for i in range(30, 33) for m in _members(str(i), picture(i), b"word " * (74 if i == 30 else 75))]
    write_tar(tmp_path / "shards" / "0.tar", members)
    task, _ = build(captioner_config(tmp_path), Accelerator("cpu"))
    model, counts, cut = task.notes
    assert "M parameters learn (image " in model
    assert "images with" in counts
    assert cut == "2 of 33 captions are longer than the model's context and are cut"


def test_a_caption_of_just_the_context_is_not_cut(tmp_path: Path) -> None:
    assert cut_captions(["word " * 74], "coca_ViT-B-32") == 0
    assert cut_captions(["word " * 75, "fog", "x" * 80], "coca_ViT-B-32") == 1


def _members(key: str, image: bytes, text: bytes = b"a caption") -> list[tuple[str, bytes]]:
    return [(f"{key}.png", image), (f"{key}.txt", text)]
