"""What a student takes from a layer: its tensors, their values in rows, and what a loaded model computes instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class TargetTensor(NamedTuple):
    """A tensor that a training example takes from a layer: its name in a batch, NumPy dtype and shape.

    With no name, it is named after what it is of: ``image``, ``caption`` or ``synthetic``. Values of one that is
    ``below`` a number are indices, from 0 on.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    below: int | None = None


class PickedValues(NamedTuple):
    """One value of every row: arrays [rows, *shape] of each target tensor, arbitrary in unusable rows.

    ``stored`` [rows] are not null, and ``usable`` [rows] can be trained on.
    """

    arrays: tuple[npt.NDArray[Any], ...]
    stored: npt.NDArray[np.bool_]
    usable: npt.NDArray[np.bool_]


class TargetEncoder(NamedTuple):
    """What computes a target of images from a loaded model that has other layers, too.

    It has the ``name`` of the tensor in a batch, the preprocessing of its ``image``, a function that encodes pixels
    [B, 3, H, W], and the ``entry`` of a layer in dataset.json as far as the model decides it.
    """

    name: str
    image: Any
    encode: Callable[[Any], Any]
    entry: Mapping[str, Any]
