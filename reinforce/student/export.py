"""Trained models as folders that plain open_clip loads, by the name ``local-dir:FOLDER``."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from safetensors.torch import save_file

from reinforce.student.model import Student, tokenizer_of

_log = logging.getLogger(__name__)


def export(student: Student, folder: str) -> None:
    """Write the student without its heads; the logit scale is that of ``student``."""
    tower = student.config["text_cfg"].get("hf_model_name")
    if tower is not None and Path(tower).is_dir():
        _log.warning("%s needs the folder %s, where the architecture of its text tower stands", folder, tower)
    write_open_clip(student.clip, student.config, tokenizer_of(student), folder)


def write_open_clip(clip: Any, config: Mapping[str, Any], tokenizer: Any, folder: str) -> None:
    """Write weights in float32, ``model_cfg`` with ``preprocess_cfg`` and, of a Hugging Face tokenizer, its files."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    # clones, since safetensors refuses tied weights, which some text towers have
    state = {name: value.detach().cpu().clone() for name, value in clip.state_dict().items()}
    save_file({name: value.contiguous() for name, value in state.items()}, target / HF_SAFE_WEIGHTS_NAME)
    whole = {"model_cfg": config, "preprocess_cfg": open_clip.get_model_preprocess_cfg(clip)}
    (target / HF_CONFIG_NAME).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
