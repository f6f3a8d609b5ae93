"""Models of open_clip without weights, and published weights in the layout of their authors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_mobile_clip_state_dict

from teachers.open_clip import registration  # noqa: F401  (its models are built here)
from teachers.open_clip.mixers import MixerBlock
from teachers.open_clip.released import MIXER

#: In the names of weights of a FastViT (MobileCLIP) whose training branches are fused.
FUSED = ".reparam_conv."
_IMAGE = "image_encoder.model."
_RECOGNISED = f"{_IMAGE}patch_embed.0.rbr_conv.0.conv.weight"


def build(name: str, preprocess: Mapping[str, Any] | None = None, image_size: int | None = None) -> Any:
    """Build an architecture by open_clip's name or ``local-dir:PATH`` with random weights, without downloads.

    ``image_size`` replaces the side of its images in pixels.
    """
    options: dict[str, Any] = {}
    text = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
    kernel = text.pop(MIXER, None)
    if kernel is not None:
        options["text_cfg"] = text
    model = open_clip.create_model(
        name,
        load_weights=False,
        pretrained_text=False,
        force_image_size=image_size,
        force_preprocess_cfg=dict(preprocess or {}),
        **options,
    )
    if kernel is not None:
        blocks = model.text.transformer.resblocks
        first, last = (MixerBlock(model.text.width, kernel) for _ in range(2))
        model.text.transformer.resblocks = torch.nn.ModuleList([first, *blocks, last]).to(blocks[0].ln_1.weight.device)
    return model


def is_authors(keys: set[str]) -> bool:
    """Whether the names of weights are those of apple/ml-mobileclip's own models."""
    return any(key.startswith(_IMAGE) for key in keys)


def from_authors(state: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Rename the weights of apple/ml-mobileclip's own models, fused or not, to those of an open_clip model."""
    if any(key.startswith(f"{_IMAGE}patch_emb.") for key in state):
        return dict(convert_mobile_clip_state_dict(model, state, fastvit=False))
    fused = _RECOGNISED not in state
    # timm recognises only weights that are not fused, and has no names for two sorts of fused ones
    state = {re.sub(r"(network\.\d+)\.reparam_conv", r"\1.pe.reparam_conv", key): state[key] for key in state}
    state = {key.replace("lkb_reparam", "reparam_conv"): value for key, value in state.items()}
    renamed = convert_mobile_clip_state_dict(model, {_RECOGNISED: torch.empty(0), **state})
    if fused:
        del renamed["visual.trunk.stem.0.conv_kxk.0.conv.weight"]
    return {key.replace("pos_enc.reparam_conv", "reparam_conv"): value for key, value in renamed.items()}
