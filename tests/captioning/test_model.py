"""CoCa in training: its losses compared with open_clip's, towers that are frozen, and the exported model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import cross_entropy

from reinforce.captioning.config import Generation
from reinforce.captioning.finetune import CaptioningTask
from reinforce.captioning.model import CaptionerModel, build_captioner, check_captioner, describe_parameters
from reinforce.errors import UserError
from reinforce.training.step import backpropagate
from reinforce.training.task import Batch
from teachers.coca.captioner import CocaCaptioner, set_context
from teachers.open_clip.building import write_open_clip
from teachers.open_clip.text import Tokenizer
from teachers.pixels import to_pixels
from teachers.runtime.accelerator import Accelerator
from tests.helpers.captioning import TEXTS, captioner_config, make_batch, make_captioner, task_losses
from tests.helpers.models.tiny_models import open_clip_model
from tests.helpers.trainings import gradients_of


def test_parameters_that_the_loss_does_not_use_are_not_trained(tmp_path: Path) -> None:
    for loss in ({"contrastive": 0, "caption": 1}, {"contrastive": 1, "caption": 0}):
        model = make_captioner(tmp_path, loss=loss)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        [value] = task_losses(model, make_batch(TEXTS), model.loss).values()
        value.backward()
        assert trainable == gradients_of(model).keys()
        assert ("coca.logit_scale" in trainable) == bool(loss["contrastive"])
        assert ("coca.text_decoder.text_projection" in trainable) == bool(loss["caption"])


def test_frozen_towers_are_not_trained_and_stay_in_eval_mode(tmp_path: Path) -> None:
    frozen = {"model": f"local-dir:{tmp_path}/model", "freeze": ["image", "text"]}
    model = make_captioner(tmp_path, captioner=frozen).train()
    assert not model.coca.visual.training
    assert not model.coca.text.training
    assert model.coca.text_decoder.training
    trainable = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"text_decoder", "logit_scale"}
    counts = model.trainable_counts()
    assert (counts["image"], counts["scales"]) == (0, 1)
    assert counts["decoder"] == sum(p.numel() for p in model.coca.text_decoder.parameters())
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    line = describe_parameters(model)
    assert "decoder" in line
    assert "frozen: image, text" in line
    assert "image 0" not in line


def test_gradient_checkpointing_does_not_change_gradients(tmp_path: Path) -> None:
    results = []
    for checkpointing in (False, True):
        model = make_captioner(tmp_path)
        model.coca.set_grad_checkpointing(checkpointing)
        values = task_losses(model.train(), make_batch(TEXTS), model.loss)
        sum(values.values()).backward()  # type: ignore[union-attr]
        results.append((values, gradients_of(model)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.slow
def test_a_compiled_captioner_has_few_graphs_whatever_the_lengths_of_captions(tmp_path: Path) -> None:
    model = make_captioner(tmp_path)
    graphs = CompileCounter()
    model.compile(backend=graphs)
    counts = []
    for number in range(6):
        texts = [f"a {'red ' * (number * shift % 7)}apple" for shift in (1, 2, 3, 5)]
        with torch.no_grad():
            model(make_batch(texts, number))
        counts.append(graphs.frame_count)
    assert counts[0] < counts[1] < 2 * counts[0], "the parts that depend on lengths"
    assert counts[1:] == [counts[1]] * 5


#: The tokenizer encodes "&!;" as the tokens 5, 0 and 282: open_clip's padding is also a word.
WITH_ZERO = "a sign that says &!;"


def open_clip_losses(model: CaptionerModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Losses by open_clip's forward pass and CoCaLoss."""
    outputs = model.coca(to_pixels(batch["image"], model.image), batch["caption"])
    loss = open_clip.loss.CoCaLoss(caption_loss_weight=2, clip_loss_weight=1, pad_id=0)
    losses: dict[str, torch.Tensor] = loss(**outputs, output_dict=True)
    return losses


