"""The formats that a source can have, by the names that ``input.format`` takes.

The registry of formats: each is the object ``FORMAT`` of a module, a ``reinforce.source.formats.base.SourceFormat``.
Where a folder has files of several formats, the first of them is read.
"""

from __future__ import annotations

MODULES = {
    "tar": "reinforce.source.formats.tar",
    "parquet": "reinforce.source.formats.parquet",
    "jsonl": "reinforce.source.formats.jsonl",
    "csv": "reinforce.source.formats.csv",
    "coco": "reinforce.source.formats.coco",
    "folder": "reinforce.source.formats.folder",
    "dataset": "reinforce.source.formats.dataset",
}
#: What a source is read as if nothing of it is recognised, which reports what its files are instead.
DEFAULT = "tar"
#: What a source can be, for messages.
SOURCES = "tars, Parquet, jsonl or csv files, COCO's captions, a folder of these or of images, or a reinforced dataset"
