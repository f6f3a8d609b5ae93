"""Depths of weights: the number of blocks between them and the head of their tower, which has depth 0.

Image towers of timm are divided by timm's ``group_matcher``; those of open_clip and transformers into what comes before
the blocks, each block, and what follows them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from timm.models import group_parameters

#: In open_clip, transformers, and residual stages of open_clip's ResNet.
_BLOCK = re.compile(r"(?:^|\.)(?:resblocks|blocks?|layers?|layer(\d+)|h)\.(\d+)\.")
_STEM = re.compile(
    r"(?:transformer\.)?(?:encoder\.)?(?:embed\w*|\w+_embed\w*|cls_emb|shared|conv\d|bn\d|ln_pre)(?:\.|$)"
)


def image_depths(visual: Any) -> dict[str, int]:
    """Depths by the names of the parameters of an image tower."""
    names = [name for name, _ in visual.named_parameters()]
    trunk: Any = getattr(visual, "trunk", None)
    if not hasattr(trunk, "group_matcher"):
        return block_depths(names)
    layers = group_parameters(trunk, trunk.group_matcher(), reverse=True)
    head = [name for name in names if not name.startswith("trunk.")]
    last = max(layers.values()) + bool(head)
    return dict.fromkeys(head, 0) | {f"trunk.{name}": last - layer for name, layer in layers.items()}


def block_depths(names: Iterable[str]) -> dict[str, int]:
    """Depths by the names of the parameters of a text tower, or of an image tower that is not timm's."""
    groups = {name: _group(name) for name in names}
    layers = sorted({*groups.values()}, reverse=True)
    return {name: layers.index(group) for name, group in groups.items()}


def _group(name: str) -> tuple[int, ...]:
    """What orders parameters from the stem (0) over the blocks (1, number) to the head (2)."""
    if block := _BLOCK.search(name):
        return (1, *(int(number) for number in block.groups() if number is not None))
    return (0,) if _STEM.match(name) else (2,)
