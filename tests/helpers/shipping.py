"""Small models to export: a ViT, and a FastViT with batch statistics, in folders that open_clip loads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from timm.models.fastvit import FastVit, RepConditionalPosEnc
from timm.models.vision_transformer import VisionTransformer

from tests.helpers.models.tiny_models import MEAN, PREPROCESS, STD, open_clip_config, save_open_clip, seeded

CONTEXT = 16
#: ``vision_cfg`` of a model with ``tiny_fastvit``.
FASTVIT = {
    "timm_model_name": "tiny_fastvit", "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": None,
}  # fmt: skip


@timm.models.register_model
def tiny_fastvit(pretrained: bool = False, **options: Any) -> FastVit:
    """One block of each kind in the image tower of MobileCLIP2-S0."""
    model = FastVit(
        layers=(1, 1),
        embed_dims=(16, 32),
        mlp_ratios=(3, 3),
        downsamples=(False, True),
        se_downsamples=(False, True),
        pos_embs=(None, partial(RepConditionalPosEnc, spatial_shape=(7, 7))),
        token_mixers=("repmixer", "attention"),
        lkc_use_act=True,
        num_classes=options["num_classes"],
    )
    model.default_cfg = {"pool_size": (8, 8)}
    return model


@timm.models.register_model
def tiny_timm_vit(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """A ViT of timm, as in the image tower of MobileCLIP2-B."""
    given = {name: options[name] for name in ("num_classes", "global_pool", "img_size") if name in options}
    model = VisionTransformer(**{"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, **given})
    model.default_cfg = {}
    return model


def timm_vit(folder: Path, proj: str | None = None, **text: Any) -> str:
    """Write a ViT of timm, whose classifier with a bias is the projection unless ``proj`` names another."""
    config = open_clip_config(context_length=CONTEXT, layers=1, **text)
    config["vision_cfg"] = {
        "timm_model_name": "tiny_timm_vit", "timm_pool": "token", "timm_proj": proj, "image_size": 32,
    }  # fmt: skip
    model = seeded(lambda: open_clip.CustomTextCLIP(**config), 3)
    return save_open_clip(folder, {**config, "custom_text": True}, {"size": 32, **PREPROCESS}, model)


def vit(folder: Path) -> str:
    """Write a small ViT with one layer a tower, since each takes a second to export."""
    config = open_clip_config(context_length=CONTEXT, layers=1)
    config["vision_cfg"]["layers"] = 1
    return save_open_clip(folder, config, {"size": 32, **PREPROCESS}, seeded(lambda: open_clip.CLIP(**config), 2))


def fastvit(folder: Path, weights: bool = True, size: tuple[int, int] = (96, 64), causal: bool = False) -> str:
    """Write a FastViT whose images, portraits by default, are squashed, and a text tower without causal mask."""
    config = open_clip_config(context_length=CONTEXT, no_causal_mask=not causal, layers=1)
    config["vision_cfg"] = {**FASTVIT, "image_size": [*size]}
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bilinear", "resize_mode": "squash", "size": [*size]}
    model = _with_statistics(lambda: open_clip.CustomTextCLIP(**config), size) if weights else None
    return save_open_clip(folder, {**config, "custom_text": True}, preprocess, model)


def resnet(folder: Path) -> str:
    """Write a ResNet, in whose attention pooling keys and values are products of one input."""
    config = open_clip_config(context_length=CONTEXT)
    config["vision_cfg"] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return save_open_clip(folder, config, {"mean": MEAN, "std": STD, "size": 32}, open_clip.CLIP(**config))


def mobileclip2_s0() -> Any:
    """MobileCLIP2-S0 with random weights."""
    return _with_statistics(lambda: open_clip.create_model("MobileCLIP2-S0", load_weights=False), (256, 256), 1)


def _with_statistics(build: Callable[[], Any], size: tuple[int, int], passes: int = 10) -> Any:
    """Weights that give different images different embeddings, and batch statistics as after training."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model = build().train()
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):  # layer scale, which is initialized near zero
                torch.nn.init.uniform_(parameter, 0.5, 1.0)
        if passes == 1:
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = None  # the statistics are those of the batch
        for _ in range(passes):
            images = torch.nn.functional.interpolate(torch.randn(8, 3, 4, 4), size, mode="bicubic")
            model.encode_image(images)
    return model.eval()
