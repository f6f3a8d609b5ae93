"""Export of trained students to folders that plain open_clip loads as ``local-dir:FOLDER``."""

from __future__ import annotations

import logging
from pathlib import Path

from reinforce.student.model import Student, load_tokenizer
from teachers.open_clip.export import write_open_clip
from teachers.open_clip.released import MIXER

_LOG = logging.getLogger(__name__)


def export(student: Student, folder: str) -> None:
    """Write the open_clip model, its config and its tokenizer, without the student's heads and learnt scales."""
    text_tower = student.config["text_cfg"].get("hf_model_name")
    if text_tower is not None and Path(text_tower).is_dir():
        _LOG.warning("%s needs the folder %s, which holds the architecture of its text tower", folder, text_tower)
    if MIXER in student.config["text_cfg"]:
        _LOG.warning("plain open_clip cannot load %s: it has no such text tower; commands of reinforce can", folder)
    write_open_clip(student.clip, student.config, load_tokenizer(student), folder)
