"""Tiny models of the classes that docs/teachers.md names, with random weights, in folders of their libraries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import transformers
from timm.models import eva, fastvit, register_model, save_for_hf, vision_transformer

from tests.helpers.models import tiny_models
from tests.helpers.models.tiny_models import SQUARE, TEXT, TOKENS, TOWER, VISION, save_transformers

SIDE = 32
_CLIP = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE)
_RADIO = transformers.CLIPImageProcessor(size=SQUARE, do_center_crop=False, do_normalize=False)


@register_model
def tiny_pe_core(pretrained: bool = False, **options: Any) -> Any:
    small = {"img_size": SIDE, "patch_size": 8, "ref_feat_shape": (4, 4), "embed_dim": 48, "depth": 1}
    return eva.vit_pe_core_tiny_patch16_384(pretrained, **small, **options)


@register_model
def tiny_mobileclip2(pretrained: bool = False, **options: Any) -> Any:
    return fastvit.fastvit_mci0(pretrained, layers=(1, 1, 1, 1), embed_dims=(16, 32, 64, 128), **options)


@register_model
def tiny_siglip2(pretrained: bool = False, **options: Any) -> Any:
    small = {"img_size": SIDE, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    return vision_transformer.vit_base_patch16_siglip_224(pretrained, **small, **options)


def open_clip_named(folder: Path, name: str) -> str:
    """Save a model with the config of open_clip's ``name``, whose towers are small."""
    config = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    text |= {"width": 48, "heads": 3, "layers": 1}
    if "timm_model_name" in vision:
        lower = name.lower().replace("-", "_")
        family = next(family for family in ("pe_core", "mobileclip2", "siglip2") if family in lower)
        vision |= {"timm_model_name": f"tiny_{family}", "image_size": SIDE}
    else:
        vision |= {"image_size": SIDE, "layers": 1, "width": 48, "head_width": 16, "patch_size": 8}
    config["embed_dim"] = 48
    if "hf_tokenizer_name" in text:  # open_clip takes the tokenizer of the folder
        text["vocab_size"] = 300
        tiny_models.tokenizer(folder, **{**TOKENS, "length": text["context_length"]})
    custom = config.pop("custom_text", False)
    build = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model = _default(build, config) if "MobileCLIP" in name else tiny_models.seeded(lambda: build(**config), 0)
    preprocessing = {"size": SIDE, "mean": 0.5, "std": 0.5, "interpolation": "bicubic", "resize_mode": "squash"}
    return tiny_models.save_open_clip(
        folder, {**config, **({"custom_text": True} if custom else {})}, preprocessing, model
    )


def _default(build: Any, config: dict[str, Any]) -> Any:
    """A model with the initial weights of its library: with larger ones, FastViT's output is the same for any image."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(**config).eval()


def siglip2(folder: Path) -> str:
    """A SigLIP 2 with a fixed size: the classes of SigLIP, with Gemma's tokenizer, which keeps capitals."""
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    processor = transformers.SiglipImageProcessor(size=SQUARE)
    save_transformers(folder, transformers.SiglipModel, config, processor)
    return _gemma_tokenizer(transformers.GemmaTokenizer, folder)


def naflex(folder: Path) -> str:
    vision = {**TOWER, "patch_size": 8, "num_patches": 16}
    config = transformers.Siglip2Config(text_config=TEXT, vision_config=vision)
    processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    save_transformers(folder, transformers.Siglip2Model, config, processor)
    return _gemma_tokenizer(transformers.Siglip2Tokenizer, folder)


def metaclip2(folder: Path) -> str:
    config = transformers.MetaClip2Config(text_config=TEXT, vision_config=VISION)
    return save_transformers(folder, transformers.MetaClip2Model, config, _CLIP, TOKENS)


def dinov3(folder: Path) -> str:
    config = transformers.DINOv3ViTConfig(**VISION, num_register_tokens=2)
    processor = transformers.DINOv3ViTImageProcessor(size=SQUARE)
    return save_transformers(folder, transformers.DINOv3ViTModel, config, processor)


def radio(folder: Path) -> str:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8, "max_img_size": 64}
    return save_transformers(folder, transformers.RadioModel, transformers.RadioConfig(**sizes), _RADIO)


def xlm_roberta(folder: Path) -> str:
    """A sentence encoder whose positions start after that of the padding token."""
    config = transformers.XLMRobertaConfig(**{**TEXT, "max_position_embeddings": 25})
    return save_transformers(folder, transformers.XLMRobertaModel, config, tokens={**TOKENS, "length": 512})


def _gemma_tokenizer(tokenizer: Any, folder: Path) -> str:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    units = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocabulary = {unit: index for index, unit in enumerate(units)}
    tokenizer(vocab=vocabulary, merges=[], model_max_length=24).save_pretrained(folder)
    return str(folder)


def timm_named(folder: Path, name: str) -> str:
    """Save a model of timm's architecture ``name``, which may have a tag, small; returns ``local-dir:FOLDER``."""
    small = {"img_size": 2 * SIDE, "embed_dim": 48, "depth": 1, "num_heads": 3}
    small["img_size"] -= small["img_size"] % (14 if "patch14" in name else 16)
    model = tiny_models.seeded(lambda: timm.create_model(name.partition(".")[0], **small), 0)
    save_for_hf(model, str(folder), model_args=small)
    return f"local-dir:{folder}"


#: Tiny models of transformers by the names on the page.
TRANSFORMERS: dict[str, Callable[[Path], str]] = {
    "google/siglip2-base-patch16-256": siglip2,
    "google/siglip2-base-patch16-naflex": naflex,
    "facebook/metaclip-2-worldwide-huge-quickgelu": metaclip2,
    "facebook/dinov2-base": tiny_models.transformers_dinov2,
    "facebook/dinov3-vitb16-pretrain-lvd1689m": dinov3,
    "nvidia/C-RADIOv4-H": radio,
    "sentence-transformers/all-MiniLM-L6-v2": tiny_models.transformers_bert,
    "intfloat/multilingual-e5-small": xlm_roberta,
    "BAAI/bge-small-en-v1.5": tiny_models.transformers_bert,
}
