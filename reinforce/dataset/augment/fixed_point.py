"""The augmentation backend ``fixed-point-1``: less CPU, and the same pixels on every processor.

- Crops are resized by a separable Catmull-Rom filter (bicubic with a = -0.5, widened when reducing, as Pillow's) with
  16-bit fixed-point weights, the height before the width, rounded to uint8 in between. Two packages compute this bit by
  bit alike: ``cykooz-resizer`` (Rust, several times faster than Pillow) and torch, which is used where the former is
  not installed. Natural images differ from Pillow's resizing by at most 2 of 255 levels.
- The operations are those of ``torchvision-pil-1`` with magnitudes rounded so that Pillow's floating-point arithmetic
  is exact: to multiples of 1/128 for Brightness, Color, Contrast and Sharpness, and of 2**-16 for the matrices of
  ShearX, ShearY and Rotate. So fused multiply-add instructions, which some processors have, change nothing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from reinforce.dataset.augment.operations import TORCHVISION, Operation, affine
from reinforce.dataset.augment.records import Resize
from reinforce.errors import UserError

FIXED_POINT_BACKEND = "fixed-point-1"

#: SHA-256 of the resized images of ``_resizing_digest``. Part of the definition of the backend.
_DIGEST = "fb1c744eaab09e4dbeecc34a067ee8e76a71871edefefa22e6e17214b93a385b"
_FACTOR_STEPS = 128
_MATRIX_STEPS = 2**16


def resize_with_cykooz() -> Resize:
    """Resizing by cykooz-resizer. Raises ImportError if it is not installed."""
    from cykooz_resizer import FilterType, ResizeAlg, ResizeOptions, Resizer

    options = ResizeOptions(ResizeAlg.convolution(FilterType.catmull_rom), use_alpha=False)

    def resize(image: Image.Image, size: int) -> Image.Image:
        out = Image.new("RGB", (size, size))
        Resizer().resize_pil(image, out, options)  # one object for each call, because it is not thread-safe
        return out

    return resize


def resize_with_torch() -> Resize:
    """The same resizing, computed by torch."""
    import torch

    def resize(image: Image.Image, size: int) -> Image.Image:
        # Transposed, because torch resizes the width first. Pillow transposes and interleaves faster than torch.
        pixels = torch.from_numpy(np.array(image.transpose(Image.Transpose.TRANSPOSE))).permute(2, 0, 1)
        out = torch.nn.functional.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0]
        bands = [Image.fromarray(band).transpose(Image.Transpose.TRANSPOSE) for band in out.numpy()]
        return Image.merge("RGB", bands)

    return resize


#: The packages that can resize, in the order in which they are tried.
RESIZERS: Mapping[str, Callable[[], Resize]] = {"cykooz-resizer": resize_with_cykooz, "torch": resize_with_torch}


def load_resizer() -> Resize:
    """Load the first package that gives the pixels of this backend. Raises UserError if there is none."""
    refused = []
    for package, load in RESIZERS.items():
        try:
            resize = load()
        except ImportError:
            continue
        if resizing_digest(resize) == _DIGEST:
            return resize
        refused.append(f"{package} {importlib.metadata.version(package)}")
    raise UserError(
        f"augmentation backend {FIXED_POINT_BACKEND}: {' and '.join(refused) or 'no installed package'} does not give "
        "its pixels on this machine. Install the versions of constraints.txt."
    )


def resizing_digest(resize: Resize) -> str:
    """SHA-256 of a few resized images: enlarged, reduced, distorted, and with extreme values."""
    digest = hashlib.sha256()
    for number, (width, height, size) in enumerate(((5, 3, 24), (61, 45, 32), (40, 97, 41), (150, 8, 9), (1, 1, 8))):
        values = np.arange(1, 3 * width * height + 1, dtype=np.uint32) * np.uint32(2654435761) >> np.uint32(24)
        pixels = values.astype(np.uint8).reshape(height, width, 3)
        image = Image.fromarray(pixels if number % 2 else pixels // 128 * 255)
        digest.update(np.asarray(resize(image, size)).tobytes())
    return digest.hexdigest()


def _rounded(operation: Operation) -> Operation:
    def apply(image: Image.Image, magnitude: float) -> Image.Image:
        return operation(image, round(magnitude * _FACTOR_STEPS) / _FACTOR_STEPS)

    return apply


def _exact_affine(image: Image.Image, *matrix: float) -> Image.Image:
    return affine(image, *(round(value * _MATRIX_STEPS) / _MATRIX_STEPS for value in matrix))


def _rotate(image: Image.Image, magnitude: float) -> Image.Image:
    """Rotate counter-clockwise around the centre, by ``magnitude`` degrees."""
    angle = math.radians(magnitude)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = image.width / 2, image.height / 2
    return _exact_affine(image, cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


#: Every operation by torchvision's name.
OPERATIONS: Mapping[str, Operation] = {
    **TORCHVISION,
    **{name: _rounded(TORCHVISION[name]) for name in ("Brightness", "Color", "Contrast", "Sharpness")},
    "ShearX": lambda image, magnitude: _exact_affine(image, 1, magnitude, 0, 0, 1, 0),
    "ShearY": lambda image, magnitude: _exact_affine(image, 1, 0, 0, magnitude, 1, 0),
    "Rotate": _rotate,
}
