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
from reinforce.images.policy import decode
from reinforce.source.config import Limits
from tests.helpers.data import picture
from tests.helpers.images import encode, noise
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


def photo_of_a_telephone() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(noise(60, 40), "JPEG", exif=exif)


def transparent() -> bytes:
    image = noise(60, 40, seed=1)
    image.putalpha(noise(60, 40, "L", seed=2))
    return encode(image)


@pytest.mark.parametrize(
    "data",
    [
        photo_of_a_telephone(),
        transparent(),
        encode(Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27)),
        encode(noise(60, 40).quantize(16), "GIF", transparency=3),
        encode(noise(60, 40, "CMYK"), "JPEG"),
    ],
    ids=["telephone", "transparent", "16 bits", "palette", "CMYK"],
)
def test_paths_bytes_and_pillow_have_equal_vectors_by_one_image_policy(
    student: reinforce.Student, tmp_path: Path, data: bytes
) -> None:
    (tmp_path / "one").write_bytes(data)
    image, copied = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data)).copy()
    same = [data, tmp_path / "one", Image.open(tmp_path / "one"), image, image, copied, decode(data, Limits())]
    found = student.encode_images(same)
    torch.testing.assert_close(found, found[:1].expand(len(same), -1), rtol=0, atol=1e-6)  # rows of a batch round apart
    assert torch.equal(student.preprocess(image), student.preprocess(decode(data, Limits())))
    plain = student.encode_images(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert "CMYK" in str(image.mode) or (found[0] @ plain[0]) < 0.9999, "the conversion of Pillow differs"


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
        (lambda one, tmp: one.encode_images([np.zeros((0, 0, 3), np.uint8)]), "image 0 cannot be decoded .*0x0 pixels"),
        (lambda one, tmp: one.encode_images(Image.new("L", (0, 5))), "image 0 cannot be decoded .*0x5 pixels"),
        (lambda one, tmp: one.preprocess(Image.new("L", (0, 5))), "the image cannot be decoded .*0x5 pixels"),
        (lambda one, tmp: one.encode_images(Image.open(io.BytesIO(picture(3)[:-400]))), "image 0 cannot be decoded"),
        (lambda one, tmp: one.encode_images("a\0b"), "Give the path of an image"),
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
