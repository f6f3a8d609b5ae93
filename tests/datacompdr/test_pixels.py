"""Images with published augmentations are decoded as their publisher did, pixel for pixel."""

from __future__ import annotations

import io
import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import reinforce
from reinforce.config import Limits
from reinforce.images.policy import PUBLISHED_POLICY, decode
from reinforce.student.config import Data
from reinforce.student.data.feed import StudentFeed
from tests.helpers.images import encode, noise
from tests.helpers.in_loaders import letters, read
from tests.helpers.pixels import torchvision_replay
from tests.helpers.published import (
    COUNT,
    SIZE,
    config_of,
    published_members,
    published_sample,
    source_members,
    write_published,
)
from tests.helpers.reinforced import reinforce_here


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("transparent", [False, True])
def test_the_published_image_policy_is_pillows_conversion_alone(mode: str, transparent: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = noise().convert("L").convert("I;16") if mode == "I;16" else noise().convert(mode)
    options = {"transparency": bytes(range(0, 256, 2)) if mode == "P" else 7} if transparent and mode in "LP" else {}
    if transparent and mode in ("LA", "RGBA"):
        picture.putalpha(noise().convert("L"))
    data = encode(picture, "PNG", exif=exif, **options)
    made = decode(data, Limits(), policy=PUBLISHED_POLICY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert made.tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()
    assert made.size == (40, 30), "not rotated by EXIF"


def test_a_student_sees_the_pixels_of_the_published_trainer(tmp_path: Path) -> None:
    """Compared with torchvision, for an image that EXIF rotates and that has colored transparent pixels."""
    one = published_sample(5)
    pixels = np.random.default_rng(1).integers(0, 255, (30, 40, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = encode(Image.fromarray(pixels, "RGBA"), "PNG", exif=exif)
    source = source_members(one)
    write_published(tmp_path, [[(source[0][0], image), *source[1:]]], [published_members(one)])
    url = reinforce_here(config_of(tmp_path))
    feed = StudentFeed(Data.model_validate({"datasets": url, "workers": 0, "window": 1}), 0, SIZE, letters)
    expected = [torchvision_replay(image, record, SIZE) for record in one.records]
    [sample] = reinforce.open(url)
    np.testing.assert_array_equal([sample.augmented(k) for k in range(COUNT)], expected)
    seen: set[int] = set()
    for batch in itertools.islice(feed.batches(0, 1, 1, 0), 12):
        matches = [k for k in range(COUNT) if np.array_equal(batch["image"][0].numpy(), expected[k])]
        assert len(matches) == 1
        assert read(batch["caption"]) == [f"true {one.key}"]
        assert read(batch["synthetic"])[0] in one.captions["syn_text"]
        seen.update(matches)
    assert seen == set(range(COUNT))
