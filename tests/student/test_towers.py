"""Students of two models: a small image tower with a teacher's text tower, and a text tower for an image tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

import reinforce
from reinforce.errors import UserError
from reinforce.student import model as student_model
from reinforce.student.config import FeatureLoss
from reinforce.student.config import Student as StudentSpec
from reinforce.student.model import StudentModel, build_student, export
from reinforce.student.teachers import IMAGES, TEXTS, TeacherInfo
from reinforce.student.terms.features import Features
from reinforce.student.terms.registry import Terms
from reinforce.student.train import StudentTask
from tests.helpers.models.tiny_models import open_clip_model
from tests.helpers.students import KINDS, batch_for, plain_open_clip, student_folder

TEXT = {"caption": ["a photo of a cat", "A dog."]}


def built(terms: Terms | None = None, only: Any = None, **spec: Any) -> StudentModel:
    return build_student(StudentSpec.model_validate(spec), seed=0, terms=terms, only=only)


def trained(folder: Path, kind: str, **changes: Any) -> str:
    """A model of a kind with weights."""
    student = built(model=student_folder(folder / "config", kind, **changes))
    export(student, str(folder / "model"))
    return f"local-dir:{folder / 'model'}"


def into_space(dim: int) -> Terms:
    return Terms(
        [Features(1.0, {"t": TeacherInfo(dim, frozenset([IMAGES, TEXTS]), None, "")}, FeatureLoss(head="none"))]
    )


def weights(clip: Any, tower: str) -> dict[str, torch.Tensor]:
    of_images = tower == "image"
    return {
        name: value.clone()
        for name, value in clip.state_dict().items()
        if name.startswith("visual") == of_images and "logit_" not in name
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of_images", ["vit", "mobileclip"])
def test_a_small_image_tower_learns_the_space_of_a_teacher_whose_text_tower_it_is_exported_with(
    tmp_path: Path, kind: str, of_images: str
) -> None:
    teacher = trained(tmp_path / "teacher", kind, embed_dim=24)
    small = student_folder(tmp_path / "small", of_images, embed_dim=7)
    student = built(into_space(24), only="image", model=small, text={"model": teacher})
    original = plain_open_clip(teacher)
    assert student.image.size == built(model=small).image.size
    before = weights(student.clip, "text")
    assert all(torch.equal(value, before[name]) for name, value in weights(original, "text").items())
    assert torch.equal(student.clip.logit_scale, original.logit_scale)

    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.5)
    inputs = batch_for(student, kinds=())
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = student(inputs).losses["features/image"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert len(student.heads) == 0

    export(student, str(tmp_path / "exported"))
    name = f"local-dir:{tmp_path / 'exported'}"
    loaded, tokenize = plain_open_clip(name), open_clip.get_tokenizer(name)
    tokens = tokenize(TEXT["caption"])
    assert torch.equal(tokens, open_clip.get_tokenizer(teacher)(TEXT["caption"]))
    with torch.no_grad():
        assert torch.equal(loaded.encode_text(tokens), original.encode_text(tokens))
        pixels = torch.zeros(1, 3, student.image.height, student.image.width)
        found = loaded.encode_image(pixels)
        torch.testing.assert_close(found, student.eval().clip.encode_image(pixels), rtol=0, atol=1e-6)
    assert found.shape == (1, 24)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_other_dimensions_need_a_new_last_layer_and_keep_all_other_layers(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    teacher, small = trained(tmp_path / "teacher", "vit", embed_dim=24), trained(tmp_path / "small", kind)
    spec: dict[str, Any] = {"model": small, "text": {"model": teacher}, "freeze": ["text"]}
    with monkeypatch.context() as patch:
        patch.setattr(student_model, "load_model", lambda *_: pytest.fail("a model was loaded"))
        with pytest.raises(UserError, match=r"has 16 dimensions and the other tower 24\. Set student\.dim to 24"):
            built(**spec)
        with pytest.raises(UserError, match=r"head: none: teacher t has 24 dimensions and the student 16\. Set stud"):
            built(into_space(24), model=small)
    with caplog.at_level("INFO", "reinforce"):
        student = built(into_space(24), dim=24, **spec)
    before, after = weights(plain_open_clip(small), "image"), weights(student.clip, "image")
    new = [name for name, value in after.items() if value.shape != before[name].shape]
    assert new
    assert f"new last layers for 24 dimensions: {', '.join(new)}" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in after.items() if name not in new)
    both = built(into_space(20), model=small, dim=20)
    features = both(batch_for(both)).features
    assert {value.shape for value in features.values()} == {(4, 20)}, "of one model alone"


def test_a_text_tower_starts_from_its_language_model(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    name = student_folder(tmp_path / "hf", "hf")
    language_model = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path / "hf/text"))
    language_model.save_pretrained(tmp_path / "hf/text")
    teacher = trained(tmp_path / "teacher", "vit", embed_dim=24)
    student = built(model=teacher, text={"model": name, "pretrained": "transformers"})
    found = student.clip.text.transformer.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in language_model.state_dict().items() if key in found)
    assert student(batch_for(student)).features["caption"].shape == (4, 24)


def test_without_a_head_the_loss_is_one_minus_the_cosine_of_the_features_themselves(tmp_path: Path) -> None:
    student = built(into_space(16), model=student_folder(tmp_path))
    inputs = batch_for(student)
    encoded, vectors = student(inputs), inputs["targets"]["t"]
    for what, rows in encoded.features.items():
        expected = 1 - torch.cosine_similarity(rows, vectors[what], dim=-1).mean()
        torch.testing.assert_close(encoded.losses[f"features/{what}"], expected)


def test_towers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    small, quick = student_folder(tmp_path / "small"), trained(tmp_path / "quick", "vit", quick_gelu=True)
    plain = trained(tmp_path / "plain", "vit")
    bare = student_folder(tmp_path / "bare", "mobileclip", vision_cfg={"timm_proj": "none"}, embed_dim=128)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"model": small, "text": {"model": "facebook/dinov2-base"}}, "text: model .* is unknown to open_clip.*remove"),
        ({"model": small, "text": {"model": plain, "pretrained": "transformers"}}, "has no language model"),
        ({"model": small, "text": {"model": "coca_ViT-B-32"}}, "text: coca_ViT-B-32 is a captioner"),
        ({"model": small, "text": {"model": "ViT-B-32"}, "freeze": ["text"]}, r"ViT-B-32 starts .*student\.text\.pre"),
        ({"model": small, "text": {"model": plain}, "freeze": ["image"]}, r"random weights; set student\.pretrained"),
        ({"model": plain, "text": {"model": quick}}, "different activations"),
        ({"model": bare, "text": {"model": plain}, "freeze": ["text"]}, "has no last layer, so it keeps its"),
    ]
    for spec, message in refused:
        with pytest.raises(UserError, match=message):
            built(**spec)
    assert built(model=small, text={"model": quick}, freeze=["text"]).config["quick_gelu"], "the image tower is random"


def test_a_training_on_images_alone_ends_in_the_teachers_space_and_resumes(
    tmp_path: Path, config: Any, teachers: dict[str, dict[str, Any]]
) -> None:
    teacher, loss = teachers["vit"]["model"], {"features": {"teachers": "all", "head": "none"}}

    def made(steps: int = 2, text: str = teacher, **data: Any) -> Any:
        data = {"teachers": ["vit"], "captions": "none", **data}
        return config(loss, {"steps": steps}, student={"text": {"model": text}}, data=data)

    assert reinforce.train(made()).steps == 2
    exported = open_clip.create_model(f"local-dir:{tmp_path}/out/student")
    of_teacher = weights(open_clip.create_model(teacher), "text")
    assert all(torch.equal(value, of_teacher[name]) for name, value in weights(exported, "text").items())
    notes = StudentTask(made()).notes
    assert "teacher vit: vectors of images, 16 dimensions, without a head" in notes
    assert not any(note.startswith("student.text") for note in notes)
    other = open_clip_model(tmp_path / "other", context_length=16, seed=1)
    assert any("does not show that" in note for note in StudentTask(made(text=other)).notes)
    with pytest.raises(UserError, match=r"teacher eyes of .* has vectors of images alone, so .* has no text tower"):
        StudentTask(made(teachers=["eyes"]))
    assert reinforce.train(made(3)).steps == 3
    path = Path(teacher.removeprefix("local-dir:"), "open_clip_config.json")
    before = path.read_text()
    try:
        changed = json.loads(before)
        changed["model_cfg"]["text_cfg"]["pool_type"] = "first"
        path.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=r"model_cfg\.text_cfg\.pool_type: not set before, 'first' now"):
            reinforce.train(made(4))
    finally:
        path.write_text(before)
