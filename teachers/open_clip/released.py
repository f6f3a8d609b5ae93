"""The published MobileCLIP models by name, with the configs and weights that open_clip does not have.

Configs are in ``json/``, as open_clip's own. That of S0 is from ``mobileclip/configs`` of apple/ml-mobileclip; those of
S3, S4 and L/14 have the sizes of MobileCLIP2, and docs/teachers.md states what is uncertain in them.
``text_cfg.mixer_kernel`` is our key: the text tower has a convolutional block of this width before and after its
attention (``teachers.open_clip.building``).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parent / "json"
MIXER = "mixer_kernel"

_MEAN_0 = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear", "resize_mode": "shortest"}
_OPENAI = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "resize_mode": "shortest",
}

#: Published weights of models for which open_clip has none: entries as in its table of tags.
WEIGHTS: dict[str, dict[str, dict[str, Any]]] = {
    "MobileCLIP-S0": {"datacompdr": {"hf_hub": "apple/MobileCLIP-S0/mobileclip_s0.pt", **_MEAN_0}},
    "MobileCLIP-S3": {
        "datacompdr": {"hf_hub": "apple/MobileCLIP-S3/mobileclip_s3.pt", "interpolation": "bilinear", **_OPENAI}
    },
    "MobileCLIP-S4": {
        "datacompdr": {"hf_hub": "apple/MobileCLIP-S4/mobileclip_s4.pt", "interpolation": "bilinear", **_OPENAI}
    },
    "MobileCLIP-L-14": {
        "datacompdr": {"hf_hub": "apple/MobileCLIP-L-14/mobileclip_l14.pt", "interpolation": "bicubic", **_OPENAI}
    },
}

#: Model and tag in open_clip's spelling, by published name; case and punctuation do not count.
_PUBLISHED = {
    **{f"MobileCLIP-{size}": (f"MobileCLIP-{size}", "datacompdr") for size in ("S0", "S1", "S2", "B", "S3", "S4")},
    **{f"MobileCLIP2-{size}": (f"MobileCLIP2-{size}", "dfndr2b") for size in ("S0", "S2", "B", "S3", "S4")},
    "MobileCLIP-B (LT)": ("MobileCLIP-B", "datacompdr_lt"),
    "MobileCLIP-L/14": ("MobileCLIP-L-14", "datacompdr"),
    "MobileCLIP2-L/14": ("MobileCLIP2-L-14", "dfndr2b"),
}


def published(name: str) -> tuple[str, str] | None:
    """Model and tag of a published name: ``MobileCLIP-B (LT)``, ``mobileclip_blt``, ``apple/MobileCLIP-S0``."""
    return _BY_KEY.get(name_key(name.removeprefix("apple/")))


def name_key(name: str) -> str:
    """The significant part of a published name."""
    return re.sub(r"[ ()/_-]", "", name.lower())


_BY_KEY = {name_key(name): found for name, found in _PUBLISHED.items()}
