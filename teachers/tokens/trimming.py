"""Check that a text encoder gives equal embeddings for texts padded to the longest of the batch or to full length."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

_log = logging.getLogger(__name__)

#: Texts of several lengths, the last longer than any context.
PROBE_TEXTS = ("", "cat", "a photo of a cat", "two dogs, one of them brown, run over a wet meadow at dawn; " * 12)
_TOLERANCE = 1e-4  # on unit-norm float32; storage in float16 loses five times that


def trimming_is_exact(encode: Callable[[Sequence[str], bool], torch.Tensor]) -> bool:
    """Compare ``encode(texts, trim) -> [B, dim]`` with and without trimming, on batches of growing longest text."""
    for count in range(1, len(PROBE_TEXTS) + 1):
        texts = PROBE_TEXTS[:count]
        with torch.inference_mode():  # without autocast, so in float32 whatever the teacher's precision
            full, trimmed = (
                torch.nn.functional.normalize(encode(texts, trim).float(), dim=-1) for trim in (False, True)
            )
        if not torch.allclose(full, trimmed, rtol=0, atol=_TOLERANCE):
            _log.warning("texts are encoded at full length: trimmed ones differ by %g", (full - trimmed).abs().max())
            return False
    return True
