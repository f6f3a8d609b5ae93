"""A trained student as a folder that plain open_clip loads, by the name ``local-dir:FOLDER``."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from safetensors.torch import save_file

from reinforce.student.model import Student, tokenizer_of


def export(student: Student, folder: str) -> None:
    """Write weights, ``model_cfg`` with ``preprocess_cfg`` and, of a Hugging Face tokenizer, its files.

    Heads stay behind. The weights are those of ``student``, logit scale included, in float32.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    # clones, since safetensors refuses tied weights, which some text towers have
    state = {name: value.detach().cpu().clone() for name, value in student.clip.state_dict().items()}
    save_file({name: value.contiguous() for name, value in state.items()}, target / HF_SAFE_WEIGHTS_NAME)
    config = {"model_cfg": student.config, "preprocess_cfg": open_clip.get_model_preprocess_cfg(student.clip)}
    (target / HF_CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = tokenizer_of(student)
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
