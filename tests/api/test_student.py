"""``reinforce.Student``: loading, encoding, export and bad input."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import reinforce
from reinforce.errors import UserError
from tests.helpers.data import picture
from tests.helpers.models.tiny_models import open_clip_model

LOAD = reinforce.Student.load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a training run, as far as it is read."""
    run = tmp_path_factory.mktemp("run")
    open_clip_model(run / "student")
    return run


@pytest.fixture(scope="module")
def student(folder: Path) -> reinforce.Student:
    return LOAD(folder)


def test_images_and_texts_are_encoded_as_open_clip_does(
    student: reinforce.Student, folder: Path, tmp_path: Path
) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}/student")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}/student")
    data = picture(3, 60, 40)
    image = Image.open(io.BytesIO(data))
    (tmp_path / "one.png").write_bytes(data)
    with torch.no_grad():
        expected = model.eval().encode_image(preprocess(image)[None], normalize=True)
        texts = model.encode_text(tokenizer(["a cat", "two dogs on a hill"]), normalize=True)
    found = student.encode_images(
        [image, data, np.asarray(image), tmp_path / "one.png", str(tmp_path / "one.png")], batch=2
    )
    torch.testing.assert_close(found, expected.expand(5, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(student.encode_texts(["a cat", "two dogs on a hill"]), texts, atol=1e-5, rtol=0)
    assert student.encode_images(image).shape == student.encode_texts("a cat").shape == (1, student.dim)
    assert student.encode_images([]).shape == student.encode_texts([]).shape == (0, student.dim)
    assert student.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()))
    torch.testing.assert_close(student.preprocess(image), preprocess(image), atol=1e-5, rtol=0)
    assert "dim=16" in repr(student)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_a_student_refuses_to_preprocess_an_image_without_pixels(
    student: reinforce.Student, size: tuple[int, int]
) -> None:
    with pytest.raises(UserError, match=rf"preprocess: the image has {size[0]} x {size[1]} pixels. Leave it out."):
        student.preprocess(Image.new("RGB", size))


def test_a_student_makes_the_inputs_of_training_examples(student: reinforce.Student, made: Path) -> None:
    item = reinforce.Examples(made, image=student.preprocess, tokenizer=student.tokenizer)[0]
    assert (item["image"].shape, item["caption"].shape) == ((3, 32, 32), (77,))


def test_a_student_is_exported_once_and_by_the_names_of_the_command(student: reinforce.Student, tmp_path: Path) -> None:
    report = student.export("onnx", tmp_path / "onnx")
    assert (tmp_path / "onnx" / "image.onnx").is_file()
    assert report.report["towers"]["image"]["cosine"]["min"] > 0.999
    with pytest.raises(UserError, match="already exists"):
        student.export("onnx", tmp_path / "onnx")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda one, tmp: LOAD(5), "load: name: Input should be a valid string, got 5"),
        (lambda one, tmp: LOAD(tmp), "is not the folder of a model.*Finish the training"),
        (lambda one, tmp: LOAD("ViT-B-33"), "unknown to open_clip"),
        (lambda one, tmp: LOAD("x", precison="bf16"), "'precison'. It takes: name"),
        (lambda one, tmp: LOAD("x", device="cpu", precision="fp8"), "precision: Input should be 'fp32'"),
        (lambda one, tmp: one.encode_images([tmp / "missing.png"]), "missing.png: No such file.*Give the path"),
        (lambda one, tmp: one.encode_images([b"no image"]), "image 0 cannot be decoded"),
        (lambda one, tmp: one.encode_images(np.zeros((4, 4), np.uint8)), r"want uint8 \[H, W, 3\], got uint8 \[4, 4\]"),
        (lambda one, tmp: one.encode_images([None]), "image 0: want an image of Pillow.*got NoneType"),
        (lambda one, tmp: one.encode_images(3), "images: want a list, got int"),
        (lambda one, tmp: one.encode_texts(["a", 3]), "texts: want strings, got 3"),
        (lambda one, tmp: one.encode_texts(["a"], batch=0), "batch: want a number of at least 1, got 0"),
        (lambda one, tmp: one.export("tflite", tmp), "there is no 'tflite'; there are: onnx"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_or_encoded_is_one_error_with_the_fix(
    student: reinforce.Student, tmp_path: Path, act: Callable[[reinforce.Student, Path], object], message: str
) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        act(student, tmp_path)
