"""The device's part of the augmentation backend ``device-1``: torch operations on the crops of a batch.

Resizing is Pillow's bicubic, as products with matrices of the filter's weights: the width before the height, or after
it in tall crops, rounded to uint8 in between. Operations are those of ``reinforce.images.records``, in
integers or in Pillow's floating-point arithmetic, so that their results are equal on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from reinforce.images.device_records import CellRecord
from reinforce.images.records import is_tall
from teachers.runtime.accelerator import device_of_float64, upload

#: Crops that are resized at a time: 100 MB in float32 if they have 512 x 512 pixels.
_AT_ONCE = 32
_LEVELS = 256


@torch.no_grad()
def augment(cells: torch.Tensor, records: Sequence[CellRecord], size: int) -> torch.Tensor:
    """Cells uint8 [B, ...] on any device, filled by ``fill_cell``, to images uint8 [B, size, size, 3] there."""
    if (device := device_of_float64(cells.device, "augmentations of the backend device-1")) != cells.device:
        return augment(cells.to(device), records, size).to(cells.device)
    pixels, images = cells.reshape(len(cells), -1, 3), cells.new_empty(len(cells), size, size, 3)
    tall = [is_tall(record.width, record.height, size) for record in records]
    for width_first in (True, False):
        chosen = [row for row, is_tall in enumerate(tall) if is_tall is not width_first]
        for start in range(0, len(chosen), _AT_ONCE):
            rows = chosen[start : start + _AT_ONCE]
            index = upload(np.array(rows), cells.device)
            crops = pixels.index_select(0, index)
            images.index_copy_(0, index, _resize(crops, [records[row] for row in rows], size, width_first))
    for place in range(max((len(record.ops) for record in records), default=0)):
        by_name: dict[str, list[int]] = {}
        for row, record in enumerate(records):
            if len(record.ops) > place and record.ops[place][0] != "Identity":
                by_name.setdefault(record.ops[place][0], []).append(row)
        for name, rows in by_name.items():
            numbers = upload(np.array([records[row].ops[place][1] for row in rows], np.float64), images.device)
            index = upload(np.array(rows), images.device)
            images.index_copy_(0, index, _OPERATIONS[name](images.index_select(0, index), numbers))
    return images


def _resize(pixels: torch.Tensor, records: Sequence[CellRecord], size: int, width_first: bool) -> torch.Tensor:
    """Crops at the start of cells [n, pixels, 3] -> uint8 [n, size, size, 3]."""
    n, device = len(records), pixels.device
    heights, widths = upload(np.array([(record.height, record.width) for record in records]), device).unbind(1)
    steps = (widths, torch.ones_like(widths))  # between places in a cell, of rows and of columns
    sides = [(heights, max(record.height for record in records)), (widths, max(record.width for record in records))]
    (first, longest), (second, other) = reversed(sides) if width_first else sides
    of_first, of_second = reversed(steps) if width_first else steps
    # Places outside of a crop have weight 0 and repeat one inside of it.
    along = torch.minimum(torch.arange(longest, device=device), first[:, None] - 1) * of_first[:, None]
    across = torch.minimum(torch.arange(other, device=device), second[:, None] - 1) * of_second[:, None]
    places = (along[:, :, None] + across[:, None, :]).reshape(n, -1, 1).expand(-1, -1, 3)
    crops = pixels.gather(1, places).float().reshape(n, longest, other * 3)
    half = torch.bmm(_weights(first, longest, size), crops).add_(0.5).floor_().clamp_(0, _LEVELS - 1)
    half = half.reshape(n, size, other, 3).transpose(1, 2).reshape(n, other, size * 3)
    whole = torch.bmm(_weights(second, other, size), half).add_(0.5).floor_().clamp_(0, _LEVELS - 1)
    whole = whole.reshape(n, size, size, 3).to(torch.uint8)
    return whole if width_first else whole.transpose(1, 2)


def _weights(sides: torch.Tensor, longest: int, size: int) -> torch.Tensor:
    """Bicubic weights (a = -0.5) [n, size, longest] with which ``size`` pixels are made of a side's, as Pillow's."""
    device = sides.device
    scale = (sides.double() / size)[:, None, None]
    reach = scale.clamp(min=1)
    centre = (torch.arange(size, device=device).double()[:, None] + 0.5) * scale
    place = torch.arange(longest, device=device)
    x = ((place + 0.5 - centre) / reach).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0)) * (place < sides[:, None, None])
    weights = weights / weights.sum(dim=2, keepdim=True)
    return ((weights * 2**22).round() / 2**22).float()  # Pillow's fixed point


def _grey(images: torch.Tensor) -> torch.Tensor:
    """Pillow's mode L, int32 [n, size, size, 1]."""
    red, green, blue = images.to(torch.int32).unbind(3)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16)[..., None]


