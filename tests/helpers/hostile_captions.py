"""Captions that a page must show as text: markup, quotes, right-to-left text, control characters, very long words."""

from __future__ import annotations

import numpy as np
import torch

from tests.helpers.models import SeedCaptioner

SCRIPT = "<script>window.attacked = true</script>"
CAPTIONS = [
    SCRIPT,
    "\"><img src=x onerror='window.attacked = true'>",
    "</script></bdi><svg onload=window.attacked=true>",
    "' onmouseover='window.attacked = true",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; &amp;",
    "قطة سوداء على الأريكة",
    "חתול שחור על הספה",
    "\u202egnp.eteled a reversed name",
    "unbroken" * 230,
    "🐈" * 280,
]


class HostileCaptioner(SeedCaptioner):
    """Returns a script, and text with control characters and a lone line separator."""

    def caption(self, pixels: torch.Tensor, seeds: np.ndarray) -> list[list[str]]:
        return [[SCRIPT, f"a \0 \x1b[31m \u2028 bell\x07 of image {int(row[0]) % 1000}"] for row in seeds]
