"""What a scorer must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reinforce.config import Score

Floats = npt.NDArray[np.float32]


class StoredRows(Protocol):
    """The rows of a row group in the layers that are stored."""

    def values(self, layer: str) -> Any:
        """The value of each row in a layer: vectors as float32 [rows, count, D], NaN where there is none."""

    def samples(self) -> pa.Table:
        """The columns of the samples that the scorer names, and keys."""


class Scorer(ABC):
    """Computes some scores of each sample. ``kinds.scores`` has the class for each key of a config.

    Attributes:
        key: the key of the config that chooses it.
        names: of the scores, which are the columns of the layer.
        needs: the layers, besides the samples, that they are computed from.
        columns: the columns of the samples that they are computed from.
        earlier: versions by which layers that exist are continued, and what is wrong with each.
    """

    key: ClassVar[str]
    names: tuple[str, ...]
    needs: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    earlier: ClassVar[Mapping[int, str]] = {}

    @abstractmethod
    def __init__(self, spec: Score, version: int | None = None) -> None:
        """Raises ValueError or OSError that names the fix."""

    @classmethod
    def version_for(cls, spec: Score, captions: int) -> int | None:
        """The version of new layers of a dataset with at most ``captions`` true captions a sample; None for the only
        one."""
        return None

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """A JSON object that the layer's fingerprint covers besides the layers that are needed."""

    @abstractmethod
    def scores(self, rows: StoredRows) -> Mapping[str, Floats]:
        """Each score [rows]; NaN where a value that it needs is null."""
