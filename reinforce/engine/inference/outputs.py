"""Outputs of models: checked, and copied before any model is called again, since a model may reuse their memory."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from reinforce.dataset.vectors import NORM_TOLERANCE
from teachers.protocols import Teacher

Floats = npt.NDArray[np.float32]
_T = TypeVar("_T")


def copied(value: _T) -> _T:
    """A copy of tensors and arrays, also inside of lists, tuples and mappings; other objects are kept."""
    found: Any = value
    if isinstance(found, torch.Tensor):
        found = _clone(found)
    elif isinstance(found, np.ndarray):
        found = found.copy()
    elif isinstance(found, MutableMapping):
        found = copy.copy(found)
        for key, item in found.items():
            found[key] = copied(item)
    elif type(found) in (list, tuple):
        found = type(found)(map(copied, found))
    result: _T = found
    return result


def encode(teacher: Teacher, method: str, inputs: Any, count: int) -> torch.Tensor:
    """A copy of the embeddings [count, dim] that a method of a teacher returns. Raises ValueError for another shape."""
    out: object = getattr(teacher, method)(inputs)
    wanted = (count, teacher.dim)
    if isinstance(out, torch.Tensor) and tuple(out.shape) == wanted:
        return _clone(out)
    where = f"{type(teacher).__name__}.{method}()"
    if not isinstance(out, torch.Tensor):
        fix = "; return torch.from_numpy of it" if isinstance(out, np.ndarray) else ""
        raise ValueError(
            f"embeddings must be a torch.Tensor of shape {wanted}, got type {type(out).__name__} from {where}{fix}"
        )
    raise ValueError(f"embeddings must have shape {wanted}, got {tuple(out.shape)} from {where}; correct it or `dim`")


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    """A copy; on CPUs by this thread alone, because torch's own threads would wait actively after a large one."""
    if tensor.device.type == "cpu" and tensor.dtype == torch.float32:
        return torch.from_numpy(tensor.detach().numpy().copy())
    return tensor.clone()


def to_numpy(out: torch.Tensor, ignored: npt.NDArray[np.bool_] | None = None) -> Floats:
    """Embeddings [rows, dim] on the CPU as float32.

    Raises ValueError unless they have norm 1. The norm of ``ignored`` rows [rows] and of rows with NaN or infinity is
    not checked.
    """
    values: Floats = out.float().cpu().numpy()
    norms = np.sqrt(np.einsum("ij,ij->i", values, values))
    wrong = ~(np.abs(norms - 1) <= NORM_TOLERANCE)
    if ignored is not None:
        wrong &= ~ignored
    if wrong.any():
        wrong[wrong] = np.isfinite(values[wrong]).all(axis=1)
        for row in np.flatnonzero(wrong)[:1]:
            raise ValueError(
                f"embeddings must have norm 1, got {norms[row]:.3f} in row {row + 1} of {len(out)}; normalize them"
            )
    return values


def to_scores(out: object, count: int, names: Sequence[str], what: str) -> Floats:
    """A copy of the scores [count, names] that a class ``what`` returned, on the CPU. Raises ValueError for others."""
    values = np.array(out.detach().float().cpu() if isinstance(out, torch.Tensor) else out)
    if values.dtype.kind not in "fiu" or values.shape not in {(count, len(names)), (count,) * (len(names) == 1)}:
        found = f"{values.dtype} {values.shape}" if isinstance(out, torch.Tensor | np.ndarray) else type(out).__name__
        raise ValueError(
            f"{what}.score() must return numbers of shape {(count, len(names))}, one for each of {count} samples and "
            f"each of {', '.join(names)}, got {found}"
        )
    return values.astype(np.float32).reshape(count, len(names))
