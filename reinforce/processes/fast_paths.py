"""The key ``accelerator`` of configs: whether a process uses fast paths."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, Field

from reinforce.errors import UserError
from teachers.fast_paths.usage import enabled, set_enabled

Accelerated = Annotated[
    Literal["fast", "plain"],
    Field(
        description="plain: turn every fast path of accelerators off (compiled code, CUDA graphs, held weights, fused "
        "attention), as REINFORCE_ACCELERATOR=plain in the environment does; results differ in rounding at most"
    ),
]
_Config = TypeVar("_Config", bound=BaseModel)


def use_accelerator(wanted: Literal["fast", "plain"]) -> Literal["fast", "plain"]:
    """Set up this process, before it loads models -> what is in force: ``plain`` if the environment says so.

    Counts of fast paths begin anew. Raises UserError for another value in the environment.
    """
    set_enabled(wanted == "fast")
    try:
        return "fast" if enabled() else "plain"
    except ValueError as error:
        raise UserError(f"{error}.") from None


def with_accelerator(config: _Config) -> _Config:
    """Set up this process -> the config with ``accelerator`` as it is in force here, for processes on other nodes."""
    wanted: Literal["fast", "plain"] = getattr(config, "accelerator")  # noqa: B009 - a key of each config of models
    return config.model_copy(update={"accelerator": use_accelerator(wanted)})
