"""Students of any architecture: how they start, what they give, and what plain open_clip loads afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from reinforce.errors import UserError
from reinforce.student.config import Student as Spec
from reinforce.student.distillation import IMAGES, TEXTS, TeacherInfo
from reinforce.student.export import export
from reinforce.student.model import Student, build_student, load_tokenizer
from teachers.pixels import fit
from tests.helpers.students import KINDS, batch, student_folder
from tests.helpers.tiny_models import open_clip_model

IMAGE_TEACHER = TeacherInfo(6, frozenset([IMAGES]), None, "")
TEACHER = TeacherInfo(5, frozenset([IMAGES, TEXTS]), 50.0, "")
SCALARS = ("logit_scale", "logit_bias")


def built(name: str, seed: int = 0, pretrained: str | None = None, **options: Any) -> Student:
    return build_student(Spec(model=name, pretrained=pretrained), seed=seed, **options)


def batch_for(student: Student, pairs: int = 4, **options: Any) -> Any:
    """A batch with targets for the heads that the student has."""
    made = batch(student.image.height, pairs, **options)
    generator = torch.Generator().manual_seed(1)
    made["targets"] = {
        name: {
            what: torch.nn.functional.normalize(torch.randn(pairs, known.dim, generator=generator), dim=-1)
            for what in ("image", "caption", "synthetic")
            if known.has(what)
        }
        for name, known in student.features.items()
    }
    return made


def learn(student: Student, steps: int = 2) -> None:
    """Change all weights and statistics a little, as training does."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        encoded = student(batch_for(student))
        cosines = encoded.features["image"] @ encoded.features["caption"].T
        logits = cosines * encoded.scalars["logit_scale"] + encoded.scalars.get("logit_bias", 0.0)
        torch.nn.functional.cross_entropy(logits, torch.arange(len(logits))).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_the_random_weights_and_nothing_else_is_drawn(tmp_path: Path, kind: str) -> None:
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
def test_plain_open_clip_loads_what_was_trained(tmp_path: Path, kind: str) -> None:
    student = built(student_folder(tmp_path / "architecture", kind), features={"t": TEACHER, "s": IMAGE_TEACHER})
    learn(student)
    export(student, str(tmp_path / "exported"))
    name = f"local-dir:{tmp_path / 'exported'}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    trained = student.clip.state_dict()
    loaded = model.state_dict()
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(value, trained[key]) for key, value in loaded.items())

    student.eval()
    inputs = batch_for(student)
    with torch.no_grad():
        features = student(inputs).features
        picture = Image.fromarray(inputs["image"][0].numpy())
        assert np.array_equal(fit(picture, student.image), inputs["image"][0].numpy())
        images = model.eval().encode_image(transform(picture)[None], normalize=True)
        texts = model.encode_text(inputs["caption"], normalize=True)
    torch.testing.assert_close(images, features["image"][:1], rtol=0, atol=1e-5)
    torch.testing.assert_close(texts, features["caption"], rtol=0, atol=1e-6)
    captions = ["a photo of a cat", "A dog."]
    assert torch.equal(open_clip.get_tokenizer(name)(captions), load_tokenizer(student)(captions))


def test_mobileclip2_s0_itself_is_exported(tmp_path: Path) -> None:
    student = built("MobileCLIP2-S0")
    export(student, str(tmp_path))
    model = open_clip.create_model(f"local-dir:{tmp_path}")
    state = student.clip.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.visual.image_size == (256, 256)


def test_heads_stay_behind(tmp_path: Path) -> None:
    student = built(student_folder(tmp_path / "a"), features={"dino.v2": IMAGE_TEACHER})
    assert [tuple(head.weight.shape) for head in student.heads.values()] == [(6, 16)]
    export(student, str(tmp_path / "b"))
    assert load_file(tmp_path / "b" / "open_clip_model.safetensors").keys() == student.clip.state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_every_weight_that_is_trained_is_reached(tmp_path: Path, kind: str, form: Any) -> None:
    features = {"two.sided": TEACHER, "images": IMAGE_TEACHER}
    student = built(student_folder(tmp_path, kind), form=form, features=features)
    encoded = student(batch_for(student))
    torch.stack(
        [value.sum() for of in (encoded.features, encoded.losses, encoded.scalars) for value in of.values()]
    ).sum().backward()
    missed = [name for name, value in student.named_parameters() if value.requires_grad and value.grad is None]
    assert missed == []


def test_features_are_those_of_open_clip_on_normalised_pixels(tmp_path: Path) -> None:
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


def test_features_leave_autocast_in_full_precision_and_of_unit_norm(tmp_path: Path) -> None:
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
def test_checkpointing_changes_memory_not_gradients(tmp_path: Path, kind: str) -> None:
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


def test_a_random_student_of_sigmoids_starts_where_siglip_does(tmp_path: Path) -> None:
    student = built(student_folder(tmp_path / "a"), form="sigmoid")
    scalars = student(batch_for(student)).scalars
    assert scalars["logit_scale"].item() == pytest.approx(10)
    assert scalars["logit_bias"].item() == -10
    learn(student)
    export(student, str(tmp_path / "b"))
    model = open_clip.create_model(f"local-dir:{tmp_path / 'b'}")
    assert model.logit_bias.item() == student.clip.logit_bias.item()
    again = built(f"local-dir:{tmp_path / 'b'}", form="sigmoid")
    assert torch.equal(again.clip.logit_bias, student.clip.logit_bias)


def test_a_softmax_leaves_a_models_bias_alone(tmp_path: Path) -> None:
    student = built(student_folder(tmp_path, init_logit_bias=-4.0))
    assert not student.clip.logit_bias.requires_grad
    assert student.clip.logit_bias.item() == -4


def test_a_student_starts_from_weights_that_it_is_given(tmp_path: Path) -> None:
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
def test_a_model_that_cannot_be_a_student_is_told(model: str, message: str) -> None:
    with pytest.raises(UserError, match=f"student: .*{message}"):
        built(model)


def test_a_model_of_images_that_are_not_square_is_told(tmp_path: Path) -> None:
    name = student_folder(tmp_path, vision_cfg={"image_size": [32, 48]})
    with pytest.raises(UserError, match="images of 32 x 48, and augmented crops are square"):
        built(name)


def test_a_pretrained_softmax_has_no_bias_for_sigmoids(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="were trained with a softmax and have no logit bias"):
        built(open_clip_model(tmp_path), form="sigmoid")


def test_a_tokenizer_that_does_not_fit_is_told(tmp_path: Path) -> None:
    student = built(student_folder(tmp_path))
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["context_length"] = 20
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"gives 20 tokens and its text tower takes 16"):
        load_tokenizer(student)


def test_images_of_another_size_do_not_pass_unseen(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the batch has images of 24 x 24; the student takes 32"):
        built(student_folder(tmp_path))(batch(24))
