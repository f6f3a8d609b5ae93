"""Members of published reinforcements (DataCompDR, DFNDR), parsed: augmentation records and the teachers' vectors.

Nothing in them is executed, and the size of what is unpacked is bounded.
"""

from __future__ import annotations

import gzip
import io
import math
import zipfile
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from reinforce.dataset.augment.records import Augmentation, Crop, Op
from reinforce.dataset.augment.tables import OPS

PARAMETERS, CAPTIONS = "paug.json", "syn.json"
VECTORS = ("npz", "pth.gz")  # the more precise one first
_MAX_BYTES = 64 * 2**20  # of one sample's unpacked vectors
MAX_OPS = 16  # of one record
_MAX_MAGNITUDE = 1e4

Floats = npt.NDArray[np.float32]


class Unreadable(ValueError):
    """A member that is missing or cannot be used; the message is the detail of the refusal."""


def parse_augmentation(record: Any, size: int, width: int, height: int) -> Augmentation:
    """``[[top, left, height, width], [[op, magnitude], ...] or null]`` of an image. Raises Unreadable."""
    crop, ops = (*record, None)[:2] if isinstance(record, list) and record else (None, None)
    if not isinstance(crop, list) or len(crop) != 4 or not all(type(side) is int for side in crop):
        raise Unreadable(f"{PARAMETERS}: {str(record)[:80]!r} has no crop")
    box = Crop(*crop)
    if min(crop) < 0 or min(crop[2:]) < 1 or box.top + box.height > height or box.left + box.width > width:
        raise Unreadable(
            f"{box} does not fit this image of {width} x {height}: the image was resized, or is not the published one"
        )
    if ops is None:
        return Augmentation(box, size, None)
    if not isinstance(ops, list) or len(ops) > MAX_OPS:
        raise Unreadable(f"{PARAMETERS}: {str(ops)[:80]!r} is not a list of operations")
    return Augmentation(box, size, tuple(map(_parse_op, ops)))


def _parse_op(pair: Any) -> Op:
    if isinstance(pair, list) and len(pair) == 2:
        index, magnitude = pair
        exists = type(index) is int and 0 <= index < len(OPS)
        if exists and type(magnitude) in (int, float) and abs(magnitude) <= _MAX_MAGNITUDE:
            return Op(OPS[index], float(np.float32(magnitude)))
    raise Unreadable(f"{PARAMETERS}: {str(pair)[:80]!r} is not an operation")


def parse_vectors(name: str, data: bytes) -> dict[str, Floats]:
    """The two-dimensional float arrays of a member ``npz`` or ``pth.gz``, by name. Raises Unreadable."""
    try:
        return _parse_npz(data) if name == "npz" else _parse_pth(data)
    except Unreadable:
        raise
    except Exception as error:  # zip, gzip, numpy and torch have exceptions of their own
        raise Unreadable(f"{name} cannot be read ({type(error).__name__}: {str(error)[:200]})") from error


def _parse_npz(data: bytes) -> dict[str, Floats]:
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        _check_size(sum(info.file_size for info in file.infolist()))
        for info in file.infolist():
            with file.open(info) as member:
                array = _parse_npy(member.read(info.file_size))  # unpacks no more than the size that was checked
            if array is not None:
                arrays[info.filename.removesuffix(".npy")] = array
    return arrays


def _parse_npy(data: bytes) -> Floats | None:
    """A two-dimensional float array, or None. The header's shape counts only if the data has its size."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, column_major, dtype = read(file)
    if dtype.kind != "f" or len(shape) != 2 or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        return None
    flat = np.frombuffer(data, dtype, offset=file.tell())
    return flat.reshape(shape, order="F" if column_major else "C").astype(np.float32)


def _parse_pth(data: bytes) -> dict[str, Floats]:
    """Tensors that ``torch.save`` wrote and gzip compressed."""
    import torch

    with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
        unpacked = packed.read(_MAX_BYTES + 1)
    _check_size(len(unpacked))
    with zipfile.ZipFile(io.BytesIO(unpacked)) as file:  # torch's older format, whose sizes are unchecked, is no zip
        _check_size(sum(info.file_size for info in file.infolist()))
    found = torch.load(io.BytesIO(unpacked), map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise Unreadable("pth.gz does not hold a mapping of names to tensors")
    tensors = {
        name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    matrices = {name: value for name, value in tensors.items() if value.ndim == 2 and value.is_floating_point()}
    _check_size(4 * sum(value.numel() for value in matrices.values()))
    return {name: value.float().numpy() for name, value in matrices.items()}


def _check_size(count: int) -> None:
    if count > _MAX_BYTES:
        raise Unreadable(f"vectors of {count:,} bytes, more than the limit of {_MAX_BYTES:,}")


def list_names(names: Iterable[object]) -> str:
    """The first few names, for messages."""
    return ", ".join(map(str, list(names)[:10]))[:200] or "nothing"
