"""Keys of models of open_clip."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from teachers import weights
from teachers.open_clip import catalog
from teachers.spec import ModelSpec

_Mean = Annotated[float, Field(allow_inf_nan=False)]
_Std = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Preprocess(BaseModel):
    """How RGB images become the input of an open_clip model. Keys that are not set are as the weights state."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    mean: Annotated[list[_Mean], Field(min_length=3, max_length=3)] | None = Field(
        None, description="mean of each channel, of values from 0 to 1"
    )
    std: Annotated[list[_Std], Field(min_length=3, max_length=3)] | None = Field(
        None, description="standard deviation of each channel, of values from 0 to 1"
    )
    interpolation: Literal["bicubic", "bilinear"] | None = Field(None, description="interpolation of the resize")
    resize_mode: Literal["shortest", "squash"] | None = Field(
        None, description="shortest: resize the shorter side, then crop the center; squash: resize both sides"
    )


#: Description of `preprocess` in every config that has it.
PREPROCESS = (
    "how images are normalised and resized; default: as the pretrained tag, the open_clip_config.json in the folder of "
    "the weights, or the hub states. Needed for a checkpoint file whose model has tags with other values than open_clip"
)


class OpenClipOptions(ModelSpec):
    preprocess: Preprocess | None = Field(None, description=f"open_clip: {PREPROCESS}")

    def hosts(self) -> Iterator[str]:
        pretrained = catalog.weights_name(self.name, self.pretrained)
        if self.name.startswith(catalog.HUB_PREFIX):
            yield f"{weights.HUB} ({self.name.removeprefix(catalog.HUB_PREFIX)})"
        elif not self.name.startswith(catalog.FOLDER_PREFIX) and pretrained and not Path(pretrained).suffix:
            yield f"{weights.HUB} or the host that open_clip names ({self.name}, {pretrained})"


def stated_preprocess(spec: BaseModel) -> dict[str, Any]:
    """The keys of ``preprocess`` that a config of a model sets, if it has such keys."""
    stated = getattr(spec, "preprocess", None)
    return stated.model_dump(exclude_none=True) if isinstance(stated, Preprocess) else {}
