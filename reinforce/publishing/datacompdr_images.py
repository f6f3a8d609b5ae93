"""Images of exported tars: readers of the format must decode them to the pixels that the augmentations were made on."""

from __future__ import annotations

import io

from PIL import Image

from reinforce.config import Limits
from reinforce.images.policy import PUBLISHED_POLICY, decode, format_extension, is_plain

_READ_EXTENSIONS = ("jpg", "png", "webp")  # by the trainer of ml-mobileclip


def has_published_pixels(image: bytes, policy: str, limits: Limits) -> bool:
    """Whether readers of the format decode an image to the pixels that ``policy`` gives. Raises ImageRefused."""
    if policy == PUBLISHED_POLICY or is_plain(image):
        return True
    return _same(decode(image, limits, policy=policy), decode(image, limits, policy=PUBLISHED_POLICY))


def image_member(image: bytes, policy: str, limits: Limits) -> tuple[str, bytes, bool]:
    """Extension and content of an image, and whether it was converted to a PNG of its pixels. Raises ImageRefused.

    It is converted where readers would decode it to other pixels, or do not read its format.
    """
    extension = format_extension(image)
    if extension in _READ_EXTENSIONS and has_published_pixels(image, policy, limits):
        return extension, image, False
    out = io.BytesIO()
    decode(image, limits, policy=policy).save(out, "PNG")
    return "png", out.getvalue(), True


def _same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()
