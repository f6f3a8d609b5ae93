"""What a config contains for the patch features of a teacher."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

_PICKED = 16  # patches of an image
_Side = Annotated[int, Field(ge=1, le=1024)]


class Patches(BaseModel):
    """Patch features of a teacher that are stored for each augmented image."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    grid: Annotated[
        _Side | tuple[_Side, _Side], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
    ] = Field(description="patches on a side, or [rows, columns], as the model has them")
    codec: str = Field("float16", description="how patch vectors are stored: float16, pca128, pq96, rq32 and others")
    sample: int = Field(
        32_768, ge=1, description="patch vectors of the first shards to which statistics and codebooks are fitted"
    )
    _picked: int | None = PrivateAttr(None)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.grid if isinstance(self.grid, tuple) else (self.grid, self.grid)

    @property
    def picked(self) -> int | None:
        """Random patches of each image that a run stores as the model gives them, to fit codebooks to; None: all are
        stored by the codec."""
        return self._picked

    @property
    def fewer(self) -> int:
        """``picked`` patches of a run that stores some."""
        return min(_PICKED, math.prod(self.shape))

    def picking(self) -> Patches:
        """A copy with ``picked`` patches."""
        copy = self.model_copy()
        copy._picked = self.fewer
        return copy
