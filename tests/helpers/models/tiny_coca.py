"""A tiny CoCa with seeded random weights, and the demo's captioner, which is small and trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file

from teachers.coca.captioner import CocaCaptioner
from teachers.runtime.accelerator import Accelerator
from tests.helpers.pages import ROOT
from tests.helpers.specs import captioner_spec

IMAGE_SIZE = 32
END = 49407


def coca_config(**text: Any) -> dict[str, Any]:
    """open_clip_config.json of the tiny CoCa. ``text`` has further keys of its text tower."""
    text_cfg = {"context_length": 76, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, "embed_cls": True}
    return {
        "model_cfg": {
            "embed_dim": 16,
            "vision_cfg": {
                "image_size": IMAGE_SIZE,
                "layers": 1,
                "width": 16,
                "head_width": 8,
                "patch_size": 8,
                "attentional_pool": True,
                "attn_pooler_heads": 2,
                "output_tokens": True,
            },
            "text_cfg": {**text_cfg, "output_tokens": True, **text},
            "multimodal_cfg": {
                "context_length": 76,
                "vocab_size": text.get("vocab_size", 49408),
                "width": 16,
                "heads": 2,
                "layers": 2,
                "attn_pooler_heads": 2,
            },
            "custom_text": True,
        },
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"},
    }


def coca_model(folder: Path | str, seed: int = 0, **text: Any) -> str:
    """Save a tiny CoCa to ``folder`` -> its ``local-dir:`` name. Its captions differ between images."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(coca_config(**text)), encoding="utf-8")
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    # open_clip does not initialize the decoder's projection. These weights give distributions as peaked as a trained
    # model's, with a bias to the end token, so that lengths differ.
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name, value in state.items():
        if value.is_floating_point() and value.ndim:
            scale = 2.0 if name == "text_decoder.text_projection" else 0.4
            state[name] = torch.randn(value.shape, generator=generator) * scale
    tilt = torch.nn.functional.normalize(state["text_decoder.ln_final.bias"], dim=0)
    state["text_decoder.text_projection"][:, END : END + 1] += 8 * tilt[:, None]
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


MODEL = f"local-dir:{ROOT / 'configs' / 'demo-models' / 'coca-64'}"


def build(device: str, **options: Any) -> CocaCaptioner:
    spec = captioner_spec(**{"model": MODEL, "captions": 3, "max_length": 16, **options})
    return CocaCaptioner(spec, Accelerator(device, options.get("precision", "fp32")))


def batch(captioner: CocaCaptioner, count: int) -> tuple[torch.Tensor, np.ndarray]:
    """Pixels on the device of a captioner, and seeds."""
    pixels = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(pixels, (64, 64))
    seeds = np.arange(count * captioner.captions, dtype=np.uint64).reshape(count, captioner.captions)
    return captioner._accelerator.put(pixels), seeds
