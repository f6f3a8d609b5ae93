"""Adds the configs of released models to open_clip's when it is imported, so that open_clip knows them by name."""

from __future__ import annotations

import open_clip

from teachers.open_clip.released import CONFIGS

for _file in sorted(CONFIGS.glob("*.json")):
    if _file.stem not in open_clip.list_models():
        open_clip.add_model_config(_file)
