"""Memory of a device: errors where it is out, how it is freed, and how much of it captions may take."""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Iterator

import torch

#: Messages of RuntimeErrors that mean the same as torch's OutOfMemoryError.
_MESSAGES = re.compile(
    r"(CUDA|HIP)( driver)? error: out of memory|(CUDA|HIP) out of memory|CUFFT_ALLOC_FAILED|"
    r"MPS backend out of memory|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_ALLOC_FAILED|DefaultCPUAllocator: "
)
GIB = 2**30
#: Share of a card's memory that the caches of one captioner may take, 1 / _PART.
_PART = 6


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, is that of a device without free memory."""
    return any(
        isinstance(one, torch.cuda.OutOfMemoryError) or (isinstance(one, RuntimeError) and _MESSAGES.search(str(one)))
        for one in _chain(error)
    )


def forget_frames(error: BaseException) -> None:
    """Let an error, and those that it was raised from, refer to nothing that the functions in it have held."""
    for one in _chain(error):
        traceback.clear_frames(one.__traceback__)


def release_cache(device: torch.device) -> None:
    """Return memory that nothing uses to the device."""
    gc.collect(1)  # cycles of the last batch; those of the whole process would take half a second
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def forget_peak(device: torch.device) -> None:
    """Return unused memory to the device, and count its peak from here on."""
    if device.type == "cuda":
        release_cache(device)
        torch.cuda.reset_peak_memory_stats(device)


def cache_bytes(device: torch.device, on_cpu: int) -> int:
    """Bytes for the caches of the captions that are decoded at once: ``on_cpu``, or a sixth of the memory of a card.

    It decides into how many parts a batch is cut, and the rounding of products may depend on that. So it is the
    card's whole memory in GiB that counts, not what is free of it: equal cards give equal bytes, whatever else is in
    their memory.
    """
    if device.type != "cuda":
        return on_cpu
    total = torch.cuda.get_device_properties(device).total_memory // GIB
    return max(1, total) * GIB // _PART


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it was raised from or while they were handled."""
    one: BaseException | None = error
    seen: set[int] = set()
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
