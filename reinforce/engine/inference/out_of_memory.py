"""Errors of a device that is out of memory: recognised, and forgotten so that what they refer to is freed."""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from reinforce.engine.messages.results import LayerFailure
from reinforce.engine.messages.tracebacks import error_with_frames, shorten

T = TypeVar("T")

#: Messages of RuntimeErrors that mean the same as torch's OutOfMemoryError.
_MESSAGES = re.compile(
    r"(CUDA|HIP)( driver)? error: out of memory|(CUDA|HIP) out of memory|CUFFT_ALLOC_FAILED|"
    r"(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_ALLOC_FAILED|DefaultCPUAllocator: "
)
_MAX_CHARACTERS = 500


@dataclass(frozen=True)
class OutOfMemory:
    """What ``attempt`` returns instead of raising: the layer whose model raised, None for a copy, and the text."""

    layer: str | None
    text: str


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, is that of a device without free memory."""
    return any(
        isinstance(one, torch.cuda.OutOfMemoryError) or (isinstance(one, RuntimeError) and _MESSAGES.search(str(one)))
        for one in _chain(error)
    )


def attempt(work: Callable[[], T]) -> T | OutOfMemory:
    """The result of ``work``, or OutOfMemory. Then nothing refers any more to what the functions in it have held."""
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        layer = error.layer if isinstance(error, LayerFailure) else None
        text = str(error.args[1]) if isinstance(error, LayerFailure) else error_with_frames(error)
        for one in _chain(error):
            traceback.clear_frames(one.__traceback__)
    return OutOfMemory(layer, shorten(text, _MAX_CHARACTERS))


def memory_hint(error: BaseException) -> str:
    """What to do about an error of a few inputs or of loading, if it is one of memory, else an empty text."""
    if not is_out_of_memory(error):
        return ""
    return (
        ". The models of the config do not fit in the memory of the device together. Use smaller ones or `precision: "
        "bf16`, compute some of the layers in a run of their own, or use a device with more memory, or one that no "
        "other program uses."
    )


def release_cache(device: torch.device) -> None:
    """Return memory that nothing uses to the device."""
    gc.collect(1)  # cycles of the last batch; those of the whole process would take half a second
    if device.type == "cuda":
        torch.cuda.empty_cache()


def forget_peak(device: torch.device) -> None:
    """Return unused memory to the device, and count its peak from here on."""
    if device.type == "cuda":
        release_cache(device)
        torch.cuda.reset_peak_memory_stats(device)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it was raised from or while they were handled."""
    one: BaseException | None = error
    seen: set[int] = set()
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
