"""NaFlex models on square images of one size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, Siglip2Model

from teachers.registry import load_teacher, teacher_spec
from teachers.transformers.naflex import square_size
from tests.helpers import named_models


@pytest.mark.parametrize("size", [None, 64])
def test_square_images_get_the_embeddings_of_transformers(tmp_path: Path, size: int | None) -> None:
    folder = named_models.naflex(tmp_path / "naflex")
    teacher = load_teacher("naflex", teacher_spec(family="transformers", model=folder, image_size=size), "cpu")
    side = size or 32
    assert teacher.image is not None
    assert teacher.image.size == side
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    processor = AutoImageProcessor.from_pretrained(folder)
    inputs = processor(images=[Image.fromarray(image)], max_num_patches=(side // 8) ** 2, return_tensors="pt")
    with torch.no_grad():
        output = Siglip2Model.from_pretrained(folder).eval().get_image_features(**inputs)
    expected = torch.nn.functional.normalize(output if isinstance(output, torch.Tensor) else output.pooler_output)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255 * 2 - 1
    torch.testing.assert_close(teacher.encode_images(pixels), expected, rtol=0, atol=1e-5)


def test_a_size_between_patches_is_refused_with_the_nearest() -> None:
    processor = {"patch_size": 16, "max_num_patches": 256}
    assert square_size(processor, None) == 256
    assert square_size({}, 224) == 224
    with pytest.raises(ValueError, match=r"250` is not a multiple of the model's patch of 16 pixels: use 256"):
        square_size(processor, 250)
