"""Slow imports of loader processes, which their fork server imports once."""

import importlib

from reinforce.processes.imports import no_garbage_collection

with no_garbage_collection():
    for module in ("reinforce.student.data.stream", "teachers.open_clip.text"):
        importlib.import_module(module)
