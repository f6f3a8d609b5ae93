"""How many bytes the caches of a captioner may take."""

from __future__ import annotations

import torch

GIB = 2**30
#: Share of a card's memory that the caches of one captioner may take, 1 / _PART.
_PART = 6


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
