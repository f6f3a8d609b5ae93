"""The demo's models: three CLIP teachers and a CoCa captioner, small enough for one core, as open_clip folders.

They are random, from a seed, until trained weights exist: what they say means nothing, and all else of a run is real.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforce.errors import UserError

if TYPE_CHECKING:
    import torch

_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
_OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

#: Folder name -> open_clip config. Sizes, dimensions and preprocessing differ, as those of real teachers do.
MODELS: dict[str, dict[str, Any]] = {
    "vit-64": {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 96, "layers": 3, "head_width": 32},
            "text_cfg": _TEXT,
        },
        "preprocess_cfg": {"size": 64, **_OPENAI, "interpolation": "bicubic", "resize_mode": "shortest"},
    },
    "vit-96": {
        "model_cfg": {
            "embed_dim": 96,
            "vision_cfg": {"image_size": 96, "patch_size": 16, "width": 96, "layers": 2, "head_width": 32},
            "text_cfg": _TEXT,
        },
        "preprocess_cfg": {"size": 96, **_HALF, "interpolation": "bicubic", "resize_mode": "squash"},
    },
    "resnet-64": {
        "model_cfg": {
            "embed_dim": 48,
            "vision_cfg": {"image_size": 64, "patch_size": None, "width": 16, "layers": [1, 1, 1, 1]},
            "text_cfg": _TEXT,
        },
        "preprocess_cfg": {"size": 64, **_IMAGENET, "interpolation": "bilinear", "resize_mode": "shortest"},
    },
    "coca-64": {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {
                "image_size": 64,
                "patch_size": 16,
                "width": 96,
                "layers": 2,
                "head_width": 32,
                "attentional_pool": True,
                "attn_pooler_heads": 2,
                "output_tokens": True,
            },
            "text_cfg": {**_TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True},
            "multimodal_cfg": {**_TEXT, "context_length": 76, "attn_pooler_heads": 2},
            "custom_text": True,
        },
        "preprocess_cfg": {"size": 64, **_OPENAI, "interpolation": "bicubic", "resize_mode": "shortest"},
    },
}


def write_models(out: str | Path, seed: int = 0) -> list[Path]:
    """Write each of MODELS as ``out/NAME`` for open_clip's ``local-dir:`` and return the folders.

    Weights are stored as float16 safetensors (open_clip loads them as float32). Equal bytes for equal seeds. A folder
    that has its weights is left alone, trained ones included.
    """
    from safetensors.torch import save

    folders = []
    for name, config in MODELS.items():
        folder = Path(out) / name
        folders.append(folder)
        weights = folder / "open_clip_model.safetensors"
        if weights.exists():
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            state = build_model(name, seed).half().state_dict()
            part = weights.with_name(weights.name + ".part")
            part.write_bytes(save({key: tensor.contiguous() for key, tensor in state.items()}))
            part.replace(weights)
        except OSError as error:
            raise UserError(f"cannot write the demo's models to {folder}: {error}. Give another --out.") from error
    return folders


def build_model(name: str, seed: int = 0) -> torch.nn.Module:
    """One of MODELS with random float32 weights from ``seed``, on the CPU; the global generator is left as it was."""
    import open_clip
    import torch

    config = copy.deepcopy(MODELS[name]["model_cfg"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if "multimodal_cfg" in config:
            del config["custom_text"]
            model: torch.nn.Module = open_clip.CoCa(**config)
            # open_clip allocates the decoder's head without filling it. Logits of deviation 5 make few tokens likely,
            # as in a trained model: nearly uniform ones are slow to sample from, for the nucleus is most of them.
            projection = model.get_parameter("text_decoder.text_projection")
            torch.nn.init.normal_(projection, std=5 * projection.shape[0] ** -0.5)
        else:
            model = open_clip.CLIP(**config)
    return model
