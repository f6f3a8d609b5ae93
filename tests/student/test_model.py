"""Students of any architecture: initialisation, features, losses, refused models, and exports."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file

from benchmarks.ablations.encoders import Encoder
from reinforce.errors import UserError
from reinforce.shipping.targets.base import reparameterize
from reinforce.student.config import Student as StudentSpec
from reinforce.student.layers import avoid_faulty_convolutions
from reinforce.student.model import build_student, export, load_tokenizer
from reinforce.training.checkpoints import learning_rate, make_adamw
from reinforce.training.config import Optimizer
from teachers.fit import fit
from teachers.protocols import ImageSpec
from tests.helpers.models.tiny_models import open_clip_model
from tests.helpers.ranks import start_ranks
from tests.helpers.students import (
    IMAGE_TEACHER,
    KINDS,
    TEACHER,
    batch,
    batch_for,
    built,
    student_folder,
    train_briefly,
)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_determines_the_weights_without_warnings_and_the_global_generator_is_untouched(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = student_folder(tmp_path, kind)
    before = torch.get_rng_state()
    students = [built(name, seed, features={"t": TEACHER}) for seed in (3, 3, 4)]
    assert torch.equal(before, torch.get_rng_state())
    load_tokenizer(students[0])
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
    first, again, other = (student.state_dict() for student in students)
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert all(value.isfinite().all() for value in first.values())
    drawn = [key for key, value in first.items() if value.ndim > 1 and value.std() > 1e-6]
    assert drawn
    assert not any(torch.equal(first[key], other[key]) for key in drawn)
    faulty = [name for name, module in students[0].named_modules() if module._forward_pre_hooks]
    assert faulty == ["clip.visual.trunk.stem.0.conv_scale.conv"] * (kind == "mobileclip")
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


def test_features_under_autocast_are_float32_with_unit_norm_and_a_mixed_batch_has_one_kind_of_text(
    tmp_path: Path,
) -> None:
    student = built(student_folder(tmp_path))
    with torch.autocast("cpu", torch.bfloat16):
        features = student(batch_for(student)).features
    for value in features.values():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.norm(dim=1), torch.ones(4))
    both, mixed = student(batch_for(student)), student(batch_for(student, kinds=("caption",)))
    assert set(mixed.features) == {"image", "caption"}
    torch.testing.assert_close(mixed.features["caption"], both.features["caption"])
    with pytest.raises(UserError, match="the batch has images of 24 x 24; the student takes 32"):
        student(batch(24))


def test_feature_losses_are_weighted_means_of_one_minus_cosine(tmp_path: Path) -> None:
    student = built(student_folder(tmp_path), features={"a": TEACHER, "b": IMAGE_TEACHER}, weight=0.5)
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
    frozen = built(student_folder(tmp_path / "c", init_logit_bias=-4.0))
    assert not frozen.clip.logit_bias.requires_grad, "with a softmax"
    assert frozen.clip.logit_bias.item() == -4


def test_a_student_starts_from_given_weights(tmp_path: Path) -> None:
    name = open_clip_model(tmp_path / "trained")
    weights = load_file(tmp_path / "trained" / "open_clip_model.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in built(name).clip.state_dict().items())
    stated = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "interpolation": "bilinear"}
    vit = built("ViT-S-32", seed=1, preprocess=stated)
    assert vit.image == ImageSpec(224, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear", "crop")
    export(vit, str(tmp_path / "vit"))
    weights = str(tmp_path / "vit" / "open_clip_model.safetensors")
    again = built("ViT-S-32", seed=2, pretrained=weights)
    assert torch.equal(again.clip.visual.proj, vit.clip.visual.proj)
    assert again.image == vit.image, "from the config beside the weights"


def test_a_model_that_cannot_be_a_student_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").touch()
    portrait = student_folder(tmp_path / "portrait", vision_cfg={"image_size": [32, 48]})
    softmax = open_clip_model(tmp_path / "softmax")
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("MobileCLIP2-S1", {}, "unknown to open_clip; did you mean .*MobileCLIP2-S"),
        ("coca_ViT-B-32", {}, "captioner.*choose a CLIP model"),
        ("local-dir:/nowhere", {}, "folder /nowhere does not exist"),
        ("MobileCLIP2-S0", {"pretrained": f"{tmp_path}/a.pt"}, r"checkpoint .*a\.pt does not state its preprocessing"),
        (portrait, {}, "images of 32 x 48, and augmented crops are square"),
        (softmax, {"form": "sigmoid"}, "were trained with a softmax and have no logit bias"),
    ]
    for model, options, message in refused:
        with pytest.raises(UserError, match=f"student: .*{message}"):
            built(model, **options)
    student = built(student_folder(tmp_path / "short"))
    config = json.loads((tmp_path / "short/open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["context_length"] = 20
    (tmp_path / "short/open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"gives 20 tokens and its text tower takes 16"):
        load_tokenizer(student)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_open_clip_loads_the_trained_weights(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    student = built(student_folder(tmp_path / "architecture", kind), features={"t": TEACHER, "s": IMAGE_TEACHER})
    train_briefly(student)
    with caplog.at_level(logging.WARNING, "reinforce"):
        export(student, str(tmp_path / "exported"))
    needed = "where open_clip's create_model does not look: load it with reinforce.Student.load"
    assert (needed in caplog.text) == (kind == "hf"), "a text tower in a local folder"
    for path in (tmp_path / "exported").glob("*.json"):
        assert str(tmp_path) not in path.read_text(), path.name
    name, options = f"local-dir:{tmp_path}/exported", {}
    if kind == "hf":  # as docs/students.md shows
        options["text_cfg"] = open_clip.get_model_config(name)["text_cfg"] | {"hf_model_name": f"{tmp_path}/exported"}
    model, _, transform = open_clip.create_model_and_transforms(name, **options)
    trained = student.clip.state_dict()
    loaded = model.state_dict()
    assert loaded.keys() == trained.keys() == load_file(tmp_path / "exported/open_clip_model.safetensors").keys()
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


def check_gradients(rank: int) -> None:
    for channels, out, size in ((3, 64, 256), (3, 24, 96), (4, 8, 32), (5, 64, 256), (12, 32, 64)):
        torch.manual_seed(0)
        convolution = torch.nn.Conv2d(channels, out, 1, 2, bias=False)
        reference = torch.nn.Conv2d(channels, out, 1, 2, bias=False).double()
        reference.load_state_dict(convolution.state_dict())
        assert avoid_faulty_convolutions(convolution) == 1
        for _ in range(3):
            images = torch.randn(4, channels, size, size).contiguous(memory_format=torch.channels_last)
            features = convolution(images)
            assert features.is_contiguous(memory_format=torch.channels_last)
            seen = torch.randn_like(features)
            for module, given, gradient in ((convolution, features, seen), (reference, None, seen.double())):
                module.zero_grad()
                (module(images.double()) if given is None else given).backward(gradient)
            torch.testing.assert_close(convolution.weight.grad.double(), reference.weight.grad, rtol=1e-4, atol=1e-3)


def test_gradients_of_affected_convolutions_alone_are_computed_otherwise_and_are_those_of_double_precision() -> None:
    others = [((3, 8, 3, 2), 1), ((3, 8, 1), 1), ((16, 8, 1, 2), 1), ((8, 8, 1, 2), 8)]
    unaffected = torch.nn.Sequential(*(torch.nn.Conv2d(*shape, groups=groups) for shape, groups in others))
    assert avoid_faulty_convolutions(unaffected) == 0
    start_ranks(check_gradients, 1)  # a process, which the fault can end with a signal; it can give wrong gradients too


def test_five_stages_at_another_image_size_are_exported_with_it_and_merge_for_inference(tmp_path: Path) -> None:
    encoder = Encoder((1, 1, 1, 1, 1), 8, 64)
    encoder.write(tmp_path)
    spec = StudentSpec(model=encoder.model(tmp_path), image_size=96)
    student = build_student(spec, seed=0)
    with pytest.raises(UserError, match="the batch has images of 64 x 64; the student takes 96"):
        student(batch(64, context=20))
    for _ in range(2):
        student(batch(96, context=20))
    export(student.eval(), str(tmp_path / "student"))
    loaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'student'}")
    assert preprocess(Image.new("RGB", (200, 100))).shape == (3, 96, 96)
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    merged = reparameterize(loaded.eval())
    torch.testing.assert_close(merged.encode_image(pixels), student.clip.encode_image(pixels), atol=1e-4, rtol=1e-3)


def test_a_transformer_starts_from_weights_at_another_image_size_unless_it_is_one_of_timm(tmp_path: Path) -> None:
    name = open_clip_model(tmp_path / "vit", context_length=16)
    student = build_student(StudentSpec(model=name, image_size=48), seed=0)
    assert student.image.size == 48
    assert len(student.clip.visual.positional_embedding) == 1 + (48 // 8) ** 2
    timm = student_folder(tmp_path / "timm", vision_cfg={"timm_model_name": "vit_tiny_patch16_224", "image_size": 224})
    with pytest.raises(UserError, match=r"another image size, .*choose a model with this `image_size`"):
        build_student(StudentSpec(model=timm, image_size=96), seed=0)


def test_a_frozen_tower_keeps_its_weights_and_statistics(tmp_path: Path) -> None:
    random = student_folder(tmp_path / "random", "mobileclip")
    export(built(random), str(tmp_path / "trained"))
    student = build_student(StudentSpec(model=f"local-dir:{tmp_path / 'trained'}", freeze=["image"]), seed=0)
    before = {name: value.clone() for name, value in student.clip.state_dict().items()}
    student.eval().train()
    train_briefly(student)
    changed = {name for name, value in student.clip.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.partition(".")[0] for name in changed} == {"text", "logit_scale"}
    with pytest.raises(UserError, match=r"student\.freeze: .* starts from random weights; set student\.pretrained"):
        build_student(StudentSpec(model=random, freeze=["image"]), seed=0)
    with pytest.raises(UserError, match=r"student\.freeze: with data\.captions: none only the image tower is trained"):
        build_student(StudentSpec(model=f"local-dir:{tmp_path / 'trained'}", freeze=["image"]), seed=0, only="image")
    with pytest.raises(ValidationError, match="with both towers frozen no encoder is trained: name one, image or text"):
        StudentSpec(model=random, freeze=["image", "text"])


@pytest.mark.parametrize("kind", ["vit", "mobileclip"])
def test_a_tower_has_a_learning_rate_of_its_own(tmp_path: Path, kind: str) -> None:
    student = built(student_folder(tmp_path, kind), features={"t": TEACHER})
    config = Optimizer(lr=1.0, final_lr=0.0, warmup=2, towers={"text": 0.1})
    groups = make_adamw(student, config).param_groups
    rates = {id(p): learning_rate(1, 9, config, group["tower"]) for group in groups for p in group["params"]}
    for name, parameter in student.named_parameters():
        text = not name.startswith(("clip.visual", "clip.logit", "heads"))
        assert rates[id(parameter)] == (0.1 if text else 1.0), name
