"""Models of open_clip: built without weights, published weights in the layout of their authors, and exported folders.

The convolutional blocks in the text tower of MobileCLIP-S0 are here, too, since open_clip does not have them.
Parameters have the names and shapes of the published weights. Source: ``mobileclip/modules/text/repmixer.py`` of
apple/ml-mobileclip, and FastViT (arXiv 2303.14189).
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from teachers.open_clip import catalog
from teachers.open_clip.released import CONFIGS, MIXER

_START_SCALE = 1e-5


class MixerBlock(nn.Module):
    """Mixes neighbouring tokens [B, L, D] by depthwise convolutions, then channels; a block of open_clip's tower."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.token_mixer = _TokenMixer(dim, kernel)
        self.convffn = _ChannelMixer(dim, kernel)
        self.layer_scale = nn.Parameter(torch.full((dim, 1, 1), _START_SCALE))

    def forward(
        self, x: torch.Tensor, k_x: None = None, v_x: None = None, attn_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Arguments are those of open_clip's blocks; the mask is not used."""
        mixed = self.token_mixer(x.transpose(1, 2).unsqueeze(2))  # [B, D, 1, L]
        mixed = mixed + self.layer_scale * self.convffn(mixed)
        return mixed.squeeze(2).transpose(1, 2)

    def get_weight_dtype(self) -> torch.dtype:
        return self.convffn.fc1.weight.dtype


class _TokenMixer(nn.Module):
    """x + scale * (mixer(x) - norm(x)), or the one convolution that equals it in evaluation."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.ModuleDict({"rbr_skip": nn.BatchNorm2d(dim)})
        branch = nn.Sequential(OrderedDict(conv=_depthwise(dim, kernel, bias=False), bn=nn.BatchNorm2d(dim)))
        self.mixer = nn.ModuleDict({"rbr_skip": nn.BatchNorm2d(dim), "rbr_conv": nn.ModuleList([branch])})
        self.layer_scale = nn.Parameter(torch.full((dim, 1, 1), _START_SCALE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "reparam_conv"):
            fused: torch.Tensor = self.reparam_conv(x)
            return fused
        mixed = self.mixer["rbr_skip"](x) + self.mixer["rbr_conv"][0](x)  # type: ignore[index]
        return x + self.layer_scale * (mixed - self.norm["rbr_skip"](x))

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fuse the branches into one convolution; timm's ``reparameterize_model`` calls it."""
        if hasattr(self, "reparam_conv"):
            return
        conv, norm = self.mixer["rbr_conv"][0]  # type: ignore[index]
        dim, _, _, kernel = conv.weight.shape
        gain, shift = _affine(norm)
        weight, bias = conv.weight * gain.reshape(-1, 1, 1, 1), shift
        for bn, sign in ((self.mixer["rbr_skip"], 1), (self.norm["rbr_skip"], -1)):
            gain, shift = _affine(bn)
            weight[..., kernel // 2] += sign * gain.reshape(-1, 1, 1)
            bias = bias + sign * shift
        weight = weight * self.layer_scale.unsqueeze(-1)
        weight[..., kernel // 2] += 1
        fused = _depthwise(dim, kernel, bias=True)
        fused.weight.copy_(weight)
        fused.bias.copy_(bias * self.layer_scale.flatten())  # type: ignore[union-attr]
        del self.norm, self.mixer, self.layer_scale
        self.reparam_conv = fused


class _ChannelMixer(nn.Module):
    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        depthwise = _depthwise(dim, kernel, bias=False)
        self.conv = nn.Sequential(OrderedDict(conv=depthwise, bn=nn.BatchNorm2d(dim)))
        self.fc1 = nn.Conv2d(dim, 4 * dim, 1)
        self.fc2 = nn.Conv2d(4 * dim, dim, 1)
        for convolution in (depthwise, self.fc1, self.fc2):
            nn.init.trunc_normal_(convolution.weight, std=0.02)
        nn.init.zeros_(self.fc1.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.fc2.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(nn.functional.gelu(self.fc1(self.conv(x))))
        return out


def _depthwise(dim: int, kernel: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, (1, kernel), padding=(0, kernel // 2), groups=dim, bias=bias)


def _affine(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The gain and shift [D] of a batch normalisation in evaluation."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    assert norm.running_mean is not None
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    return gain, norm.bias - norm.running_mean * gain


# The configs of released models are added to open_clip's when this is imported, so that open_clip finds them by name.

#: In the names of weights of a FastViT (MobileCLIP) whose training branches are fused.
FUSED = ".reparam_conv."
#: With which the names of the image weights of apple/ml-mobileclip's own models begin.
AUTHORS = "image_encoder.model."
_RECOGNISED = f"{AUTHORS}patch_embed.0.rbr_conv.0.conv.weight"

for _file in sorted(CONFIGS.glob("*.json")):
    if _file.stem not in open_clip.list_models():
        open_clip.add_model_config(_file)


def build(
    name: str,
    preprocess: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    language_model: bool = False,
) -> Any:
    """Build an architecture by open_clip's name or ``local-dir:PATH`` with random weights, without downloads.

    ``image_size`` replaces the side of its images in pixels. With ``language_model``, a text tower of transformers gets
    the weights of its language model, which may be downloaded.
    """
    options: dict[str, Any] = {}
    config = open_clip.get_model_config(name) or {}
    text = config.get("text_cfg", {})
    kernel = text.pop(MIXER, None)
    if kernel is not None:
        options["text_cfg"] = text
    if text.get("hf_model_name") == catalog.OWN_FOLDER:
        own = str(catalog.local_folder(name))
        options["text_cfg"] = {**text, "hf_model_name": own, "hf_model_pretrained": False}
    model = open_clip.create_model(
        name,
        load_weights=False,
        pretrained_text=language_model,
        force_image_size=image_size,
        force_preprocess_cfg=dict(preprocess or {}),
        **options,
    )
    if kernel is not None:
        blocks = model.text.transformer.resblocks
        first, last = (MixerBlock(model.text.width, kernel) for _ in range(2))
        model.text.transformer.resblocks = torch.nn.ModuleList([first, *blocks, last]).to(blocks[0].ln_1.weight.device)
    return model


def from_authors(state: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Rename the weights of apple/ml-mobileclip's own models, fused or not, to those of an open_clip model."""
    from open_clip.convert import convert_mobile_clip_state_dict

    if any(key.startswith(f"{AUTHORS}patch_emb.") for key in state):
        return dict(convert_mobile_clip_state_dict(model, state, fastvit=False))
    fused = _RECOGNISED not in state
    # timm recognises only weights that are not fused, and has no names for two sorts of fused ones
    state = {re.sub(r"(network\.\d+)\.reparam_conv", r"\1.pe.reparam_conv", key): state[key] for key in state}
    state = {key.replace("lkb_reparam", "reparam_conv"): value for key, value in state.items()}
    renamed = convert_mobile_clip_state_dict(model, {_RECOGNISED: torch.empty(0), **state})
    if fused:
        del renamed["visual.trunk.stem.0.conv_kxk.0.conv.weight"]
    return {key.replace("pos_enc.reparam_conv", "reparam_conv"): value for key, value in renamed.items()}


def write_open_clip(clip: Any, config: Mapping[str, Any], tokenizer: Any, folder: str) -> None:
    """Write float32 weights, ``model_cfg`` and ``preprocess_cfg``, and the files of a Hugging Face tokenizer.

    A tokenizer that was in a local folder is named as ``OWN_FOLDER``, so that the folder can be moved.
    """
    target, text = Path(folder), config["text_cfg"]
    if hasattr(tokenizer, "save_pretrained") and catalog.is_place(str(text.get("hf_tokenizer_name"))):
        config = {**config, "text_cfg": {**text, "hf_tokenizer_name": catalog.OWN_FOLDER}}
    target.mkdir(parents=True, exist_ok=True)
    # cloned, since safetensors refuses tied weights, which some text towers have
    state = {name: value.detach().cpu().clone() for name, value in clip.state_dict().items()}
    save_file({name: value.contiguous() for name, value in state.items()}, target / HF_SAFE_WEIGHTS_NAME)
    configs = {"model_cfg": config, "preprocess_cfg": open_clip.get_model_preprocess_cfg(clip)}
    (target / HF_CONFIG_NAME).write_text(json.dumps(configs, indent=2) + "\n", encoding="utf-8")
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
