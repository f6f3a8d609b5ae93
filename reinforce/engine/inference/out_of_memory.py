"""Work for which the memory of a device may not suffice, and what to do about that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from reinforce.engine.messages.results import LayerFailure
from reinforce.engine.messages.tracebacks import error_with_frames
from teachers.runtime.determinism import is_without_engine
from teachers.runtime.memory import forget_frames, is_out_of_memory

T = TypeVar("T")


@dataclass(frozen=True)
class OutOfMemory:
    """The failure that ``attempt`` returns instead of raising: the layer whose model raised, None for a copy, and the
    text."""

    layer: str | None
    text: str


def attempt(work: Callable[[], T]) -> T | OutOfMemory:
    """The result of ``work``, or OutOfMemory. Then nothing refers any more to what the functions in it have held."""
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        layer = error.layer if isinstance(error, LayerFailure) else None
        text = str(error.args[1]) if isinstance(error, LayerFailure) else error_with_frames(error)
        forget_frames(error)
    return OutOfMemory(layer, text)


def memory_hint(error: BaseException) -> str:
    """What to do about an error of a few inputs or of loading, if it is one of memory or of a convolution without an
    algorithm, which may lack memory, else an empty text."""
    if is_without_engine(error):
        return (
            ". cuDNN has no algorithm for a convolution of this model, or no memory for one. Set workers.deterministic "
            "to false: a shard that is computed again may then differ in rounding. Or set another `precision`."
        )
    if not is_out_of_memory(error):
        return ""
    return (
        ". The models of the config do not fit in the memory of the device together. Use smaller ones or `precision: "
        "bf16`, compute some of the layers in a run of their own, or use a device with more memory, or one that no "
        "other program uses."
    )
