"""Students of any architecture: initialisation, features, losses, and refused models."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from reinforce.errors import UserError
from reinforce.student.export import export
from reinforce.student.model import load_tokenizer
from tests.helpers.students import IMAGE_TEACHER, KINDS, TEACHER, batch, batch_for, built, student_folder, train_briefly
from tests.helpers.tiny_models import open_clip_model


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_determines_the_weights_and_the_global_generator_is_untouched(tmp_path: Path, kind: str) -> None:
    name = student_folder(tmp_path, kind)
    before = torch.get_rng_state()
    first, again, other = (built(name, seed, features={"t": TEACHER}).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert all(value.isfinite().all() for value in first.values())
    drawn = [key for key, value in first.items() if value.ndim > 1 and value.std() > 1e-6]
    assert drawn
    assert not any(torch.equal(first[key], other[key]) for key in drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_are_no_warning(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    name = student_folder(tmp_path, kind)
    load_tokenizer(built(name))
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
    open_clip.create_model(name, load_weights=False, pretrained_text=False)
    assert [record.message.split(" ")[0] for record in caplog.records] == ["Local", "No"], "elsewhere it is"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_every_trained_weight_gets_a_gradient(tmp_path: Path, kind: str, form: Any) -> None:
    features = {"two.sided": TEACHER, "images": IMAGE_TEACHER}
    student = built(student_folder(tmp_path, kind), form=form, features=features)
    encoded = student(batch_for(student))
    torch.stack(
        [value.sum() for of in (encoded.features, encoded.losses, encoded.scalars) for value in of.values()]
    ).sum().backward()
    missed = [name for name, value in student.named_parameters() if value.requires_grad and value.grad is None]
    assert missed == []


def test_features_equal_open_clips_on_normalised_pixels(tmp_path: Path) -> None:
    student = built(open_clip_model(tmp_path)).eval()
    inputs = batch(32, context=77)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (student.image.mean, student.image.std))
    pixels = (inputs["image"].permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.no_grad():
        encoded = student(inputs)
        image, text, scale = student.clip(pixels, inputs["synthetic"])
    torch.testing.assert_close(encoded.features["image"], image)
    torch.testing.assert_close(encoded.features["synthetic"], text)
    torch.testing.assert_close(encoded.scalars, {"logit_scale": scale})


def test_features_under_autocast_are_float32_with_unit_norm(tmp_path: Path) -> None:
    student = built(student_folder(tmp_path))
    with torch.autocast("cpu", torch.bfloat16):
        features = student(batch_for(student)).features
    for value in features.values():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.norm(dim=1), torch.ones(4))


def test_a_mixed_batch_has_one_kind_of_text(tmp_path: Path) -> None:
    student = built(student_folder(tmp_path))
    both, mixed = student(batch_for(student)), student(batch_for(student, kinds=("caption",)))
    assert set(mixed.features) == {"image", "caption"}
    torch.testing.assert_close(mixed.features["caption"], both.features["caption"])


def test_feature_losses_are_weighted_means_of_one_minus_cosine(tmp_path: Path) -> None:
    student = built(student_folder(tmp_path), features={"a": TEACHER, "b": IMAGE_TEACHER}, features_weight=0.5)
    inputs = batch_for(student, pairs=3)
    encoded, a, b = student(inputs), inputs["targets"]["a"], inputs["targets"]["b"]

    def distance(head: str, rows: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        return 1 - torch.cosine_similarity(rows @ student.heads[head].weight.T, vectors, dim=-1).mean()

    of = encoded.features
    images = [distance("a/images", of["image"], a["image"]), distance("b/images", of["image"], b["image"])]
    expected = {
        "features/image": 0.5 * (images[0] + images[1]) / 2,
        "features/caption": 0.5 * distance("a/texts", of["caption"], a["caption"]),
        "features/synthetic": 0.5 * distance("a/texts", of["synthetic"], a["synthetic"]),
    }
    torch.testing.assert_close(encoded.losses, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_does_not_change_gradients(tmp_path: Path, kind: str) -> None:
    name = student_folder(tmp_path, kind)
    gradients = []
    for checkpointing in (False, True):
        student = built(name, checkpointing=checkpointing)
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        for module in student.modules():
            if isinstance(module, torch.nn.LayerNorm | torch.nn.GELU):
                module.register_forward_hook(count)
        torch.manual_seed(0)  # of dropout
        encoded = student(batch_for(student))
        (encoded.features["image"] * encoded.features["caption"]).sum().backward()
        gradients.append({key: value.grad for key, value in student.named_parameters() if value.grad is not None})
        gradients[-1]["calls"] = torch.tensor(calls)
    plain, checked = gradients
    assert checked.pop("calls") > plain.pop("calls")
    torch.testing.assert_close(checked, plain)


def test_a_random_student_with_sigmoid_starts_with_siglips_scale_and_bias(tmp_path: Path) -> None:
    student = built(student_folder(tmp_path / "a"), form="sigmoid")
    scalars = student(batch_for(student)).scalars
    assert scalars["logit_scale"].item() == pytest.approx(10)
    assert scalars["logit_bias"].item() == -10
    train_briefly(student)
    export(student, str(tmp_path / "b"))
    model = open_clip.create_model(f"local-dir:{tmp_path / 'b'}")
    assert model.logit_bias.item() == student.clip.logit_bias.item()
    again = built(f"local-dir:{tmp_path / 'b'}", form="sigmoid")
    assert torch.equal(again.clip.logit_bias, student.clip.logit_bias)


def test_a_models_bias_is_frozen_with_softmax(tmp_path: Path) -> None:
    student = built(student_folder(tmp_path, init_logit_bias=-4.0))
    assert not student.clip.logit_bias.requires_grad
    assert student.clip.logit_bias.item() == -4


def test_a_student_starts_from_given_weights(tmp_path: Path) -> None:
    name = open_clip_model(tmp_path / "trained")
    weights = load_file(tmp_path / "trained" / "open_clip_model.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in built(name).clip.state_dict().items())
    vit = built("ViT-S-32", seed=1)
    export(vit, str(tmp_path / "vit"))
    again = built("ViT-S-32", seed=2, pretrained=str(tmp_path / "vit" / "open_clip_model.safetensors"))
    assert torch.equal(again.clip.visual.proj, vit.clip.visual.proj)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("MobileCLIP2-S1", "unknown to open_clip; did you mean .*MobileCLIP2-S"),
        ("coca_ViT-B-32", "captioner.*choose a CLIP model"),
        ("local-dir:/nowhere", "folder /nowhere does not exist"),
    ],
)
def test_a_model_that_cannot_be_a_student_is_refused(model: str, message: str) -> None:
    with pytest.raises(UserError, match=f"student: .*{message}"):
        built(model)


def test_a_model_with_images_that_are_not_square_is_refused(tmp_path: Path) -> None:
    name = student_folder(tmp_path, vision_cfg={"image_size": [32, 48]})
    with pytest.raises(UserError, match="images of 32 x 48, and augmented crops are square"):
        built(name)


def test_weights_without_a_bias_are_refused_with_sigmoid(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="were trained with a softmax and have no logit bias"):
        built(open_clip_model(tmp_path), form="sigmoid")


def test_a_tokenizer_that_does_not_fit_the_context_is_refused(tmp_path: Path) -> None:
    student = built(student_folder(tmp_path))
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["context_length"] = 20
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"gives 20 tokens and its text tower takes 16"):
        load_tokenizer(student)


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the batch has images of 24 x 24; the student takes 32"):
        built(student_folder(tmp_path))(batch(24))
