"""What loader processes need and what takes seconds to import: their fork server imports it once."""

import importlib

from reinforce.processes.imports import no_garbage_collection

with no_garbage_collection():
    for module in ("reinforce.student.data.stream", "teachers.open_clip.text"):
        importlib.import_module(module)
