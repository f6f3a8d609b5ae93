from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn.functional import cross_entropy

from reinforce.captioning.config import Loss
from reinforce.captioning.feed import predicted
from reinforce.captioning.model import CaptionerModel, build_captioner, describe
from reinforce.captioning.task import CaptioningTask
from reinforce.errors import UserError
from reinforce.training.step import backpropagate
from reinforce.training.task import Batch
from teachers.device import Accelerator
from teachers.open_clip_tokens import Tokenizer
from teachers.pixels import to_pixels
from tests.helpers.captioning import TEXTS, batch_of, captioner, captioner_config
from tests.helpers.tiny_coca import END
from tests.helpers.tiny_models import open_clip_model

#: The tokenizer makes "&!;" the words 5, 0 and 282: its padding is also a word.
WITH_ZERO = "a sign that says &!;"


def ours(model: CaptionerModel, batch: Batch, loss: Loss) -> dict[str, torch.Tensor]:
    return CaptioningTask(model, loss, judge=None).losses(model(batch), batch)  # type: ignore[arg-type]


def theirs(model: CaptionerModel, batch: Batch) -> dict[str, torch.Tensor]:
    """open_clip's own forward pass and loss."""
    made = model.coca(to_pixels(batch["image"], model.image), batch["caption"])
    loss = open_clip.loss.CoCaLoss(caption_loss_weight=2, clip_loss_weight=1, pad_id=0)
    found: dict[str, torch.Tensor] = loss(**made, output_dict=True)
    return found


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_loss_and_its_gradients_are_those_of_open_clip(tmp_path: Path) -> None:
    model = captioner(tmp_path)
    batch = batch_of(TEXTS)
    mine = ours(model, batch, model.loss)
    sum(mine.values()).backward()  # type: ignore[union-attr]
    of_mine = gradients(model)
    model.zero_grad()
    reference = theirs(model, batch)
    sum(reference.values()).backward()  # type: ignore[union-attr]
    of_reference = gradients(model)

    torch.testing.assert_close(mine["contrastive"], reference["contrastive_loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine["caption"], reference["caption_loss"], rtol=1e-5, atol=1e-5)
    assert of_mine.keys() == of_reference.keys()
    for name, gradient in of_mine.items():
        torch.testing.assert_close(gradient, of_reference[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_word_with_the_number_of_the_padding_is_learnt(tmp_path: Path) -> None:
    model = captioner(tmp_path)
    batch = batch_of([WITH_ZERO, "two dogs"])
    assert 0 in batch["caption"][0, 1 : batch["length"][0]]
    with torch.no_grad():
        mine = ours(model, batch, model.loss)["caption"]
        logits = model.coca(to_pixels(batch["image"], model.image), batch["caption"])["logits"]
        token_by_token = [
            cross_entropy(logits[row, at], batch["caption"][row, at + 1])
            for row in range(2)
            for at in range(batch["length"][row])
        ]
        torch.testing.assert_close(mine, 2 * torch.stack(token_by_token).mean(), rtol=1e-5, atol=1e-5)
        assert abs(float(mine - theirs(model, batch)["caption_loss"])) > 1e-3  # which leaves the word out


def test_what_is_predicted_ends_with_the_first_end() -> None:
    tokens = Tokenizer("coca_ViT-B-32")(["", "fog", WITH_ZERO, "<end_of_text> is text", "word " * 200])
    lengths = predicted(tokens, END)
    assert lengths[:2] == [1, 2]
    assert lengths[2] == tokens[2].tolist().index(END)
    assert lengths[3] > 4  # a special token within a caption is plain text
    assert lengths[4] == 75  # cut at the context, where the end stands


@pytest.mark.parametrize("loss", [{"contrastive": 0, "caption": 1}, {"contrastive": 1, "caption": 0}])
def test_what_the_loss_does_not_reach_does_not_learn(tmp_path: Path, loss: dict[str, int]) -> None:
    model = captioner(tmp_path, loss=loss)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    [value] = ours(model, batch_of(TEXTS), model.loss).values()
    value.backward()
    assert learning == gradients(model).keys()
    assert ("coca.logit_scale" in learning) == bool(loss["contrastive"])
    assert ("coca.text_decoder.text_projection" in learning) == bool(loss["caption"])


def test_frozen_towers_keep_their_weights_and_their_mode(tmp_path: Path) -> None:
    model = captioner(tmp_path, captioner={"model": f"local-dir:{tmp_path}/model", "freeze": ["image", "text"]}).train()
    assert not model.coca.visual.training
    assert not model.coca.text.training
    assert model.coca.text_decoder.training
    learning = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {"text_decoder", "logit_scale"}
    told = describe(model)
    assert "decoder" in told
    assert "frozen: image, text" in told
    assert "image 0" not in told


@pytest.mark.parametrize(
    ("freeze", "loss"),
    [(["image", "text", "decoder"], {}), (["image", "text"], {"contrastive": 1, "caption": 0})],
)
def test_a_config_that_leaves_nothing_to_learn_is_refused(tmp_path: Path, freeze: list[str], loss: dict) -> None:
    with pytest.raises(UserError, match="nothing is left to learn"):
        captioner_config(tmp_path, captioner={"model": f"local-dir:{tmp_path}/model", "freeze": freeze}, loss=loss)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(tmp_path: Path) -> None:
    model = captioner(tmp_path)
    task = CaptioningTask(model, model.loss, judge=None)  # type: ignore[arg-type]
    batch, accelerator = batch_of(TEXTS), Accelerator("cpu")
    assert len(set(batch["length"])) == 4  # parts differ in their number of words
    found = []
    for seeds in ([0], [0, 1]):
        model.zero_grad()
        outcome = backpropagate(task, model, batch, len(TEXTS), seeds, accelerator)
        found.append((outcome.losses, gradients(model)))
    for name, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][name], rtol=1e-5, atol=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        model = captioner(tmp_path)
        model.coca.set_grad_checkpointing(checkpointing)
        values = ours(model.train(), batch_of(TEXTS), model.loss)
        sum(values.values()).backward()  # type: ignore[union-attr]
        found.append((values, gradients(model)))
    torch.testing.assert_close(found[0], found[1])


def test_bf16_comes_near_to_fp32(tmp_path: Path) -> None:
    model = captioner(tmp_path)
    task = CaptioningTask(model, model.loss, judge=None)  # type: ignore[arg-type]
    batch = batch_of(TEXTS)
    full, half = (
        backpropagate(task, model, batch, len(TEXTS), [0], Accelerator("cpu", precision)).losses
        for precision in ("fp32", "bf16")
    )
    for name, value in full.items():
        assert half[name].dtype == torch.float32
        assert half[name] != value
        torch.testing.assert_close(half[name], value, rtol=0.03, atol=0.03)


def test_other_models_are_refused_before_they_are_loaded(tmp_path: Path) -> None:
    clip = open_clip_model(tmp_path / "clip")
    with pytest.raises(UserError, match="is not a CoCa and cannot caption"):
        build_captioner(captioner_config(tmp_path, captioner={"model": clip}))
    with pytest.raises(UserError, match="unknown to open_clip"):
        build_captioner(captioner_config(tmp_path, captioner={"model": "coca_ViT-XL"}))