def _blend(grey: torch.Tensor, images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """``Image.blend``: float32, and the fraction is cut off."""
    start = grey.float()
    factor = factors[:, :1, None, None].float()
    return (start + factor * (images.float() - start)).clamp_(0, _LEVELS - 1).to(torch.uint8)


def _contrast(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    grey = _grey(images).flatten(1)
    mean = (grey.sum(dim=1).double() / grey.shape[1] + 0.5).floor()
    return _blend(mean[:, None, None, None], images, factors)


def _sharpness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """The smooth image has means of 3 x 3 pixels, of which the middle one counts five times."""
    smooth, values = images.to(torch.int32), images.to(torch.int32)
    if min(images.shape[1:3]) >= 3:
        rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
        means = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * values[:, 1:-1, 1:-1]
        smooth = smooth.clone()
        smooth[:, 1:-1, 1:-1] = (means + 6) // 13
    return _blend(smooth, images, factors)


def _affine(images: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Nearest pixels, black outside; matrices [n, 6] in multiples of 2**-16."""
    n, size = images.shape[:2]
    a, b, c, d, e, f = matrices.to(torch.int64)[:, :, None, None].unbind(1)
    y, x = torch.arange(size, device=images.device)[:, None], torch.arange(size, device=images.device)
    column, row = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16
    inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
    places = (row * size + column).where(inside, 0).reshape(n, -1, 1).expand(-1, -1, 3)
    moved = images.reshape(n, -1, 3).gather(1, places).reshape(images.shape)
    return moved * inside[..., None]


def _posterize(images: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    step = (2 ** (8 - bits))[:, :1, None, None].to(torch.int32)
    return (images // step * step).to(torch.uint8)


def _autocontrast(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    low, high = (values.double()[:, None, None] for values in torch.aminmax(images.flatten(1, 2), dim=1))
    scale = torch.full_like(high, 255.0) / (high - low)  # a number divided by a tensor is rounded twice
    stretched = (images.double() * scale + -low * scale).clamp_(0, _LEVELS - 1).to(torch.uint8)
    return torch.where(high > low, stretched, images)


def _equalize(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    n, size = images.shape[:2]
    values = images.permute(0, 3, 1, 2).reshape(3 * n, -1).long()  # by image and channel
    counts = values.new_zeros(3 * n, _LEVELS).scatter_add_(1, values, torch.ones_like(values))
    highest = counts.gather(1, values.amax(dim=1, keepdim=True))
    step = (values.shape[1] - highest) // 255
    before = counts.cumsum(dim=1) - counts
    table = ((step // 2 + before) // step.clamp(min=1)).clamp_(max=_LEVELS - 1)
    table = torch.where(step > 0, table, torch.arange(_LEVELS, device=images.device))
    return table.gather(1, values).to(torch.uint8).reshape(n, 3, size, size).permute(0, 2, 3, 1)


_OPERATIONS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    **dict.fromkeys(("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"), _affine),
    "Brightness": lambda images, factors: _blend(images.new_zeros(()), images, factors),
    "Color": lambda images, factors: _blend(_grey(images), images, factors),
    "Contrast": _contrast,
    "Sharpness": _sharpness,
    "Posterize": _posterize,
    "Solarize": lambda images, above: torch.where(images < above[:, :1, None, None], images, 255 - images),
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
}