def test_losses_and_gradients_equal_those_of_open_clip_but_a_word_like_its_padding_counts(tmp_path: Path) -> None:
    model = make_captioner(tmp_path)
    batch = make_batch(TEXTS)
    ours = task_losses(model, batch, model.loss)
    sum(ours.values()).backward()  # type: ignore[union-attr]
    our_gradients = gradients_of(model)
    model.zero_grad()
    reference = open_clip_losses(model, batch)
    sum(reference.values()).backward()  # type: ignore[union-attr]
    reference_gradients = gradients_of(model)

    torch.testing.assert_close(ours["contrastive"], reference["contrastive_loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["caption"], reference["caption_loss"], rtol=1e-5, atol=1e-5)
    assert our_gradients.keys() == reference_gradients.keys()
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, reference_gradients[name], rtol=1e-3, atol=1e-4, msg=name)

    batch = make_batch([WITH_ZERO, "two dogs"])
    assert 0 in batch["caption"][0, 1 : batch["length"][0]]
    with torch.no_grad():
        caption = task_losses(model, batch, model.loss)["caption"]
        logits = model.coca(to_pixels(batch["image"], model.image), batch["caption"])["logits"]
        token_by_token = [
            cross_entropy(logits[row, position], batch["caption"][row, position + 1])
            for row in range(2)
            for position in range(batch["length"][row])
        ]
        torch.testing.assert_close(caption, 2 * torch.stack(token_by_token).mean(), rtol=1e-5, atol=1e-5)
        assert abs(float(caption - open_clip_losses(model, batch)["caption_loss"])) > 1e-3  # which ignores the word


def test_batch_parts_give_the_gradients_of_the_whole_batch_and_bf16_is_close(tmp_path: Path) -> None:
    model = make_captioner(tmp_path)
    task = CaptioningTask(model, model.loss, evaluator=None)  # type: ignore[arg-type]
    batch = make_batch(TEXTS)
    assert len(set(batch["length"])) == 4  # parts differ in their number of tokens
    results = []
    for seeds, precision in (([0], "fp32"), ([0, 1], "fp32"), ([0], "bf16")):
        model.zero_grad()
        outcome = backpropagate(task, model, batch, len(TEXTS), seeds, Accelerator("cpu", precision))  # type: ignore[arg-type]
        results.append((outcome.losses, gradients_of(model)))
    (whole, gradients), (of_parts, gradients_of_parts), (half, _) = results
    for name, value in whole.items():
        torch.testing.assert_close(value, of_parts[name], rtol=1e-5, atol=1e-5)
        assert half[name].dtype == torch.float32
        assert half[name] != value
        torch.testing.assert_close(half[name], value, rtol=0.03, atol=0.03)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_of_parts[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("context", [9, 128])
def test_another_context_keeps_the_features_and_predictions_of_captions_that_fit_it(
    tmp_path: Path, context: int
) -> None:
    """The words keep their positions, and the class token its own; interpolation would move all of them."""
    plain = make_captioner(tmp_path).eval()
    resized_model = {"model": f"local-dir:{tmp_path}/model", "context": context}
    short = {"generate": {"min_length": 0, "max_length": 8}}
    other = make_captioner(tmp_path, captioner=resized_model, evaluate=short).eval()
    tokens = Tokenizer("coca_ViT-B-32")(["fog", "two dogs"])
    resized = Tokenizer("coca_ViT-B-32", context - 1)(["fog", "two dogs"])
    assert resized.shape == (2, context - 1)
    batch = make_batch(["fog", "two dogs"])
    with torch.no_grad():
        before, after = plain(batch), other({**batch, "caption": resized})
    assert torch.equal(tokens[:, :8], resized[:, :8])
    for name, values in before.features.items():
        torch.testing.assert_close(after.features[name], values, msg=name)
    assert len(other.coca.text.positional_embedding) == context


def test_a_context_is_exported_and_captions_are_written_up_to_it(tmp_path: Path) -> None:
    model = {"model": f"local-dir:{tmp_path}/model"}
    generate = {"generate": {"min_length": 0, "max_length": 128}}
    trained = make_captioner(tmp_path, captioner={**model, "context": 128}, evaluate=generate)
    folder = str(tmp_path / "exported")
    write_open_clip(trained.coca, trained.config, open_clip.get_tokenizer(trained.name), folder)
    assert open_clip.get_tokenizer(f"local-dir:{folder}")("fog").shape == (1, 127)
    spec = Generation(min_length=127 - 2, max_length=128).captioner(f"local-dir:{folder}")
    captioner = CocaCaptioner(spec, Accelerator("cpu"))
    [[caption]] = captioner.caption(torch.rand(1, 3, 32, 32), np.zeros((1, 1), np.uint64))
    assert caption
    with pytest.raises(UserError, match=r"max_length 129 exceeds the 128 tokens"):
        make_captioner(tmp_path, captioner={**model, "context": 128}, evaluate={"generate": {"max_length": 129}})


def test_random_weights_are_those_of_the_seed_for_a_name_and_a_folder(tmp_path: Path) -> None:
    folder = {"model": f"local-dir:{tmp_path}/model", "pretrained": "random", "context": 16}
    short = {"generate": {"max_length": 12}}
    first, again, other = (make_captioner(tmp_path, captioner=folder, evaluate=short, seed=seed) for seed in (0, 0, 1))
    weights = dict(first.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in again.named_parameters())
    assert not torch.equal(weights["coca.text.positional_embedding"], other.coca.text.positional_embedding)
    assert float(weights["coca.text.positional_embedding"].detach().std()) == pytest.approx(0.01, rel=0.3)
    assert float(weights["coca.text_decoder.text_projection"].detach().std()) == pytest.approx(16**-0.5, rel=0.1)
    config = captioner_config(tmp_path, captioner={"model": "coca_ViT-B-32", "pretrained": "random"})
    check_captioner(config)


def test_models_and_keys_that_do_not_fit_are_refused_before_loading(tmp_path: Path) -> None:
    clip, folder = open_clip_model(tmp_path / "clip"), f"local-dir:{tmp_path}/model"
    refused: list[tuple[dict[str, Any], str]] = [
        ({"model": clip}, "is not a CoCa and cannot caption"),
        ({"model": "coca_ViT-XL"}, "unknown to open_clip"),
        (
            {"model": "coca_ViT-B-32"},
            r"no weights without `pretrained`.*`captioner\.pretrained: random` starts from random",
        ),
        ({"model": folder, "pretrained": "random", "freeze": ["image"]}, "freeze"),
    ]
    for captioner, error in refused:
        with pytest.raises(UserError, match=error):
            build_captioner(captioner_config(tmp_path, captioner=captioner))
    coca = SimpleNamespace(text=torch.nn.Linear(1, 1), text_decoder=None)  # as a text tower of Hugging Face
    with pytest.raises(ValueError, match="its context cannot be changed"):
        set_context(coca, {}, 128)
