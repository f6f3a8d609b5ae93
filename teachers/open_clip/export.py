"""Export of models as folders that open_clip loads by the name ``local-dir:FOLDER``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from safetensors.torch import save_file


def write_open_clip(clip: Any, config: Mapping[str, Any], tokenizer: Any, folder: str) -> None:
    """Write float32 weights, ``model_cfg`` and ``preprocess_cfg``, and the files of a Hugging Face tokenizer."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    # cloned, since safetensors refuses tied weights, which some text towers have
    state = {name: value.detach().cpu().clone() for name, value in clip.state_dict().items()}
    save_file({name: value.contiguous() for name, value in state.items()}, target / HF_SAFE_WEIGHTS_NAME)
    configs = {"model_cfg": config, "preprocess_cfg": open_clip.get_model_preprocess_cfg(clip)}
    (target / HF_CONFIG_NAME).write_text(json.dumps(configs, indent=2) + "\n", encoding="utf-8")
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
