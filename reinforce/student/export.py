"""Trained students as folders that plain open_clip loads, by the name ``local-dir:FOLDER``."""

from __future__ import annotations

import logging
from pathlib import Path

from reinforce.student.model import Student, tokenizer_of
from teachers.export import write_open_clip

_log = logging.getLogger(__name__)


def export(student: Student, folder: str) -> None:
    """Write the student without its heads; the logit scale is that of ``student``."""
    tower = student.config["text_cfg"].get("hf_model_name")
    if tower is not None and Path(tower).is_dir():
        _log.warning("%s needs the folder %s, where the architecture of its text tower stands", folder, tower)
    write_open_clip(student.clip, student.config, tokenizer_of(student), folder)
