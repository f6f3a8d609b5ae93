from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from reinforce.captioning.model import build_captioner, describe_parameters
from reinforce.errors import UserError
from tests.helpers.captioning import TEXTS, captioner_config, gradients_of, make_batch, make_captioner, task_losses
from tests.helpers.tiny_models import open_clip_model


@pytest.mark.parametrize("loss", [{"contrastive": 0, "caption": 1}, {"contrastive": 1, "caption": 0}])
def test_parameters_that_the_loss_does_not_use_are_not_trained(tmp_path: Path, loss: dict[str, int]) -> None:
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
    model = make_captioner(
        tmp_path, captioner={"model": f"local-dir:{tmp_path}/model", "freeze": ["image", "text"]}
    ).train()
    assert not model.coca.visual.training
    assert not model.coca.text.training
    assert model.coca.text_decoder.training
    trainable = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"text_decoder", "logit_scale"}
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


def test_other_models_are_refused_before_loading(tmp_path: Path) -> None:
    clip = open_clip_model(tmp_path / "clip")
    with pytest.raises(UserError, match="is not a CoCa and cannot caption"):
        build_captioner(captioner_config(tmp_path, captioner={"model": clip}))
    with pytest.raises(UserError, match="unknown to open_clip"):
        build_captioner(captioner_config(tmp_path, captioner={"model": "coca_ViT-XL"}))


def test_trainable_parameters_are_counted_by_tower(tmp_path: Path) -> None:
    model = make_captioner(tmp_path, captioner={"model": f"local-dir:{tmp_path}/model", "freeze": ["image"]})
    counts = model.trainable_counts()
    assert counts["image"] == 0
    assert counts["scales"] == 1
    assert counts["decoder"] == sum(p.numel() for p in model.coca.text_decoder.parameters())
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
def test_a_compiled_captioner_has_few_graphs_whatever_the_lengths_of_captions(tmp_path: Path) -> None:
    model = make_captioner(tmp_path)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    model.compile(backend=backend)
    counts = []
    for number in range(6):
        texts = [f"a {'red ' * (number * shift % 7)}apple" for shift in (1, 2, 3, 5)]
        with torch.no_grad():
            model(make_batch(texts, number))
        counts.append(len(graphs))
    assert counts[0] < counts[1] < 2 * counts[0], "the parts that depend on lengths"
    assert counts[1:] == [counts[1]] * 5
