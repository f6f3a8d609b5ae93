"""What a codec must offer: the numbers in which it stores vectors, and their bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from reinforce.processes.imports import require

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[Any]
#: The arrays of a codebook by name.
Arrays = Mapping[str, npt.NDArray[Any]]

#: Bytes of a stored number, by its type. Vectors in int8 also have a scale in float32.
_WIDTHS = {"float16": 2, "float32": 4, "int8": 1, "uint8": 1}
_SCALE_BYTES = 4


class Codec(ABC):
    """How vectors are stored, by its ``name`` in configs and in dataset.json.

    ``numbers`` is the type of the stored numbers, as of ``schemas.embeddings_schema``, and ``codes`` how many of them
    each vector has, 0 for as many as it has itself. A codec that is ``fitted`` stores a vector as bytes, which a
    codebook decodes.
    """

    pattern: ClassVar[str]
    example: ClassVar[str]
    fitted: ClassVar[bool] = False
    #: Whether vectors are rounded to float16 before, so that a layer in float16 can be encoded later.
    rounds: bool = False
    numbers: str
    codes: int = 0

    def __init__(self, name: str) -> None:
        self.name = name

    def dim(self, dim: int) -> int:
        """Length of the decoded vectors of a model of ``dim``. Raises ValueError if such vectors cannot be stored."""
        return dim

    def width(self, dim: int) -> int:
        """Stored numbers of a decoded vector of length ``dim``."""
        return self.codes or dim

    def bytes(self, dim: int) -> int:
        """Bytes of a vector of a model of ``dim``."""
        return self.width(self.dim(dim)) * _WIDTHS[self.numbers] + (_SCALE_BYTES if self.numbers == "int8" else 0)

    def prepare(self, values: Floats) -> Floats:
        """The vectors [..., D] as they are stored, before they are converted to ``numbers`` or encoded."""
        if not self.rounds:
            return values
        with np.errstate(over="ignore"):
            halves: Floats = values.astype(np.float16).astype(np.float32)
        return halves


class FittedCodec(Codec):
    """A codec whose codebook is fitted to a sample of vectors, of ``least`` vectors or more.

    ``encoder`` is the extra, the purpose and the package that encode, if these may be missing, and ``facts`` are what
    a codebook states besides its sample.
    """

    fitted = True
    rounds = True
    numbers = "uint8"
    least: int
    encoder: tuple[str, str, str] | None = None
    facts: Mapping[str, Any] = {}

    def require_encoder(self) -> None:
        """Raise UserError if a package that encodes is not installed."""
        if self.encoder is not None:
            require(*self.encoder)

    @abstractmethod
    def fit(self, sample: Floats, seed: int) -> Arrays:
        """The codebook of a sample [n, D]; the same for the same arguments on one machine."""

    @abstractmethod
    def shapes(self, dim: int) -> Mapping[str, tuple[int, ...]]:
        """The float32 arrays of a codebook of vectors of length ``dim``, by name, with their shapes."""

    def fits(self, arrays: Arrays) -> bool:
        """Whether arrays are those of a codebook."""
        found = {name: array.shape for name, array in arrays.items()}
        sides = {side for shape in found.values() for side in (shape[-1:] or (0,))}
        lengths = (dim for side in sides for dim in (side, side * self.width(side)))
        same = any(found == dict(self.shapes(dim)) for dim in lengths if dim)
        return same and all(one.dtype == np.float32 and np.isfinite(one).all() for one in arrays.values())

    @abstractmethod
    def encode(self, values: Floats, arrays: Arrays) -> Codes:
        """The codes [n, width] of vectors [n, D]."""

    @abstractmethod
    def decode(self, codes: Codes, arrays: Arrays) -> Floats:
        """The vectors [n, D] of codes [n, width]."""
