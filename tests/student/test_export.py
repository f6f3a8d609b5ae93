"""Exported students, as plain open_clip loads them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from reinforce.student.export import export
from reinforce.student.model import load_tokenizer
from teachers.preprocessing.fit import fit
from tests.helpers.students import IMAGE_TEACHER, KINDS, TEACHER, batch_for, built, student_folder, train_briefly


@pytest.mark.parametrize("kind", KINDS)
def test_plain_open_clip_loads_the_trained_weights(tmp_path: Path, kind: str) -> None:
    student = built(student_folder(tmp_path / "architecture", kind), features={"t": TEACHER, "s": IMAGE_TEACHER})
    train_briefly(student)
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


def test_mobileclip2_s0_is_exported(tmp_path: Path) -> None:
    student = built("MobileCLIP2-S0")
    export(student, str(tmp_path))
    model = open_clip.create_model(f"local-dir:{tmp_path}")
    state = student.clip.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.visual.image_size == (256, 256)


def test_heads_are_not_exported(tmp_path: Path) -> None:
    student = built(student_folder(tmp_path / "a"), features={"dino.v2": IMAGE_TEACHER})
    assert [tuple(head.weight.shape) for head in student.heads.values()] == [(6, 16)]
    export(student, str(tmp_path / "b"))
    assert load_file(tmp_path / "b" / "open_clip_model.safetensors").keys() == student.clip.state_dict().keys()


def test_a_text_tower_in_a_local_folder_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    student = built(student_folder(tmp_path / "a", "hf"))
    with caplog.at_level(logging.WARNING, "reinforce"):
        export(student, str(tmp_path / "b"))
    assert f"{tmp_path / 'b'} needs the folder {tmp_path / 'a' / 'text'}" in caplog.text
